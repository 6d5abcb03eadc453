"""The slow, obvious version of L_PLOT: from full distributions, pairwise costs and loops, all of it differentiable.

Nothing of it is shared with the package, and what it does not know it refuses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Unknown(Exception):
    """The oracle has no definition of this option."""


@dataclass
class World:
    """What the term depends on beside its options.

    Attributes:
        p: ``(B, T, V)`` float64 output of the policy at each position; q: the reference's, or ``None``.
        tokens: ``(B, T)`` the token that each position predicts.
        masks: the positions of each role, ``(B, T)`` bool: ``chosen``, ``rejected`` and ``all``.
        sequences: ``(B, T)`` which sequence a position belongs to.
        embeddings: ``(V, H)`` of the reference; padding rows included.
        chosen, rejected: ``(V,)`` counts over the data set, for token ids only.
        reference: ``(V,)`` the reference's mean output over the data set, or ``None``.
    """

    p: Tensor
    q: Tensor | None
    tokens: Tensor
    masks: dict[str, Tensor]
    sequences: Tensor
    embeddings: Tensor
    chosen: Tensor
    rejected: Tensor
    reference: Tensor | None = None

    @property
    def valid(self) -> int:
        return len(self.chosen)

    @property
    def difference(self) -> Tensor:
        """d over the rows of the head."""
        d = self.chosen.double() / self.chosen.sum() - self.rejected.double() / self.rejected.sum()
        return torch.cat([d, d.new_zeros(self.p.size(-1) - self.valid)])


def plot_loss(config: Any, world: World) -> Tensor:
    """L_PLOT without its weight."""
    options = config.ablations
    mask = world.masks[config.positions]
    if options.divergence == "deft_log":
        return -mean_of(
            config.granularity, mask, world, (world.p.log() @ world.difference).unsqueeze(-1), lambda x: x[0]
        )
    if options.divergence == "deft_prob":
        return -mean_of(config.granularity, mask, world, world.p, lambda p: p @ world.difference)
    distance = distance_of(options, world)
    if config.granularity == "token" or not is_per_batch(config, world):
        target = dataset_target(config, world)
        return mean_of(config.granularity, mask, world, world.p, lambda p: distance(p, target))
    kind = config.target if config.target != "auto" else "chosen" if world.q is None else "anchored"
    if kind == "anchored":
        both = torch.cat([world.p, world.q], -1)
        size = world.p.size(-1)
        return mean_of(
            config.granularity, mask, world, both,
            lambda pq: distance(pq[:size], anchored(pq[size:].detach(), config.target_strength, world)),
        )  # fmt: skip
    target = counted(kind, *frequencies_in_batch(kind, config, world), options.target_temperature, world)
    if target is None:
        return world.p.sum() * 0
    return mean_of(config.granularity, mask, world, world.p, lambda p: distance(p, target))


def mean_of(granularity: str, mask: Tensor, world: World, values: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """f of the mean over the selected positions; the mean over sequences of the same; or the mean of f, one by one."""
    if not mask.any():
        return values.sum() * 0
    match granularity:
        case "batch":
            return f(values[mask].mean(0))
        case "sequence":
            each = [values[mask & (world.sequences == s)] for s in world.sequences[mask].unique()]
            return torch.stack([f(rows.mean(0)) for rows in each]).mean()
        case "token":
            return torch.stack([f(row) for row in values[mask]]).mean()
    raise Unknown(granularity)


def is_per_batch(config: Any, world: World) -> bool:
    match config.ablations.target_scope:
        case "batch":
            return True
        case "dataset":
            return False
        case "auto":
            return config.target == "auto" and world.reference is None
    raise Unknown(config.ablations.target_scope)


def dataset_target(config: Any, world: World) -> Tensor:
    kind = config.target
    if kind == "auto":
        kind = "relu" if world.reference is None else "anchored"
    if kind == "anchored":
        assert world.reference is not None
        reference = world.reference.clone()
        reference[world.valid :] = 0
        return anchored(reference / reference.sum(), config.target_strength, world)
    total = world.chosen.sum(), world.rejected.sum()
    frequencies = (world.chosen.double() / total[0], world.rejected.double() / total[1])
    target = counted(kind, *frequencies, config.ablations.target_temperature, world)
    assert target is not None
    return target


def anchored(reference: Tensor, strength: float, world: World) -> Tensor:
    weights = (reference + strength * world.difference).clamp(min=0)
    weights[world.valid :] = 0
    return weights / weights.sum()


def counted(kind: str, chosen: Tensor, rejected: Tensor, temperature: float, world: World) -> Tensor | None:
    """φ of token frequencies (V ids), padded to the head; ``None`` where a side has no token or both are equal."""
    d = chosen - rejected
    if (kind != "chosen" and (rejected.sum() == 0 or d.abs().max() == 0)) or chosen.sum() == 0:
        return None
    match kind:
        case "relu":
            weights = torch.tensor([max(float(x), 0.0) for x in d], dtype=torch.float64)
        case "shift":
            weights = d - min(d.tolist())
        case "softmax":
            unit = max(abs(x) for x in d.tolist()) / math.log(len(d))
            weights = torch.tensor([math.exp(x / (temperature * unit)) for x in d.tolist()], dtype=torch.float64)
        case "chosen":
            weights = chosen
        case _:
            raise Unknown(kind)
    padded = torch.zeros(world.p.size(-1), dtype=torch.float64)
    padded[: world.valid] = weights / weights.sum()
    return padded


def frequencies_in_batch(kind: str, config: Any, world: World) -> tuple[Tensor, Tensor]:
    frequencies = []
    for role in ("all" if kind == "chosen" and config.positions == "all" else "chosen", "rejected"):
        tokens = world.tokens[world.masks[role]].tolist()
        frequencies.append(
            torch.tensor([tokens.count(v) / max(1, len(tokens)) for v in range(world.valid)], dtype=torch.float64)
        )
    return frequencies[0], frequencies[1]


def distance_of(options: Any, world: World) -> Callable[[Tensor, Tensor], Tensor]:
    """``D(p, P)`` of two distributions (V,) as the definitions have it."""
    e = world.embeddings.double()
    match options.divergence:
        case "tv":
            return lambda p, target: (p - target).abs().sum() / 2
        case "kl":
            return kl
        case "js":
            return lambda p, target: (kl(p, (p + target) / 2) + kl(target, (p + target) / 2)) / 2
        case "emo":
            cost = 1 - torch.nn.functional.cosine_similarity(e[:, None], e[None, :], dim=-1)
            return lambda p, target: p @ cost @ target
        case "w1":
            lines = coordinates(options, e, world.valid)
            if options.geometry == "max_sliced":
                return lambda p, target: torch.stack([on_line(p, target, x) for x in lines]).max()
            return lambda p, target: torch.stack([on_line(p, target, x) for x in lines]).mean()
    raise Unknown(options.divergence)


def kl(p: Tensor, target: Tensor) -> Tensor:
    """With 0·log 0 = 0; where p has mass and the target none it is infinite."""
    there = p > 0
    return (p[there] * (p[there] / target[there]).log()).sum()


def on_line(p: Tensor, target: Tensor, x: Tensor) -> Tensor:
    """``∫ |F_p − F_P| dx``, each F by counting which tokens are at or before a place."""
    places = x.unique()
    before = (x[None, :] <= places[:, None]).double()  # (U, V)
    return ((before @ (p - target)).abs()[:-1] * places.diff()).sum()


def coordinates(options: Any, e: Tensor, valid: int) -> list[Tensor]:
    match options.geometry:
        case "norm":
            size = (
                e.abs().amax(1)
                if math.isinf(options.norm_order)
                else (e.abs() ** options.norm_order).sum(1) ** (1 / options.norm_order)
            )
            lines = [size]
        case "principal":
            rows = e[:valid].numpy()
            axis = np.linalg.svd(rows - rows.mean(0))[2][0]
            lines = [torch.from_numpy((e.numpy() - rows.mean(0)) @ axis)]
        case "vocabulary":
            lines = [torch.arange(len(e)).double()]
        case "sliced" | "max_sliced":
            generator = torch.Generator().manual_seed(options.geometry_seed)
            axes = torch.randn(e.size(1), options.slices, generator=generator, dtype=torch.float64)
            lines = [e @ (axis / axis.square().sum().sqrt()) for axis in axes.T]
        case _:
            raise Unknown(options.geometry)
    if not options.scaled:
        return lines
    apart = [(x[:valid, None] - x[None, :valid]).abs().sum() / (valid * (valid - 1)) for x in lines]
    return [x / torch.stack(apart).mean() for x in lines]
