"""How large a block may be."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch

from plot_align.fused import HeadSpec, fused_head
from plot_align.fused.memory import block_bytes

MIB = 1 << 20
CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with so many MiB free, and so many kept by the allocator but unused."""

    def make(free: int, cached: int = 0) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * MIB, 80_000 * MIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: (cached + 100) * MIB)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100 * MIB)

    return make


def test_on_a_gpu_no_more_than_trl_or_the_gradient_takes(gpu):
    gpu(free=40_000)
    llama = {"vocab": 128_256, "hidden": 3072, "itemsize": 2, "device": CUDA}
    # frozen: TRL's tile of 4,096 tokens by 32,768 columns of 2 bytes, 256 MiB; of fewer tokens a smaller one
    assert block_bytes(8192, **llama, converts_gradient=False) == 256 * MIB
    assert block_bytes(1024, **llama, converts_gradient=False) == 64 * MIB
    # trained in bf16: the gradient that float32 is rounded to, 128,256 · 3,072 · 2 bytes
    assert block_bytes(8192, **llama, converts_gradient=True) == 128_256 * 3072 * 2
    large = {**llama, "hidden": 8192}
    assert block_bytes(8192, **large, converts_gradient=True) == 1024 * MIB


def test_half_of_what_is_free(gpu):
    gpu(free=100, cached=60)
    assert block_bytes(8192, 128_256, 3072, 2, CUDA, converts_gradient=True) == 80 * MIB
    gpu(free=2)
    assert block_bytes(8192, 128_256, 3072, 2, CUDA, converts_gradient=True) == 16 * MIB


def test_on_a_cpu(monkeypatch):
    for available, expected in ((64_000, 256), (400, 100), (8, 16)):
        memory = SimpleNamespace(available=available * MIB)
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: memory)
        found = block_bytes(10, 128_256, 512, 4, torch.device("cpu"), converts_gradient=False)
        assert found == expected * MIB


def test_the_block_is_gone_before_the_gradient_is_rounded(monkeypatch):
    """A trained head in bf16: when its gradient is copied from float32, no block is alive any more."""
    import gc
    import weakref

    from plot_align.fused import chunked

    blocks: list[weakref.ref] = []
    alive: list[int] = []
    sweep, restore = chunked._Sweep.__init__, chunked._Columns.restore

    def watched(self, *args, **kwargs):
        sweep(self, *args, **kwargs)
        blocks.append(weakref.ref(self.tile))

    def counted(self, rows, dtype):
        gc.collect()
        alive.append(sum(block() is not None for block in blocks))
        return restore(self, rows, dtype)

    monkeypatch.setattr(chunked._Sweep, "__init__", watched)
    monkeypatch.setattr(chunked._Columns, "restore", counted)
    hidden = torch.randn(6, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(50, 8, dtype=torch.bfloat16, requires_grad=True)
    out = fused_head(hidden, weight, None, torch.zeros(6, dtype=torch.long), HeadSpec(), weights=torch.ones(6) / 6)
    (out.log_probs.sum() + out.marginals.square().sum()).backward()
    assert len(blocks) == 2
    assert alive == [0]
