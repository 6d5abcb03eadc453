"""GCG: greedy coordinate gradient (Zou et al., arXiv 2307.15043).

A step takes the gradient of the loss with respect to the one-hot tokens, draws candidates that differ from the current
suffix in one token among the ``top_k`` most promising of its place, and goes to the candidate with the least loss,
whether that is better than the current one or not. The best suffix ever seen is returned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from plot_align.errors import InputError
from plot_align.redteam.attack import Attack, Attacked, OnStep, Request, require_counts
from plot_align.redteam.objective import TargetObjective
from plot_align.redteam.spent import Spent
from plot_align.redteam.victim import Victim
from plot_align.redteam.vocabulary import Vocabulary


@dataclass(frozen=True)
class GCG(Attack):
    """Options, HarmBench's defaults.

    Args:
        steps: update steps.
        search_width: candidates a step.
        top_k: tokens a place that candidates are drawn from.
        suffix_tokens: length of the suffix.
        non_ascii: allow tokens with other characters than printable ASCII.
        early_stop: stop a case once its loss is below this many nats a token; None runs all steps.
        batch_size: candidates a pass; None: what fits.
        prefix_cache: see :class:`TargetObjective`.
    """

    steps: int = 500
    search_width: int = 512
    top_k: int = 256
    suffix_tokens: int = 20
    non_ascii: bool = False
    early_stop: float | None = None
    batch_size: int | None = None
    prefix_cache: bool = True

    name: ClassVar[str] = "GCG"
    default_cases: ClassVar[int] = 1
    needs_target: ClassVar[bool] = True
    white_box: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_counts(self, "steps", "search_width", "top_k", "suffix_tokens", "batch_size")
        if self.early_stop is not None and not math.isfinite(self.early_stop):
            raise InputError(f"early_stop is {self.early_stop}; expected a number of nats, or null to run all steps.")

    def run(self, victim: Victim, request: Request, on_step: OnStep = lambda step: None) -> Attacked:
        """Attack one request; each case has its own random stream."""
        vocabulary = victim.vocabulary(non_ascii=self.non_ascii)
        runs = [self._one(victim, request, vocabulary, case, on_step) for case in range(request.cases)]
        length = max(len(run.trace) for run in runs)
        padded = [run.trace + run.trace[-1:] * (length - len(run.trace)) for run in runs]  # of those that ended early
        reached = [step for step in request.snapshots if any(step in run.snapshots for run in runs)]
        return Attacked(
            cases=[case for run in runs for case in run.cases],
            losses=[run.trace[-1] for run in runs],
            trace=[sum(column) / len(runs) for column in zip(*padded, strict=True)],
            snapshots={n: [case for run in runs for case in run.snapshots.get(n, run.cases)] for n in reached},
            spent=[cost for run in runs for cost in run.spent],
            spent_by_step={n: [c for run in runs for c in run.spent_by_step.get(n, run.spent)] for n in reached},
        )

    def _one(self, victim: Victim, request: Request, vocabulary: Vocabulary, case: int, on_step: OnStep) -> Attacked:
        """One case."""
        objective = TargetObjective(
            victim,
            request.behavior,
            request.target,
            self.suffix_tokens,
            vocabulary,
            batch_size=self.batch_size,
            prefix_cache=self.prefix_cache,
        )
        generator = request.generator("cpu", self.name, case)
        current = best = objective.initial  # (L,)
        trace: list[float] = []
        snapshots: dict[int, list[str]] = {}
        spent: dict[int, list[Spent]] = {}
        for step in range(1, self.steps + 1):
            loss, gradient = objective.gradient(current)
            if not trace:
                trace.append(loss)
            drawn = self.candidates(objective, gradient, current, generator)  # (B, L)
            drawn = drawn[objective.survive(drawn).to(drawn.device)]  # (≤ B, L)
            if len(drawn):  # otherwise the next step draws others
                losses = objective.losses(drawn)  # (≤ B,)
                current = drawn[losses.argmin()]
                if float(losses.min()) < trace[-1]:
                    best = current
                trace.append(min(trace[-1], float(losses.min())))
            else:
                trace.append(trace[-1])
            if step in request.snapshots:
                snapshots[step], spent[step] = objective.test_cases(best[None]), [objective.meter.read()]
            on_step(case * self.steps + step)
            stopped = self.early_stop is not None and trace[-1] < self.early_stop
            if stopped or request.limit.reached(objective.meter.read()):
                break
        final, cost = objective.test_cases(best[None]), [objective.meter.read()]
        if stopped:  # more steps would have changed nothing
            snapshots = {step: snapshots.get(step, final) for step in request.snapshots}
            spent = {step: spent.get(step, cost) for step in request.snapshots}
        return Attacked(final, trace=trace, snapshots=snapshots, spent=cost, spent_by_step=spent)

    def candidates(
        self, objective: TargetObjective, gradient: Tensor, current: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Suffixes that differ from ``current`` in at most one token, equally many for each place.

        Args:
            gradient: (L, V) of the loss with respect to the one-hot tokens.
            current: (L,).
            generator: on the CPU, so that a seed draws the same everywhere.

        Returns:
            (search_width, L), ordered by the place that differs.
        """
        promising = promising_tokens(gradient, objective.allowed_by_place(), self.top_k)  # (L, K)
        width = self.search_width
        places = torch.arange(width) * len(current) // width  # (B,)
        picks = torch.randint(promising.size(1), (width,), generator=generator)  # (B,)
        drawn = current.repeat(width, 1)  # (B, L)
        drawn[torch.arange(width), places] = promising[places.to(promising.device), picks.to(promising.device)]
        return drawn


def promising_tokens(gradient: Tensor, allowed: Tensor, top_k: int) -> Tensor:
    """For every place the allowed tokens with the most negative gradient, the most promising first.

    Args:
        gradient: (L, V). allowed: (L, V) bool.
        top_k: how many; fewer where fewer are allowed.

    Returns:
        (L, K) token ids, K at most ``top_k``.
    """
    count = min(top_k, int(allowed.sum(1).min()))
    return gradient.masked_fill(~allowed, torch.inf).topk(count, largest=False).indices
