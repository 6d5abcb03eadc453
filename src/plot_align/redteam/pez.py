"""PEZ: hard prompts made easy (Wen et al., arXiv 2302.03668).

A suffix of free embeddings is optimised. The forward pass sees the token nearest to each by cosine similarity, and the
gradient found there is applied to the free embedding (straight-through).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from plot_align.errors import InputError
from plot_align.redteam.attack import Attack, Attacked, OnStep, Request, require_counts
from plot_align.redteam.objective import TargetObjective, best_of_each
from plot_align.redteam.victim import Victim


@dataclass(frozen=True)
class PEZ(Attack):
    """Options, HarmBench's defaults.

    Args:
        steps: updates of Adam.
        learning_rate: its rate, falling to zero by a cosine.
        suffix_tokens: length of the suffix.
        non_ascii: allow tokens with other characters than printable ASCII.
    """

    steps: int = 500
    learning_rate: float = 0.01
    suffix_tokens: int = 20
    non_ascii: bool = False

    name: ClassVar[str] = "PEZ"
    default_cases: ClassVar[int] = 5
    needs_target: ClassVar[bool] = True
    white_box: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_counts(self, "steps", "suffix_tokens")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate is {self.learning_rate}; expected a positive number.")

    def run(self, victim: Victim, request: Request, on_step: OnStep = lambda step: None) -> Attacked:
        """Attack one request; its cases are optimised side by side and start from random tokens of their own."""
        vocabulary = victim.vocabulary(non_ascii=self.non_ascii)
        objective = TargetObjective(victim, request.behavior, request.target, self.suffix_tokens, vocabulary)
        generator = request.generator("cpu", self.name)
        table = objective.embedding_table.float()  # (V, H)
        start = objective.random_suffixes(request.cases, generator)  # (C, L)
        free = table[start].clone().requires_grad_()  # (C, L, H)
        optimizer = torch.optim.Adam([free], lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)

        tokens = objective.nearest(free.detach())  # (C, L)

        def update(step: int) -> Tensor:
            nonlocal tokens
            seen = straight_through(free, table[tokens])  # (C, L, H)
            losses = objective.soft_losses(seen)  # (C,)
            (free.grad,) = torch.autograd.grad(losses.sum(), free)
            optimizer.step()
            schedule.step()
            tokens = objective.nearest(free.detach())
            return tokens

        return best_of_each(objective, start, update, self.steps, request, on_step)


def straight_through(free: Tensor, seen: Tensor) -> Tensor:
    """The value of ``seen`` with the gradient passed on to ``free``; both (C, L, H)."""
    return free + (seen - free).detach()
