"""From the output distributions that the head swept up to the PLOT loss and what is logged about it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..fused import HeadOutput
from ..losses import Divergence
from ..losses.base import widest_dtype
from .batches import PolicyBatch
from .config import PlotConfig


@dataclass(frozen=True)
class Shares:
    """How the rows of a head pass enter the output distributions.

    ``weights (N,)`` of every segment with a selected row sum to one; ``segments (N,)`` or ``None`` for one segment;
    ``counts (S,)`` selected rows of each segment.
    """

    weights: Tensor
    segments: Tensor | None
    counts: Tensor


class PlotTerm(nn.Module):
    """``L_PLOT`` of one micro-batch at a granularity (design: ``docs/mathematics.md``).

    ``batch``: D(p̄, P) with p̄ the mean over all selected positions; ``sequence``: the mean of D(p̄_s, P) over the
    sequences that have a selected position; ``token``: the mean of D(p_t, P) over the selected positions. A batch
    with nothing selected costs zero, since D(0, P) would be a constant that no model can change.

    Args:
        config: the options.
        divergence: holds the target.
        preferred: ``(V,)`` bool, tokens that people prefer (d > 0); for the logged mass only.
        rejected: ``(V,)`` bool, tokens with d < 0.
    """

    preferred: Tensor
    rejected: Tensor

    def __init__(self, config: PlotConfig, divergence: Divergence, preferred: Tensor, rejected: Tensor) -> None:
        super().__init__()
        self.config = config
        self.divergence = divergence
        self.register_buffer("preferred", preferred)
        self.register_buffer("rejected", rejected)

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
        return self.divergence if self.config.granularity == "token" else None

    def loss(self, head: HeadOutput, shares: Shares) -> Tensor:
        """The scalar L_PLOT, with a graph; exactly zero, with a graph, where nothing is selected."""
        marginals = head.marginals
        if marginals is None:
            raise ValueError("the head was run without weights")
        if self.config.granularity == "token" and head.values is not None:
            return (head.values * shares.weights).sum()
        # A handful of V-vectors: float64 costs nothing here and keeps the cumulative sums exact.
        marginals = marginals.to(widest_dtype(marginals.device))  # (S, V)
        counts = shares.counts.to(marginals.device)  # (S,)
        if self.config.pool:
            marginals, counts = _pooled(marginals, counts)
        values = self.divergence.value(marginals)  # (S,)
        values = torch.where(counts > 0, values, marginals.sum(-1) * 0)
        return values.sum() / (counts > 0).sum().clamp(min=1)

    @torch.no_grad()
    def masses(self, head: HeadOutput, shares: Shares) -> Tensor:
        """``(2,)`` mass that the selected positions' mean output puts on preferred and on rejected tokens."""
        if head.marginals is None:
            raise ValueError("the head was run without weights")
        counts = shares.counts.to(head.marginals)  # (S,)
        each = counts / counts.sum().clamp(min=1)
        output = each @ head.marginals  # (V,)
        masses = torch.stack([output[self.preferred].sum(), output[self.rejected].sum()])
        return torch.where(counts.sum() > 0, masses, torch.nan)


def _pooled(output: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The mean distribution (1, V) over all ranks, weighted by their token counts (1,): one all-reduce of a V-vector.

    Each rank's own part keeps its graph, scaled by the world size: DDP divides the summed gradients by it again, and
    what remains is the gradient of the pooled value.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return output, tokens
    packed = torch.cat([output.detach() * tokens, tokens.to(output.dtype).unsqueeze(-1)], dim=-1)  # (1, V + 1)
    dist.all_reduce(packed)
    total = packed[:, -1:].clamp(min=1)  # (1, 1)
    share = output * (tokens * dist.get_world_size() / total)  # (1, V)
    return packed[:, :-1] / total + (share - share.detach()), packed[:, -1]
