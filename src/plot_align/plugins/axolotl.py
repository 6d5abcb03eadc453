"""The term in Axolotl: installing plot-align registers this plug-in, and ``plot:`` in the YAML file turns it on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from plot_align.errors import InputError
from plot_align.plugins.block import read_block
from plot_align.trl import artifacts
from plot_align.trl.attach import PlotHandle, attach


class PlotArgs(BaseModel):
    """The key that Axolotl's configuration gains."""

    plot: dict[str, Any] | None = None


class PlotPlugin(BasePlugin):
    """Adds ``α·L_PLOT`` to the loss of Axolotl's preference trainers; does nothing without ``plot:``."""

    handle: PlotHandle | None = None

    def get_input_args(self) -> str:
        """Where Axolotl finds the class of the keys that this plug-in adds."""
        return f"{PlotArgs.__module__}.{PlotArgs.__name__}"

    def register(self, cfg: Any) -> None:
        """Refuses what cannot work, before Axolotl loads anything.

        Raises:
            InputError: options that are wrong, or a configuration without pairs or without logits.
        """
        if read_block(cfg.get("plot")) is None:
            return
        if not cfg.get("rl"):
            raise InputError(
                "plot is set and rl is not, so Axolotl would train a trainer of its own on single answers; expected a "
                "method on preferences: set rl to dpo, ipo, kto, orpo or simpo, or remove plot"
            )
        if cfg.get("dpo_use_liger_kernel"):
            raise InputError(
                "dpo_use_liger_kernel is on, and Liger's loss builds no logits, which PLOT reads; turn "
                "dpo_use_liger_kernel off, or remove plot"
            )

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Attaches the term to the trainer that Axolotl built."""
        block = read_block(cfg.get("plot"))
        self.handle = None if block is None else attach(trainer, block.preference, block.config)

    def post_train(self, cfg: Any, model: Any) -> None:
        """Writes PLOT's files beside the weights, which Axolotl saves without its trainer."""
        if self.handle is not None and self.handle.trainer.is_world_process_zero():
            step = self.handle.trainer.state.global_step
            artifacts.save(Path(cfg.output_dir), self.handle.config, self.handle.preference, step=step)
