"""Drop-in trainers: TRL's, and the one for PRO, with the PLOT term attached."""

from __future__ import annotations

import os
from typing import Any

from trl import DPOTrainer, SFTTrainer

from ..preference import PreferenceDistribution
from .attach import PlotHandle, attach
from .config import PlotConfig
from .pro import PROTrainer

PreferenceSource = PreferenceDistribution | str | os.PathLike[str] | None


class _Attached:
    """Builds the trainer it stands before in the bases, then attaches the term."""

    plot_handle: PlotHandle

    def __init__(
        self, *args: Any, preference: PreferenceSource = None, plot: PlotConfig | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.plot_handle = attach(self, preference, plot)


class PlotDPOTrainer(_Attached, DPOTrainer):
    """:class:`trl.DPOTrainer` with ``α·L_PLOT`` added to whichever ``loss_type`` it is configured with.

    Args:
        *args, **kwargs: those of :class:`trl.DPOTrainer`.
        preference: token preferences or the file of them; ``None`` counts them in ``train_dataset``.
        plot: options of the term; ``None`` takes the defaults.

    Raises:
        InputError: see :func:`plot_align.attach`.
    """


class PlotSFTTrainer(_Attached, SFTTrainer):
    """:class:`trl.SFTTrainer` with ``α·L_PLOT`` added; its data hold one side only, so ``preference`` is needed.

    Args:
        *args, **kwargs: those of :class:`trl.SFTTrainer`.
        preference: token preferences or the file of them (``plot-align estimate``).
        plot: options of the term; ``None`` takes the defaults.

    Raises:
        InputError: see :func:`plot_align.attach`.
    """


class PlotPROTrainer(_Attached, PROTrainer):
    """:class:`PROTrainer` with ``α·L_PLOT`` added; the best completion of each list is the preferred one.

    Args:
        *args, **kwargs: those of :class:`PROTrainer`.
        preference: token preferences or the file of them; ``None`` counts them in ``train_dataset``.
        plot: options of the term; ``None`` takes the defaults.

    Raises:
        InputError: see :class:`PROTrainer` and :func:`plot_align.attach`.
    """
