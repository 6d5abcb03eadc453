"""Best of N: the plain request, answered N times by sampling. One complying answer breaks the behaviour.

J. Hughes et al. (arXiv 2412.03556) alter the prompt for each sample; here it stays as it is, which is their baseline.
HarmBench has no such method, so the folder's name is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from plot_align.errors import InputError
from plot_align.redteam.attack import Answering, Attack, Attacked, OnStep, Request, require_counts
from plot_align.redteam.behaviors import Behavior
from plot_align.redteam.victim import Victim


@dataclass(frozen=True)
class BestOfN(Attack):
    """The plain request, sampled ``n`` times; each answer is a row of HarmBench's completions.

    A sample depends only on the seed, the behaviour's id and its own number, so a run with more samples extends one
    with fewer.

    Args:
        n: samples a behaviour.
        temperature: of the sampling.

    Raises:
        InputError: ``n`` is below 1, or ``temperature`` is not above 0.
    """

    n: int = 16
    temperature: float = 1.0

    name: ClassVar[str] = "BestOfN"
    default_cases: ClassVar[int] = 1
    needs_target: ClassVar[bool] = False
    white_box: ClassVar[bool] = False
    any_answer: ClassVar[bool] = True
    steps: ClassVar[int] = 0

    def __post_init__(self) -> None:
        require_counts(self, "n")
        if not 0 < self.temperature < math.inf:
            raise InputError(
                f"temperature is {self.temperature}; expected a number above 0, as greedy answers are all the same."
            )

    @property
    def title(self) -> str:
        return f"{self.name} (any of {self.n})"

    @property
    def on_answer(self) -> bool:
        return True

    @property
    def identity(self) -> dict[str, Any]:
        return {"temperature": self.temperature}  # not n: existing answers are the first of any larger number

    def run(self, victim: Victim, request: Request, on_step: OnStep = lambda step: None) -> Attacked:
        """One case, the behaviour after its context, however many are requested: its answers already differ."""
        return Attacked([request.behavior.prompt])

    def answering(
        self, victim: Victim, behaviors: Sequence[Behavior], targets: Mapping[str, str], seed: int
    ) -> Answering:
        return Answering(samples=self.n, temperature=self.temperature, seed=seed)
