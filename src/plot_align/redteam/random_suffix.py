"""Random suffixes: the baseline that an optimised attack must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from plot_align.redteam.attack import Attack, Attacked, OnStep, Request, require_counts
from plot_align.redteam.objective import TargetObjective
from plot_align.redteam.victim import Victim


@dataclass(frozen=True)
class RandomSuffix(Attack):
    """Suffixes of tokens drawn evenly from those that the optimised attacks may use.

    Args:
        suffix_tokens: length of the suffix.
        non_ascii: allow tokens with other characters than printable ASCII.
    """

    suffix_tokens: int = 20
    non_ascii: bool = False

    name: ClassVar[str] = "RandomSuffix"
    default_cases: ClassVar[int] = 1
    needs_target: ClassVar[bool] = True  # to compare its loss with the optimised ones
    white_box: ClassVar[bool] = True
    steps: ClassVar[int] = 0

    def __post_init__(self) -> None:
        require_counts(self, "suffix_tokens")

    def run(self, victim: Victim, request: Request, on_step: OnStep = lambda step: None) -> Attacked:
        """Draw one suffix per case."""
        vocabulary = victim.vocabulary(non_ascii=self.non_ascii)
        objective = TargetObjective(victim, request.behavior, request.target, self.suffix_tokens, vocabulary)
        suffixes = objective.random_suffixes(request.cases, request.generator("cpu", self.name))  # (C, L)
        losses = objective.losses(suffixes)  # (C,)
        return Attacked(objective.test_cases(suffixes), losses.tolist(), [float(losses.mean())])
