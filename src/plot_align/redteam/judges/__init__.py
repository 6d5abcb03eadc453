"""Judges decide whether an attack succeeded and whether a benign request was served; one file per judge.

An attack is judged against the behaviour, never against the test case: a suffix may have led the model elsewhere.
"""

from plot_align.redteam.judges.agreement import agreement
from plot_align.redteam.judges.base import Judge, Judged
from plot_align.redteam.judges.classifier import ClassifierPrompts, HarmBenchClassifier
from plot_align.redteam.judges.endpoint import EndpointJudge
from plot_align.redteam.judges.likelihood import TargetLikelihood
from plot_align.redteam.judges.phrases import REFUSAL_PHRASES, RefusalPrefixes
from plot_align.redteam.judges.published import FineTunedJudge, PromptedJudge
from plot_align.redteam.judges.refusal import RefusalJudge

__all__ = [
    "REFUSAL_PHRASES",
    "ClassifierPrompts",
    "EndpointJudge",
    "FineTunedJudge",
    "HarmBenchClassifier",
    "Judge",
    "Judged",
    "PromptedJudge",
    "RefusalJudge",
    "RefusalPrefixes",
    "TargetLikelihood",
    "agreement",
]
