"""What ``auto`` becomes on each method, and that the defaults train every one of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from plot_align.config import PlotConfig
from plot_align.errors import InputError, RunError
from plot_align.trl import attach
from plot_align.trl.backends import own_pass
from plot_align.trl.batches import trainer_kind
from plot_align.trl.checks import check, resolve_auto

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
        ("dpo", {"plot_backend": "separate"}, ("anchored", "batch")),
        ("dpo", {"target_scope": "dataset"}, ("relu", "dataset")),
        ("dpo", {"target": "anchored"}, ("anchored", "dataset")),
        ("dpo", {"target": "anchored", "target_scope": "batch"}, ("anchored", "batch")),
        ("dpo", {"target": "relu", "target_scope": "batch"}, ("relu", "batch")),
        ("sft", {"target": "shift"}, ("shift", "dataset")),
    ],
)
def test_auto(make_trainer, method, options, expected):
    trainer = make_trainer(method)
    found = resolve_auto(PlotConfig.from_options(**options), trainer, trainer_kind(trainer))
    assert (found.target, found.ablations.target_scope) == expected


def test_auto_without_a_reference_forward(make_trainer):
    trainer = make_trainer("dpo", precompute_ref_log_probs=True)
    found = resolve_auto(PlotConfig(), trainer, "DPOTrainer")
    assert (found.target, found.ablations.target_scope) == ("chosen", "batch")


def test_auto_with_a_reference_of_the_users(make_trainer):
    trainer = make_trainer("grpo")
    found = resolve_auto(PlotConfig(), trainer, "GRPOTrainer", torch.full((300,), 1 / 300))
    assert (found.target, found.ablations.target_scope) == ("anchored", "dataset")


@pytest.mark.parametrize("method", METHODS)
def test_the_defaults_train_every_method(make_trainer, preference, method):
    trainer = make_trainer(method)
    attach(trainer, preference)
    trainer.train()
    assert len(logged(trainer, "plot/loss")) == 3
    assert all(alpha > 0 for alpha in logged(trainer, "plot/alpha"))


@pytest.mark.parametrize(
    "options",
    [{"target": "relu"}, {"target": "anchored", "target_scope": "batch"}, {"divergence": "deft_prob"}],
)
def test_a_reference_that_nothing_looks_at_is_refused(make_trainer, preference, options):
    trainer = make_trainer("dpo")
    with pytest.raises(InputError, match="reference was passed"):
        attach(trainer, preference, PlotConfig.from_options(**options), reference=torch.full((300,), 1 / 300))


def ranks(trainer, **options):
    """The trainer as ``check`` sees it on several ranks of an engine that this machine does not start."""
    state = SimpleNamespace(deepspeed_plugin=options.pop("deepspeed_plugin", None))
    known = {"num_processes": 2, "is_fsdp2": False, "parallelism_config": None, "state": state}
    return SimpleNamespace(model=trainer.model, accelerator=SimpleNamespace(**{**known, **options}))


@pytest.mark.parametrize(
    ("options", "plot", "said"),
    [
        ({"distributed_type": DistributedType.FSDP}, {}, "FSDP version 1, which flattens the LM head"),
        ({"distributed_type": DistributedType.MEGATRON_LM}, {}, "Megatron-LM, which splits it"),
        (
            {"distributed_type": DistributedType.FSDP, "is_fsdp2": True},
            {"plot_backend": "separate", "target": "relu"},
            "plot_backend is 'separate' and the LM head is sharded",
        ),
        *(
            (
                {
                    "distributed_type": DistributedType.FSDP,
                    "is_fsdp2": True,
                    "parallelism_config": SimpleNamespace(**{f"{short}_size": 2}),
                },
                {},
                f"{name} parallelism over 2 ranks is on",
            )
            for short, name in {"tp": "tensor", "cp": "context", "sp": "sequence", "pp": "pipeline"}.items()
        ),
        (
            {
                "distributed_type": DistributedType.DEEPSPEED,
                "deepspeed_plugin": SimpleNamespace(deepspeed_config={"tensor_parallel": {"autotp_size": 4}}),
            },
            {},
            "tensor parallelism over 4 ranks is on",
        ),
    ],
)
def test_ranks_that_are_not_data_parallel_alone(make_trainer, options, plot, said):
    trainer = make_trainer("dpo")
    with pytest.raises(InputError, match=said):
        check(ranks(trainer, **options), "DPOTrainer", PlotConfig.from_options(**plot))


def test_processes_that_would_train_alone(make_trainer, preference, monkeypatch):
    trainer = make_trainer("dpo")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="2 processes were started and each would train a model of its own"):
        attach(trainer, preference)


def test_rejected_positions_are_not_held_to_chosen_tokens(make_trainer, preference):
    with pytest.raises(InputError, match="positions='rejected'"):
        attach(make_trainer("cpo"), preference, PlotConfig(positions="rejected"))


def test_a_head_with_an_adapter(make_trainer, preference):
    """CPO allows one; what is made from the head's weight alone would not see it."""
    from peft import LoraConfig

    extra = {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "lm_head"])}
    for options in ({"divergence": "deft_log"}, {"plot_backend": "separate"}):
        with pytest.raises(InputError, match="the LM head has an adapter"):
            attach(make_trainer("cpo", extra=dict(extra)), preference, PlotConfig.from_options(**options))
    attach(make_trainer("cpo", extra=dict(extra)), preference)


