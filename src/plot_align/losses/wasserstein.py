"""W1 on a line, through cumulative distribution functions."""

from __future__ import annotations

import torch
from torch import Tensor

from plot_align.errors import InputError
from plot_align.geometry import Geometry
from plot_align.losses.base import Divergence


class Wasserstein1(Divergence):
    """The 1-Wasserstein distance of p to P for the cost ``|x_i - x_j|``.

        D = cumsum(p[order]) - cumsum(P[order]);  value = (D.abs() * gaps).sum()    # the naive line

    With the tokens sorted by coordinate, ``gaps[k] = x_(k+1) - x_(k)`` and the last gap 0::

        W1 = sum_k |F_p(k) - F_P(k)| * gaps[k]              s_j = sum_{k >= j} sign(F_p(k) - F_P(k)) * gaps[k]

    s is the Kantorovich potential, returned in token order; sign(0) = 0, so s = 0 at p = P (the subgradient of least
    norm). Tokens with equal coordinates have gap 0: their order does not matter. Where F_p and F_P tie exactly in
    theory but differ by rounding, the sign is that of the rounding: s is then another valid subgradient. Source:
    Peyré & Cuturi, "Computational Optimal Transport" (2019), remark 2.30.

    Three (..., V) buffers live at the peak, the returned potential included.

    Args:
        target: (V,) P, see :class:`Divergence`.
        geometry: coordinates (V,).

    Raises:
        InputError: the geometry has another number of tokens than the target.
    """

    order: Tensor  # (V,) int64: tokens by coordinate
    rank: Tensor  # (V,) int64: its inverse
    gaps: Tensor  # (V,), last entry 0
    sorted_target: Tensor  # (V,) = P[order]

    def __init__(self, target: Tensor, geometry: Geometry) -> None:
        super().__init__(target)
        if geometry.vocab_size != self.vocab_size:
            raise InputError(
                f"geometry has {geometry.vocab_size} tokens and target {self.vocab_size}, but both must have one "
                "entry per row of the head: build the target with size = geometry.vocab_size."
            )
        coordinates, order = geometry.coordinates.sort(stable=True)  # (V,), (V,)
        device = self.target.device
        order = order.to(device)
        self._constant("order", order)
        self._constant("rank", order.argsort())
        gaps = torch.cat([coordinates.diff(), coordinates.new_zeros(1)])  # (V,)
        self._constant("gaps", gaps.to(self.target.dtype).to(device))
        self._constant("sorted_target", self.target[order])

    @torch.no_grad()
    def value_and_potential(self, p: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Divergence.value_and_potential`; both in units of the geometry's coordinates."""
        p = self._prepare(p)  # (..., V)
        gaps = self.gaps.to(p.dtype)  # (V,)
        if target is None:
            sorted_target = self.sorted_target.to(p.dtype)  # (V,)
        else:
            sorted_target = self._target_for(p, target).to(p.dtype).index_select(-1, self.order)  # (V,) or (..., V)
        # cumsum of the difference, not difference of the cumsums: exact zeros where p = P, one pass less
        tail = p.index_select(-1, self.order).sub_(sorted_target).cumsum_(-1)  # (..., V) F_p - F_P
        slope = tail.sign().mul_(gaps)  # (..., V)
        value = tail.mul_(slope).sum(-1)  # (...); a product and a sum, because autocast and TF32 round matmuls
        torch.cumsum(slope, -1, out=tail)
        total = tail[..., -1:].clone()  # (..., 1)
        torch.sub(slope, tail, out=tail).add_(total)  # (..., V) sum over k >= j = total - (sum over k <= j) + slope_j
        del slope
        return value, tail.index_select(-1, self.rank)  # (...), (..., V)
