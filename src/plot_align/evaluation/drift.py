"""How far tuning moved the output distribution: KL to the reference, the mean output, and which tokens gained or
lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import identity, kron, vstack
from torch import Tensor

from plot_align.errors import InputError, RunError
from plot_align.evaluation import data
from plot_align.evaluation.fluency import Diversity, answers_to
from plot_align.evaluation.preference import OnPairs
from plot_align.evaluation.subject import Found, Subject
from plot_align.inference.scoring import divergences, score
from plot_align.preference.distribution import PreferenceDistribution, vocabulary_size
from plot_align.preference.estimation import ScoredSequence
from plot_align.preference.inspection import token_text
from plot_align.results import of_items, of_whole
from plot_align.statistics import jackknife_interval
from plot_align.transport import make_divergence
from plot_align.transport.geometry import line, slices

_GROUPS = 10  # of sequences, for the jackknife
_SHOWN = 20  # tokens that gained most, and as many that lost most
_SUPPORT = 64  # of the plan: tokens on each side
_FLOWS = 30  # the largest ones, which are kept


@dataclass
class KL(Diversity):
    """``KL(π ‖ π_ref)`` a token, over the model's own greedy answers to a set of prompts.

    Uses the prompts, options and answers of :class:`plot_align.evaluation.fluency.Diversity`.
    """

    def run(self, subject: Subject) -> Found:
        """The mean over answers of the mean over their tokens of the KL between whole next-token distributions."""
        reference = subject.require_reference("kl")
        answers = answers_to(self, subject)
        prompts = data.prompts(self.prompts, split=self.split, limit=self.limit, seed=subject.seed)
        starts = [len(row) for row in subject.rows(list(prompts.values()))]
        whole = subject.tokenizer.apply_chat_template(
            [[*prompts[name], {"role": "assistant", "content": answers[name]}] for name in prompts],
            tokenize=True,
            return_dict=False,
        )
        sequences = [
            ScoredSequence(np.array(row, np.int32), min(start, len(row)), len(row))
            for row, start in zip(whole, starts, strict=True)
        ]
        values = divergences(
            subject.model,
            reference.model,
            sequences,
            batch_size=subject.batch_size,
            advance=subject.bar("KL to the reference", len(sequences)),
        ).tolist()
        if any(math.isinf(value) for value in values):
            raise RunError(
                f"KL to {reference.name} is infinite in {sum(map(math.isinf, values))} answers: the reference gives "
                "a token that the model writes no probability at all; use float32"
            )
        items = {name: value for name, value in zip(prompts, values, strict=True) if not math.isnan(value)}
        quantity = of_items(f"KL to {reference.name}", items, better=None, unit="nats a token", seed=subject.seed)
        return Found({"kl": quantity}, {"answers_without_tokens": len(values) - len(items)})


@dataclass
class Drift(OnPairs):
    """Where the mean output over chosen answers moved, against the reference and against the preference.

    ``p̄`` and ``p̄_ref`` are the mean output distributions of the model and the reference over the same positions, those
    that predict the tokens of held-out chosen answers. The intervals are a delete-one jackknife's over ten groups of
    sequences.

    Args:
        preference: file of ``plot-align estimate``; None leaves out preferred and rejected tokens.
    """

    limit: int | None = 500
    preference: str | None = None

    def check(self) -> None:
        super().check()
        if self.preference is not None:
            PreferenceDistribution.load(self.preference)

    def run(self, subject: Subject) -> Found:
        """Total variation and sliced W1 to the reference; W1 to the target and the mass on preferred and rejected
        tokens; the tokens that moved most, and the plan that moves one into the other."""
        reference = subject.require_reference("drift")
        rows = data.load(self.pairs, split=self.split, data_dir=self.data_dir, limit=self.limit, seed=subject.seed)
        chosen, _ = data.scored(rows, subject.tokenizer, self.max_length)
        chosen = [sequence for sequence in chosen if sequence.start < sequence.stop]
        if len(chosen) < 2:
            raise InputError(
                f"{self.pairs} has {len(chosen)} chosen answers with a token to score, expected 2 or more; raise "
                "max_length, or name more pairs"
            )
        after, before = self._outputs(subject, chosen), self._outputs(reference, chosen)  # (G, V) each
        embeddings = reference.model.get_input_embeddings().weight.detach()  # (rows, H)
        size = min(after.size(1), before.size(1), embeddings.size(0))
        after, before, embeddings = after[:, :size], before[:, :size], embeddings[:size]
        tokens = int(after.sum().round())
        valid = min(vocabulary_size(subject.tokenizer), size)
        lines = slices(embeddings, 16, valid=valid)

        def whole(title: str, of: Callable[[Tensor, Tensor], float], better: Any = None, **options: Any) -> Any:
            value, (low, high) = jackknife(of, after, before)
            interval = (max(low, 0.0), high)  # all distances and masses
            return of_whole(title, value, tokens, interval=interval, better=better, **options)

        rates: dict[str, Any] = {"bounds": (0.0, 1.0)}
        quantities = {
            "tv": whole(f"Mean output, total variation to {reference.name}", _total_variation, **rates),
            "w1": whole(f"Mean output, W1 to {reference.name}", lambda p, q: _distance(p, q, lines)),
        }
        details: dict[str, Any] = {"tokens": tokens, "reference": reference.name}
        preference = None
        if self.preference is not None:
            preference = PreferenceDistribution.load(self.preference)
            preference.check_tokenizer(subject.tokenizer)
            target = preference.target("relu", size=size)  # (V,)
            axis = line(embeddings, valid=valid)
            d = preference.difference(size=size)  # (V,)
            liked, disliked = d > 0, d < 0
            quantities |= {
                "target_distance": whole(
                    "Mean output, W1 to the preference", lambda p, q: _distance(p, target, axis), "lower"
                ),
                "preferred_mass": whole(
                    "Mean output on preferred tokens", lambda p, q: float(p[liked].sum()), "higher", **rates
                ),
                "rejected_mass": whole(
                    "Mean output on rejected tokens", lambda p, q: float(p[disliked].sum()), "lower", **rates
                ),
            }
            details["masses"] = {
                name: {"preferred": float(p[liked].sum()), "rejected": float(p[disliked].sum())}
                for name, p in (("model", _mean(after)), ("reference", _mean(before)))
            }
        p, q = _mean(after), _mean(before)
        details["moved"] = moved_tokens(p, q, subject.tokenizer, preference)
        details["flows"] = [
            {"from": token_text(subject.tokenizer, i), "to": token_text(subject.tokenizer, j), "mass": m, "cost": c}
            for i, j, m, c in flows(q, p, embeddings)
        ]
        return Found(quantities, details)

    def _outputs(self, of: Subject, sequences: Sequence[ScoredSequence]) -> Tensor:
        """Summed output distributions of each group of sequences: (G, V) float64. Cached per model."""
        key = ("outputs", self.pairs, self.split, self.data_dir, self.limit, self.max_length)
        if key not in of.memory:
            advance = of.bar("mean output", len(sequences))
            groups = [sequences[g::_GROUPS] for g in range(min(_GROUPS, len(sequences)))]
            of.memory[key] = torch.stack(
                [score(of.model, group, batch_size=of.batch_size, advance=advance).total for group in groups]
            )
        return of.memory[key]


def _mean(sums: Tensor) -> Tensor:
    """(G, V) summed output distributions → their mean (V,); every position has the same weight."""
    total = sums.sum(0)  # (V,)
    return total / total.sum()


def _total_variation(p: Tensor, q: Tensor) -> float:
    return float((p - q).abs().sum() / 2)


def _distance(p: Tensor, target: Tensor, geometry: Any) -> float:
    return float(make_divergence("w1", target / target.sum(), geometry).to(p.device).value(p))


def jackknife(
    of: Callable[[Tensor, Tensor], float], after: Tensor, before: Tensor
) -> tuple[float, tuple[float, float]]:
    """A function of two mean outputs, and its 95 % interval from leaving out one group of sequences at a time.

    Args:
        after, before: (G, V) summed output distributions of the same groups.
    """
    every = torch.arange(len(after))
    without = [of(_mean(after[every != g]), _mean(before[every != g])) for g in range(len(after))]
    value = of(_mean(after), _mean(before))
    return value, jackknife_interval(value, without)


def moved_tokens(
    p: Tensor, q: Tensor, tokenizer: Any, preference: PreferenceDistribution | None
) -> list[dict[str, Any]]:
    """The tokens whose mean probability rose and fell most from q (V,) to p (V,), the largest rise first.

    Each with ``d`` and the counts of the preference if there is one.
    """
    change = p - q  # (V,)
    order = torch.argsort(change, descending=True, stable=True).tolist()
    ends = [i for i in order[:_SHOWN] if change[i] > 0] + [i for i in order[-_SHOWN:] if change[i] < 0]
    d = None if preference is None else preference.difference(size=len(p))
    shown = []
    for i in ends:
        entry = {"token": token_text(tokenizer, i), "id": i, "change": float(change[i]), "before": float(q[i])}
        if preference is not None and d is not None:
            counted = i < preference.vocab_size
            entry |= {
                "d": float(d[i]),
                "chosen": int(preference.chosen_counts[i]) if counted else 0,
                "rejected": int(preference.rejected_counts[i]) if counted else 0,
            }
        shown.append(entry)
    return shown


def flows(q: Tensor, p: Tensor, embeddings: Tensor) -> list[tuple[int, int, float, float]]:
    """The largest movements of the cheapest plan that turns q (V,) into p (V,): (from, to, mass, cost per unit).

    Mass that both have stays in place, which is optimal if the cost is a metric. For the rest, the plan covers the
    tokens that lost and gained most and moves as much as the smaller side has: partial optimal transport, solved as a
    linear program. The cost is the Euclidean distance of the embeddings (V, H), in units of the mean distance between
    a token that lost and one that gained.
    """
    change = (p - q).double().cpu()  # (V,)
    count = min(_SUPPORT, len(change))
    lost = [int(i) for i in torch.topk(-change, count).indices if change[i] < 0]
    gained = [int(i) for i in torch.topk(change, count).indices if change[i] > 0]
    if not lost or not gained:
        return []
    supply, demand = -change[lost].numpy(), change[gained].numpy()  # (n,), (m,)
    e = embeddings.float().cpu().double()
    cost = torch.cdist(e[lost], e[gained], compute_mode="donot_use_mm_for_euclid_dist").numpy()  # (n, m)
    cost = cost / (cost.mean() or 1.0)
    plan = partial_plan(supply, demand, cost)
    order = np.argsort(-plan, axis=None, kind="stable")[:_FLOWS]
    found = [np.unravel_index(k, plan.shape) for k in order]
    return [(lost[i], gained[j], float(plan[i, j]), float(cost[i, j])) for i, j in found if plan[i, j] > 0]


def partial_plan(supply: np.ndarray, demand: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """``min ⟨T, C⟩`` over T (n, m) ≥ 0 with ``T·1 ≤ supply``, ``Tᵀ·1 ≤ demand`` and ``ΣT = min(Σsupply, Σdemand)``."""
    n, m = cost.shape
    rows = kron(identity(n), np.ones((1, m)))  # (n, n·m): sums over a row of T
    columns = kron(np.ones((1, n)), identity(m))  # (m, n·m)
    scale = min(supply.sum(), demand.sum())  # the solver's tolerances are absolute
    solved = linprog(
        cost.ravel(),
        A_ub=vstack([rows, columns]),
        b_ub=np.concatenate([supply, demand]) / scale,
        A_eq=np.ones((1, n * m)),
        b_eq=[1.0 - 1e-12],
        method="highs",
    )
    if solved.x is None:
        raise RunError(f"the transport plan of {n} and {m} tokens was not found ({solved.message}); report this")
    return solved.x.reshape(n, m) * scale
