"""What is wrong with a preference data set, before a run: checks, a verdict in plain words, one page.

Other wings import the names below and nothing else. They are loaded on first use, so that ``--help`` needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from plot_align.lazy import lazy

if TYPE_CHECKING:
    from plot_align.doctor.diagnosis import Diagnosis, diagnose
    from plot_align.doctor.findings import Finding
    from plot_align.doctor.forecast import Step
    from plot_align.doctor.model import ModelMeasures, measure
    from plot_align.doctor.verdict import Advice, judge

__all__ = ["Advice", "Diagnosis", "Finding", "ModelMeasures", "Step", "diagnose", "judge", "measure"]

__getattr__ = lazy(
    __name__,
    {
        "diagnosis": "Diagnosis diagnose",
        "findings": "Finding",
        "forecast": "Step",
        "model": "ModelMeasures measure",
        "verdict": "Advice judge",
    },
)
