"""Exact optimal transport on small supports, by linear programming."""

from __future__ import annotations

import ot
import torch
from torch import Tensor


def cost_matrix(embeddings: Tensor, *, norm_order: float = 2.0) -> Tensor:
    """``C_ij = ||e_i - e_j||_l``: (n, H) → (n, n) float64."""
    rows = embeddings.detach().double()  # (n, H)
    # cdist's matmul trick loses half the digits of small distances
    return torch.cdist(rows, rows, p=norm_order, compute_mode="donot_use_mm_for_euclid_dist")


def exact_cost(p: Tensor, target: Tensor, cost: Tensor) -> float:
    """``min_{T in U(p, P)} <T, C>``, the cost of the best transport plan, in units of C.

    Args:
        p, target: (n,) distributions.
        cost: (n, n) ``C_ij``, what moving one unit of mass from token i to token j costs.

    Source: Bonneel et al., "Displacement interpolation using Lagrangian mass transport" (2011), through POT.
    """
    source, sink = (x.detach().double() / x.detach().double().sum() for x in (p, target))  # (n,), (n,)
    rows, columns = source > 0, sink > 0  # the plan is zero elsewhere
    value, log = ot.emd2(
        source[rows].numpy(),
        sink[columns].numpy(),
        cost.detach().double()[rows][:, columns].contiguous().numpy(),
        numItermax=5_000_000,
        log=True,
    )
    if log["warning"] is not None:
        raise RuntimeError(f"ot.emd2 stopped before the optimum on {len(source)} tokens: {log['warning']}")
    return float(value)
