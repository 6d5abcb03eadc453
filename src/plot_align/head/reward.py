"""DEFT's distribution reward over log-probabilities, from the head's inputs: one product with a vector, no logits.

``L = L_vanilla − ω·R`` (arXiv 2604.01787) with d = Q⁺/ΣQ⁺ − Q⁻/ΣQ⁻
(:meth:`~plot_align.PreferenceDistribution.difference`); R over probabilities is a divergence,
:class:`~plot_align.transport.reward.DistributionReward`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plot_align.errors import InputError

# Rows of a bf16 head that are converted to float32 at a time.
_CAST_ROWS = 16384


def log_reward(
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
    """R over log-probabilities, from the head's inputs, without logits.

        R = weights @ ((scale * (hidden @ weight.T + bias)).log_softmax(-1) @ difference)    # the naive line

    Because d sums to zero, every log-sum-exp drops out and R is linear in the hidden states:
    ``R = scale·(⟨h̄, Wᵀd⟩ + ⟨b, d⟩)`` with ``h̄ = Σ_t w_t h_t``. That is one product of the head with a vector, whatever
    the number of positions; nothing of size (N, V) is made, and the backward does not read the head at all.

    Source: arXiv 2604.01787; that the reward is over log-probabilities is our reading.

    Args:
        hidden: (N, H) the head's inputs at the positions that predict the scored tokens. Any floating dtype.
        weight: (V, H) rows of the head.
        bias: (V,) the head's bias, or None.
        difference: (V,) d, a constant that sums to zero (its sum is not checked: that would stop a GPU on every
            step). Rows of the head beyond the tokenizer have d = 0: ``preference.difference(size=V)``.
        weights: (N,) weight of each position in its segment, constants; those of a segment sum to one.
        segments: (N,) int64, the segment of each position, e.g. its sequence; None: one segment.
        num_segments: number of segments S.
        scale: the factor on the logits before the softmax, from :func:`reward_scale`.

    Returns:
        (S,) R of every segment in nats, 0 for one without positions; float32, or float64 for float64 ``hidden``. Sums
        are taken in that dtype whatever the dtype of the head, and under autocast. Differentiable once in ``hidden``,
        ``weight`` and ``bias``.

    Raises:
        InputError: shapes that do not fit; in the backward, ``create_graph=True``.
    """
    for name, tensor, shape, rows in (
        ("difference", difference, (weight.size(0),), "row of the head: use preference.difference(size=rows)"),
        ("weights", weights, (hidden.size(0),), "position: pass the weight of each"),
    ):
        if tensor.shape != shape:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}, but {shape} is needed, one entry a {rows}.")
    return _LogReward.apply(hidden, weight, bias, difference, weights, segments, num_segments, scale)


def reward_scale(*, logit_scale: float = 1.0, temperature: float = 1.0, softcap: float | None = None) -> float:
    """The ``scale`` of :func:`log_reward` for a model that scales its logits like this.

    Raises:
        InputError: the model caps its logits, so that they are not linear in the hidden states.
    """
    if softcap is not None:
        raise InputError(
            f"the model caps its logits (final_logit_softcapping is {softcap:g}), but the log reading of the "
            "distribution reward needs logits that are linear in the hidden states: use the prob reading."
        )
    return logit_scale / temperature


class _LogReward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        difference: Tensor,  # (V,)
        weights: Tensor,  # (N,)
        segments: Tensor | None,  # (N,)
        num_segments: int,
        scale: float,
    ) -> Tensor:
        stat = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            d = difference.to(hidden.device, stat)  # (V,)
            rows = torch.arange(hidden.size(0), device=hidden.device)  # (N,)
            by_segment = torch.zeros(num_segments, hidden.size(0), device=hidden.device, dtype=stat)  # (S, N)
            # A product rather than index_add, whose order of summation is not fixed on a GPU.
            by_segment[torch.zeros_like(rows) if segments is None else segments, rows] = weights.to(stat)
            pooled = by_segment @ hidden.to(stat)  # (S, H)
            direction = hidden.new_zeros(hidden.size(1), dtype=stat)  # (H,) Wᵀd
            for start in range(0, weight.size(0), _CAST_ROWS):
                part = slice(start, start + _CAST_ROWS)
                direction += d[part] @ weight[part].to(stat)
            rewards = pooled @ direction  # (S,)
            if bias is not None:
                rewards = rewards + by_segment.sum(-1) * (bias.to(stat) @ d)
        ctx.save_for_backward(by_segment, pooled, direction, d)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.scale = scale
        return scale * rewards

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # nothing saved has a graph: second derivatives would silently be zero
            raise InputError(
                "create_graph is True, but the distribution reward can be differentiated only once: leave "
                "create_graph off, or use an optimiser that needs no second derivatives."
            )
        by_segment, pooled, direction, d = ctx.saved_tensors
        hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
        grad_hidden = grad_weight = grad_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            each = ctx.scale * grad.to(by_segment.dtype)  # (S,)
            if ctx.needs_input_grad[0]:
                grad_hidden = torch.outer(each @ by_segment, direction).to(hidden_dtype)  # (N, H)
            if ctx.needs_input_grad[1]:
                mean = each @ pooled  # (H,)
                grad_weight = torch.empty(d.numel(), mean.numel(), device=d.device, dtype=weight_dtype)  # (V, H)
                for start in range(0, d.numel(), _CAST_ROWS):
                    part = slice(start, start + _CAST_ROWS)
                    grad_weight[part] = torch.outer(d[part], mean)
            if bias_dtype is not None and ctx.needs_input_grad[2]:
                grad_bias = (d * (each @ by_segment.sum(-1))).to(bias_dtype)  # (V,)
        return grad_hidden, grad_weight, grad_bias, *(None,) * 5
