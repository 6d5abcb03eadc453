"""How large a block of logits may be, and where its memory comes from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor

# A larger block means fewer passes over the head's weight and its gradient. On a CPU one four times as large is no
# faster; on a GPU 1 GiB is some thousand rows of the largest vocabularies, where the products are bound by arithmetic.
_MOST = {"cpu": 256 << 20, "cuda": 1 << 30}
_LEAST = 16 << 20
# TRL's head works on tiles of so many tokens and vocabulary rows (`trl.kernels.chunked_logprob`, TRL 1.16).
_TRL_TILE = (4096, 32768)


def block_bytes(
    rows: int, vocab: int, hidden: int, itemsize: int, device: torch.device, *, converts_gradient: bool
) -> int:
    """Bytes of one block of logits: as much as costs no memory that a step without PLOT does not use as well.

    At most 1 GiB (256 MiB on a CPU) and half (a quarter) of what is free. On a GPU also no more than TRL's own tile of
    4,096 tokens by 32,768 vocabulary rows, or than the head's finished gradient: it is accumulated in float32, and by
    the time it is rounded to the weight's dtype, which TRL does as well, the block is freed.

    Gradients that are summed over blocks of another size differ by roundings: where memory is so scarce that it
    decides, a run repeats to the bit only with a size that is given (``plot_block_mib``).

    Args:
        rows, vocab, hidden: N, V, H.
        itemsize: bytes of an element in the compute dtype.
        device: where the block lives.
        converts_gradient: whether the weight is trained in a dtype narrower than float32.
    """
    if device.type != "cuda":
        return max(_LEAST, min(_MOST["cpu"], psutil.virtual_memory().available // 4))
    unused, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    tokens, columns = _TRL_TILE
    tile = min(rows, tokens) * min(vocab, columns) * itemsize
    gradient = vocab * hidden * itemsize if converts_gradient else 0
    return max(_LEAST, min(_MOST["cuda"], max(tile, gradient), (unused + cached) // 2))


class Workspace:
    """Buffers that the head's passes of one step lend each other: forward, the reference's forward, backward.

    On a CPU only. There glibc maps every allocation above 32 MiB anew and unmaps it when it is freed, so each of its
    pages costs a fault and is filled with zeros, in every pass again. torch's allocator for GPUs keeps what is freed,
    and nothing is held here.

    A workspace belongs to one step. The graph keeps it from the forward to the backward, which empties it; the
    backward would take as much memory itself, so nothing is held that would not be there at the step's peak. What is
    lent is taken out: who asks meanwhile, another thread for one, gets memory of their own.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    @contextmanager
    def lend(self, name: str, *shape: int, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
        """A buffer of this shape for the duration of the block, holding anything; it is the last one of that ``name``
        where that is large enough."""
        if device.type != "cpu":
            yield torch.empty(shape, dtype=dtype, device=device)
            return
        size = math.prod(shape) * dtype.itemsize
        memory = self._kept.pop(name, None)  # (bytes,)
        if memory is None or memory.numel() < size:
            memory = torch.empty(size, dtype=torch.uint8)
        yield memory[:size].view(dtype).view(shape)
        self._kept[name] = memory

    def clear(self) -> None:
        """Gives the memory back."""
        self._kept.clear()
