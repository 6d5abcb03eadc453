"""Resolves the term's options for a trainer and refuses combinations that cannot work, before anything is built."""

from __future__ import annotations

import os
import warnings
from typing import Any

from torch import Tensor

from plot_align.config import PlotConfig
from plot_align.errors import InputError
from plot_align.head import causal_lm
from plot_align.trl.backends import own_pass
from plot_align.trl.batches import is_earlier_kto


def makes_reference_forward(trainer: Any, kind: str) -> bool:
    """Whether the trainer runs the reference model over the micro-batch inside its training step."""
    return kind in ("DPOTrainer", "KTOTrainer") and not getattr(trainer.args, "precompute_ref_log_probs", False)


def resolve_auto(config: PlotConfig, trainer: Any, kind: str, reference: Tensor | None = None) -> PlotConfig:
    """``config`` with ``auto`` resolved for this trainer."""
    return config.resolve_auto(
        reference_forward=makes_reference_forward(trainer, kind), reference=reference is not None
    )


def check(trainer: Any, kind: str, config: PlotConfig, reference: Tensor | None = None) -> None:
    """Refuses options that do not work with a trainer, and warns of a loss that is not what its name says.

    Raises:
        InputError: positions, a granularity or a target that this trainer's micro-batches do not have, a
            ``reference`` that would not be used, an adapter on the head that the term would ignore, or an
            encoder-decoder model.
    """
    if reference is not None and (
        config.is_reward or (config.target, config.ablations.target_scope) != ("anchored", "dataset")
    ):
        scope = config.ablations.target_scope
        raise InputError(
            f"reference was passed, and target={config.target!r} with target_scope={scope!r} does not look at it; "
            "expected target='anchored' with target_scope='dataset', or no reference."
        )
    _check_unsloth(trainer, kind)
    _check_ranks(trainer, config)
    _check_generation(trainer, kind, config)
    _check_head(trainer, config)
    if kind == "SFTTrainer" and config.positions == "rejected":
        raise InputError(
            "positions is 'rejected' and the trainer is an SFTTrainer, which sees no rejected completion; expected "
            "'chosen' or 'all'."
        )
    packs = getattr(trainer.args, "packing", False)
    if config.granularity == "sequence" and packs and getattr(trainer.args, "packing_strategy", None) == "wrapped":
        raise InputError(
            "granularity is 'sequence' and packing_strategy is 'wrapped', which forgets where a sequence ends; "
            "expected packing_strategy='bfd', packing=False, or granularity='batch'."
        )
    if getattr(trainer, "is_encoder_decoder", False):
        raise InputError(
            f"the model of the {kind} is an encoder-decoder, whose completion does not follow its prompt; expected a "
            "decoder-only model: attach to one, or add plot_align.PlotLoss to a loss of your own."
        )
    if config.has_batch_target:
        _check_batch_target(trainer, kind, config)
    losses = getattr(trainer, "loss_types", None) or getattr(trainer, "loss_type", None) or []
    sorts = [name for name in losses if name in ("aot", "aot_pair", "aot_unpaired")]
    if sorts and trainer.args.per_device_train_batch_size == 1:
        warnings.warn(
            f"loss_type is {sorts[0]!r} with per_device_train_batch_size=1: it compares sorted micro-batches, and "
            "sorting one pair leaves plain DPO (sigmoid), whatever the gradient accumulation; raise "
            "per_device_train_batch_size, as far as the memory goes.",
            stacklevel=3,
        )


def _check_unsloth(trainer: Any, kind: str) -> None:
    """Refuses those of Unsloth's trainers, compiled from TRL's, whose loss leaves the term nothing to work on."""
    if not any(cls.__module__.startswith("Unsloth") for cls in type(trainer).__mro__):
        return
    if kind not in ("DPOTrainer", "KTOTrainer"):
        raise InputError(
            f"trainer is Unsloth's {kind}, whose loss does not come from the LM head that PLOT watches; expected "
            "Unsloth's DPOTrainer or KTOTrainer, or TRL's own trainer in a program that does not import unsloth."
        )
    if os.environ.get("UNSLOTH_FUSED_PREFERENCE_LOSS", "0") == "1":
        raise InputError(
            f"UNSLOTH_FUSED_PREFERENCE_LOSS is 1, with which Unsloth's {kind} builds no logits that PLOT could read; "
            "set it to 0 before importing Unsloth."
        )


def _check_generation(trainer: Any, kind: str, config: PlotConfig) -> None:
    """Refuses what the installed TRL's trainer does in a way that leaves the term nothing to work on."""
    if kind == "KTOTrainer" and is_earlier_kto(type(trainer)):
        raise InputError(
            "the KTOTrainer of this TRL is an earlier one, with batches of another form; expected trl 1.8 or newer: "
            "upgrade it, or use a DPOTrainer."
        )
    if kind == "DPOTrainer" and getattr(trainer, "padding_free", False):
        raise InputError(
            "padding_free is on, with which the DPOTrainer of this TRL packs all pairs into one row; PLOT expects a "
            "row for each completion: set padding_free=False."
        )
    if config.ablations.plot_backend == "separate":
        return
    before_0_29 = hasattr(trainer, "get_batch_loss_metrics")
    hides_logits = (
        hasattr(trainer, "dpo_loss_fn")  # TRL before 0.29 makes it when the switch is on, whichever that is
        or getattr(trainer.args, "use_liger_loss", False)
        or getattr(trainer, "use_liger_kernel", False)
        or (kind == "SFTTrainer" and getattr(trainer.args, "use_liger_kernel", False))
    )
    if own_pass(kind, getattr(trainer.args, "loss_type", None)) == "logits" and hides_logits:
        raise InputError(
            f"Liger's fused loss is on, and the {kind} then builds no logits, which PLOT reads on this TRL; expected "
            "use_liger_kernel and use_liger_loss off: turn them off, or set plot_backend='separate'"
            f"{' and target_scope=' + repr('dataset') if before_0_29 else ''}, which costs a second head pass."
        )


