"""One page from many records: what was measured, which differences are sure, and how each number was made."""

from plot_align.report.observations import collect
from plot_align.report.runs import attack_curves

__all__ = ["attack_curves", "collect"]
