"""``attach`` against TRL's loss plus the materialised term: loss, every gradient, every weight after training."""

from __future__ import annotations

import copy

import pytest
import torch

from oracles.training import embeddings_at_start, materialised_loss
from plot_align.config import PlotConfig
from plot_align.trl import attach

KINDS = {
    "dpo": "DPOTrainer", "sft": "SFTTrainer", "kto": "KTOTrainer", "grpo": "GRPOTrainer", "rloo": "RLOOTrainer",
    "pro": "PROTrainer", "cpo": "CPOTrainer", "simpo": "CPOTrainer", "orpo": "ORPOTrainer",
}  # fmt: skip


def gradients(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def first_batch(trainer):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def check_one_step(make_trainer, preference, method, config, *, extra=None, nudge=False, **options):
    plain, ours = (make_trainer(method, extra=copy.deepcopy(extra), **options) for _ in range(2))
    ours.model.load_state_dict(plain.model.state_dict())
    embeddings_at_start(plain)
    if nudge:
        for trainer in (plain, ours):
            torch.manual_seed(1)
            for weight in trainer.ref_model.model.layers.parameters():  # the embeddings are the geometry
                weight.data.add_(0.02 * torch.randn_like(weight))
    inputs = first_batch(plain)
    handle = attach(ours, preference, config)
    ours.model.train()
    ours.current_gradient_accumulation_steps = 1
    want = plain.compute_loss(plain.model, dict(inputs))
    want = want + materialised_loss(plain, KINDS[method], inputs, config, preference)
    got = ours.compute_loss(ours.model, dict(inputs))
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    wanted, found = gradients(plain, want), gradients(ours, got)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        scale = gradient.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(
            found[name] / scale, gradient / scale, rtol=0, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
    return handle


@pytest.mark.parametrize("granularity", ["batch", "sequence", "token"])
@pytest.mark.parametrize("loss_type", [["sigmoid"], ["ipo"], ["aot"], ["aot_unpaired"], ["sigmoid", "sft"]])
def test_dpo(make_trainer, preference, loss_type, granularity):
    config = PlotConfig.paper(alpha=3.0, granularity=granularity)
    check_one_step(make_trainer, preference, "dpo", config, loss_type=loss_type)


@pytest.mark.parametrize("granularity", ["batch", "sequence", "token"])
@pytest.mark.parametrize("method", ["sft", "kto", "pro"])
def test_sft_kto_pro(make_trainer, preference, method, granularity):
    check_one_step(make_trainer, preference, method, PlotConfig.paper(alpha=3.0, granularity=granularity))


@pytest.mark.parametrize("granularity", ["batch", "sequence", "token"])
@pytest.mark.parametrize("method", ["cpo", "simpo", "orpo"])
def test_cpo_simpo_orpo(make_trainer, preference, method, granularity):
    check_one_step(make_trainer, preference, method, PlotConfig.paper(alpha=3.0, granularity=granularity))


@pytest.mark.parametrize("positions", ["rejected", "all"])
@pytest.mark.parametrize("method", ["dpo", "pro", "orpo"])
def test_positions(make_trainer, preference, method, positions):
    check_one_step(make_trainer, preference, method, PlotConfig.paper(alpha=3.0, positions=positions))


@pytest.mark.parametrize("positions", ["all", "chosen", "rejected"])
@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_online(make_trainer, preference, method, positions):
    check_one_step(make_trainer, preference, method, PlotConfig.paper(alpha=3.0, positions=positions))


@pytest.mark.parametrize("method", ["dpo", "cpo"])
def test_lora(make_trainer, preference, method):
    from peft import LoraConfig

    extra = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)}
    check_one_step(make_trainer, preference, method, PlotConfig.paper(alpha=3.0), extra=extra)


@pytest.mark.parametrize("method", ["dpo", "sft", "kto", "pro", "cpo", "orpo"])
def test_separate_backend(make_trainer, preference, method):
    check_one_step(make_trainer, preference, method, PlotConfig.paper(alpha=3.0, plot_backend="separate"))


@pytest.mark.parametrize("granularity", ["batch", "sequence", "token"])
@pytest.mark.parametrize("divergence", ["deft_log", "deft_prob", "emo", "tv"])
def test_other_terms(make_trainer, preference, divergence, granularity):
    config = PlotConfig.paper(alpha=3.0, divergence=divergence, granularity=granularity)
    check_one_step(make_trainer, preference, "dpo", config)


