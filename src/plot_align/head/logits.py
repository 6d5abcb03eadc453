"""The output distribution from logits that the trainer builds anyway: no matrix product, and no copy of the logits.

Only the selected rows are read, a slice at a time. Forward saves the logits themselves and one number per row;
backward recomputes the softmax and returns the gradient of the logits, one buffer of their size. This does not raise
the peak: autograd runs the newest nodes first, and the gradients of the vanilla loss are just as large, so the buffer
is freed, as soon as it is added, at a time when the vanilla loss is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from plot_align.errors import InputError
from plot_align.head.block import Run, runs_of
from plot_align.head.block_torch import rows_per_slice, times_plot_factor
from plot_align.transport import Divergence


def output_distribution(
    logits: Tensor,  # (..., V)
    weights: Tensor,  # (...)
    segments: Tensor | None = None,  # (...) int64
    num_segments: int = 1,
    divergence: Divergence | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Output distributions of the selected positions, differentiable once in the logits.

        distributions[s] = (weights[..., None] * softmax(logits, -1))[segments == s].sum(0)        # the naive line

    Its gradient is ``w_t · p_t ⊙ (s − ⟨p_t, s⟩)``, s the gradient with respect to the segment's distribution.

    Args:
        logits: ``(N, V)`` or ``(B, T, V)``, any float dtype; copied unless contiguous. Rows of weight 0 are not read,
            and may hold anything.
        weights: weight of each position in its segment, 0 or more. The result is a distribution if the weights of a
            segment sum to one.
        segments: the segment of each position; ``None``: one segment.
        num_segments: number of segments S.
        divergence: if given, its value is computed at every position, and no gradient flows through the
            distributions. It must be on the device of the logits.

    Returns:
        ``distributions (S, V)`` in fp32 (fp64 for fp64 logits), without gradient if ``divergence`` is given; and
        ``values`` in the shape of ``weights``, the divergence at each position with a positive weight and 0 elsewhere,
        or ``None`` without ``divergence``.

    Raises:
        InputError: in backward, if ``create_graph`` is on.
    """
    return _OutputDistribution.apply(logits, weights, segments, num_segments, divergence)


@torch.no_grad()
def target_log_probs(logits: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """``log_softmax(logits)[rows, targets]``, in fp32 at least and without a graph, a slice at a time.

    Args:
        logits: ``(..., V)``.
        rows: ``(M,)`` int64, indices into the flattened leading dimensions.
        targets: ``(M,)`` int64.

    Returns:
        ``(M,)``, NaN or infinite if the row's logits are.
    """
    flat = logits.reshape(-1, logits.size(-1))  # (N, V)
    found = torch.empty(rows.numel(), device=logits.device, dtype=_statistics_dtype(logits))
    step = rows_per_slice(logits.device, logits.size(-1))
    for start in range(0, rows.numel(), step):
        r = slice(start, start + step)
        z = flat[rows[r]].to(found.dtype)  # (R, V)
        found[r] = z.gather(-1, targets[r].unsqueeze(-1)).squeeze(-1) - z.logsumexp(-1)
    return found


def _statistics_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _slices(runs: list[Run], rows: int) -> Iterator[tuple[slice, int]]:
    """The runs in slices of at most ``rows`` rows, each with its segment."""
    for first, end, segment in runs:
        for start in range(first, end, rows):
            yield slice(start, min(start + rows, end)), segment


class _OutputDistribution(torch.autograd.Function):
    @staticmethod
    @record_function("plot_align/output_distribution")
    def forward(
        ctx: Any,
        logits: Tensor,  # (..., V)
        weights: Tensor,  # (...)
        segments: Tensor | None,  # (...)
        num_segments: int,
        divergence: Divergence | None,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        stat, vocab = _statistics_dtype(logits), logits.size(-1)
        flat = logits.detach().reshape(-1, vocab)  # (N, V)
        flat_weights = weights.detach().flatten().to(logits.device, stat)  # (N,)
        runs = runs_of(flat_weights, None if segments is None else segments.flatten().to(logits.device))
        log_z = torch.zeros_like(flat_weights)
        distributions = torch.zeros(num_segments, vocab, device=logits.device, dtype=stat)  # (S, V)
        values = torch.zeros_like(flat_weights) if divergence is not None else None  # (N,)
        with torch.autocast(logits.device.type, enabled=False):
            for r, segment in _slices(runs, rows_per_slice(logits.device, vocab)):
                top = flat[r].amax(-1, keepdim=True).to(stat)  # (R, 1)
                e = torch.sub(flat[r], top).exp_()  # (R, V) in `stat`, which `top` promotes to
                total = e.sum(-1)  # (R,)
                log_z[r] = top.squeeze(-1) + total.log()
                torch.addmv(distributions[segment], e.T, flat_weights[r] / total, out=distributions[segment])
                if divergence is not None and values is not None:
                    values[r] = divergence.value(e.div_(total.unsqueeze(-1))).to(stat)
        ctx.save_for_backward(logits, flat_weights, log_z)
        ctx.runs, ctx.divergence = runs, divergence
        if divergence is not None:
            ctx.mark_non_differentiable(distributions)
        return distributions, None if values is None else values.view(weights.shape)

    @staticmethod
    @record_function("plot_align/potential")
    def backward(ctx: Any, potential: Tensor | None, g_value: Tensor | None) -> tuple[Tensor | None, ...]:
        if potential is None and g_value is None:
            return (None,) * 5
        if torch.is_grad_enabled():  # the formula below has no graph: second derivatives would silently be zero
            raise InputError(
                "create_graph is True, but the output distribution can be differentiated only once: leave "
                "create_graph off, or use an optimiser that needs no second derivatives."
            )
        logits, weights, log_z = ctx.saved_tensors
        flat = logits.reshape(-1, logits.size(-1))  # (N, V)
        gradient = torch.zeros_like(flat)  # (N, V)
        with torch.autocast(logits.device.type, enabled=False):
            for r, segment in _slices(ctx.runs, rows_per_slice(logits.device, logits.size(-1))):
                p = torch.sub(flat[r], log_z[r].unsqueeze(-1)).exp_()  # (R, V)
                times_plot_factor(
                    p,
                    torch.zeros_like(weights[r]),  # no other gradient flows through these rows
                    weights[r],
                    None if potential is None else potential[segment].to(p.dtype),
                    None if g_value is None else g_value.flatten()[r].to(p.dtype),
                    ctx.divergence,
                )
                gradient[r] = p
        return gradient.view(logits.shape), None, None, None, None
