"""UAT: universal adversarial triggers (Wallace et al., arXiv 1908.07125), for one request at a time as in HarmBench.

A step goes through the suffix from left to right. At each place the tokens with the most negative first-order change
(HotFlip) are tried, and one is kept only if the loss falls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from plot_align.redteam.attack import Attack, Attacked, OnStep, Request, require_counts
from plot_align.redteam.gcg import promising_tokens
from plot_align.redteam.objective import TargetObjective, best_of_each
from plot_align.redteam.victim import Victim


@dataclass(frozen=True)
class UAT(Attack):
    """Options, HarmBench's defaults.

    Args:
        steps: passes over the suffix.
        candidates: tokens tried at a place.
        suffix_tokens: length of the suffix.
        non_ascii: allow tokens with other characters than printable ASCII.
    """

    steps: int = 100
    candidates: int = 3
    suffix_tokens: int = 20
    non_ascii: bool = False

    name: ClassVar[str] = "UAT"
    default_cases: ClassVar[int] = 1
    needs_target: ClassVar[bool] = True
    white_box: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_counts(self, "steps", "candidates", "suffix_tokens")

    def run(self, victim: Victim, request: Request, on_step: OnStep = lambda step: None) -> Attacked:
        """Attack one request; the first case starts from the filler, the others from random tokens."""
        vocabulary = victim.vocabulary(non_ascii=self.non_ascii)
        objective = TargetObjective(victim, request.behavior, request.target, self.suffix_tokens, vocabulary)
        start = objective.random_suffixes(request.cases, request.generator("cpu", self.name))  # (C, L)
        start[0] = objective.initial
        current = start.clone()

        def update(step: int) -> Tensor:
            for case in range(len(current)):
                current[case] = self.one_pass(objective, current[case])
            return current.clone()

        return best_of_each(objective, start, update, self.steps, request, on_step)

    def one_pass(self, objective: TargetObjective, suffix: Tensor) -> Tensor:
        """One pass over the places of a suffix (L,), left to right; its loss never rises."""
        suffix = suffix.clone()
        for place in range(len(suffix)):
            loss, gradient = objective.gradient(suffix)
            tokens = promising_tokens(gradient, objective.allowed_by_place(), self.candidates)
            tried = suffix.repeat(tokens.size(1), 1)  # (K, L)
            tried[:, place] = tokens[place]
            losses = objective.losses(tried)  # (K,)
            if float(losses.min()) < loss:
                suffix = tried[losses.argmin()]
        return suffix
