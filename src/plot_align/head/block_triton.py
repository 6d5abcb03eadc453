"""The elementwise part of the head in Triton kernels: what ``block_torch.py`` computes, in fewer passes over memory.

A forward reads the block once, and the rows that PLOT selects a second time; a backward reads and writes it once, and
reads the selected rows a second time. Every sum has a fixed order (partial buffers, no atomics), so the same input in
blocks of the same size gives the same bits. Logits are float32 in registers, whatever the block's dtype.

    TRITON_INTERPRET=1      # set before this module is imported: the kernels run on CPU tensors, slowly
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.profiler import record_function
from triton import knobs

from plot_align.head import block_torch
from plot_align.head import triton_kernels as kernels
from plot_align.head.block import Gradients, Logits, Plot, Run, Statistics, overlaps
from plot_align.transport import Divergence, SortedLine

# Along a line the kernels carry the cumulative sum from step to step, so columns must be in the line's order.
SORTS_COLUMNS = True
INTERPRETED = bool(knobs.runtime.interpret)

# Elements of a row in one step of a row's program, and in one program of the elementwise kernel.
_ROW_BLOCK = 2048
_BLOCK = 1024
# One program of the column sums: its columns, its rows, and the rows of one step.
_SUM_COLUMNS, _SUM_ROWS, _SUM_STEP = 512, 64, 8


def runs(weights: Tensor, segments: Tensor | None, num_segments: int, divergence: Divergence | None) -> list[Run]:
    """See :func:`plot_align.head.block_torch.runs`. The kernels themselves skip the unselected rows of a run."""
    if num_segments == 1 and (divergence is None or isinstance(divergence, SortedLine)):
        return [(0, weights.numel(), 0)]
    return block_torch.runs(weights, segments, num_segments, divergence)


def forward(
    raw: Tensor,  # (T, V)
    first: int,
    logits: Logits,
    targets: Tensor,  # (N,)
    statistics: Statistics,
    plot: Plot | None,
    distributions: Tensor | None,  # (S, V)
) -> None:
    """See :func:`plot_align.head.block_torch.forward`; the block is not changed."""
    rows, vocab = raw.shape
    r = slice(first, first + rows)
    with _current(raw.device):
        kernels.statistics[(rows,)](
            raw, raw.stride(0), logits.bias, targets[r], logits.tokens,
            statistics.log_z[r], statistics.target_logit[r], *(None if x is None else x[r] for x in (
                statistics.entropy, statistics.sum_sq, statistics.mean, statistics.top1)),
            vocab, *_numbers(logits), **_flags(logits), HAS_TOKENS=logits.tokens is not None,
            ENTROPY=statistics.entropy is not None, SUM_SQ=statistics.sum_sq is not None,
            MEAN=statistics.mean is not None, TOP1=statistics.top1 is not None, BLOCK=_row_block(vocab), num_warps=8,
        )  # fmt: skip
        if plot is None or distributions is None:
            return
        for batch_rows, block_rows, segment in overlaps(plot.runs, r.start, r.stop):
            with record_function("plot_align/output_distribution"):
                _add_column_sums(
                    raw[block_rows],
                    logits,
                    statistics.log_z[batch_rows],
                    plot.weights[batch_rows],
                    distributions[segment],
                )
            if plot.divergence is None or statistics.values is None:
                continue
            if isinstance(plot.divergence, SortedLine):
                line = plot.divergence
                kernels.line_values[(block_rows.stop - block_rows.start,)](
                    raw[block_rows], raw.stride(0), logits.bias, statistics.log_z[batch_rows],
                    plot.weights[batch_rows], line.target.float(), line.gaps.float(),
                    statistics.values[batch_rows], vocab, *_numbers(logits),
                    **_flags(logits), BLOCK=_row_block(vocab), num_warps=8,
                )  # fmt: skip
            else:
                _add_values(raw[block_rows], logits, statistics.log_z[batch_rows], plot, statistics.values[batch_rows])


def backward(
    raw: Tensor,  # (T, V)
    first: int,
    logits: Logits,
    targets: Tensor,  # (N,)
    gradients: Gradients,
    plot: Plot | None,
) -> None:
    """See :func:`plot_align.head.block_torch.backward`."""
    rows, vocab = raw.shape
    r = slice(first, first + rows)
    per_token = plot is not None and gradients.of_value is not None
    if per_token and plot is not None and not isinstance(plot.divergence, SortedLine):
        # Every row has its own potential, from a divergence that is no line: nothing to fuse.
        block_torch.backward(raw, first, logits, targets, gradients, plot)
        return
    has_entropy = gradients.of_entropy is not None and gradients.entropy is not None
    entropy = (gradients.entropy[r], gradients.of_entropy[r]) if has_entropy else (None, None)  # type: ignore[index]
    common = (logits.bias, targets[r], gradients.log_z[r], gradients.of_log_prob[r], *entropy)
    numbers = (vocab, *_numbers(logits), logits.outer)
    flags = {**_flags(logits), "ENTROPY": has_entropy}
    with _current(raw.device):
        if per_token and plot is not None and gradients.of_value is not None:
            line: Any = plot.divergence
            weight = torch.where(plot.weights[r] > 0, gradients.of_value[r], 0.0)  # (T,)
            kernels.line_gradient[(rows,)](
                raw, raw.stride(0), *common, weight, line.target.float(), line.gaps.float(), *numbers, **flags,
                BLOCK=_row_block(vocab), num_warps=8,
            )  # fmt: skip
            return
        factor = -gradients.of_log_prob[r]  # (T,)
        weights = potential = segments = None
        if plot is not None and gradients.potential is not None:
            weights, potential = plot.weights[r], gradients.potential.contiguous()
            segments = torch.zeros_like(targets[r]) if plot.segments is None else plot.segments[r]
            with record_function("plot_align/potential"):
                kernels.potential[(rows,)](
                    raw, raw.stride(0), logits.bias, gradients.log_z[r], weights, segments, potential, factor, vocab,
                    *_numbers(logits), **_flags(logits), BLOCK=_row_block(vocab), num_warps=8,
                )  # fmt: skip
        kernels.gradient[(rows, triton.cdiv(vocab, _BLOCK))](
            raw, raw.stride(0), *common, factor, weights, segments, potential, *numbers, **flags,
            PLOT=potential is not None, BLOCK=_BLOCK,
        )  # fmt: skip


def _add_column_sums(raw: Tensor, logits: Logits, log_z: Tensor, weights: Tensor, distribution: Tensor) -> None:
    """``distribution (V,) += Σ_t weights[t]·softmax(z_t)``, with one partial sum for every 64 rows."""
    rows, vocab = raw.shape
    splits = triton.cdiv(rows, _SUM_ROWS)
    partial = torch.empty(splits, vocab, device=raw.device, dtype=torch.float32)
    kernels.column_sums[(triton.cdiv(vocab, _SUM_COLUMNS), splits)](
        raw, raw.stride(0), logits.bias, log_z, weights, partial, rows, vocab, *_numbers(logits), **_flags(logits),
        ROWS=_SUM_ROWS, STEP=_SUM_STEP, BLOCK=_SUM_COLUMNS,
    )  # fmt: skip
    distribution += partial.sum(0)


def _add_values(raw: Tensor, logits: Logits, log_z: Tensor, plot: Plot, values: Tensor) -> None:
    """Computes the values of a divergence that is no line, in torch."""
    step = block_torch.rows_per_slice(raw.device, raw.size(-1))
    for start in range(0, raw.size(0), step):
        some = slice(start, start + step)
        z, _ = block_torch.transform(raw[some], logits, keep=True)  # (R, V)
        p = z.sub_(log_z[some].unsqueeze(-1)).exp_()
        if plot.divergence is not None:
            values[some] = plot.divergence.value(p).to(values.dtype)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes ``device`` the current GPU, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _row_block(vocab: int) -> int:
    return min(_ROW_BLOCK, triton.next_power_of_2(vocab))


def _numbers(logits: Logits) -> tuple[float, float, float]:
    return logits.logit_scale, logits.softcap or 0.0, 1 / logits.temperature


def _flags(logits: Logits) -> dict[str, bool]:
    return {"HAS_BIAS": logits.bias is not None, "HAS_SOFTCAP": logits.softcap is not None}
