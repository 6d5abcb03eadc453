"""What the examples share: their command line, the demo's pairs, settings for a small model, the report at the end."""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

from plot_align.demo.data import pairs
from plot_align.demo.fetch import fetch
from plot_align.environment import fast_bf16, on_cpu

__all__ = ["arguments", "pairs", "report", "settings"]


def arguments(description: str, **choices: list[str]) -> argparse.Namespace:
    """``--steps``, ``--alpha``, ``--model``, and an option for each of ``choices``, the first value its default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps")
    parser.add_argument("--alpha", type=float, help="weight of the PLOT term; none: balanced")
    parser.add_argument("--model", help="a checkpoint folder with a chat template; none: SmolLM2-135M-Instruct")
    for name, values in choices.items():
        parser.add_argument(f"--{name}", choices=values, default=values[0], help="which one")
    options = parser.parse_args()
    options.model = str(fetch(options.model))
    return options


def settings(steps: int, batch_size: int = 8) -> dict[str, Any]:
    """Training arguments of every TRL config: a small model, five lines of log, nothing kept."""
    return {
        "output_dir": tempfile.mkdtemp(prefix="plot-align-example-"),
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": 2e-5,
        "logging_steps": max(1, steps // 5),
        "save_strategy": "no",
        "report_to": "none",
        "bf16": fast_bf16(),
        "use_cpu": on_cpu(),
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def report(trainer: Any) -> None:
    """The PLOT metrics of the first and the last log, each the mean over its steps."""
    logs = [record for record in trainer.state.log_history if "plot/loss" in record]
    print(f"\n{'':22}{'first':>8}{'last':>10}")
    for name in sorted(name for name in logs[0] if name.startswith("plot/")):
        last = f"{logs[-1][name]:10.4f}" if name in logs[-1] else f"{'–':>10}"  # the ratio is not taken at every step
        print(f"{name:20}{logs[0][name]:10.4f}{last}")
