"""The expected cost of independent draws: an upper bound of optimal transport, linear in p."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from plot_align.transport.base import Divergence, widest_dtype
from plot_align.transport.geometry import chunks, rows_per_chunk
from plot_align.transport.table import Table


class ExpectedCost(Divergence):
    """Expected cosine distance of a token drawn from p and one drawn from P (EMO).

        E = F.normalize(embeddings, dim=1);  value = 1 - (p @ E) @ (P @ E)    # the naive line

    With ``C_ij = 1 - cos(e_i, e_j)`` this is ``sum_ij p_i P_j C_ij``, the cost of the plan ``p P^T``: an upper bound
    of the cheapest one. Linear in p, so its potential ``s_j = sum P - <E_j, E^T P>`` does not depend on p; it is not 0
    at p = P, and least where all of p is on the tokens nearest to P's mean direction. A zero row (padding) has no
    direction: it is at distance 1 from every token, itself included. Source: Ren et al., "EMO: Earth Mover Distance
    Optimization for Auto-Regressive Language Modeling" (ICLR 2024).

    A target costs two passes over the embeddings, in chunks of 32 MiB: once for the target given here, on each call
    for a target of that call. On a GPU they run in float64, because there reading the table dominates and TF32 must
    not round the products. On a CPU they run in the table's dtype, float32 at least, and sums over chunks in float64,
    which is accurate to 1e-5. The embeddings are held by reference, see :class:`plot_align.transport.table.Table`.

    Args:
        target: (V,) P, see :class:`Divergence`.
        embeddings: (V, H), any floating dtype and device, finite.

    Raises:
        InputError: the target is no distribution; embeddings of another size, or not finite.
    """

    inverse_norms: Tensor  # (V,), 0 for zero rows
    fixed_potential: Tensor  # (V,) of the target given at construction

    def __init__(self, target: Tensor, embeddings: Tensor) -> None:
        super().__init__(target)
        self._table = Table(embeddings, self.vocab_size)
        norms = torch.cat([torch.linalg.vector_norm(rows, dim=1) for rows in chunks(self._table.weight)])  # (V,)
        inverse = torch.where(norms > 0, 1.0 / norms, 0.0)  # (V,)
        self._constant("inverse_norms", inverse.to(self.target.dtype).to(self.target.device))
        self._constant("fixed_potential", self._potential_to(self.target))

    @torch.no_grad()
    def value_and_potential(self, p: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Divergence.value_and_potential`; a cosine distance, between 0 and 2."""
        p = self._prepare(p)  # (..., V)
        fixed, target = target is None, self._target_for(p, target)  # (V,) or (..., V)
        potential = (self.fixed_potential if fixed else self._potential_to(target)).to(p.dtype)  # (V,) or (..., V)
        return (p * potential).sum(-1), potential.expand(p.shape).clone()

    def _potential_to(self, target: Tensor) -> Tensor:
        """P (..., V) → its potential (..., V), on P's device."""
        target = target.to(self.inverse_norms.dtype)
        weights = (target * self.inverse_norms).split(rows_per_chunk(self._table.weight), dim=-1)  # (..., n) each
        with torch.autocast(target.device.type, enabled=False):
            direction = target.new_zeros(*target.shape[:-1], self._table.weight.shape[1])  # (..., H) E^T P
            for part, rows in zip(weights, self._chunks(), strict=True):
                direction += part.to(rows) @ rows
            cosine = torch.cat([direction.to(rows) @ rows.T for rows in self._chunks()], dim=-1)  # (..., V)
        return target.sum(-1, keepdim=True) - cosine * self.inverse_norms

    def _chunks(self) -> Iterator[Tensor]:
        """The table in blocks of (n, H), in the dtype of the products."""
        weight = self._table.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        for rows in weight.split(rows_per_chunk(weight)):
            yield rows.to(dtype if weight.device.type == "cpu" else widest_dtype(weight.device))

    def _apply(self, fn: Any, recurse: bool = True) -> Divergence:
        super()._apply(fn, recurse)
        self._table.to(self.target.device)
        return self
