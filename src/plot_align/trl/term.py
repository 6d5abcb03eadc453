"""From the output distributions that the head swept up to the PLOT loss and what is logged about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plot_align.config import PlotConfig
from plot_align.head import HeadOutput, HeadSpec
from plot_align.methods.deft import log_reward, reward_scale
from plot_align.preference.distribution import target_weights
from plot_align.transport import Divergence
from plot_align.transport.base import Constants, widest_dtype
from plot_align.trl.batches import PolicyBatch


@dataclass(frozen=True)
class Shares:
    """How the rows of a head pass enter the output distributions.

    ``weights (N,)`` of every segment with a selected row sum to one; ``segments (N,)`` or ``None`` for one segment;
    ``counts (S,)`` selected rows of each segment.
    """

    weights: Tensor
    segments: Tensor | None
    counts: Tensor

    def arguments(self, device: torch.device) -> dict[str, Any]:
        """What a head pass on ``device`` is given of them."""
        segments = None if self.segments is None else self.segments.to(device)
        return {"weights": self.weights.to(device), "segments": segments, "num_segments": self.counts.numel()}


@dataclass
class Swept:
    """What the policy's head pass over a micro-batch left behind.

    Attributes:
        head: log-probabilities and output distributions, with their graph.
        shares: how the rows entered the distributions.
        hidden: the head's input, the place where gradient norms are compared.
        rows: ``(N,)`` places of the rows in the flattened ``(B, T − 1)`` batch.
        reference: ``(S, V)`` the reference model's output distributions over the same positions, where asked for.
        some_rows: sweeps some of the rows again, given their indices, with the head's weights held fixed: its input
            and its output. ``None`` where the vanilla loss does not come from this pass.
        outputs: what the model returned with a graph, on which FSDP2 and DeepSpeed put hooks.
    """

    head: HeadOutput
    shares: Shares
    hidden: Tensor
    rows: Tensor
    reference: Tensor | None = None
    some_rows: Callable[[Tensor], tuple[Tensor, HeadOutput]] | None = None
    outputs: tuple[Tensor, ...] = ()


class PlotTerm(Constants):
    """``L_PLOT`` of one micro-batch at a granularity (design: ``docs/mathematics.md``).

    ``batch``: D(p̄, P) with p̄ the mean over all selected positions; ``sequence``: the mean of D(p̄_s, P) over the
    sequences that have a selected position; ``token``: the mean of D(p_t, P) over the selected positions. A batch
    with nothing selected, or without a target of its own at ``target_scope="batch"``, costs zero, since D(0, P) would
    be a constant that no model can change. With ``divergence="deft_log"`` or ``"deft_prob"`` DEFT's −R takes the
    distance's place, and α is its ω.

    Args:
        config: the options.
        divergence: holds the target of ``target_scope="dataset"``; it is not asked with ``deft_log``.
        difference: ``(V,)`` d of each row of the head, 0 on padding rows.
        valid: number of token ids; padding rows follow them and never get target mass.
    """

    difference: Tensor

    def __init__(self, config: PlotConfig, divergence: Divergence, difference: Tensor, valid: int) -> None:
        super().__init__()
        self.config = config
        self.divergence = divergence
        self.valid = valid
        self._constant("difference", difference)

    def shares(self, batch: PolicyBatch, rows: Tensor) -> Shares:
        """Weights of the head's rows; ``rows (N,)`` are their places in the flattened ``(B, T − 1)`` batch."""
        selected = batch.selected(self.config.positions).flatten()[rows]  # (N,)
        segments = None
        if self.config.granularity == "sequence":
            ids = batch.sequence_ids()  # (B, T-1)
            segments = ids.flatten()[rows]  # (N,)
            counts = torch.bincount(segments[selected], minlength=int(ids.max()) + 1)  # (S,)
            weights = selected / counts.clamp(min=1)[segments]
        else:
            counts = selected.sum().unsqueeze(0)  # (1,)
            weights = selected / counts.clamp(min=1)
        return Shares(weights.float(), segments, counts)

    def head_divergence(self) -> Divergence | None:
        """What the head must evaluate at every position itself: only the ``token`` granularity needs that."""
        is_asked = self.config.granularity == "token" and self.config.ablations.divergence != "deft_log"
        return self.divergence if is_asked else None

    def reward(
        self,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        spec: HeadSpec,
        *,
        weights: Tensor,  # (N,)
        segments: Tensor | None,  # (N,)
        num_segments: int,
    ) -> Tensor | None:
        """``(S,)`` DEFT's reward in its log reading, from the head's input; ``None`` unless it is the term."""
        if self.config.ablations.divergence != "deft_log":
            return None
        scale = reward_scale(logit_scale=spec.logit_scale, temperature=spec.temperature, softcap=spec.softcap)
        with spec.gather(weight, bias):
            return log_reward(
                hidden,
                weight,
                bias,
                self.difference,
                weights=weights,
                segments=segments,
                num_segments=num_segments,
                scale=scale,
            )

    def loss(self, swept: Swept, batch: PolicyBatch) -> Tensor:
        """The scalar L_PLOT, with a graph; exactly zero, with a graph, where nothing is selected."""
        head, shares = swept.head, swept.shares
        if head.marginals is None:
            raise ValueError("the head was run without weights")
        if head.values is not None:
            return (head.values * shares.weights.to(head.values)).sum()
        if head.reward is not None:
            selected = shares.counts.to(head.reward.device) > 0  # (S,)
            return -(head.reward * selected).sum() / selected.sum().clamp(min=1)
        # A handful of V-vectors: float64 costs nothing here and keeps the cumulative sums exact.
        marginals = head.marginals.to(widest_dtype(head.marginals.device))  # (S, V)
        counts = shares.counts.to(marginals.device)  # (S,)
        target = None
        if self.config.ablations.target_scope == "batch" and not self.config.is_reward:
            target, has_target = self._batch_target(swept, batch)  # (S or 1, V), (S or 1,)
            counts = counts * has_target
        if self.config.pool:
            marginals, counts = _pooled(marginals, counts)
        values = self.divergence.value(marginals, target)  # (S,)
        values = torch.where(counts > 0, values, marginals.sum(-1) * 0)
        return values.sum() / (counts > 0).sum().clamp(min=1)

    @torch.no_grad()
    def _batch_target(self, swept: Swept, batch: PolicyBatch) -> tuple[Tensor, Tensor]:
        """This micro-batch's own target, (S, V) or (1, V), and where there is one; rows without one hold anything."""
        device = self.difference.device
        size = self.difference.numel()
        if self.config.needs_reference:
            if swept.reference is None:
                raise ValueError("the reference was not swept")
            anchor = swept.reference.to(self.difference)  # (S, V)
            if self.config.pool:
                anchor, _ = _pooled(anchor, swept.shares.counts.to(device))
            moved = (anchor + self.config.target_strength * self.difference).clamp(min=0)
        else:
            moved = self._counted_target(batch, size).unsqueeze(0)  # (1, V)
        moved[..., self.valid :] = 0
        total = moved.sum(-1, keepdim=True)  # (S or 1, 1)
        # A sum of softmaxes in float32 is 1 but for rounding, which W1's sign would turn into a full-size gradient
        # where policy and target agree: the target gets the output's own sum.
        mass = torch.ones_like(total) if swept.head.marginals is None else swept.head.marginals.to(moved).sum(-1, True)
        found = ~(total.squeeze(-1) <= 0)  # a NaN of the reference is no missing target: it must reach the loss
        return moved * (mass / total.clamp(min=torch.finfo(moved.dtype).tiny)), found

    def _counted_target(self, batch: PolicyBatch, size: int) -> Tensor:
        """φ of the micro-batch's own token counts, (V,); zero where a side is missing or both sides are equal."""
        sides = []
        # The chosen tokens of the positions that are compared: all of them, where all are.
        first = "all" if self.config.target == "chosen" and self.config.positions == "all" else "chosen"
        for role in (first, "rejected"):
            labels = batch.labels[:, 1:][batch.selected(role)].to(self.difference.device)  # (n,)
            sides.append(torch.bincount(labels, minlength=size).to(self.difference))  # (V,)
        counts = torch.stack(sides)  # (2, V)
        if self.config.pool and _ranks() > 1:
            dist.all_reduce(counts)
        totals = counts.sum(-1)  # (2,)
        if totals[0] == 0 or (self.config.target != "chosen" and totals[1] == 0):
            return counts.new_zeros(size)
        chosen, rejected = counts / totals.clamp(min=1).unsqueeze(-1)  # (V,), (V,)
        if self.config.target != "chosen" and torch.equal(chosen, rejected):
            return counts.new_zeros(size)
        config, ids = self.config, slice(self.valid)
        weights = target_weights(
            config.target, chosen[ids], rejected[ids], temperature=config.ablations.target_temperature
        )
        return torch.cat([weights, weights.new_zeros(size - self.valid)])

    @torch.no_grad()
    def masses(self, swept: Swept) -> Tensor:
        """``(2,)`` mass that the selected positions' mean output puts on preferred and on rejected tokens."""
        marginals = swept.head.marginals
        if marginals is None:
            raise ValueError("the head was run without weights")
        counts = swept.shares.counts.to(marginals)  # (S,)
        each = counts / counts.sum().clamp(min=1)
        output = each @ marginals  # (V,)
        masses = torch.stack([output[self.difference > 0].sum(), output[self.difference < 0].sum()])
        return torch.where(counts.sum() > 0, masses, torch.nan)


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _pooled(output: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The mean distribution (1, V) over all ranks, weighted by their token counts (1,): one all-reduce of a V-vector.

    Each rank's own part keeps its graph, scaled by the world size: DDP divides the summed gradients by it again, and
    what remains is the gradient of the pooled value.
    """
    if _ranks() == 1:
        return output, tokens
    packed = torch.cat([output.detach() * tokens, tokens.to(output.dtype).unsqueeze(-1)], dim=-1)  # (1, V + 1)
    dist.all_reduce(packed)
    total = packed[:, -1:].clamp(min=1)  # (1, 1)
    share = output * (tokens * _ranks() / total)  # (1, V)
    return packed[:, :-1] / total + (share - share.detach()), packed[:, -1]
