"""The output distribution from logits that a trainer has built anyway: no matrix product and no copy of them.

Only the selected rows are read, a slice at a time. Forward keeps the logits themselves and one number a row; backward
makes the softmax again and returns the gradient of the logits. That is one buffer of their size. It does not raise
the peak: autograd runs the newest nodes first, so the vanilla loss, whose own gradients of slices of the logits are
as large, is done by then, and the buffer is freed as soon as it is added.
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

        marginals[s] = (weights[..., None] * softmax(logits, -1))[segments == s].sum(0)        # the naive line

    Its gradient is ``w_t · p_t ⊙ (s − ⟨p_t, s⟩)``, s the gradient with respect to the segment's marginal.

    Args:
        logits: ``(N, V)`` or ``(B, T, V)``, any float dtype, contiguous (else they are copied). Rows of weight 0 are
            not read, and may hold anything.
        weights: share of each position in its segment's distribution, 0 or more. A distribution results where the
            weights of a segment sum to one.
        segments: which marginal a position belongs to; ``None`` for one of all. Selected rows of one segment that
            are adjacent are swept together.
        num_segments: number of marginals S.
        divergence: asks for its value at every position instead of a gradient through the marginals; it must be on
            the device of the logits.

    Returns:
        ``marginals (S, V)`` in fp32 (fp64 for fp64 logits), without gradient where ``divergence`` is given; and
        ``values``, in the shape of ``weights``: the divergence at each position with a positive weight, 0 elsewhere,
        or ``None`` without ``divergence``.

    Raises:
        InputError: in backward, where ``create_graph`` asks for second derivatives.
    """
    return _OutputDistribution.apply(logits, weights, segments, num_segments, divergence)


@torch.no_grad()
def target_log_probs(logits: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """``log_softmax(logits)[rows, targets]``, in fp32 at least and without a graph, a slice at a time.

    Args:
        logits: ``(..., V)``.
        rows: ``(M,)`` int64, places in the flattened leading dimensions.
        targets: ``(M,)`` int64.

    Returns:
        ``(M,)``, NaN or infinite where the row's logits are.
    """
    flat = logits.reshape(-1, logits.size(-1))  # (N, V)
    found = torch.empty(rows.numel(), device=logits.device, dtype=_statistics(logits))
    step = rows_per_slice(logits.device, logits.size(-1))
    for start in range(0, rows.numel(), step):
        r = slice(start, start + step)
        z = flat[rows[r]].to(found.dtype)  # (R, V)
        found[r] = z.gather(-1, targets[r].unsqueeze(-1)).squeeze(-1) - z.logsumexp(-1)
    return found


def _statistics(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _slices(runs: list[Run], rows: int) -> Iterator[tuple[slice, int]]:
    """The runs in slices of at most ``rows``, each with its segment."""
    for first, end, segment in runs:
        for start in range(first, end, rows):
            yield slice(start, min(start + rows, end)), segment


class _OutputDistribution(torch.autograd.Function):
    @staticmethod
    @record_function("plot_align/marginal")
    def forward(
        ctx: Any,
        logits: Tensor,  # (..., V)
        weights: Tensor,  # (...)
        segments: Tensor | None,  # (...)
        num_segments: int,
        divergence: Divergence | None,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        stat, vocab = _statistics(logits), logits.size(-1)
        flat = logits.detach().reshape(-1, vocab)  # (N, V)
        share = weights.detach().flatten().to(logits.device, stat)  # (N,)
        runs = runs_of(share, None if segments is None else segments.flatten().to(logits.device))
        log_z = torch.zeros_like(share)
        marginals = torch.zeros(num_segments, vocab, device=logits.device, dtype=stat)  # (S, V)
        values = torch.zeros_like(share) if divergence is not None else None  # (N,)
        with torch.autocast(logits.device.type, enabled=False):
            for r, segment in _slices(runs, rows_per_slice(logits.device, vocab)):
                top = flat[r].amax(-1, keepdim=True).to(stat)  # (R, 1)
                e = torch.sub(flat[r], top).exp_()  # (R, V) in `stat`, which `top` promotes to
                total = e.sum(-1)  # (R,)
                log_z[r] = top.squeeze(-1) + total.log()
                torch.addmv(marginals[segment], e.T, share[r] / total, out=marginals[segment])
                if divergence is not None and values is not None:
                    values[r] = divergence.value(e.div_(total.unsqueeze(-1))).to(stat)
        ctx.save_for_backward(logits, share, log_z)
        ctx.runs, ctx.divergence = runs, divergence
        if divergence is not None:
            ctx.mark_non_differentiable(marginals)
        return marginals, None if values is None else values.view(weights.shape)

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
        logits, share, log_z = ctx.saved_tensors
        flat = logits.reshape(-1, logits.size(-1))  # (N, V)
        gradient = torch.zeros_like(flat)  # (N, V)
        with torch.autocast(logits.device.type, enabled=False):
            for r, segment in _slices(ctx.runs, rows_per_slice(logits.device, logits.size(-1))):
                p = torch.sub(flat[r], log_z[r].unsqueeze(-1)).exp_()  # (R, V)
                times_plot_factor(
                    p,
                    torch.zeros_like(share[r]),  # nothing but PLOT flows through these rows
                    share[r],
                    None if potential is None else potential[segment].to(p.dtype),
                    None if g_value is None else g_value.flatten()[r].to(p.dtype),
                    ctx.divergence,
                )
                gradient[r] = p
        return gradient.view(logits.shape), None, None, None, None
