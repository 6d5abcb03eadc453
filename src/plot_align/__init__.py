"""Preference learning with optimal transport: one term for any preference fine-tuning loss.

The names below are loaded on first use, so that ``import plot_align`` pulls in neither torch, transformers nor trl.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from plot_align import errors
from plot_align._version import __version__

if TYPE_CHECKING:
    from plot_align.config import PlotAblations, PlotConfig
    from plot_align.doctor.diagnosis import diagnose
    from plot_align.methods.pro import PlotPROTrainer, PROConfig, PROTrainer
    from plot_align.methods.pro_loss import pro_loss
    from plot_align.monitor import PreferenceMonitor
    from plot_align.plot import BalancedAlpha, PlotLoss
    from plot_align.preference.datasets import load_pairs
    from plot_align.preference.distribution import PreferenceDistribution
    from plot_align.preference.estimation import estimate
    from plot_align.trl import PlotDPOTrainer, PlotHandle, PlotSFTTrainer, attach

__all__ = [
    "BalancedAlpha",
    "PROConfig",
    "PROTrainer",
    "PlotAblations",
    "PlotConfig",
    "PlotDPOTrainer",
    "PlotHandle",
    "PlotLoss",
    "PlotPROTrainer",
    "PlotSFTTrainer",
    "PreferenceDistribution",
    "PreferenceMonitor",
    "__version__",
    "attach",
    "diagnose",
    "errors",
    "estimate",
    "load_pairs",
    "pro_loss",
]

_HOME = {
    "BalancedAlpha": "plot_align.plot",
    "PROConfig": "plot_align.methods.pro",
    "PROTrainer": "plot_align.methods.pro",
    "PlotAblations": "plot_align.config",
    "PlotConfig": "plot_align.config",
    "PlotHandle": "plot_align.trl",
    "PlotDPOTrainer": "plot_align.trl",
    "PlotLoss": "plot_align.plot",
    "PlotPROTrainer": "plot_align.methods.pro",
    "PlotSFTTrainer": "plot_align.trl",
    "PreferenceDistribution": "plot_align.preference.distribution",
    "PreferenceMonitor": "plot_align.monitor",
    "attach": "plot_align.trl",
    "diagnose": "plot_align.doctor.diagnosis",
    "estimate": "plot_align.preference.estimation",
    "load_pairs": "plot_align.preference.datasets",
    "pro_loss": "plot_align.methods.pro_loss",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
