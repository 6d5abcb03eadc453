"""The PLOT term from logits: the plain specification that every faster path must match."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plot_align.errors import InputError
from plot_align.transport.base import Divergence, widest_dtype
from plot_align.transport.geometry import Geometry
from plot_align.transport.make import make_divergence

GRANULARITIES = ("batch", "sequence", "token")


class PlotLoss(nn.Module):
    """Distance of the model's output distribution over the selected positions to the target.

        p = softmax(logits, -1);  loss = D((mask[..., None] * p).sum((0, 1)) / mask.sum(), P)    # the naive line

    With weights w = mask and p_t = softmax(z_t):

    - ``batch``: ``D(sum_t w_t p_t / sum_t w_t, P)``, one output distribution for all positions.
    - ``sequence``: the mean over the sequences that have a selected position of the same, within each.
    - ``token``: ``sum_t w_t D(p_t, P) / sum_t w_t``.

    Its gradient is ``w_t / sum w * p_t * (s - <p_t, s>)``, s the potential of D at the pooled distribution.

    Only the selected rows are touched, so padding may hold anything. The softmax is taken in float32 (float64 for
    float64 logits) whatever the autocast state; the pooled V-vector is compared in float64 where the device has it,
    single tokens in the dtype of their softmax. Nothing is checked for NaN: a NaN logit gives a NaN loss.

    Args:
        target: (V,) P, a distribution over the rows of the head.
        geometry: a line, or several; needed by ``w1`` and ``max_w1``.
        divergence: a name of :data:`plot_align.transport.DIVERGENCES`.
        granularity: ``"batch"``, ``"sequence"`` or ``"token"``.
        options: what else :func:`plot_align.transport.make_divergence` takes: ``embeddings`` for ``sinkhorn`` and
            ``emo``, ``sinkhorn_...``, ``valid``, ``seed``.

    Raises:
        InputError: an unknown name, a target that is no distribution, a geometry or embeddings missing, sizes that
            differ.
    """

    divergence: Divergence

    def __init__(
        self,
        target: Tensor,
        geometry: Geometry | Sequence[Geometry] | None = None,
        *,
        divergence: str = "w1",
        granularity: str = "batch",
        **options: Any,
    ) -> None:
        super().__init__()
        if granularity not in GRANULARITIES:
            raise InputError(
                f'granularity is {granularity!r}, but "batch", "sequence" or "token" is needed: choose one of them.'
            )
        self.granularity = granularity
        self.divergence = make_divergence(divergence, target, geometry, **options)

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            logits: (B, T, V), any floating dtype; position t must be the one that *predicts* the selected token (for a
                causal model: shift the mask, not the logits). The module follows the logits to their device.
            mask: (B, T), bool or non-negative weights; constants, no gradient flows into them.

        Returns:
            Scalar in float32 (float64 for float64 logits). An empty selection gives exactly 0, still with a graph.

        Raises:
            InputError: shapes that do not fit, or negative, NaN or infinite weights.
        """
        self._check(logits, mask)
        if self.divergence.target.device != logits.device:
            self.divergence.to(logits.device)
        weights = mask.detach().to(logits.device, torch.promote_types(logits.dtype, torch.float32))  # (B, T)
        if not bool(((weights >= 0) & (weights < torch.inf)).all()):  # NaN compares false
            raise InputError(
                "mask has a negative, NaN or infinite weight, but weights are shares of a distribution: "
                "pass booleans or finite numbers >= 0."
            )
        selected = weights > 0  # (B, T)
        rows = logits[selected]  # (N, V)
        weights = weights[selected]  # (N,)
        with torch.autocast(logits.device.type, enabled=False):
            p = torch.softmax(rows, dim=-1, dtype=weights.dtype)  # (N, V)
            if rows.shape[0] == 0:
                return p.sum()  # 0, and W1(0, P) > 0 would pollute the loss
            if self.granularity == "token":
                return (weights * self.divergence.value(p)).sum() / weights.sum()
            sizes = [rows.shape[0]] if self.granularity == "batch" else selected.sum(dim=1).tolist()
            groups = zip(weights.split(sizes), p.split(sizes), strict=True)  # (n,), (n, V); rows keep their order
            pooled = torch.stack([w @ p_group / w.sum() for w, p_group in groups if len(w) > 0])  # (G, V)
            return self.divergence.value(pooled.to(widest_dtype(pooled.device))).mean().to(p.dtype)

    def _check(self, logits: Tensor, mask: Tensor) -> None:
        if logits.ndim != 3 or not logits.is_floating_point():
            raise InputError(
                f"logits is a {logits.dtype} tensor of shape {tuple(logits.shape)}, but a floating-point tensor of "
                "shape (B, T, V) is needed: pass the model's output logits."
            )
        if logits.shape[-1] != self.divergence.vocab_size:
            raise InputError(
                f"logits has {logits.shape[-1]} tokens and target {self.divergence.vocab_size}, but both must have "
                "one entry per row of the head: build the target with size = logits.shape[-1]."
            )
        if mask.shape != logits.shape[:2]:
            raise InputError(
                f"mask has shape {tuple(mask.shape)} for logits of shape {tuple(logits.shape)}, but one weight "
                f"per position is needed: pass a mask of shape {tuple(logits.shape[:2])}."
            )
