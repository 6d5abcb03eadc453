"""Make attacks and judges from their names and options."""

from __future__ import annotations

from typing import Any

from plot_align.errors import InputError
from plot_align.io import build
from plot_align.redteam import judges
from plot_align.redteam.attack import Attack
from plot_align.redteam.best_of_n import BestOfN
from plot_align.redteam.direct import DirectRequest
from plot_align.redteam.gbda import GBDA
from plot_align.redteam.gcg import GCG
from plot_align.redteam.judges import Judge
from plot_align.redteam.names import ATTACKS
from plot_align.redteam.pez import PEZ
from plot_align.redteam.prefill import Prefill
from plot_align.redteam.random_suffix import RandomSuffix
from plot_align.redteam.sfs import SFS
from plot_align.redteam.uat import UAT
from plot_align.redteam.zero_shot import ZeroShot


def attack_class(name: str) -> Any:
    """The class of the attack called ``name``, one of ATTACKS."""
    classes = (DirectRequest, Prefill, BestOfN, RandomSuffix, GCG, PEZ, GBDA, UAT, ZeroShot, SFS)
    return dict(zip(ATTACKS, classes, strict=True))[name]


def make_attack(name: str, given: dict[str, Any], **extra: Any) -> Attack:
    """The attack called ``name`` with the options ``given`` by a user. ``extra`` holds ``attacker`` for attacks that
    use one.

    Raises:
        InputError: an unknown option, or one of another type.
    """
    return build(attack_class(name), given, name, **extra)


def make_judge(
    name: str,
    *,
    harmbench: str | None = None,
    classifier: str | None = None,
    device: str | None = None,
    url: str | None = None,
    model: str | None = None,
    key_variable: str = "OPENAI_API_KEY",
) -> Judge:
    """The judge called ``name``, one of JUDGES except likelihood, which needs a victim.

    Args:
        harmbench, classifier, device: of judge harmbench. url, model, key_variable: of judge endpoint.

    Raises:
        InputError: something that it needs is missing.
    """
    match name:
        case "refusal":
            return judges.RefusalJudge()
        case "prefixes":
            return judges.RefusalPrefixes()
        case "harmbench":
            if harmbench is None or classifier is None:
                raise InputError("judge harmbench needs HarmBench's prompts; name a checkout of it")
            prompts = judges.ClassifierPrompts.from_harmbench(harmbench)
            return judges.HarmBenchClassifier.from_checkpoint(classifier, prompts, device=device)
        case "endpoint":
            from plot_align.inference.endpoint import Endpoint

            if url is None or model is None:
                raise InputError("judge endpoint needs an address and a model; give --judge_url and --judge_model")
            return judges.EndpointJudge(Endpoint(url, model, key_variable))
    raise InputError(f"judge {name!r} cannot be made from options; expected refusal, prefixes, harmbench or endpoint")
