"""One step of training on an engine (``ddp``, ``fsdp2``, ``zero2``, ``zero3``): the losses and every gradient, whole.

A case has ``name``, ``engine``, ``method``, ``args`` and ``plot``. :func:`train_all` runs a list of them in one
process group; :func:`train_once` without an engine is the one process that they are compared with.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, fsdp_utils, gather_object
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl.experimental.cpo import CPOConfig, CPOTrainer

from plot_align import PlotConfig, attach, estimate
from plot_align.trl import gradients as measured
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

# Several ranks sample other rows than one process does; of all rows the norms must be the same.
ALL_ROWS = 10_000

ARGS = {
    "per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0,
    "train_sampling_strategy": "sequential", "bf16": False, "seed": 3, "gradient_checkpointing": False,
    "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
}  # fmt: skip
PAPER = {"alpha": 3.0, "target": "relu", "target_scope": "dataset", "geometry": "norm"}
ZERO = {
    "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
}  # fmt: skip


def build(method: str, model: Any, folder: str, data: Dataset, args: dict[str, Any], peft: bool = False) -> Any:
    """TRL's trainer of ``method``, without the term."""
    config, trainer = {
        "dpo": (DPOConfig, DPOTrainer), "sft": (SFTConfig, SFTTrainer), "cpo": (CPOConfig, CPOTrainer),
    }[method]  # fmt: skip
    if method == "sft":
        data = data.rename_column("chosen", "completion").remove_columns("rejected")
    extra: dict[str, Any] = {}
    if peft:
        from peft import LoraConfig

        torch.manual_seed(0)  # the adapters' start is random
        extra["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_alpha=32)
    args = config(**{**ARGS, **args})
    return trainer(
        model, args=args, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(folder), **extra
    )


def whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The gradient of a parameter that FSDP2 or ZeRO may have split over the ranks."""
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):  # of ZeRO-3, of ZeRO-2
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)
    gradient = parameter.grad
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimiser step."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def take(self, model: torch.nn.Module) -> None:
        if self.found:
            return
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.found[name.removeprefix("module.")] = whole(parameter).detach().float().clone().contiguous()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.take(model)


def record(trainer: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Trains, and returns the gradients of the first step and what was logged."""
    kept = Gradients()
    trainer.add_callback(kept)
    tokens: list[int] = []
    compute_loss = trainer.compute_loss

    def counting(model, inputs, *args, **kwargs):
        name = next(name for name in ("completion_mask", "labels", "chosen_labels") if name in inputs)
        labels = inputs[name] if name == "completion_mask" else inputs[name] != -100
        tokens.append(int(labels[:, 1:].sum()))
        engine = getattr(trainer.accelerator, "deepspeed_engine_wrapped", None)
        if engine is not None and not hasattr(engine.engine, "_step_before"):
            # accelerate steps inside backward(), and the step frees the gradients.
            engine.engine._step_before = engine.engine.step

            def step(*args, **kwargs):
                if engine.engine.is_gradient_accumulation_boundary():
                    kept.take(engine.engine.module)
                return engine.engine._step_before(*args, **kwargs)

            engine.engine.step = step
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = counting
    trainer.train()
    return kept.found, {"log": trainer.state.log_history, "tokens": gather_object([tokens])}


def train_once(case: dict[str, Any], model_folder: str, data: Dataset, preference: Any, out: str) -> tuple:
    """One case on the engine that this process group is set up for."""
    args = {**case.get("args", {}), "output_dir": out}
    model: Any = model_folder
    if case.get("by_name"):  # loaded by the trainer, when the engine is known: split, or on the first rank only
        args["model_init_kwargs"] = {"dtype": "float32"}
    else:
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    trainer = build(case["method"], model, model_folder, data, args, case.get("peft", False))
    attach(trainer, preference, PlotConfig.from_options(**{**PAPER, **case["plot"]}))
    return record(trainer)


@contextlib.contextmanager
def grouped(how: str | None) -> Iterator[None]:
    """FSDP2's groups. ``None``: accelerate's. ``root``: the head in the root's group, freed after every forward, as
    before accelerate 1.15. ``own``: the head in a group of its own."""
    original, final_norm = torch.distributed.fsdp.fully_shard, fsdp_utils._find_final_norm

    def fully_shard(module, **options):
        if isinstance(module, (list, torch.nn.Embedding)):
            return module
        return original(module, **{**options, "reshard_after_forward": True})

    if how == "root":
        torch.distributed.fsdp.fully_shard = fully_shard
    if how == "own":
        fsdp_utils._find_final_norm = lambda model: None
    try:
        yield
    finally:
        torch.distributed.fsdp.fully_shard, fsdp_utils._find_final_norm = original, final_norm


@contextlib.contextmanager
def on_cpu(engine: str, options: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """Options of the trainer for ``engine``. accelerate shards on accelerators only; what it builds on runs on gloo as
    well, so for the sharding engines it is told that these processes are such."""
    if engine == "ddp":
        yield {"use_cpu": True}
        return
    prepare, device = PartialState._prepare_backend, PartialState.set_device
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    before = dict(os.environ)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        if engine == "fsdp2":
            yield {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True, **(options or {})}}
        else:
            import deepspeed

            # Else it compiles a faster all-reduce for minutes.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            stage = int(engine.removeprefix("zero"))
            yield {"deepspeed": {**ZERO, "zero_optimization": {"stage": stage, "reduce_scatter": stage == 3}}}
    finally:
        unset_hf_deepspeed_config()
        PartialState._prepare_backend, PartialState.set_device = prepare, device
        os.environ.clear()
        os.environ.update(before)


def train_all(cases: list[dict[str, Any]], model_folder: str, data_file: str, out: str) -> dict[str, Any]:
    """What :func:`train_once` returns for each case on these ranks, or the error."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    measured._SAMPLED_ROWS = ALL_ROWS
    data = Dataset.from_json(data_file)
    preference = estimate(data, AutoTokenizer.from_pretrained(model_folder), progress=False)
    found: dict[str, Any] = {}
    for case in cases:
        with on_cpu(case["engine"], case.get("engine_options")) as engine:
            case = {**case, "args": {**case.get("args", {}), **engine}}
            try:
                with grouped(case.get("groups")):
                    found[case["name"]] = train_once(case, model_folder, data, preference, f"{out}/{case['name']}")
            except Exception:
                found[case["name"]] = traceback.format_exc()
    torch.distributed.barrier()
    return found
