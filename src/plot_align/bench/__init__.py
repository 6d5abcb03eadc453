"""What the term costs on a machine: the head alone, whole training steps, their floor, a profile."""

from __future__ import annotations

from .head import HeadProblem
from .machine import Machine, measure_machine
from .ratios import compare, mixed, paired
from .roofline import HeadWork
from .shapes import SHAPES, Shape
from .step import StepProblem

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
