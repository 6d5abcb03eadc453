"""A training's progress: one line of at most 80 columns a log, and a bar below it where there is a terminal."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers.trainer_callback import ProgressCallback

_WIDTH = 80
_SHOWN = {  # of each log, while they fit; the record and the trackers have everything
    "loss": "loss {:#.4g}",
    "plot/vanilla_loss": "vanilla {:#.4g}",
    "plot/loss": "plot {:#.3g}",
    "plot/alpha": "α {:#.3g}",
    "rewards/accuracies": "accuracy {:#.3g}",
    "rank_accuracy": "accuracy {:#.3g}",
    "rewards/margins": "margin {:#.3g}",
    "mean_token_accuracy": "token accuracy {:#.3g}",
    "monitor/chosen_per_token": "chosen {:+#.2g}",
    "monitor/refuses_benign": "refuses benign {:#.2g}",
    "monitor/refuses_harmful": "harmful {:#.2g}",
    "monitor/repetition": "repeats {:#.2g}",
}


class Progress(ProgressCallback):
    """Shows a line where transformers shows a dictionary of twenty numbers."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, dynamic_ncols=True, disable=None)  # None: if no terminal
        self.current_step = 0

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if sys.stderr.isatty():
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(line(logs, state.global_step, state.max_steps))
            sys.stdout.flush()


def use(trainer: Any) -> None:
    """Replaces the Trainer's own progress; with ``disable_tqdm`` it prints its dictionaries as ever."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(Progress())


def line(logs: Mapping[str, Any], step: int, steps: int) -> str:
    """One log in at most 80 columns, e.g. ``  4/12  loss 1.524  vanilla 0.6931  plot 0.0276  α 30.1``."""
    if "train_runtime" in logs:
        took = datetime.timedelta(seconds=round(logs["train_runtime"]))
        return f"{step} steps in {took}, {logs['train_steps_per_second']:.3g} a second"
    prefix = "eval_" if "eval_loss" in logs else ""
    text = f"{step:>{len(str(steps))}}/{steps}" + ("  evaluation" if prefix else "")
    for name, number in _SHOWN.items():
        if prefix + name in logs:
            more = "  " + number.format(float(logs[prefix + name]))
            if len(text + more) > _WIDTH:
                break
            text += more
    return text