def test_a_reference_without_numbers_is_named(make_trainer, preference):
    trainer = make_trainer("dpo")
    attach(trainer, preference)
    with torch.no_grad():
        trainer.ref_model.lm_head.weight[7] = torch.nan
    with pytest.raises(RunError, match="the reference model's logits are NaN or infinite at step 0"):
        trainer.train()


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


def earlier_trl(monkeypatch):
    """TRL before 1.15, as far as its utilities tell."""
    from trl.trainer import utils

    monkeypatch.delattr(utils, "add_fused_lm_head")


@pytest.mark.parametrize(
    ("kind", "loss_type", "found"),
    [
        ("DPOTrainer", ["sigmoid"], "logits"),
        ("KTOTrainer", "kto", "logits"),
        ("SFTTrainer", "nll", "logits"),
        ("SFTTrainer", "chunked_nll", "chunked"),
        ("CPOTrainer", "sigmoid", "logits"),
    ],
)
def test_where_the_outputs_are(monkeypatch, kind, loss_type, found):
    assert own_pass(kind, loss_type) == ("logits" if kind == "CPOTrainer" else "fused")
    earlier_trl(monkeypatch)
    assert own_pass(kind, loss_type) == found


def test_online_trainers_before_the_fused_head(make_trainer, preference, monkeypatch):
    """They scale their logits in place: refused, and the other backend is named, which works."""
    trainer = make_trainer("grpo")
    earlier_trl(monkeypatch)
    with pytest.raises(InputError, match=r"GRPOTrainer of this TRL has no fused head.*plot_backend='separate'"):
        attach(trainer, preference)
    attach(trainer, preference, PlotConfig.from_options(plot_backend="separate"))


@pytest.mark.parametrize("where", ["args.use_liger_loss", "use_liger_kernel"])
def test_logits_that_liger_hides(make_trainer, preference, monkeypatch, where):
    """``use_liger_loss`` before TRL 0.29, then the trainer's own ``use_liger_kernel``."""
    trainer = make_trainer("dpo")
    setattr(trainer.args if where.startswith("args") else trainer, where.rpartition(".")[2], True)
    check(trainer, "DPOTrainer", PlotConfig())  # the fused head stands in the place of Liger's
    earlier_trl(monkeypatch)
    with pytest.raises(InputError, match="Liger's fused loss is on, and the DPOTrainer then builds no logits"):
        check(trainer, "DPOTrainer", PlotConfig())
    check(trainer, "DPOTrainer", PlotConfig.from_options(plot_backend="separate"))


def test_pairs_in_one_row(make_trainer):
    trainer = make_trainer("dpo")
    trainer.padding_free = True
    with pytest.raises(InputError, match="padding_free is on"):
        check(trainer, "DPOTrainer", PlotConfig())


def test_kto_of_before(make_trainer, preference, monkeypatch):
    trainer = make_trainer("kto")
    # The method in which the earlier one computes its loss.
    monkeypatch.setattr(type(trainer), "get_batch_loss_metrics", None, raising=False)
    with pytest.raises(InputError, match=r"the KTOTrainer of this TRL is an earlier one.*trl 1\.8"):
        attach(trainer, preference)
