"""Checkpoints that a run goes on from: the newest whole one, and whether it is as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from plot_align.io import json_or_none, seal_folder, write_json

_COUNTS = "plot_align_counts.json"
_TOKENS = "_total_train_tokens"  # TRL's name for it


class _Keep(TrainerCallback):
    """Adds to a checkpoint what TRL forgets, and, once all processes have written theirs, the digests of its files."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from accelerate import PartialState

        PartialState().wait_for_everyone()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            write_json(folder / _COUNTS, {"num_tokens": getattr(self.trainer, _TOKENS, None)})
            seal_folder(folder)


class _Trained(Exception):
    """There is nothing left to train."""


class _StopAtTheEnd(TrainerCallback):
    """transformers takes one step too many where it goes on from the last step of ``max_steps``."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            raise _Trained


def train(trainer: Any, checkpoint: Path | None) -> dict[str, Any]:
    """``trainer.train()``, from ``checkpoint`` on, with checkpoints that are known again. Returns the metrics."""
    trainer.add_callback(_Keep(trainer))
    trainer.add_callback(_StopAtTheEnd())
    counts = json_or_none(checkpoint / _COUNTS) if checkpoint is not None else None
    if isinstance(counts, dict) and counts.get("num_tokens") is not None:
        setattr(trainer, _TOKENS, counts["num_tokens"])  # the tokens trained on, which TRL's log would count anew
    try:
        return trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint)).metrics
    except _Trained:  # the weights are those of the checkpoint
        metrics = {"total_flos": trainer.state.total_flos, "train_loss": 0.0}  # as transformers without a step has it
        trainer.log(dict(metrics))
        return {**metrics, "epoch": trainer.state.epoch}


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in ``folder`` that is whole: the trainer writes its state last."""
    whole = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").exists()]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
