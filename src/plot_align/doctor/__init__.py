"""What is wrong with a preference data set, before a run: checks, a verdict in plain words, one page.

Other wings import the names below and nothing else. They are loaded on first use, so that ``--help`` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plot_align.doctor.diagnosis import Diagnosis, diagnose
    from plot_align.doctor.findings import Finding
    from plot_align.doctor.forecast import Step
    from plot_align.doctor.model import ModelMeasures, measure
    from plot_align.doctor.verdict import Advice, judge

__all__ = ["Advice", "Diagnosis", "Finding", "ModelMeasures", "Step", "diagnose", "judge", "measure"]

_NAMES = {
    "diagnosis": "Diagnosis diagnose",
    "findings": "Finding",
    "forecast": "Step",
    "model": "ModelMeasures measure",
    "verdict": "Advice judge",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
