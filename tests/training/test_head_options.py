"""The head's implementation and block size, asked for where the term is configured."""

from __future__ import annotations

import pytest
import torch

from plot_align import PlotConfig, attach
from plot_align.errors import InputError
from plot_align.fused import chunked


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
        attach(trainer, preference, PlotConfig(plot_impl=impl, **plot))
        trainer.train()
        assert set(used) == {impl}
        losses[impl] = [(x["loss"], x["plot/loss"]) for x in trainer.state.log_history if "plot/loss" in x]
    torch.testing.assert_close(torch.tensor(losses["torch"]), torch.tensor(losses["triton"]), rtol=2e-4, atol=1e-5)


def test_block_size_is_what_was_asked_for(make_trainer, preference, monkeypatch):
    sizes = []
    sweep = chunked._Sweep.__init__

    def watched(self, *args, **kwargs):
        sweep(self, *args, **kwargs)
        sizes.append(self.tile.untyped_storage().nbytes())

    monkeypatch.setattr(chunked._Sweep, "__init__", watched)
    monkeypatch.setattr(chunked, "block_bytes", lambda *args, **kwargs: pytest.fail("chosen, though given"))
    trainer = make_trainer("dpo", max_steps=1, per_device_train_batch_size=12)
    attach(trainer, preference, PlotConfig(plot_block_mib=1))
    trainer.train()
    assert sizes
    assert max(sizes) <= 1 << 20


def test_wrong_options_are_named():
    with pytest.raises(InputError, match="plot_impl is 'cuda'; expected one of auto, torch, triton"):
        PlotConfig(plot_impl="cuda")
    with pytest.raises(InputError, match="plot_block_mib is 0; expected 1 or more, or none"):
        PlotConfig(plot_block_mib=0)
