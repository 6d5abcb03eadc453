"""The cost of the term on the user's machine: interleaved timings of whole training steps, and a profile of one."""

from plot_align.bench.baseline import without_plot
from plot_align.bench.ratios import compare, mixed, paired, paired_ratio
from plot_align.bench.step import StepProblem, measured_share
from plot_align.bench.timing import Arm, Samples, interleaved

__all__ = [
    "Arm",
    "Samples",
    "StepProblem",
    "compare",
    "interleaved",
    "measured_share",
    "mixed",
    "paired",
    "paired_ratio",
    "without_plot",
]
