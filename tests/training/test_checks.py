"""What ``auto`` becomes on each method, and that the defaults train every one of them."""

from __future__ import annotations

import pytest
import torch

from plot_align.training import PlotConfig, attach
from plot_align.training.batches import trainer_kind
from plot_align.training.checks import settled

METHODS = ["dpo", "kto", "sft", "pro", "cpo", "simpo", "orpo", "grpo", "rloo"]


def logged(trainer, key):
    return [record[key] for record in trainer.state.log_history if key in record]


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("dpo", {}, ("anchored", "batch")),
        ("kto", {}, ("anchored", "batch")),
        ("sft", {}, ("chosen", "batch")),
        ("cpo", {}, ("chosen", "batch")),
        ("grpo", {}, ("chosen", "batch")),
        ("dpo", {"granularity": "token"}, ("relu", "dataset")),
        ("dpo", {"granularity": "sequence"}, ("anchored", "batch")),
        ("dpo", {"plot_backend": "separate"}, ("chosen", "batch")),
        ("dpo", {"target_scope": "dataset"}, ("relu", "dataset")),
        ("dpo", {"target": "anchored"}, ("anchored", "dataset")),
        ("dpo", {"target": "anchored", "target_scope": "batch"}, ("anchored", "batch")),
        ("dpo", {"target": "relu", "target_scope": "batch"}, ("relu", "batch")),
        ("sft", {"target": "shift"}, ("shift", "dataset")),
    ],
)
def test_auto(make_trainer, method, options, expected):
    trainer = make_trainer(method)
    found = settled(PlotConfig(**options), trainer, trainer_kind(trainer))
    assert (found.target, found.target_scope) == expected


def test_auto_without_a_reference_forward(make_trainer):
    trainer = make_trainer("dpo", precompute_ref_log_probs=True)
    found = settled(PlotConfig(), trainer, "DPOTrainer")
    assert (found.target, found.target_scope) == ("chosen", "batch")


def test_auto_with_a_reference_of_the_users(make_trainer):
    trainer = make_trainer("grpo")
    found = settled(PlotConfig(), trainer, "GRPOTrainer", torch.full((300,), 1 / 300))
    assert (found.target, found.target_scope) == ("anchored", "dataset")


@pytest.mark.parametrize("method", METHODS)
def test_the_defaults_train_every_method(make_trainer, preference, method):
    trainer = make_trainer(method)
    attach(trainer, preference)
    trainer.train()
    assert len(logged(trainer, "plot/loss")) == 3
    ratio = logged(trainer, "plot/grad_ratio")[0]
    assert ratio == pytest.approx(0.5, rel=1e-3)


def test_the_reference_is_reached_behind_mixed_precision(make_trainer, preference):
    """With bf16 accelerate wraps the reference's forward when the trainer is built. The first step's distance, of the
    policy to its own output shifted by d, is float32's but for bf16's rounding."""
    losses = []
    for bf16 in (False, True):
        trainer = make_trainer("dpo", bf16=bf16, max_steps=2)
        wrapped = trainer.ref_model.forward
        handle = attach(trainer, preference)
        trainer.train()
        losses.append(logged(trainer, "plot/loss")[0])
        handle.detach()
        assert trainer.ref_model.forward == wrapped
    assert losses[0] > 0
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
