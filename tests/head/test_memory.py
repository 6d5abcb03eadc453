"""How large a block may be."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from plot_align.head import HeadSpec, Workspace, fused_head
from plot_align.head.memory import block_bytes

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

    from plot_align.head import fused as chunked

    blocks: list[StorageWeakRef] = []
    alive: list[int] = []
    init, restore = chunked._HeadPass.__init__, chunked._Columns.restore

    def watched(self, *args, **kwargs):
        init(self, *args, **kwargs)
        blocks.append(StorageWeakRef(self.tile.untyped_storage()))

    def counted(self, rows, dtype):
        gc.collect()
        alive.append(sum(not block.expired() for block in blocks))
        return restore(self, rows, dtype)

    monkeypatch.setattr(chunked._HeadPass, "__init__", watched)
    monkeypatch.setattr(chunked._Columns, "restore", counted)
    hidden = torch.randn(6, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(50, 8, dtype=torch.bfloat16, requires_grad=True)
    out = fused_head(hidden, weight, None, torch.zeros(6, dtype=torch.long), HeadSpec(), weights=torch.ones(6) / 6)
    (out.log_probs.sum() + out.distributions.square().sum()).backward()
    assert len(blocks) == 2
    assert alive == [0]


CPU = torch.device("cpu")


def problem(rows: int, vocab: int = 50, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(size, 8, generator=generator, requires_grad=True) for size in (rows, vocab))
    return hidden, weight, None, torch.randint(vocab, (rows,), generator=generator)


def step(arguments, workspace: Workspace | None, dtype: torch.dtype):
    """A policy's forward, another one's without gradient, and the backward."""
    spec = HeadSpec(workspace=workspace)
    rows = arguments[0].size(0)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = fused_head(*arguments, spec, weights=torch.ones(rows) / rows)
        with torch.no_grad():
            other = fused_head(*arguments, spec).log_probs
    loss = out.log_probs.sum() + out.distributions.square().sum()
    return (loss, other, *torch.autograd.grad(loss, arguments[:2]))


def test_passes_of_a_step_share_their_memory(tiles):
    """Three passes, one buffer; the next step's is another, since the backward has given the first one back."""
    workspace = Workspace()
    for _ in range(2):
        step(problem(6), workspace, torch.bfloat16)
    buffers = [tile.untyped_storage().data_ptr() for tile in tiles]  # all alive, so no address is used twice
    assert len(buffers) == 6
    assert len(set(buffers[:3])) == len(set(buffers[3:])) == 1
    assert buffers[0] != buffers[3]


def test_forward_and_backward_share_without_a_workspace(tiles):
    step(problem(6), None, torch.float32)
    policy, other, backward = (tile.untyped_storage().data_ptr() for tile in tiles)
    assert policy == backward != other


def test_sampled_rows_leave_the_memory_to_the_step(tiles):
    """Gradient norms go back through some rows before the step does; they take its buffer and give it back."""
    workspace = Workspace()
    hidden, weight, _, targets = problem(6)
    out = fused_head(hidden, weight, None, targets, HeadSpec(workspace=workspace))
    some = hidden.detach()[:2].requires_grad_()
    again = fused_head(some, weight, None, targets[:2], HeadSpec(frozen=True, workspace=workspace))
    torch.autograd.grad(again.log_probs.sum(), some)
    torch.autograd.grad(out.log_probs.sum(), hidden)
    assert len(tiles) == 4
    assert len({tile.untyped_storage().data_ptr() for tile in tiles}) == 1


@pytest.mark.parametrize("columns", [33, 70, 127])
def test_what_stands_behind_a_block_does_not_show(columns):
    """A bf16 product on a CPU may read behind the last column: NaN in fresh memory would reach ∂h."""
    for _ in range(20):
        workspace = Workspace()
        with workspace.lend("block", 40 * 128, dtype=torch.bfloat16, device=CPU) as held:
            held.fill_(torch.nan)
        for found in step(problem(40, columns), workspace, torch.bfloat16):
            assert torch.isfinite(found).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_buffer_held_does_not_show(dtype):
    """Steps of other sizes and dtypes before it, through the same workspace: equal to the bit."""
    workspace = Workspace()
    for rows, vocab, other in ((9, 300, torch.bfloat16), (2, 20, torch.float32), (40, 70, torch.float32)):
        arguments = problem(rows, vocab)
        fused_head(*arguments, HeadSpec(workspace=workspace))  # no backward, which would empty it
        for found, wanted in zip(step(arguments, workspace, other), step(arguments, None, other), strict=True):
            assert torch.equal(found, wanted)
        with workspace.lend("block", 500, dtype=torch.float64, device=CPU) as held:
            held.fill_(torch.nan)
        for found, wanted in zip(step(arguments, workspace, dtype), step(arguments, None, dtype), strict=True):
            assert torch.equal(found, wanted)


def test_what_is_lent_is_not_lent_twice():
    workspace = Workspace()
    with workspace.lend("block", 8, dtype=torch.float32, device=CPU):
        pass  # one is kept now
    with workspace.lend("block", 8, dtype=torch.float32, device=CPU) as first:
        first.zero_()
        with workspace.lend("block", 8, dtype=torch.float32, device=CPU) as second:
            second.fill_(1.0)
        assert (first == 0).all()
    with workspace.lend("block", 4, dtype=torch.float32, device=CPU) as third:
        assert third.data_ptr() in (first.data_ptr(), second.data_ptr())


def test_nothing_is_held_on_another_device():
    """There torch's own allocator keeps what is freed."""
    workspace = Workspace()
    with workspace.lend("block", 3, 4, dtype=torch.float16, device=torch.device("meta")) as lent:
        assert (lent.shape, lent.dtype, lent.device.type) == ((3, 4), torch.float16, "meta")
    assert workspace._kept == {}


@pytest.fixture
def tiles(monkeypatch):
    """The block of every pass."""
    from plot_align.head import fused as chunked

    found: list[torch.Tensor] = []
    init = chunked._HeadPass.__init__

    def watched(self, *args, **kwargs):
        init(self, *args, **kwargs)
        found.append(self.tile)

    monkeypatch.setattr(chunked._HeadPass, "__init__", watched)
    return found
