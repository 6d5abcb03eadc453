"""Red-teaming: attacks on one's own models, in HarmBench's formats, and an honest attack success rate.

Other rooms import the names below and nothing else. They are loaded on first use, so that ``--help`` needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from plot_align.lazy import lazy
from plot_align.redteam.names import ASKING, ATTACKS, DEFAULT_JUDGES, JUDGES, parse_judges, telling_refusals

if TYPE_CHECKING:
    from plot_align.redteam.behaviors import (
        Behavior,
        default_benign,
        read_behaviors,
        read_labelled,
        read_targets,
        require_targets,
        write_behaviors,
    )
    from plot_align.redteam.catalogue import judge_rules, make_attack, make_judge, require_judge
    from plot_align.redteam.judges import Judge, Judged, RefusalJudge, RefusalPrefixes
    from plot_align.redteam.measure import Budget, agreements, attack_and_judge, benign_labels, require_decided
    from plot_align.redteam.run import label_benign
    from plot_align.redteam.victim import Victim

__all__ = [
    "ASKING",
    "ATTACKS",
    "DEFAULT_JUDGES",
    "JUDGES",
    "Behavior",
    "Budget",
    "Judge",
    "Judged",
    "RefusalJudge",
    "RefusalPrefixes",
    "Victim",
    "agreements",
    "attack_and_judge",
    "benign_labels",
    "default_benign",
    "judge_rules",
    "label_benign",
    "make_attack",
    "make_judge",
    "parse_judges",
    "read_behaviors",
    "read_labelled",
    "read_targets",
    "require_decided",
    "require_judge",
    "require_targets",
    "telling_refusals",
    "write_behaviors",
]

__getattr__ = lazy(
    __name__,
    {
        "behaviors": "Behavior default_benign read_behaviors read_labelled read_targets require_targets "
        "write_behaviors",
        "catalogue": "judge_rules make_attack make_judge require_judge",
        "judges": "Judge Judged RefusalJudge RefusalPrefixes",
        "measure": "Budget agreements attack_and_judge benign_labels require_decided",
        "run": "label_benign",
        "victim": "Victim",
    },
)
