"""Exact optimal transport on small supports, by linear programming: the reference that the line is judged by.

Needs the POT library (a development dependency): nothing that trains imports this module.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plot_align.errors import InputError, RunError
from plot_align.transport.base import check_target
from plot_align.transport.geometry import check_norm_order

MAX_SUPPORT = 4096  # the cost matrix is dense; 4096 squared is 128 MiB in float64


def cost_matrix(embeddings: Tensor, *, norm_order: float = 2.0) -> Tensor:
    """``C_ij = ||e_i - e_j||_l``: (n, H) → (n, n) float64 on the CPU.

    Raises:
        InputError: more than 4096 rows, or l < 1.
    """
    if embeddings.ndim != 2 or embeddings.shape[0] > MAX_SUPPORT:
        raise InputError(
            f"embeddings has shape {tuple(embeddings.shape)}, but (n, H) with n <= {MAX_SUPPORT} is needed: "
            "select the tokens of the support first."
        )
    rows = embeddings.detach().cpu().double()  # (n, H)
    # cdist's matmul trick loses half the digits of small distances
    return torch.cdist(rows, rows, p=check_norm_order(norm_order), compute_mode="donot_use_mm_for_euclid_dist")


def exact_cost(p: Tensor, target: Tensor, cost: Tensor) -> float:
    """``min_{T in U(p, P)} <T, C>``, the cost of the best transport plan, by network simplex (``ot.emd2``).

    Args:
        p: (n,) a distribution.
        target: (n,) a distribution.
        cost: (n, n) ``C_ij``, what moving one unit of mass from token i to token j costs.

    Returns:
        The cost, in units of C.

    Raises:
        InputError: POT is missing, shapes differ, or p or target is no distribution.
        RunError: the solver stopped before the optimum.

    Source: Bonneel et al., "Displacement interpolation using Lagrangian mass transport" (2011), through POT.
    """
    try:
        import ot
    except ImportError as error:
        raise InputError(
            "exact_cost needs the POT library, which is not installed, but is a development dependency: "
            'install it with pip install "plot-align[dev]".'
        ) from error
    source, sink = (check_target(x).cpu() for x in (p, target))  # (n,), (n,)
    n = source.numel()
    if sink.numel() != n or tuple(cost.shape) != (n, n):
        raise InputError(
            f"cost has shape {tuple(cost.shape)} for p of {n} and target of {sink.numel()} tokens, but (n, n) with "
            "one n for all three is needed: select the same tokens everywhere."
        )
    rows, columns = source > 0, sink > 0  # the plan is zero elsewhere
    value, log = ot.emd2(
        source[rows].numpy(),
        sink[columns].numpy(),
        cost.detach().cpu().double()[rows][:, columns].contiguous().numpy(),
        numItermax=5_000_000,
        log=True,
    )
    if log["warning"] is not None:
        raise RunError(f"ot.emd2 stopped before the optimum on {n} tokens: {log['warning']}; use fewer tokens.")
    return float(value)
