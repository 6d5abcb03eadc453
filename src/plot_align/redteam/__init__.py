"""Red-teaming: attacks on one's own models, in HarmBench's formats, and an honest attack success rate.

Other rooms import the names below and nothing else. They are loaded on first use, so that ``--help`` needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from plot_align.lazy import lazy
from plot_align.redteam.names import ATTACKS, TELL_REFUSALS

if TYPE_CHECKING:
    from plot_align.redteam.behaviors import (
        Behavior,
        default_benign,
        read_behaviors,
        read_targets,
        require_targets,
        write_behaviors,
    )
    from plot_align.redteam.catalogue import make_attack, make_judge
    from plot_align.redteam.judges import Judge, Judged, RefusalJudge, RefusalPrefixes
    from plot_align.redteam.measure import Budget, attack_and_judge, require_decided
    from plot_align.redteam.victim import Victim

__all__ = [
    "ATTACKS",
    "TELL_REFUSALS",
    "Behavior",
    "Budget",
    "Judge",
    "Judged",
    "RefusalJudge",
    "RefusalPrefixes",
    "Victim",
    "attack_and_judge",
    "default_benign",
    "make_attack",
    "make_judge",
    "read_behaviors",
    "read_targets",
    "require_decided",
    "require_targets",
    "write_behaviors",
]

__getattr__ = lazy(
    __name__,
    {
        "behaviors": "Behavior default_benign read_behaviors read_targets require_targets write_behaviors",
        "catalogue": "make_attack make_judge",
        "judges": "Judge Judged RefusalJudge RefusalPrefixes",
        "measure": "Budget attack_and_judge require_decided",
        "victim": "Victim",
    },
)
