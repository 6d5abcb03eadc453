"""How much the PLOT term weighs at each step: constant, on a schedule, or held to a share of the vanilla gradient."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .config import PlotConfig

# The first steps set the level, so each is measured; later ones only follow it.
_MEASURED_FIRST, _MEASURED_EVERY = 10, 5
_DECAY = 0.9


class AlphaSchedule(TrainerCallback, ExportableState):
    """α of each optimiser step.

    ``constant``: ``alpha``. ``linear`` and ``cosine``: from ``alpha`` at the first step to ``alpha_end`` at the last,
    ``α = alpha_end + (alpha − alpha_end)·(1 − t/T)`` or ``·(1 + cos(π·t/T))/2``. ``balance``:
    ``α = ρ·‖∇L_vanilla‖ / ‖∇L_PLOT‖`` with ρ = ``balance_ratio``. Both norms are taken at the head's input, every step
    for the first ten and every fifth from then on, and averaged over past measurements with weight 0.9. Until
    something was measured, balance uses ``alpha``, or 0 where none is given.

    A callback of the Trainer, so that its averages are saved with a checkpoint and a resumed run goes on with them.
    """

    def __init__(self, config: PlotConfig) -> None:
        self.config = config
        self.vanilla = 0.0  # decayed sums of the measured norms
        self.plot = 0.0
        self.last_step = -1

    def value(self, step: int, steps: int) -> float:
        """α of step ``step`` of ``steps``."""
        start, end = self.config.alpha or 0.0, self.config.alpha_end
        done = min(step / steps, 1.0) if steps > 0 else 0.0
        match self.config.alpha_schedule:
            case "linear":
                return end + (start - end) * (1 - done)
            case "cosine":
                return end + (start - end) * (1 + math.cos(math.pi * done)) / 2
            case "balance" if self.plot > 0:
                return self.config.balance_ratio * self.vanilla / self.plot
        return start

    def wants_measurement(self, step: int) -> bool:
        """Whether the gradients of this step are to be measured: once a step, whatever the accumulation."""
        if self.config.alpha_schedule != "balance" or step == self.last_step:
            return False
        return step < _MEASURED_FIRST or step % _MEASURED_EVERY == 0 or self.last_step < 0

    def observe(self, step: int, vanilla: float, plot: float) -> None:
        """Takes in ‖∇L_vanilla‖ and ‖∇L_PLOT‖ of a step; a micro-batch on which either was zero is left out.

        The correction for the averages' start is the same factor for both, so their ratio needs none.
        """
        self.last_step = step
        if not (math.isfinite(vanilla) and math.isfinite(plot) and vanilla > 0 and plot > 0):
            return
        self.vanilla = _DECAY * self.vanilla + (1 - _DECAY) * vanilla
        self.plot = _DECAY * self.plot + (1 - _DECAY) * plot

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"vanilla": self.vanilla, "plot": self.plot, "last_step": self.last_step}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the averages back from the checkpoint that training resumes from."""
        saved = (state.stateful_callbacks or {}).get(type(self).__name__)
        if state.global_step > 0 and isinstance(saved, dict):
            for name, value in saved["attributes"].items():
                setattr(self, name, value)
