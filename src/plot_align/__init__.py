"""Preference learning with optimal transport: one term for any preference fine-tuning loss.

The names below are loaded on first use, so that ``import plot_align`` pulls in neither torch, transformers nor trl.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from plot_align import errors
from plot_align._version import __version__

if TYPE_CHECKING:
    from plot_align.estimate import estimate, load_pairs
    from plot_align.geometry import Geometry, line
    from plot_align.losses import PlotLoss, make_divergence, pro_loss
    from plot_align.preference import PreferenceDistribution
    from plot_align.training import (
        PlotConfig,
        PlotDPOTrainer,
        PlotPROTrainer,
        PlotSFTTrainer,
        PROConfig,
        PROTrainer,
        attach,
    )

__all__ = [
    "Geometry",
    "PROConfig",
    "PROTrainer",
    "PlotConfig",
    "PlotDPOTrainer",
    "PlotLoss",
    "PlotPROTrainer",
    "PlotSFTTrainer",
    "PreferenceDistribution",
    "__version__",
    "attach",
    "errors",
    "estimate",
    "line",
    "load_pairs",
    "make_divergence",
    "pro_loss",
]

_HOME = {
    "Geometry": "plot_align.geometry",
    "PROConfig": "plot_align.training",
    "PROTrainer": "plot_align.training",
    "PlotConfig": "plot_align.training",
    "PlotDPOTrainer": "plot_align.training",
    "PlotLoss": "plot_align.losses",
    "PlotPROTrainer": "plot_align.training",
    "PlotSFTTrainer": "plot_align.training",
    "PreferenceDistribution": "plot_align.preference",
    "attach": "plot_align.training",
    "estimate": "plot_align.estimate",
    "line": "plot_align.geometry",
    "load_pairs": "plot_align.estimate",
    "make_divergence": "plot_align.losses",
    "pro_loss": "plot_align.losses",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps ``plot_align.estimate`` the function.

    The import system binds every submodule on its package, so the first ``from plot_align.estimate import ...`` would
    put the module where the public function of the same name belongs. Modules stay reachable by their full name.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
