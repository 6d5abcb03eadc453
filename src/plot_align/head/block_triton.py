"""The elementwise part of the head by Triton's kernels: what ``block_torch.py`` computes, in fewer passes over memory.

A forward reads the block once, and the rows that PLOT selects once more; a backward reads and writes it once, and
reads the selected rows once more. Every sum has a fixed order (partial buffers, no atomics), so the same input in
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

# Along a line the kernels carry the cumulative sum from step to step, so columns must stand in the line's order.
IN_ITS_ORDER = True
INTERPRETED = bool(knobs.runtime.interpret)

# Elements of a row that one step of a row's program takes, and of one program of the elementwise kernel.
_ROW_BLOCK = 2048
_BLOCK = 1024
# The column sums' programs: so many columns wide, over so many rows, so many at a time.
_SUM_COLUMNS, _SUM_ROWS, _SUM_STEP = 512, 64, 8


def runs(weights: Tensor, segments: Tensor | None, num_segments: int, divergence: Divergence | None) -> list[Run]:
    """See :func:`plot_align.head.block_torch.runs`. The kernels skip unselected rows of a run by themselves."""
    if num_segments == 1 and (divergence is None or isinstance(divergence, SortedLine)):
        return [(0, weights.numel(), 0)]
    return block_torch.runs(weights, segments, num_segments, divergence)


def forward(
    raw: Tensor,  # (T, V)
    first: int,
    logits: Logits,
    targets: Tensor,  # (N,)
    found: Statistics,
    plot: Plot | None,
    marginals: Tensor | None,  # (S, V)
) -> None:
    """See :func:`plot_align.head.block_torch.forward`; the block is left as it is."""
    rows, vocab = raw.shape
    r = slice(first, first + rows)
    with _on(raw.device):
        kernels.statistics[(rows,)](
            raw, raw.stride(0), logits.bias, targets[r], logits.tokens,
            found.log_z[r], found.target_logit[r], *(None if x is None else x[r] for x in (
                found.entropy, found.sum_sq, found.mean, found.top1)),
            vocab, *_numbers(logits), **_flags(logits), HAS_TOKENS=logits.tokens is not None,
            ENTROPY=found.entropy is not None, SUM_SQ=found.sum_sq is not None, MEAN=found.mean is not None,
            TOP1=found.top1 is not None, BLOCK=_row_block(vocab), num_warps=8,
        )  # fmt: skip
        if plot is None or marginals is None:
            return
        for everywhere, here, segment in overlaps(plot.runs, r.start, r.stop):
            with record_function("plot_align/marginal"):
                _add_column_sums(
                    raw[here], logits, found.log_z[everywhere], plot.share[everywhere], marginals[segment]
                )
            if plot.divergence is None or found.values is None:
                continue
            if isinstance(plot.divergence, SortedLine):
                line = plot.divergence
                kernels.line_values[(here.stop - here.start,)](
                    raw[here], raw.stride(0), logits.bias, found.log_z[everywhere], plot.share[everywhere],
                    line.target.float(), line.gaps.float(), found.values[everywhere], vocab, *_numbers(logits),
                    **_flags(logits), BLOCK=_row_block(vocab), num_warps=8,
                )  # fmt: skip
            else:
                _add_values(raw[here], logits, found.log_z[everywhere], plot, found.values[everywhere])


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
        # A potential of its own for every row, from a divergence that is no line: nothing to fuse.
        block_torch.backward(raw, first, logits, targets, gradients, plot)
        return
    has_entropy = gradients.of_entropy is not None and gradients.entropy is not None
    entropy = (gradients.entropy[r], gradients.of_entropy[r]) if has_entropy else (None, None)  # type: ignore[index]
    common = (logits.bias, targets[r], gradients.log_z[r], gradients.of_log_prob[r], *entropy)
    numbers = (vocab, *_numbers(logits), logits.outer)
    flags = {**_flags(logits), "ENTROPY": has_entropy}
    with _on(raw.device):
        if per_token and plot is not None and gradients.of_value is not None:
            line: Any = plot.divergence
            weight = torch.where(plot.share[r] > 0, gradients.of_value[r], 0.0)  # (T,)
            kernels.line_gradient[(rows,)](
                raw, raw.stride(0), *common, weight, line.target.float(), line.gaps.float(), *numbers, **flags,
                BLOCK=_row_block(vocab), num_warps=8,
            )  # fmt: skip
            return
        factor = -gradients.of_log_prob[r]  # (T,)
        share = potential = segments = None
        if plot is not None and gradients.potential is not None:
            share, potential = plot.share[r], gradients.potential.contiguous()
            segments = torch.zeros_like(targets[r]) if plot.segments is None else plot.segments[r]
            with record_function("plot_align/potential"):
                kernels.potential[(rows,)](
                    raw, raw.stride(0), logits.bias, gradients.log_z[r], share, segments, potential, factor, vocab,
                    *_numbers(logits), **_flags(logits), BLOCK=_row_block(vocab), num_warps=8,
                )  # fmt: skip
        kernels.gradient[(rows, triton.cdiv(vocab, _BLOCK))](
            raw, raw.stride(0), *common, factor, share, segments, potential, *numbers, **flags,
            PLOT=potential is not None, BLOCK=_BLOCK,
        )  # fmt: skip


def _add_column_sums(raw: Tensor, logits: Logits, log_z: Tensor, share: Tensor, marginal: Tensor) -> None:
    """``marginal (V,) += Σ_t share[t]·softmax(z_t)``, through one partial sum for every 64 rows."""
    rows, vocab = raw.shape
    splits = triton.cdiv(rows, _SUM_ROWS)
    partial = torch.empty(splits, vocab, device=raw.device, dtype=torch.float32)
    kernels.column_sums[(triton.cdiv(vocab, _SUM_COLUMNS), splits)](
        raw, raw.stride(0), logits.bias, log_z, share, partial, rows, vocab, *_numbers(logits), **_flags(logits),
        ROWS=_SUM_ROWS, STEP=_SUM_STEP, BLOCK=_SUM_COLUMNS,
    )  # fmt: skip
    marginal += partial.sum(0)


def _add_values(raw: Tensor, logits: Logits, log_z: Tensor, plot: Plot, values: Tensor) -> None:
    """The values of a divergence that is no line, in torch."""
    step = block_torch.rows_per_slice(raw.device, raw.size(-1))
    for start in range(0, raw.size(0), step):
        some = slice(start, start + step)
        z, _ = block_torch.transform(raw[some], logits, keep=True)  # (R, V)
        p = z.sub_(log_z[some].unsqueeze(-1)).exp_()
        if plot.divergence is not None:
            values[some] = plot.divergence.value(p).to(values.dtype)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current GPU, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _row_block(vocab: int) -> int:
    return min(_ROW_BLOCK, triton.next_power_of_2(vocab))


def _numbers(logits: Logits) -> tuple[float, float, float]:
    return logits.logit_scale, logits.softcap or 0.0, 1 / logits.temperature


def _flags(logits: Logits) -> dict[str, bool]:
    return {"HAS_BIAS": logits.bias is not None, "HAS_SOFTCAP": logits.softcap is not None}
