"""How many operations and bytes the head and the term's extra passes need at the least, and how long that takes.

With N positions of which M are selected, V tokens, hidden size H and b bytes a number:

    products      4 · 2·N·V·H operations: logits, logits again, ∂h, ∂W
    head          logits written and read once forward; written, read, written and read twice backward
    PLOT          M·V·b once forward (column sums) and once backward (⟨p, s⟩), and V-vectors of fp32 for each segment
    PLOT, token   M·V·b for the column sums, and for each line once forward (values) and once backward (potentials)

A floor is what a perfect program on this machine would need; where a block fits into a cache, less is possible.
"""

from __future__ import annotations

from dataclasses import dataclass

from machine import Machine

_STAT = 4  # bytes of a statistic: fp32


@dataclass(frozen=True)
class HeadWork:
    """The work of one head pass, forward and backward.

    Args:
        rows: positions N. selected: positions M that PLOT looks at. vocab: V. hidden: H. itemsize: b.
        segments: output distributions, one a sequence with ``granularity="sequence"``.
        lines: of the geometry; 1 for every divergence without lines.
        per_token: with ``granularity="token"``.
    """

    rows: int
    selected: int
    vocab: int
    hidden: int
    itemsize: int
    segments: int = 1
    lines: int = 1
    per_token: bool = False

    @property
    def flops(self) -> int:
        """Operations of the four matrix products; PLOT adds none."""
        return 4 * 2 * self.rows * self.vocab * self.hidden

    @property
    def head_bytes(self) -> int:
        """Bytes that the head moves without PLOT, its logits in one block."""
        logits = self.rows * self.vocab * self.itemsize
        weight = self.vocab * self.hidden * self.itemsize
        hidden = self.rows * self.hidden * self.itemsize
        forward = weight + hidden + 2 * logits
        again = weight + hidden + 3 * logits  # the product, then read and written in place
        to_hidden = logits + weight + self.rows * self.hidden * _STAT
        to_weight = logits + hidden + self.vocab * self.hidden * _STAT
        return forward + again + to_hidden + to_weight

    @property
    def plot_bytes(self) -> int:
        """Bytes that PLOT moves on top of it."""
        block = self.selected * self.vocab * self.itemsize
        if self.per_token:
            return (1 + 2 * self.lines) * block
        return 2 * block + 3 * self.segments * self.vocab * _STAT  # p̄ written, read; s read

    def head_floor(self, machine: Machine) -> float:
        """Seconds: the larger of the operations' and the bytes' time."""
        return max(self.flops / machine.throughput, self.head_bytes / machine.bandwidth)

    def plot_floor(self, machine: Machine) -> float:
        """Seconds of PLOT's extra bytes."""
        return self.plot_bytes / machine.bandwidth
