"""Direct request: the behaviour as it is, the baseline that every attack must beat (HarmBench's DirectRequest)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from plot_align.redteam.attack import Attack, Attacked, OnStep, Request
from plot_align.redteam.victim import Victim


@dataclass(frozen=True)
class DirectRequest(Attack):
    """No options. One test case, however many are requested: more would be the same."""

    name: ClassVar[str] = "DirectRequest"
    default_cases: ClassVar[int] = 1
    needs_target: ClassVar[bool] = False
    white_box: ClassVar[bool] = False
    steps: ClassVar[int] = 0

    def run(self, victim: Victim, request: Request, on_step: OnStep = lambda step: None) -> Attacked:
        """The behaviour, its context first."""
        return Attacked([request.behavior.prompt])
