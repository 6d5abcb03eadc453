"""The size of a block of logits, and the memory it lives in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor

# A larger block means fewer passes over the head's weight and its gradient. On a CPU a block four times as large is no
# faster; on a GPU 1 GiB is about a thousand rows of the largest vocabularies, enough for the products to be bound by
# arithmetic.
_MOST = {"cpu": 256 << 20, "cuda": 1 << 30}
_LEAST = 16 << 20
# Tokens and vocabulary rows in a tile of TRL's head (`trl.kernels.chunked_logprob`, TRL 1.16).
_TRL_TILE = (4096, 32768)


def block_bytes(
    rows: int, vocab: int, hidden: int, itemsize: int, device: torch.device, *, converts_gradient: bool
) -> int:
    """Bytes of one block of logits: as many as a step without PLOT would use as well.

    At most 1 GiB (256 MiB on a CPU) and half (a quarter) of the free memory. On a GPU also no more than TRL's own tile
    of 4,096 tokens by 32,768 vocabulary rows, or the head's finished gradient, whichever is larger: the gradient is
    accumulated in float32 and rounded to the weight's dtype, as in TRL, only after the block is freed.

    The block size changes the rounding of summed gradients. If the free memory decides the size, a run is reproducible
    to the bit only with a given size (``plot_block_mib``).

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
    """Buffers that the head passes of one step reuse: forward, the reference's forward, backward.

    On a CPU only: glibc maps every allocation above 32 MiB anew and unmaps it when it is freed, so each pass would pay
    a page fault and a page of zeros again. torch's GPU allocator keeps freed memory, so nothing is held there.

    A workspace belongs to one step. The graph keeps it from the forward to the backward, which empties it. The
    backward would need as much memory itself, so the workspace does not raise the step's peak. A lent buffer is
    taken out, so a second caller, such as another thread, gets its own memory.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    @contextmanager
    def lend(self, name: str, *shape: int, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
        """An uninitialised buffer of this shape for the duration of the block; reuses the last buffer of that ``name``
        if it is large enough."""
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
        """Frees the buffers."""
        self._kept.clear()
