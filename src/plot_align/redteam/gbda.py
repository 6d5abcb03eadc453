"""GBDA: gradient-based distributional attack (Guo et al., arXiv 2104.13733).

A suffix is a distribution over tokens at each place, softmax(θ / τ) of θ plus Gumbel noise; θ is optimised through the
expected embedding while τ falls, and the result is the most likely token at each place.

Our reading in three points: θ starts at 12 for random tokens (the authors start at the text to be changed), ``noise``
scales the Gumbel noise of every update, and the best tokens ever seen are returned. Ports of HarmBench start at small
random θ with full noise, let the learning rate fall by a cosine, and return the last.
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

START = 12.0  # θ at the initial tokens, 0 elsewhere, as in the authors' code


@dataclass(frozen=True)
class GBDA(Attack):
    """Options, HarmBench's defaults.

    Args:
        steps: updates of Adam.
        learning_rate: its rate.
        noise: scale of the Gumbel noise.
        suffix_tokens: length of the suffix.
        non_ascii: allow tokens with other characters than printable ASCII.
    """

    steps: int = 500
    learning_rate: float = 0.2
    noise: float = 0.2
    suffix_tokens: int = 20
    non_ascii: bool = False

    name: ClassVar[str] = "GBDA"
    default_cases: ClassVar[int] = 5
    needs_target: ClassVar[bool] = True
    white_box: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_counts(self, "steps", "suffix_tokens")
        if not (0 < self.learning_rate < math.inf and 0 <= self.noise < math.inf):
            raise InputError(
                f"learning_rate is {self.learning_rate} and noise {self.noise}; expected a positive rate and a noise "
                "of 0 or more."
            )

    def run(self, victim: Victim, request: Request, on_step: OnStep = lambda step: None) -> Attacked:
        """Attack one request; its cases are optimised side by side and start from random tokens of their own."""
        vocabulary = victim.vocabulary(non_ascii=self.non_ascii)
        objective = TargetObjective(victim, request.behavior, request.target, self.suffix_tokens, vocabulary)
        generator = request.generator("cpu", self.name)
        table = objective.embedding_table.float()  # (V, H)
        start = objective.random_suffixes(request.cases, generator)  # (C, L)
        barred = ~objective.allowed_by_place()  # (L, V)
        theta = torch.zeros(*start.shape, len(table), device=victim.device)  # (C, L, V)
        theta.scatter_(-1, start[..., None], START).requires_grad_()
        optimizer = torch.optim.Adam([theta], lr=self.learning_rate)

        def update(step: int) -> Tensor:
            noise = -torch.empty(theta.shape).exponential_(generator=generator).log().to(theta)  # Gumbel(0, 1)
            logits = (theta + self.noise * noise).masked_fill(barred, -torch.inf)
            weights = (logits / temperature(step, self.steps)).softmax(-1)  # (C, L, V)
            losses = objective.soft_losses(weights @ table)  # (C,)
            (theta.grad,) = torch.autograd.grad(losses.sum(), theta)
            optimizer.step()
            return theta.detach().masked_fill(barred, -torch.inf).argmax(-1)  # (C, L)

        return best_of_each(objective, start, update, self.steps, request, on_step)


def temperature(step: int, steps: int) -> float:
    """τ of the Gumbel-softmax in update ``step`` of 1 … ``steps``: from 1 to 0.1 in a line."""
    return 1.0 if steps == 1 else 1.0 - 0.9 * (step - 1) / (steps - 1)
