"""From measured values to what to do: the rules, each with its threshold and source. ``docs/doctor.md`` has the table.

A rule reads names of a plain mapping and is skipped where one is absent, so that the measures of the data and those of
a model on them go through the same table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from plot_align.doctor.findings import CHECKS, SEVERITIES, Severity, percent

NOTHING = "Nothing wrong was found."


@dataclass(frozen=True)
class Advice:
    """One sentence of the verdict: what was seen, and what to do. ``rule`` and ``source`` say where it is from.

    ``severity`` is that of the worst finding it speaks of; a warning where it speaks of none of the checks'.
    """

    rule: str
    sentence: str
    source: str
    severity: Severity = "warning"


@dataclass(frozen=True)
class Rule:
    """A rule of the verdict.

    Attributes:
        name: of the rule. when: its condition in words, with the threshold. do: its remedy in a few words.
        reads: names of the values it needs. say: the values, in that order → a sentence, or None where the condition
            does not hold. source: where the rule is from.
    """

    name: str
    when: str
    do: str
    reads: tuple[str, ...]
    say: Callable[..., str | None]
    source: str


def judge(measured: Mapping[str, Any]) -> list[Advice]:
    """What the rules say of ``measured``, on errors first; one advice, :data:`NOTHING`, where none applies.

    Args:
        measured: name → number, or an entry of :func:`plot_align.records.measure`, whose value a rule reads by this
            name and the ends of whose interval as ``NAME_low`` and ``NAME_high``. Of the data: the measures of
            :class:`~plot_align.doctor.data.Examination`, ``content`` (share of the preference on content) and
            ``largest_kind`` (what most of the rest is). ``context``: how many tokens the model holds; ``capped``:
            whether the pairs were cut there, as ``max_length`` is more. Of a model, each with its interval:
            ``accuracy`` and ``accuracy_per_token`` (share of pairs it ranks rightly before training), ``ches_mean``
            (length-normalised CHES, mean over pairs), ``on_policy`` (share of chosen answers at least as likely as
            the model's own, of which there are ``own_answers``); ``forecast`` (name of a loss → predicted change of
            the chosen log-probability in a step, nats) and ``forecast_interval`` (the same → its ends).
    """
    values: dict[str, Any] = {"context": math.inf, "capped": False, **measured}
    for name, entry in measured.items():
        if isinstance(entry, Mapping) and {"value", "n"} <= entry.keys():
            low, high = entry.get("interval") or (None, None)
            values |= {name: entry["value"], f"{name}_low": low, f"{name}_high": high}
    gap = values.get("refusal_gap_low")
    values["refusing"] = gap is not None and gap >= warns("refusals")  # then no rule advises SFT on such answers
    advice = []
    for rule in RULES:
        if all(values.get(name) is not None for name in rule.reads):
            sentence = rule.say(*(values[name] for name in rule.reads))
            if sentence is not None:
                advice.append(Advice(rule.name, sentence, rule.source, _severity(rule, values)))
    advice.sort(key=lambda said: -SEVERITIES.index(said.severity))  # stable: else in the order of the rules
    return advice or [Advice("nothing", NOTHING, "every rule whose values were measured", "note")]


def _severity(rule: Rule, values: Mapping[str, Any]) -> Severity:
    found = {CHECKS[name].severity(values[name]) for name in rule.reads if name in CHECKS}
    return "error" if "error" in found else "warning"


# --- thresholds and sentences ---------------------------------------------------------------------------------------


def warns(check: str) -> float:
    """From which value on the check is a warning, which is when the verdict speaks of it."""
    threshold = CHECKS[check].thresholds[1]
    assert threshold is not None
    return threshold


CONTENT = 0.5  # share of the preference's mass
ACCURACY_LOW, ACCURACY_HIGH = 0.5, 0.95
CHES = 0.0  # length-normalised, mean
ON_POLICY = 0.5
OWN_ANSWERS = 20  # of fewer the low end of what is the model's own is not known
_DROPPED = {
    "no-pair": "no pair",
    "empty": "empty",
    "identical": "identical",
    "duplicate": "repeated",
    "contradictory": "contradictory",
}
_TOKENS = ("template", "eos-missing", "eos-doubled", "border")


def _warning(check: str, value: float) -> bool:
    return value > 0 and value >= warns(check)


def _drop(*shares: float) -> str | None:
    named = {
        check: f"{name} ({percent(share)})"
        for (check, name), share in zip(_DROPPED.items(), shares, strict=True)
        if _warning(check, share)
    }
    contradictory = named.pop("contradictory", None)
    said = []
    if named:
        said.append(f"Drop what is {', '.join(named.values())}: it teaches nothing, or the same twice.")
    if contradictory:
        said.append(f"Settle what is {contradictory}, or drop both pairs: each unlearns what the other teaches.")
    return " ".join(said) or None


def _tokens(*shares: float) -> str | None:
    named = [CHECKS[check].remedy for check, share in zip(_TOKENS, shares, strict=True) if _warning(check, share)]
    return f"Mend the tokens before any run. {' '.join(named)}" if named else None


def _truncated(share: float, lost: float, longest: float, context: float, capped: bool) -> str | None:
    more = f", and {percent(lost)} lose what they differ in" if lost else ""
    cut = f"{percent(share)} of the pairs are cut{more}"
    if capped and share > 0:
        return (
            f"`max_length` lets pairs through that are longer than the {context:,} tokens the model holds: set "
            f"`max_length: {context}`, at which all this was measured and {cut}, or take a model that holds more."
        )
    if not _warning("truncated", share) and not _warning("difference-lost", lost):
        return None
    if longest > context:
        return (
            f"{cut}: `max_length: {round(longest)}` would hold 99 % of them, but the model holds only {context:,} "
            "tokens. Drop the longest pairs, or take a model that holds more."
        )
    return f"{cut}: `max_length: {round(longest)}` holds 99 % of them."


_FILTER = "drop the pairs with the largest CHES (`plot-align filter --by ches`)"


def _near(share: float, refusing: bool) -> str | None:
    if not _warning("near-identical", share):
        return None
    term = "" if refusing else "train with the SFT term (`loss_type: [sigmoid, sft]`), or "
    return (
        f"{percent(share)} of the pairs are nearly equal, where DPO lowers the chosen answer with the rejected one: "
        f"{term}{_FILTER}."
    )


def _noise(share: float) -> str | None:
    if not _warning("contradictory", share):
        return None
    return (
        f"{percent(share)} of the pairs contradict another, so labels are noisy: use `loss_type: robust` with "
        "`label_smoothing` at the rate of wrong labels. PLOT does not mend wrong labels."
    )


def _length(auc: float, low: float, high: float) -> str | None:
    if low >= warns("length"):
        return (
            f"The longer answer is preferred in {percent(auc)} of the pairs: expect ever longer answers. "
            "`ld_alpha: 0.5` (LD-DPO) or a length-normalised loss (SimPO) takes weight from length."
        )
    if high <= 1 - warns("length"):
        return (
            f"The shorter answer is preferred in {percent(1 - auc)} of the pairs: expect terse answers; compare "
            "models at equal length."
        )
    return None


def _first_words(accuracy: float, low: float) -> str | None:
    if low < warns("first-words"):
        return None
    return (
        f"The first words give the label away in {percent(accuracy)} of the pairs: accuracy will come to 1 with "
        "little learned beyond them. Judge the run by its answers and not by its margin."
    )


def _refusals(chosen: float, rejected: float, low: float, high: float) -> str | None:
    said = f"{percent(chosen)} of the chosen and {percent(rejected)} of the rejected answers refuse: "
    if low >= warns("refusals"):
        return (
            f"{said}refusing is the largest thing these pairs teach. Mix in harmless requests that are answered, keep "
            "β at 0.1 or above, better 0.5, or use PLOT; in our runs the SFT term refused more harmless requests, not "
            "fewer."
        )
    if high <= -warns("never-refuses"):
        return f"{said}refusing is trained away. Measure harmful requests after the run (`plot-align redteam`)."
    return None


def _scripts(share: float) -> str | None:
    if not _warning("scripts", share):
        return None
    return f"{percent(share)} of the pairs have answers in two scripts: drop them, or language is what is learned."


def _overlap(share: float) -> str | None:
    if not _warning("overlap", share):
        return None
    return f"{percent(share)} of the prompts are in the file given: drop them, or report no result on that file."


def _content(content: float, kind: str) -> str | None:
    if content >= CONTENT:
        return None
    return (
        f"Only {percent(content)} of what these pairs prefer token by token is content; most of the rest is {kind}. "
        "PLOT would train that: mend the data first, or leave PLOT off."
    )


def _accuracy(
    accuracy: float, low: float, high: float, token_low: float, token_high: float, refusing: bool
) -> str | None:
    if min(low, token_low) >= ACCURACY_HIGH:
        return (
            f"The model ranks {percent(accuracy)} of the pairs rightly before any training: there is little in them "
            "for it to learn. Take harder pairs."
        )
    if max(high, token_high) < ACCURACY_LOW:
        first = "read some of them, as labels may be wrong" if refusing else "train on the chosen answers first (SFT)"
        term = "" if refusing else ", or keep the SFT term"
        return (
            f"The model ranks {percent(1 - accuracy)} of the pairs the wrong way round before training, and DPO "
            f"seldom turns a ranking: {first}{term}."
        )
    return None


def _ches(mean: float, low: float, refusing: bool) -> str | None:
    if low <= CHES:
        return None
    term = "" if refusing else ", or train with the SFT term"
    return (
        f"The answers of a pair look alike to the model (mean length-normalised CHES {mean:.3g}), so the chosen one "
        f"will be pulled down: {_FILTER}{term}."
    )


def _forecast(forecast: Mapping[str, float], intervals: Mapping[str, Any], refusing: bool) -> str | None:
    """It speaks where the interval of DPO's forecast lies below 0, and names a loss whose own lies above DPO's."""
    high = (intervals.get("DPO") or (None, math.inf))[1]
    if "DPO" not in forecast or high >= 0:
        return None
    better = [
        name
        for name in forecast
        if intervals.get(name) and intervals[name][0] > high and not (refusing and name == "DPO+SFT")
    ]
    said = f"DPO's first step is forecast to change the chosen log-probability by {forecast['DPO']:+.2g} nats"
    if better:
        best = max(better, key=lambda name: forecast[name])
        return f"{said}, {best}'s by {forecast[best]:+.2g}: take {best}. {_BETA}"
    first = _FILTER if refusing else "train on the chosen answers first (SFT)"
    return f"{said}, and no other loss to do clearly better: {first}. {_BETA}"


_BETA = (
    "Another β does not change DPO's first step, only those after it: of 0.05, 0.1 and 0.5 the largest kept the "
    "chosen answers likeliest in our runs."
)


def _off_policy(share: float, high: float, own: int, refusing: bool) -> str | None:
    if own < OWN_ANSWERS or high >= ON_POLICY:
        return None
    draw = "Draw" if refusing else "Train by SFT on the chosen answers first, or draw"
    return (
        f"Only {percent(share)} of the chosen answers are as likely as the model's own: the pairs are off its policy. "
        f"{draw} pairs from the model itself, and keep β between 0.1 and 0.5."
    )


_OURS, _SANDBOX = "our runs: docs/results.md", "our runs: docs/choosing.md"


def _from(check: str) -> str:
    return percent(warns(check)) + " or more" if warns(check) else "any"


RULES = (
    Rule(
        "drop",
        "; ".join(f"{name}: {_from(check)}" for check, name in _DROPPED.items()),
        "drop them; settle what contradicts",
        tuple(_DROPPED),
        _drop,
        "the checks of the same names",
    ),
    Rule(
        "tokens",
        "; ".join(f"{check}: {_from(check)}" for check in _TOKENS),
        "mend tokenizer, template or texts",
        _TOKENS,
        _tokens,
        "the checks of the same names",
    ),
    Rule(
        "truncation",
        f"pairs cut at `max_length`: {_from('truncated')}, any where it is more than the model holds; that lose what "
        f"they differ in: {_from('difference-lost')}",
        "the `max_length` that holds 99 %, or that the model holds",
        ("truncated", "difference-lost", "longest_99", "context", "capped"),
        _truncated,
        "TRL's tokenisation",
    ),
    Rule(
        "near-identical",
        f"nearly equal pairs: {_from('near-identical')}",
        "SFT term or a filter by CHES",
        ("near-identical", "refusing"),
        _near,
        "Pal et al. 2024 (arXiv 2402.13228); Razin et al. 2024 (arXiv 2410.08847)",
    ),
    Rule(
        "noise",
        f"contradictory pairs: {_from('contradictory')}",
        "`loss_type: robust`",
        ("contradictory",),
        _noise,
        f"Chowdhury et al. 2024 (arXiv 2403.00409), TRL's `robust`; of PLOT, {_SANDBOX}",
    ),
    Rule(
        "length",
        f"AUC of length alone, the nearer end of its 95 % interval: {warns('length')} or more, or "
        f"{1 - warns('length'):.2f} or less",
        "`ld_alpha`, SimPO, or balanced lengths",
        ("length_auc", "length_auc_low", "length_auc_high"),
        _length,
        "Park et al. 2024 (arXiv 2403.19159); LD-DPO (arXiv 2409.06411)",
    ),
    Rule(
        "first-words",
        f"accuracy of the first words alone, the low end of its 95 % interval: {warns('first-words')} or more",
        "judge by answers",
        ("first_words_accuracy", "first_words_accuracy_low"),
        _first_words,
        "Qi et al. 2024 (arXiv 2406.05946)",
    ),
    Rule(
        "refusals",
        "chosen answers refuse more often than rejected ones, or the reverse, the nearer end of the 95 % interval: by "
        f"{_from('refusals')}",
        "answered harmless requests, β from 0.1 to 0.5, or PLOT, and no other rule advises SFT; or a measure of "
        "harmful requests",
        ("refusals_chosen", "refusals_rejected", "refusal_gap_low", "refusal_gap_high"),
        _refusals,
        f"Röttger et al. 2023 (arXiv 2308.01263); {_OURS}",
    ),
    Rule(
        "scripts",
        f"answers in two scripts: {_from('scripts')}",
        "drop them",
        ("scripts",),
        _scripts,
        "the check of the same name",
    ),
    Rule(
        "overlap",
        f"prompts of the file given: {_from('overlap')}",
        "drop them",
        ("overlap",),
        _overlap,
        "Brown et al. 2020 (arXiv 2005.14165)",
    ),
    Rule(
        "content",
        f"less than {percent(CONTENT)} of the preference's mass is on content",
        "mend the data before PLOT",
        ("content", "largest_kind"),
        _content,
        "the table of tokens: PLOT trains these and no others",
    ),
    Rule(
        "accuracy",
        "the model's accuracy before training, of sums and per token, the nearer ends of both 95 % intervals: "
        f"{ACCURACY_HIGH} or more, or below {ACCURACY_LOW}",
        "harder pairs; or SFT first",
        (
            "accuracy",
            "accuracy_low",
            "accuracy_high",
            "accuracy_per_token_low",
            "accuracy_per_token_high",
            "refusing",
        ),
        _accuracy,
        "Chen et al. 2024 (arXiv 2405.19534): preference learning seldom turns a ranking",
    ),
    Rule(
        "ches",
        f"mean length-normalised CHES, the low end of its 95 % interval: above {CHES:g}",
        "filter by CHES, or the SFT term",
        ("ches_mean", "ches_mean_low", "refusing"),
        _ches,
        "Razin et al. 2024 (arXiv 2410.08847)",
    ),
    Rule(
        "forecast",
        "DPO's first step is forecast to lower the chosen log-probability, the high end of its 95 % interval: below 0",
        "the best of the losses whose interval lies above DPO's; else SFT first",
        ("forecast", "forecast_interval", "refusing"),
        _forecast,
        f"first order, by one real gradient; of β, {_OURS}",
    ),
    Rule(
        "off-policy",
        f"chosen answers that are no less likely than {OWN_ANSWERS} or more answers of the model's own (above their "
        f"2.5 % quantile), the high end of the 95 % interval: below {percent(ON_POLICY)}",
        "SFT first, or pairs of the model's own; β from 0.1 to 0.5",
        ("on_policy", "on_policy_high", "own_answers", "refusing"),
        _off_policy,
        "Tajwar et al. 2024 (arXiv 2404.14367)",
    ),
)