def _check_ranks(trainer: Any, config: PlotConfig) -> None:
    """Refuses any parallelism but data parallelism: p̄ is a mean over whole sequences and the whole vocabulary."""
    accelerator = trainer.accelerator
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and accelerator.num_processes == 1:
        raise InputError(
            f"{ranks} processes were started and each would train a model of its own, since they do not run on "
            "accelerators; expected use_cpu=True in the trainer's arguments, or `plot-align dpo --num_processes`."
        )
    kind = str(accelerator.distributed_type.value)
    if kind == "MEGATRON_LM" or (kind == "FSDP" and not accelerator.is_fsdp2):
        engine = "FSDP version 1, which flattens the LM head" if kind == "FSDP" else "Megatron-LM, which splits it"
        raise InputError(
            f"the trainer runs on {engine}, and PLOT needs the head whole; expected DDP, FSDP with fsdp_version: 2 or "
            "DeepSpeed: change the configuration of accelerate."
        )
    parallel = getattr(accelerator, "parallelism_config", None)
    sizes = {name: getattr(parallel, f"{name}_size", 1) or 1 for name in ("tp", "cp", "sp", "pp")}
    plugin = getattr(accelerator.state, "deepspeed_plugin", None) if kind == "DEEPSPEED" else None
    zero = {} if plugin is None else plugin.deepspeed_config
    sizes["tp"] = max(
        sizes["tp"],
        zero.get("tensor_parallel", {}).get("autotp_size", 1) or 1,
        getattr(trainer.model, "_tp_size", None) or 1,
    )
    names = {"tp": "tensor", "cp": "context", "sp": "sequence", "pp": "pipeline"}
    for short, size in sizes.items():
        if size > 1:
            raise InputError(
                f"{names[short]} parallelism over {size} ranks is on, where no rank sees a whole head and whole "
                f"sequences; PLOT expects data parallelism alone: set {short}_size to 1."
            )
    is_sharded = kind == "FSDP" or zero.get("zero_optimization", {}).get("stage") == 3
    if is_sharded and config.ablations.plot_backend == "separate":
        raise InputError(
            "plot_backend is 'separate' and the LM head is sharded (FSDP or ZeRO-3), which only TRL's own head "
            "gathers; expected plot_backend='fused', or DDP or ZeRO-2."
        )


def _check_head(trainer: Any, config: PlotConfig) -> None:
    """Refuses an adapter on the LM head with options that compute logits from the head's weight alone."""
    if config.ablations.plot_backend != "separate" and config.ablations.divergence != "deft_log":
        return
    if hasattr(causal_lm(trainer.model).get_output_embeddings(), "base_layer"):
        raise InputError(
            "the LM head has an adapter (PEFT's target_modules name it), which "
            + ("plot_backend='separate'" if config.ablations.plot_backend == "separate" else "divergence='deft_log'")
            + " would not see; expected a head without one: take lm_head out of target_modules, or use another option."
        )


def _check_batch_target(trainer: Any, kind: str, config: PlotConfig) -> None:
    if config.needs_reference and not makes_reference_forward(trainer, kind):
        raise InputError(
            f"target_scope is 'batch' with target='anchored', and this {kind} makes no reference forward in its "
            "training step; expected a DPO or KTO trainer without precompute_ref_log_probs: use "
            "target_scope='dataset', or target='chosen'."
        )
    if config.target == "chosen" and config.positions == "rejected":
        raise InputError(
            "target is 'chosen' on the micro-batch with positions='rejected', so rejected answers would be held to "
            f"the tokens of others; expected positions='chosen' or 'all', or another target for this {kind}."
        )
    counts_both = config.target in ("relu", "shift", "softmax")
    one_side = kind in ("KTOTrainer", "GRPOTrainer", "RLOOTrainer") and trainer.args.per_device_train_batch_size == 1
    if counts_both and one_side:
        raise InputError(
            f"target is {config.target!r} on the micro-batch with per_device_train_batch_size=1, and one row of a "
            f"{kind} has one side only, so there would never be a target; expected a larger micro-batch, "
            "target='chosen', or target_scope='dataset'."
        )
    if kind == "SFTTrainer" and config.target not in ("anchored", "chosen"):
        raise InputError(
            f"target_scope is 'batch' with target={config.target!r}, and an SFTTrainer's micro-batch holds no "
            "rejected completion to count; expected target='chosen' or target_scope='dataset'."
        )
