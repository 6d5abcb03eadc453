"""What is said of a backend is what a trainer gets."""

from __future__ import annotations

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
