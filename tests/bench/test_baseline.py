"""The arm that PLOT is compared with: TRL's own loss, on our kernel, in every head pass that PLOT's arm makes."""

from __future__ import annotations

import pytest
import torch

from plot_align.bench import baseline
from plot_align.config import PlotConfig


@pytest.mark.parametrize(("method", "passes"), [("dpo", 2), ("sft", 1), ("kto", 2)])
def test_without_plot_is_trl_on_our_kernel(make_trainer, monkeypatch, method, passes):
    trainer = make_trainer(method)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    forward, calls = trainer.model.forward, []
    kernel = baseline.fused_head
    monkeypatch.setattr(baseline, "fused_head", lambda *args: calls.append(args) or kernel(*args))
    want = trainer.compute_loss(trainer.model, dict(inputs))
    with baseline.without_plot(trainer):
        for _ in range(2):
            got = trainer.compute_loss(trainer.model, dict(inputs))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert len(calls) == 2 * passes
    assert trainer.model.forward == forward
    assert "compute_loss" not in vars(trainer)


def test_without_plot_runs_the_kernel_of_the_options(make_trainer, monkeypatch):
    trainer, specs = make_trainer("dpo"), []
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    kernel = baseline.fused_head
    monkeypatch.setattr(baseline, "fused_head", lambda *args: specs.append(args[-1]) or kernel(*args))
    with baseline.without_plot(trainer, PlotConfig.from_options(plot_impl="torch", plot_block_mib=3)):
        trainer.compute_loss(trainer.model, dict(inputs))
    assert [(spec.impl, spec.block_bytes) for spec in specs] == [("torch", 3 << 20)] * 2
