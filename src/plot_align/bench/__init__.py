"""What the term costs on a machine: the head alone, whole training steps, their floor, a profile."""

from __future__ import annotations

from plot_align.bench.head import HeadProblem
from plot_align.bench.machine import Machine, measure_machine
from plot_align.bench.ratios import compare, mixed, paired
from plot_align.bench.roofline import HeadWork
from plot_align.bench.shapes import SHAPES, Shape
from plot_align.bench.step import StepProblem

__all__ = [
    "SHAPES",
    "HeadProblem",
    "HeadWork",
    "Machine",
    "Shape",
    "StepProblem",
    "compare",
    "measure_machine",
    "mixed",
    "paired",
]
