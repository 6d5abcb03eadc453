"""Make attacks and judges from their names and options."""

from __future__ import annotations

from typing import Any

from plot_align.errors import InputError, require_packages
from plot_align.io import build
from plot_align.redteam import judges
from plot_align.redteam.attack import Attack
from plot_align.redteam.best_of_n import BestOfN
from plot_align.redteam.direct import DirectRequest
from plot_align.redteam.gbda import GBDA
from plot_align.redteam.gcg import GCG
from plot_align.redteam.judges import Judge
from plot_align.redteam.judges.base import digest_of
from plot_align.redteam.names import ASKING, ATTACKS, CHECKPOINTS, JUDGES, PUBLISHED
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
    checkpoint: str | None = None,
    harmbench: str | None = None,
    device: str | None = None,
    url: str | None = None,
    model: str | None = None,
    key_variable: str = "OPENAI_API_KEY",
) -> Judge:
    """The judge called ``name``, one of JUDGES except likelihood, which needs a victim.

    Args:
        checkpoint: hub id or folder of a judge that loads a model; None takes the published one.
        harmbench: a checkout, for judge harmbench.
        device: of a judge that loads a model. url, model, key_variable: of the endpoint of a judge that asks one.

    Raises:
        InputError: something that it needs is missing.
    """
    require_judge(name, harmbench=harmbench, url=url, model=model)
    if name == "refusal":
        return judges.RefusalJudge()
    if name == "prefixes":
        return judges.RefusalPrefixes()
    if name == "harmbench" and harmbench is not None:
        prompts = judges.ClassifierPrompts.from_harmbench(harmbench)
        return judges.HarmBenchClassifier.from_checkpoint(checkpoint or CHECKPOINTS[name], prompts, device=device)
    if name in CHECKPOINTS:
        return judges.FineTunedJudge.load(name, checkpoint, device=device)
    if name in ASKING and url is not None and model is not None:
        from plot_align.inference.endpoint import Endpoint

        endpoint = Endpoint(url, model, key_variable)
        return judges.EndpointJudge(endpoint) if name == "endpoint" else judges.PromptedJudge(name, endpoint)
    raise InputError(f"judge {name!r} cannot be made from options; expected one of {', '.join(JUDGES)}")


def judge_rules() -> dict[str, str]:
    """The judges that go by rules or prompts of ours, each with the digest of them."""
    rules = {judge.name: judge.rules for judge in (judges.RefusalJudge(), judges.RefusalPrefixes())}
    return {**rules, "endpoint": digest_of("endpoint.py")}


def require_judge(
    name: str, *, harmbench: str | None = None, url: str | None = None, model: str | None = None
) -> None:
    """Check that a judge has what it needs, before attacks that may take hours; nothing is loaded.

    Args: as :func:`make_judge`.

    Raises:
        InputError: something is missing.
    """
    if name == "harmbench":
        if harmbench is None:
            raise InputError("judge harmbench needs HarmBench's prompts; name a checkout of it with --harmbench")
        judges.ClassifierPrompts.from_harmbench(harmbench)
    if name in ASKING and (url is None or model is None):
        raise InputError(f"judge {name} needs an address and a model; give --judge_url and --judge_model")
    if name in PUBLISHED:
        require_packages(f"judge {name}", "judgezoo", extra="judges")
