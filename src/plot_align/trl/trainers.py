"""Drop-in replacements for TRL's trainers, with the PLOT term attached."""

from __future__ import annotations

import os
from typing import Any

from plot_align.config import PlotConfig
from plot_align.preference.distribution import PreferenceDistribution
from plot_align.trl.attach import PlotHandle, attach
from trl import DPOTrainer, SFTTrainer

PreferenceSource = PreferenceDistribution | str | os.PathLike[str] | None


class Attached:
    """A mixin: builds the trainer that follows it in the bases, then attaches the term."""

    plot_handle: PlotHandle

    def __init__(
        self, *args: Any, preference: PreferenceSource = None, plot: PlotConfig | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.plot_handle = attach(self, preference, plot)


class PlotDPOTrainer(Attached, DPOTrainer):
    """:class:`trl.DPOTrainer` with ``α·L_PLOT`` added to whichever ``loss_type`` it is configured with.

    Args:
        *args: those of :class:`trl.DPOTrainer`.
        **kwargs: likewise.
        preference: token preferences or the file of them; ``None`` counts them in ``train_dataset``.
        plot: options of the term; ``None`` takes the defaults.

    Raises:
        InputError: see :func:`plot_align.attach`.
    """


class PlotSFTTrainer(Attached, SFTTrainer):
    """:class:`trl.SFTTrainer` with ``α·L_PLOT`` added; its data hold one side only, so ``preference`` is needed.

    Args:
        *args: those of :class:`trl.SFTTrainer`.
        **kwargs: likewise.
        preference: token preferences or the file of them (``plot-align estimate``).
        plot: options of the term; ``None`` takes the defaults.

    Raises:
        InputError: see :func:`plot_align.attach`.
    """
