"""Tune one model with several losses from one seed, on the same pairs; each arm is an ordinary TRL run."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from plot_align.bench import without_plot
from plot_align.config import PlotConfig
from plot_align.environment import on_cpu
from plot_align.io import check_folder, seal_folder
from plot_align.preference.distribution import PreferenceDistribution
from plot_align.records import write_record
from plot_align.trl import attach
from plot_align.trl.artifacts import results_of
from plot_align.trl.checkpoints import last_checkpoint
from plot_align.trl.checkpoints import train as resume

RECORD = "plot_align_record.json"


@dataclass(frozen=True)
class Arm:
    """A loss of TRL's ``DPOConfig``, with the PLOT term (``plot``) or without it (None)."""

    name: str
    loss_type: tuple[str, ...]
    plot: PlotConfig | None = None


ARMS = (
    Arm("DPO", ("sigmoid",)),
    Arm("DPO+SFT", ("sigmoid", "sft")),
    Arm("DPO+PLOT", ("sigmoid",), PlotConfig()),
)


@dataclass(frozen=True)
class Setting:
    """Settings common to all arms.

    Args:
        steps: optimiser steps. pairs: per step. learning_rate: of AdamW, falling linearly to 0.
        beta: of DPO. max_length: tokens of prompt and answer.
        bf16: autocast to bfloat16 over float32 weights. seed: of the order of the pairs.
    """

    steps: int
    pairs: int = 4
    learning_rate: float = 3e-5
    beta: float = 0.1
    max_length: int = 160
    bf16: bool = True
    seed: int = 0


def make_trainer(arm: Arm, setting: Setting, model: Path, pairs: Any, output: Path) -> Any:
    """TRL's ``DPOTrainer`` for an arm, before the PLOT term is attached."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        output_dir=str(output),
        max_steps=setting.steps,
        per_device_train_batch_size=setting.pairs,
        learning_rate=setting.learning_rate,
        beta=setting.beta,
        loss_type=list(arm.loss_type),
        max_length=setting.max_length,
        bf16=setting.bf16,
        use_cpu=on_cpu(),
        seed=setting.seed,
        gradient_checkpointing=False,  # this model fits in memory; recomputing would cost a third of the time
        save_steps=max(1, -(-setting.steps // 2)),  # only one checkpoint on the way, because it is 2 GB
        save_total_limit=1,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, use_safetensors=True),
        args=args,
        train_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(model),
    )


def train(
    arm: Arm,
    setting: Setting,
    model: Path,
    pairs: Any,
    preference: PreferenceDistribution,
    folder: Path,
    on_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Train an arm and save it to ``folder``, with a record beside the weights; resumes from its last checkpoint.

    Args:
        model: checkpoint folder to start from, also the reference.
        pairs: rows of ``prompt``, ``chosen`` and ``rejected``, as TRL takes them.
        preference: token counts of those pairs.
        folder: of the tuned model; it is finished if it has a record.
        on_step: called with the number of finished steps.

    Arms without PLOT use the same head kernel as the arm with it, so that their times are comparable.
    """
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    if (folder / RECORD).exists():
        check_folder(folder)
        _drop_checkpoints(folder)  # killed before that
        on_step(setting.steps)
        return

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            on_step(state.global_step)
            if state.global_step >= setting.steps:
                control.should_save = False  # the model is saved below; a last checkpoint would be four times as large

    trainer = make_trainer(arm, setting, model, pairs, folder)
    kernel: AbstractContextManager[None] = nullcontext()
    if arm.plot is None:
        kernel = without_plot(trainer)
    else:
        attach(trainer, preference, arm.plot)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Steps())
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        check_folder(checkpoint)
        on_step(int(checkpoint.name.rpartition("-")[2]))
    with kernel:
        metrics = resume(trainer, checkpoint)
    trainer.save_model(str(folder))
    seal_folder(folder)
    write_record(
        folder / RECORD,
        "dpo",
        results_of(trainer, metrics, resumed=checkpoint is not None),
        config={
            "arm": arm.name,
            "setting": asdict(setting),
            "training": trainer.args.to_dict(),
            "model": {"model_name_or_path": str(model)},
            "plot": None if arm.plot is None else arm.plot.to_dict(),
        },
        seed=setting.seed,
    )
    _drop_checkpoints(folder)


def _drop_checkpoints(folder: Path) -> None:
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)


def quiet() -> None:
    """Silence the libraries' progress bars and notices, which would drown the demo's own."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for name in ("trl", "accelerate", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
