"""The weight α of the PLOT term at each step: constant, on a schedule, or balanced against the vanilla gradient."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback

from plot_align.config import PlotConfig
from plot_align.plot import BalancedAlpha

_KEY = "plot_align.alpha"  # key in the trainer's state; no callback has this name, so the Trainer ignores it


class AlphaSchedule(TrainerCallback):
    """α of each optimiser step.

    ``constant``: ``alpha``. ``linear`` and ``cosine``: from ``alpha`` at the first step to ``alpha_end`` after the
    last, ``α = alpha_end + (alpha − alpha_end)·(1 − t/T)`` or ``·(1 + cos(π·t/T))/2``. ``balance``:
    :class:`plot_align.plot.BalancedAlpha`; before the first measurement ``alpha``, or 0 if none is given.

    The averages are part of the trainer's state: every checkpoint saves them, and a resumed run restores them.
    """

    def __init__(self, config: PlotConfig) -> None:
        self.config = config
        self.balance = BalancedAlpha(config.ratio)
        self.last_step = -1  # the last step that was measured

    def value(self, step: int, steps: int) -> float:
        """α of step ``step`` of ``steps``."""
        start, end = self.config.alpha or 0.0, self.config.alpha_end
        done = min(step / steps, 1.0) if steps > 0 else 0.0
        match self.config.schedule:
            case "linear":
                return end + (start - end) * (1 - done)
            case "cosine":
                return end + (start - end) * (1 + math.cos(math.pi * done)) / 2
            case "balance" if self.balance.plot > 0:
                return self.balance.value
        return start

    def wants_measurement(self, step: int) -> bool:
        """Whether to measure the gradients of this step; not a second time after a successful measurement."""
        if self.config.schedule != "balance" or step == self.last_step:
            return False
        return self.balance.is_due(step)

    def observe(self, step: int, vanilla: float, plot: float) -> None:
        """Adds ‖∇L_vanilla‖ and ‖∇L_PLOT‖ of a step to the averages; ignores a micro-batch on which either is zero."""
        if self.balance.observe(vanilla, plot):
            self.last_step = step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Resets the averages, or restores them from the checkpoint that training resumes from."""
        saved = (state.stateful_callbacks or {}).get(_KEY) if state.global_step > 0 else None
        self.balance.vanilla, self.balance.plot, self.last_step = saved or (0.0, 0.0, -1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stores the averages in the state that the next checkpoint saves."""
        if self.config.schedule == "balance" and not self.config.is_off:
            averages = [self.balance.vanilla, self.balance.plot, self.last_step]
            state.stateful_callbacks = {**(state.stateful_callbacks or {}), _KEY: averages}
