"""Checkpoints that a run goes on from: the newest whole one, and whether it is as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from plot_align.io import seal_folder


class SealCheckpoints(TrainerCallback):
    """Writes the digests of a checkpoint's files beside them, once all processes have written theirs."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from accelerate import PartialState

        PartialState().wait_for_everyone()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
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
    trainer.add_callback(SealCheckpoints())
    trainer.add_callback(_StopAtTheEnd())
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