@pytest.mark.parametrize("divergence", ["deft_log", "deft_prob"])
@pytest.mark.parametrize("method", ["pro", "sft", "cpo", "grpo"])
def test_deft_elsewhere(make_trainer, preference, divergence, method):
    check_one_step(make_trainer, preference, method, PlotConfig.paper(alpha=3.0, divergence=divergence))


def test_vocabulary_order(make_trainer, preference):
    check_one_step(make_trainer, preference, "dpo", PlotConfig.paper(alpha=3.0, geometry="vocabulary"))


@pytest.mark.parametrize("granularity", ["batch", "sequence"])
@pytest.mark.parametrize("method", ["dpo", "kto"])
@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_anchored_on_the_micro_batch(make_trainer, preference, method, granularity, strength):
    """The reference is made to differ from the policy, or the target would be the output itself at λ = 0."""
    config = PlotConfig.paper(
        alpha=3.0, target="anchored", target_scope="batch", target_strength=strength, granularity=granularity
    )
    check_one_step(make_trainer, preference, method, config, nudge=True)


def test_anchored_on_the_micro_batch_with_adapters(make_trainer, preference):
    """The reference is the policy with its adapters off, in the same forward function."""
    from peft import LoraConfig

    extra = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)}
    config = PlotConfig.paper(alpha=3.0, target="anchored", target_scope="batch", positions="all")
    check_one_step(make_trainer, preference, "dpo", config, extra=extra)


@pytest.mark.parametrize("target", ["relu", "chosen"])
@pytest.mark.parametrize("method", ["dpo", "kto", "grpo"])
def test_counted_in_the_micro_batch(make_trainer, preference, method, target):
    check_one_step(make_trainer, preference, method, PlotConfig.paper(alpha=3.0, target=target, target_scope="batch"))


def test_sft_towards_its_own_tokens(make_trainer, preference):
    check_one_step(make_trainer, preference, "sft", PlotConfig.paper(alpha=3.0, target="chosen", target_scope="batch"))


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("method", ["dpo", "sft", "kto", "grpo", "rloo", "pro", "cpo", "simpo", "orpo"])
def test_weights_after_training(make_trainer, preference, method, accumulation):
    """Two optimiser steps of SGD; the oracle divides its term by hand where TRL's loss is divided already."""
    options = {
        "gradient_accumulation_steps": accumulation, "max_steps": 2, "optim": "sgd", "learning_rate": 0.1,
        "max_grad_norm": 1e9,
    }  # fmt: skip
    if method in ("grpo", "rloo"):
        options |= {"steps_per_generation": accumulation}
    config = PlotConfig.paper(alpha=3.0, positions="all")
    plain, ours = (make_trainer(method, **options) for _ in range(2))
    embeddings_at_start(plain)
    original = plain.compute_loss
    divisor = accumulation if method in ("sft", "grpo") else 1

    def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = original(model, dict(inputs), return_outputs, num_items_in_batch)
        return loss + materialised_loss(plain, KINDS[method], inputs, config, preference) / divisor

    plain.compute_loss = compute_loss
    attach(ours, preference, config)
    start = {name: p.detach().clone() for name, p in ours.model.named_parameters()}
    for trainer in (plain, ours):
        torch.manual_seed(0)  # the online methods sample their completions
        trainer.train()
    for (name, want), got in zip(plain.model.named_parameters(), ours.model.parameters(), strict=True):
        moved = (want - start[name]).abs().max()
        assert moved > 0, name
        torch.testing.assert_close(
            got / moved, want / moved, rtol=0, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("method", ["dpo", "sft", "kto", "pro", "cpo", "orpo"])
def test_alpha_zero_is_trl_to_the_bit(make_trainer, preference, method):
    plain, ours = (make_trainer(method, max_steps=5) for _ in range(2))
    attach(ours, preference, PlotConfig.paper(alpha=0))
    plain.train()
    ours.train()
    for (name, want), got in zip(plain.model.named_parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(got, want), name
    assert [r.get("loss") for r in plain.state.log_history] == [r.get("loss") for r in ours.state.log_history]


@pytest.mark.parametrize("method", ["dpo", "cpo", "orpo"])
def test_detached_is_trl_to_the_bit(make_trainer, preference, method):
    plain, ours = (make_trainer(method, max_steps=2) for _ in range(2))
    handle = attach(ours, preference, PlotConfig.paper(alpha=5.0))
    handle.detach()
    handle.detach()
    plain.train()
    ours.train()
    for want, got in zip(plain.model.parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(got, want)
    assert not any("plot/loss" in record for record in ours.state.log_history)
