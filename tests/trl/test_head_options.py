"""The head's implementation and block size, asked for where the term is configured."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from plot_align import PlotConfig, attach
from plot_align.errors import InputError
from plot_align.head import fused as chunked


@pytest.mark.parametrize("plot", [
    {}, {"granularity": "token", "target": "relu", "target_scope": "dataset", "geometry": "norm", "alpha": 1.0},
], ids=["default", "token"])  # fmt: skip
def test_kernels_train_as_torch_does(make_trainer, preference, monkeypatch, plot):
    """Three steps of DPO by Triton's kernels and by torch: the same losses, and each where it was asked for."""
    pytest.importorskip("triton")
    used = []
    choose = chunked._implementation

    def watched(spec, device, dtype):
        found = choose(spec, device, dtype)
        used.append(found.__name__.rpartition("_")[2])
        return found

    monkeypatch.setattr(chunked, "_implementation", watched)
    losses = {}
    for impl in ("torch", "triton"):
        used.clear()
        trainer = make_trainer("dpo", max_steps=2, per_device_train_batch_size=1)
        attach(trainer, preference, PlotConfig.from_options(plot_impl=impl, **plot))
        trainer.train()
        assert set(used) == {impl}
        losses[impl] = [(x["loss"], x["plot/loss"]) for x in trainer.state.log_history if "plot/loss" in x]
    torch.testing.assert_close(torch.tensor(losses["torch"]), torch.tensor(losses["triton"]), rtol=2e-4, atol=1e-5)


def test_block_size_is_what_was_asked_for(make_trainer, preference, monkeypatch):
    sizes = []
    init = chunked._HeadPass.__init__

    def watched(self, *args, **kwargs):
        init(self, *args, **kwargs)
        sizes.append(self.tile.untyped_storage().nbytes())

    monkeypatch.setattr(chunked._HeadPass, "__init__", watched)
    monkeypatch.setattr(chunked, "block_bytes", lambda *args, **kwargs: pytest.fail("chosen, though given"))
    trainer = make_trainer("dpo", max_steps=1, per_device_train_batch_size=12)
    attach(trainer, preference, PlotConfig.from_options(plot_block_mib=1))
    trainer.train()
    assert sizes
    assert max(sizes) <= 1 << 20


@pytest.fixture
def tiles(monkeypatch):
    """The block of every head pass, which keeps its memory alive: no address is used twice."""
    found: list[torch.Tensor] = []
    init = chunked._HeadPass.__init__

    def watched(self, *args, **kwargs):
        init(self, *args, **kwargs)
        found.append(self.tile)

    monkeypatch.setattr(chunked._HeadPass, "__init__", watched)
    return found


def buffers(tiles: list[torch.Tensor]) -> list[int]:
    return [tile.untyped_storage().data_ptr() for tile in tiles]


def test_a_step_has_one_block(make_trainer, preference, tiles):
    """Of the policy, the reference, the rows that are sampled to balance α, and the backward; of each trainer its own.

    Two trainers take turns: a step of one must not reach into the block of the other, whose backward is yet to come.
    """
    losses, handles = [], []
    for _ in range(2):
        trainer = make_trainer("dpo")
        handles.append(attach(trainer, preference, PlotConfig(grad_ratio_steps=1)))
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        losses.append(trainer.compute_loss(trainer.model, inputs))
    forwards = buffers(tiles)
    assert len(forwards) >= 6
    first, second = forwards[: len(forwards) // 2], forwards[len(forwards) // 2 :]
    assert len(set(first)) == len(set(second)) == 1
    assert set(first) != set(second)
    for loss in losses:
        loss.backward()
    assert buffers(tiles)[len(forwards) :] == [first[0], second[0]]
    for handle in handles:
        assert handle._backend.workspace is None


@pytest.mark.parametrize("ending", ["backward", "evaluation", "error"])
def test_no_block_outlives_its_step(make_trainer, preference, tiles, monkeypatch, ending):
    """Given back by the backward, though the graph lives on; where none comes, with the loss."""
    trainer = make_trainer("dpo")
    handle = attach(trainer, preference)
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    match ending:
        case "backward":
            trainer.model.train()
            loss = trainer.compute_loss(trainer.model, inputs)
            loss.backward()
        case "evaluation":
            trainer.model.eval()
            with torch.no_grad():
                trainer.compute_loss(trainer.model, inputs)
        case "error":
            trainer.model.train()
            monkeypatch.setattr(handle.term, "loss", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                trainer.compute_loss(trainer.model, inputs)
    storages = [StorageWeakRef(tile.untyped_storage()) for tile in tiles]
    assert storages
    tiles.clear()
    gc.collect()
    assert all(storage.expired() for storage in storages)


def test_wrong_options_are_named():
    with pytest.raises(InputError, match="plot_impl is 'cuda'; expected one of auto, torch, triton"):
        PlotConfig.from_options(plot_impl="cuda")
    with pytest.raises(InputError, match="plot_block_mib is 0; expected 1 or more, or none"):
        PlotConfig.from_options(plot_block_mib=0)
