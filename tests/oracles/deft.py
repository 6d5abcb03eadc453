"""DEFT's distribution reward, log reading, on materialised log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor


def materialised_log_reward(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    difference: Tensor,  # (V,)
    *,
    weights: Tensor,  # (N,)
    segments: Tensor | None = None,  # (N,) int64
    num_segments: int = 1,
    scale: float = 1.0,
) -> Tensor:
    """Same arguments and same result as ``log_reward``."""
    z = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))  # (N, V)
    if bias is not None:
        z = z + bias
    log_p = (scale * z).log_softmax(-1)  # (N, V)
    rewards = weights.to(z.dtype) * (log_p @ difference.to(z.dtype))  # (N,)
    if segments is None:
        segments = torch.zeros_like(weights, dtype=torch.int64)
    return rewards.new_zeros(num_segments).index_add(0, segments, rewards)  # (S,)
