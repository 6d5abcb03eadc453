"""What the elementwise implementations share: how raw products become logits, and what a pass reads and writes.

A block is ``(T, V)`` raw products h W^T of T rows of the head's input with the whole vocabulary, in the compute dtype.
Between the matrix products two things happen to it: ``forward`` takes statistics of it, ``backward`` overwrites it
with the gradient of the loss. ``block_torch.py`` says what they compute; ``block_triton.py`` does the same in fewer
passes over memory on a GPU.
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

    ``bias (V,)`` is added here and not in the compute dtype, where it would be rounded a second time. ``tokens (V,)``
    is the token of each column; ``None`` where column j is token j.
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
    """Per-token results of a forward pass, ``(N,)`` each; ``None`` where nobody asked."""

    log_z: Tensor
    target_logit: Tensor
    entropy: Tensor | None
    sum_sq: Tensor | None
    mean: Tensor | None
    top1: Tensor | None
    values: Tensor | None


@dataclass(frozen=True)
class Plot:
    """What a pass needs to know of the output distributions.

    ``share (N,)`` in the statistics' dtype, ``segments (N,)`` or ``None`` for one, ``runs`` with the selected rows.
    """

    share: Tensor
    segments: Tensor | None
    runs: list[Run]
    divergence: Divergence | None


@dataclass(frozen=True)
class Gradients:
    """What flows back, and what is left of the forward pass; in the statistics' dtype.

    ``log_z (N,)``, ``entropy (N,)`` of the forward; gradients of the loss with respect to ``log_prob (N,)``,
    ``entropy (N,)``, the marginals (the ``potential (S, V)``) and each position's own ``value (N,)``.
    """

    log_z: Tensor
    entropy: Tensor | None
    of_log_prob: Tensor
    of_entropy: Tensor | None
    potential: Tensor | None
    of_value: Tensor | None


def runs_of(weights: Tensor, segments: Tensor | None) -> list[Run]:
    """``(start, end, segment)`` of the stretches of positive weight: what is not selected costs nothing."""
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
    """The parts of ``runs`` within rows [start, end): as rows of all, as rows of the slice, and their segment."""
    for run_start, run_end, segment in runs:
        low, high = max(run_start, start), min(run_end, end)
        if low < high:
            yield slice(low, high), slice(low - start, high - start), segment
