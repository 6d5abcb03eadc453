"""CHES, the centred hidden embedding similarity of a pair (Razin et al. 2024, arXiv 2410.08847).

    CHES(x, y⁺, y⁻) = ⟨s⁺, s⁻⟩ − ‖s⁺‖²                     s = Σ_k h_k
    length-normalised = ⟨m⁺, m⁻⟩ − ‖m⁺‖²                     m = s / |y|

h_k is the model's last hidden state (the input of the head) at the position that predicts the k-th token of the
answer. A large value says that pushing y⁻ down will pull y⁺ down with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from plot_align.head import causal_lm
from plot_align.inference.chat import evaluating
from plot_align.inference.scoring import last_hidden_states
from plot_align.preference.estimation import ScoredSequence
from plot_align.transport.base import widest_dtype

Pair = tuple[ScoredSequence, ScoredSequence]


def pair_batches(pairs: Sequence[Pair], size: int) -> Iterator[list[int]]:
    """Indices of the pairs whose sides both have a scored token, in batches of ``size``, longest first."""
    scored = [i for i, pair in enumerate(pairs) if all(side.start < side.stop for side in pair)]
    scored.sort(key=lambda i: -max(len(side.ids) for side in pairs[i]))  # stable: the same batches in every run
    for at in range(0, len(scored), size):
        yield scored[at : at + size]


def stacked(batch: Sequence[Pair]) -> list[ScoredSequence]:
    """The B chosen sides, then the B rejected ones, as one batch of 2B sequences."""
    return [pair[side] for side in (0, 1) for pair in batch]


def ches(model: Any, batch: Sequence[Pair]) -> Tensor:
    """CHES of B pairs from one forward pass: (B, 2) float64 on the CPU, as it is and length-normalised.

    Raises:
        RunError: the device is out of memory.
    """
    base = causal_lm(model)
    with evaluating(base):
        hidden, _, rows = last_hidden_states(base, stacked(batch))
        return ches_of_states(hidden, rows, batch)


def ches_of_states(hidden: Tensor, rows: Tensor, batch: Sequence[Pair]) -> Tensor:
    """The same from hidden states (n, H) of :func:`stacked` pairs and the row of each (n,)."""
    sums = torch.zeros(2 * len(batch), hidden.size(1), dtype=widest_dtype(hidden.device), device=hidden.device)
    sums.index_add_(0, rows.to(hidden.device), hidden.to(sums))  # (2B, H)
    counts = torch.bincount(rows, minlength=len(sums)).unsqueeze(-1).to(sums)  # (2B, 1)
    return torch.stack([_similarity(sums), _similarity(sums / counts)], dim=-1).double().cpu()


def _similarity(states: Tensor) -> Tensor:
    """(2B, H) → (B,): ⟨s⁺, s⁻⟩ − ‖s⁺‖², as the one product ⟨s⁺, s⁻ − s⁺⟩, in which less cancels."""
    chosen, rejected = states.chunk(2)
    return (chosen * (rejected - chosen)).sum(-1)
