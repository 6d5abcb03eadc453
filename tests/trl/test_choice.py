"""What is said of a backend is what a trainer gets."""

from __future__ import annotations

import dataclasses
import importlib.metadata

import pytest

from plot_align import PlotConfig, attach
from plot_align.trl import backends
from plot_align.trl.batches import SUPPORTED
from plot_align.trl.choice import backend_for

METHODS = {kind.removesuffix("Trainer").lower(): kind for kind in SUPPORTED}


@pytest.mark.parametrize("method", METHODS)
def test_a_trainer_gets_the_backend_that_is_said(method, make_trainer, preference):
    name, reason = backend_for(METHODS[method])
    handle = attach(make_trainer(method), preference, PlotConfig(alpha=0.1))
    expected = {"fused": backends.FusedBackend, "logits": backends.LogitsBackend}[name]
    assert type(handle._backend) is expected
    assert "head pass" in reason or "logits" in reason


def test_another_trl_gets_none(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.99.0")
    name, reason = backend_for("DPOTrainer")
    assert name == "none"
    assert "1.99.0 is newer than the 1.16" in reason
    assert backend_for("CPOTrainer")[0] == "logits"


def test_a_loss_that_the_config_fills_in(monkeypatch):
    """As in TRL 1.8 to 1.14: no default, and ``__post_init__`` takes the loss in chunks where there is one."""
    from trl.trainer import sft_trainer, utils

    import trl

    @dataclasses.dataclass
    class Config:
        loss_type: str | None = None

    monkeypatch.setattr(trl, "SFTConfig", Config)
    monkeypatch.delattr(utils, "add_fused_lm_head")
    monkeypatch.setattr(sft_trainer, "_chunked_cross_entropy_loss", None, raising=False)
    assert backend_for("SFTTrainer")[0] == "chunked"
    monkeypatch.delattr(sft_trainer, "_chunked_cross_entropy_loss")
    assert backend_for("SFTTrainer")[0] == "logits"
