"""Best of N: the plain request, answered N times by sampling; broken where any answer complies.

Anyone can ask again. J. Hughes et al. (arXiv 2412.03556) use the name where each sample has an altered prompt; here
the prompt stays as it is, which is their baseline. HarmBench has no such method, so the folder's name is ours.
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

    A sample is drawn from the seed, the behaviour's id and its own number alone, so more samples go on from fewer.

    Args:
        n: samples a behaviour.
        temperature: of the sampling.

    Raises:
        InputError: ``n`` is below 1, or ``temperature`` is no number above 0.
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
    def identity(self) -> dict[str, Any]:
        return {"temperature": self.temperature}  # not n: the answers that are there are the first of any number

    def run(self, victim: Victim, request: Request, on_step: OnStep = lambda step: None) -> Attacked:
        """The behaviour, its context first; one case, whatever is asked for, as its answers differ already."""
        return Attacked([request.behavior.prompt])

    def answering(
        self, victim: Victim, behaviors: Sequence[Behavior], targets: Mapping[str, str], seed: int
    ) -> Answering:
        return Answering(samples=self.n, temperature=self.temperature, seed=seed)
