"""Numbers of ours in the trainer's own log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal


def store(trainer: Any, metrics: Mapping[str, float], mode: Literal["train", "eval"]) -> None:
    """Adds ``metrics`` to those that a trainer of TRL averages until its next log."""
    if hasattr(trainer, "store_metrics"):  # CPO, ORPO, and DPO before TRL 0.29
        prefix = "eval_" if mode == "eval" else ""
        trainer.store_metrics({prefix + name: value for name, value in metrics.items()}, train_eval=mode)
        return
    for name, value in metrics.items():
        trainer._metrics[mode][name].append(value)
