"""The data that both elementwise implementations work on: logits, statistics, weights and gradients of a block.

A block is ``(T, V)`` raw products h W^T of T rows of the head's input with the whole vocabulary, in the compute dtype.
``forward`` computes statistics of it; ``backward`` overwrites it with the gradient of the loss. ``block_torch.py``
defines both; ``block_triton.py`` does the same on a GPU in fewer passes over memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from plot_align.transport import Divergence

Run = tuple[int, int, int]  # rows [start, end) of one segment


@dataclass(frozen=True)
class Logits:
    """``z = softcap(logit_scale · (raw + bias)) / temperature``, in the statistics' dtype.

    ``bias (V,)`` is added in this dtype because the compute dtype would round a second time. ``tokens (V,)`` is the
    token of each column; ``None`` if column j is token j.
    """

    bias: Tensor | None
    tokens: Tensor | None
    logit_scale: float
    softcap: float | None
    temperature: float
    dtype: torch.dtype  # of the statistics: float32, or float64 for float64 inputs

    @property
    def outer(self) -> float:
        """∂z/∂raw without the soft cap's slope."""
        return self.logit_scale / self.temperature


@dataclass
class Statistics:
    """Per-token results of a forward pass, ``(N,)`` each; ``None`` if not requested."""

    log_z: Tensor
    target_logit: Tensor
    entropy: Tensor | None
    sum_sq: Tensor | None
    mean: Tensor | None
    top1: Tensor | None
    values: Tensor | None


@dataclass(frozen=True)
class Plot:
    """The inputs of a pass that yields output distributions.

    ``weights (N,)`` of the positions in the statistics' dtype; ``segments (N,)``, or ``None`` for one segment; the
    ``runs`` of selected rows.
    """

    weights: Tensor
    segments: Tensor | None
    runs: list[Run]
    divergence: Divergence | None


@dataclass(frozen=True)
class Gradients:
    """The gradients that enter a backward pass, and what it needs of the forward pass; in the statistics' dtype.

    ``log_z (N,)`` and ``entropy (N,)`` of the forward; gradients of the loss with respect to ``log_prob (N,)``,
    ``entropy (N,)``, the output distributions (the ``potential (S, V)``) and each position's own ``value (N,)``.
    """

    log_z: Tensor
    entropy: Tensor | None
    of_log_prob: Tensor
    of_entropy: Tensor | None
    potential: Tensor | None
    of_value: Tensor | None


def runs_of(weights: Tensor, segments: Tensor | None) -> list[Run]:
    """``(start, end, segment)`` of each run of rows with positive weight; rows that are not selected cost nothing."""
    selected = weights > 0  # (N,)
    label = torch.where(selected, 0 if segments is None else segments, -1)  # (N,)
    values, counts = torch.unique_consecutive(label, return_counts=True)
    runs, start = [], 0
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        if value >= 0:
            runs.append((start, start + count, value))
        start += count
    return runs


def overlaps(runs: list[Run], start: int, end: int) -> Iterator[tuple[slice, slice, int]]:
    """The parts of ``runs`` within rows [start, end): as rows of the batch and of the slice, and their segment."""
    for run_start, run_end, segment in runs:
        low, high = max(run_start, start), min(run_end, end)
        if low < high:
            yield slice(low, high), slice(low - start, high - start), segment
