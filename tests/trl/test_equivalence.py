"""``attach`` against TRL's loss plus the oracle's term: loss, every gradient, every weight after training.

The defaults come first; then every geometry, target, scope and distance.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch

from oracles.training import Alpha, embeddings_at_start, head_input, materialised_term
from plot_align.config import PlotConfig
from plot_align.trl import attach

KINDS = {
    "dpo": "DPOTrainer", "sft": "SFTTrainer", "kto": "KTOTrainer", "grpo": "GRPOTrainer", "rloo": "RLOOTrainer",
    "pro": "PROTrainer", "cpo": "CPOTrainer", "simpo": "CPOTrainer", "orpo": "ORPOTrainer",
}  # fmt: skip


@pytest.fixture(autouse=True)
def exact_norms(monkeypatch):
    """Norms over all rows: how well a sample estimates them is the matter of ``test_alpha.py``."""
    monkeypatch.setattr("plot_align.trl.gradients._SAMPLED_ROWS", 10_000)


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
    attach(ours, preference, config)
    ours.model.train()
    ours.current_gradient_accumulation_steps = 1
    with head_input(plain) as hidden:
        vanilla = plain.compute_loss(plain.model, dict(inputs))
    alpha = Alpha(config)(plain, KINDS[method], inputs, preference, vanilla, hidden[0])
    want = vanilla + alpha * materialised_term(plain, KINDS[method], inputs, config, preference)
    got = ours.compute_loss(ours.model, dict(inputs))
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    wanted, found = gradients(plain, want), gradients(ours, got)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        scale = gradient.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(
            found[name] / scale, gradient / scale, rtol=0, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("granularity", ["batch", "sequence", "token"])
@pytest.mark.parametrize("method", KINDS)
def test_the_default(make_trainer, preference, method, granularity):
    check_one_step(
        make_trainer, preference, method, PlotConfig(granularity=granularity), nudge=method in ("dpo", "kto")
    )


@pytest.mark.parametrize("loss_type", [["ipo"], ["aot"], ["aot_unpaired"], ["sigmoid", "sft"]])
def test_the_default_on_every_dpo_loss(make_trainer, preference, loss_type):
    check_one_step(make_trainer, preference, "dpo", PlotConfig(), nudge=True, loss_type=loss_type)


@pytest.mark.parametrize("granularity", ["batch", "token"])
@pytest.mark.parametrize(
    "options",
    [
        {"geometry": "norm", "norm_order": 1.0}, {"geometry": "norm", "norm_order": math.inf},
        {"geometry": "principal"}, {"geometry": "vocabulary"}, {"geometry": "max_sliced"},
        {"geometry": "sliced", "slices": 3, "geometry_seed": 7}, {"scaled": False},
    ],
)  # fmt: skip
def test_every_geometry(make_trainer, preference, options, granularity):
    config = PlotConfig.from_options(granularity=granularity, **options)
    check_one_step(make_trainer, preference, "dpo", config, nudge=True)


@pytest.mark.parametrize("scope", ["batch", "dataset"])
@pytest.mark.parametrize("target", ["relu", "shift", "softmax", "chosen", "anchored"])
@pytest.mark.parametrize("method", ["dpo", "kto", "cpo"])
def test_every_target_and_scope(make_trainer, preference, method, target, scope):
    if (method, target, scope) == ("cpo", "anchored", "batch"):
        pytest.skip("refused: CPO runs no reference model")
    config = PlotConfig.from_options(target=target, target_scope=scope, target_strength=0.7, reference_rows=5)
    check_one_step(make_trainer, preference, method, config, nudge=method in ("dpo", "kto"))


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


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_pairs_longer_than_max_length(make_trainer, preference, mode):
    """TRL has cut them before its collator, in it and in its forward."""
    check_one_step(make_trainer, preference, "dpo", PlotConfig(), nudge=True, max_length=15, truncation_mode=mode)


@pytest.mark.parametrize("method", ["dpo", "cpo"])
def test_lora(make_trainer, preference, method):
    from peft import LoraConfig

    extra = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)}
    check_one_step(make_trainer, preference, method, PlotConfig.paper(alpha=3.0), extra=extra)


@pytest.mark.parametrize("method", ["dpo", "sft", "kto", "pro", "cpo", "orpo", "grpo", "rloo"])
def test_separate_backend(make_trainer, preference, method):
    check_one_step(make_trainer, preference, method, PlotConfig.paper(alpha=3.0, plot_backend="separate"))


@pytest.mark.parametrize("granularity", ["batch", "sequence"])
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_separate_backend_has_the_default_target(make_trainer, preference, method, granularity):
    """It takes the reference's output too, so that it is the same method at a higher price."""
    config = PlotConfig.from_options(alpha=3.0, plot_backend="separate", granularity=granularity)
    check_one_step(make_trainer, preference, method, config, nudge=True)


def test_separate_backend_with_adapters(make_trainer, preference):
    """The reference is the policy with its adapters off: the same backbone runs twice."""
    from peft import LoraConfig

    extra = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)}
    config = PlotConfig.from_options(alpha=3.0, plot_backend="separate")
    check_one_step(make_trainer, preference, "dpo", config, extra=extra)


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
@pytest.mark.parametrize(
    "config", [PlotConfig(), PlotConfig.paper(alpha=3.0, positions="all")], ids=["default", "paper"]
)
def test_weights_after_training(make_trainer, preference, config, method, accumulation):
    """Optimiser steps of SGD; the oracle divides its term by hand where TRL's loss is divided already, and measures
    α once a step, on its first micro-batch."""
    options = {
        "gradient_accumulation_steps": accumulation, "max_steps": 2, "optim": "sgd", "learning_rate": 0.1,
        "max_grad_norm": 1e9,
    }  # fmt: skip
    if method in ("grpo", "rloo"):
        options |= {"steps_per_generation": accumulation}
    plain, ours = (make_trainer(method, **options) for _ in range(2))
    embeddings_at_start(plain)
    original = plain.compute_loss
    divisor = accumulation if method in ("sft", "grpo") else 1
    kind, measure, alphas = KINDS[method], Alpha(config), {}

    def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
        with head_input(plain) as hidden:
            loss = original(model, dict(inputs), return_outputs, num_items_in_batch)
        step = plain.state.global_step
        if step not in alphas:
            alphas[step] = measure(plain, kind, inputs, preference, loss * divisor, hidden[0])
        return loss + alphas[step] * materialised_term(plain, kind, inputs, config, preference) / divisor

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
