"""The attacks and judges by name; without torch, so that ``--help`` need not wait for it."""

from __future__ import annotations

from plot_align.errors import InputError, did_you_mean

ATTACKS = ("direct", "prefill", "best_of_n", "random", "gcg", "pez", "gbda", "uat", "zero_shot", "sfs")
CHECKPOINTS = {  # of the judges that load a model, as published
    "harmbench": "cais/HarmBench-Llama-2-13b-cls",
    "strongreject": "qylu4156/strongreject-15k-v1",
    "llama-guard-3": "meta-llama/Llama-Guard-3-8B",
    "llama-guard-4": "meta-llama/Llama-Guard-4-12B",
}
ASKING = ("endpoint", "strongreject-rubric", "jailbreakbench", "xstest")  # judges that ask a model behind an endpoint
# Those of the package judgezoo.
PUBLISHED = ("strongreject", "llama-guard-3", "llama-guard-4", "strongreject-rubric", "jailbreakbench", "xstest")
JUDGES = ("refusal", "prefixes", "likelihood", *CHECKPOINTS, *ASKING)
TELL_REFUSALS = ("refusal", "prefixes", "endpoint", "xstest")  # the other judges know success only
DEFAULT_JUDGES = ("refusal", "prefixes")


def parse_judges(text: str, known: tuple[str, ...] = JUDGES) -> dict[str, str | None]:
    """Judges by name, in order, each with its checkpoint or None, from ``A,B=CHECKPOINT``.

    Raises:
        InputError: none, an unknown one, one twice, or a checkpoint of a judge that loads none.
    """
    found: dict[str, str | None] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, given, checkpoint = part.partition("=")
        if name not in known:
            raise InputError(f"judge is {name!r}; {did_you_mean(name, known, 'expected ' + ', '.join(known))}")
        if name in found:
            raise InputError(f"judge is {text!r}, which names {name} twice; name each once")
        if given and (name not in CHECKPOINTS or not checkpoint):
            raise InputError(f"judge is {part!r}; only {', '.join(CHECKPOINTS)} take a checkpoint, e.g. harmbench=DIR")
        found[name] = checkpoint or None
    if not found:
        raise InputError(f"judge is {text!r}, expected one or more of {', '.join(known)}")
    return found


def telling_refusals(judges: dict[str, str | None]) -> dict[str, str | None]:
    """Those of ``judges`` that tell refusals of benign requests; where one does not, filled up to two by defaults."""
    telling = {name: checkpoint for name, checkpoint in judges.items() if name in TELL_REFUSALS}
    if len(telling) == len(judges):
        return telling
    others = [name for name in DEFAULT_JUDGES if name not in telling]
    return telling | dict.fromkeys(others[: max(2 - len(telling), 0)])
