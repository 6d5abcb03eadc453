"""The elementwise part of the head in plain torch, on slices of a block that fit into a CPU's cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from plot_align.head.block import Gradients, Logits, Plot, Run, Statistics, overlaps, runs_of
from plot_align.transport import Divergence

# W1 gathers p into the order of its line. Permuting the head's rows instead, as `block_triton` does, was slower on a
# CPU: 1.4 times the head's time, against 1.1 to 1.3 with the gather (docs/log/2026-11-28.md).
SORTS_COLUMNS = False

# Large enough to fill a GPU, small enough that a few fp32 temporaries stay far below the block.
_SLICE_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}


def rows_per_slice(device: torch.device, vocab: int) -> int:
    """The number of rows of V elements in one step of elementwise work."""
    return max(1, _SLICE_ELEMENTS.get(device.type, _SLICE_ELEMENTS["cuda"]) // vocab)


def runs(weights: Tensor, segments: Tensor | None, num_segments: int, divergence: Divergence | None) -> list[Run]:
    """The runs of rows to sum up: those with positive weight, segment by segment."""
    return runs_of(weights, segments)


def forward(
    raw: Tensor,  # (T, V)
    first: int,
    logits: Logits,
    targets: Tensor,  # (N,)
    statistics: Statistics,
    plot: Plot | None,
    distributions: Tensor | None,  # (S, V)
) -> None:
    """Fills in the block's rows of ``statistics`` and adds its weighted softmaxes to ``distributions``.

    Args:
        raw: the block; overwritten if its dtype is that of the statistics.
        first: the block's first row among all N.
        targets: column of each row's next token.
    """
    for start, part in _slices(raw):
        r = slice(first + start, first + start + part.size(0))
        z, _ = transform(part, logits, keep=False)  # (R, V)
        top, index = z.max(-1)  # the first maximum, as argmax: a tie with an earlier token is no hit
        target_logit = z.gather(-1, targets[r].unsqueeze(-1)).squeeze(-1)
        statistics.target_logit[r] = target_logit
        if statistics.top1 is not None:
            statistics.top1[r] = index == targets[r]
        if statistics.mean is not None:
            statistics.mean[r] = z.mean(-1)
        e = torch.sub(z, top.unsqueeze(-1)).exp_()  # (R, V)
        total = e.sum(-1)  # (R,)
        log_z = top + total.log()
        statistics.log_z[r] = log_z
        if statistics.entropy is not None:
            statistics.entropy[r] = log_z - z.mul_(e).sum(-1) / total
        if statistics.sum_sq is not None:
            statistics.sum_sq[r] = torch.mul(e, e, out=z).sum(-1).log() - 2 * total.log()
        if plot is None or distributions is None:
            continue
        for batch_rows, block_rows, segment in overlaps(plot.runs, r.start, r.stop):
            # `addmv` reads e once; it is no product of the head's size.
            with record_function("plot_align/output_distribution"):
                torch.addmv(
                    distributions[segment],
                    e[block_rows].T,
                    plot.weights[batch_rows] / total[block_rows],
                    out=distributions[segment],
                )
            if plot.divergence is not None and statistics.values is not None:
                p = e[block_rows].div_(total[block_rows].unsqueeze(-1))  # (R', V); e is not needed any more
                statistics.values[batch_rows] = plot.divergence.value(p).to(statistics.values.dtype)


def backward(
    raw: Tensor,  # (T, V)
    first: int,
    logits: Logits,
    targets: Tensor,  # (N,)
    gradients: Gradients,
    plot: Plot | None,
) -> None:
    """Overwrites the block with the gradient of the loss with respect to it.

        p ⊙ (−g_t + w_t·(s − ⟨p_t, s⟩)) + g_t·1[target] − h_t·p ⊙ (log p + H)        times ∂z/∂raw

    with g, h, s the gradients of log-probability, entropy and output distribution (or of each position's own value).
    """
    for start, part in _slices(raw):
        r = slice(first + start, first + start + part.size(0))
        z, slope = transform(part, logits, keep=gradients.of_entropy is not None)  # (R, V)
        log_p = z.sub_(gradients.log_z[r].unsqueeze(-1))
        from_entropy = None
        if gradients.of_entropy is not None and gradients.entropy is not None:
            p = log_p.exp()
            # ∂H/∂z_j = −p_j·(log p_j + H)
            from_entropy = log_p.add_(gradients.entropy[r].unsqueeze(-1)).mul_(p)
            from_entropy.mul_(gradients.of_entropy[r].unsqueeze(-1))
        else:
            p = log_p.exp_()
        # The gradient of the logits is p ⊙ factor + g·1[target]: one number per row where PLOT has no weight.
        g = gradients.of_log_prob  # (N,)
        done = 0
        for batch_rows, block_rows, segment in overlaps([] if plot is None else plot.runs, r.start, r.stop):
            if plot is None:
                break
            p[done : block_rows.start].mul_(-g[r.start + done : batch_rows.start].unsqueeze(-1))
            with record_function("plot_align/potential"):
                times_plot_factor(
                    p[block_rows],
                    -g[batch_rows],
                    plot.weights[batch_rows],
                    None if gradients.potential is None else gradients.potential[segment],
                    None if gradients.of_value is None else gradients.of_value[batch_rows],
                    plot.divergence,
                )
            done = block_rows.stop
        p[done:].mul_(-g[r.start + done : r.stop].unsqueeze(-1))
        if from_entropy is not None:
            p.sub_(from_entropy)
        p.scatter_add_(-1, targets[r].unsqueeze(-1), g[r].unsqueeze(-1))
        if slope is not None:
            p.mul_(slope)
        if logits.outer != 1.0:
            p.mul_(logits.outer)
        if p.data_ptr() != part.data_ptr():
            part.copy_(p)


def transform(raw: Tensor, logits: Logits, *, keep: bool) -> tuple[Tensor, Tensor | None]:
    """(R, V) final logits in the statistics' dtype, in place unless ``keep``; and 1 − tanh² if capped."""
    z = raw.to(logits.dtype, copy=keep)
    if logits.bias is not None:
        z = z.add_(logits.bias)
    if logits.logit_scale != 1.0:
        z = z.mul_(logits.logit_scale)
    slope = None
    if logits.softcap is not None:
        z = z.div_(logits.softcap).tanh_()
        slope = 1 - z.square()
        z = z.mul_(logits.softcap)
    if logits.temperature != 1.0:
        z = z.div_(logits.temperature)
    return z, slope


def times_plot_factor(
    p: Tensor,  # (R, V), changed in place
    row: Tensor,  # (R,) the rest of the factor
    weights: Tensor,  # (R,)
    potential: Tensor | None,  # (V,) gradient of the loss with respect to this segment's output distribution
    g_value: Tensor | None,  # (R,) gradient of the loss with respect to each position's value
    divergence: Divergence | None,
) -> None:
    """``p ⊙ (row + w_t·(s − ⟨p_t, s⟩))``, s the potential of the segment or of the position."""
    if g_value is not None and divergence is not None:
        factor = divergence.potential(p).to(p.dtype)  # (R, V)
        mean = torch.linalg.vecdot(p, factor)  # (R,)
        factor.mul_(g_value.unsqueeze(-1)).add_((row - g_value * mean).unsqueeze(-1))
        p.mul_(factor)
    elif potential is not None:
        row = row - weights * torch.mv(p, potential)  # (R,)
        p.mul_(torch.addr(row.unsqueeze(-1), weights, potential))  # one pass builds the factor, one applies it


def _slices(block: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The first row of each slice and the slice itself, a view of ``block`` (R, V)."""
    step = rows_per_slice(block.device, block.size(-1))
    for start in range(0, block.size(0), step):
        yield start, block[start : start + step]
