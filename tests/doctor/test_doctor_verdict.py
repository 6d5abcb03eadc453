"""The verdict: each rule speaks from its threshold on, and the page of the documentation has the tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from plot_align.doctor import judge
from plot_align.doctor.diagnosis import ruled
from plot_align.doctor.findings import CHECKS, at_least, percent
from plot_align.doctor.verdict import NOTHING, RULES
from plot_align.records import measure, wilson

PAGE = Path(__file__).resolve().parents[2] / "docs" / "doctor.md"
CLEAN = {
    **dict.fromkeys(("no-pair", "empty", "identical", "contradictory", "duplicate", "near-identical", "overlap"), 0.0),
    **dict.fromkeys(
        ("truncated", "difference-lost", "template", "eos-missing", "eos-doubled", "border", "scripts"), 0.0
    ),
    "longest_99": 700,
    "length_auc": measure(0.5, 900, interval=(0.45, 0.55)),
    "first_words_accuracy": measure(0.5, 900, interval=(0.45, 0.55)),
    "refusals_chosen": 0.1,
    "refusals_rejected": 0.1,
    "refusal_gap": measure(0.0, 900, interval=(-0.05, 0.05)),
    "content": 0.9,
    "largest_kind": "format",
    "accuracy": measure(0.7, 900, interval=(0.65, 0.75)),
    "accuracy_per_token": measure(0.7, 900, interval=(0.65, 0.75)),
    "ches_mean": measure(-3.0, 900, interval=(-3.1, -2.9)),
    "forecast": {"DPO": 0.1, "DPO+SFT": 0.3, "DPO+PLOT": 0.2},
    "forecast_interval": {"DPO": [0.05, 0.15], "DPO+SFT": [0.2, 0.4], "DPO+PLOT": [0.1, 0.3]},
    "on_policy": measure(0.8, 900, interval=(0.75, 0.85)),
    "own_answers": 32,
}
SURE = {  # every rule of a model speaks
    "accuracy": measure(0.3, 900, interval=(0.27, 0.33)),
    "accuracy_per_token": measure(0.3, 900, interval=(0.27, 0.33)),
    "ches_mean": measure(3.0, 900, interval=(2.9, 3.1)),
    "forecast": {"DPO": -0.5, "DPO+SFT": 0.3, "DPO+PLOT": 0.1},
    "forecast_interval": {"DPO": [-0.6, -0.4], "DPO+SFT": [0.2, 0.4], "DPO+PLOT": [0.0, 0.2]},
    "on_policy": measure(0.2, 900, interval=(0.17, 0.23)),
    "own_answers": 32,
}


def rules(**changed):
    return [advice.rule for advice in judge({**CLEAN, **{name.replace("__", "-"): x for name, x in changed.items()}})]


def test_nothing_is_an_answer():
    assert [advice.sentence for advice in judge(CLEAN)] == [NOTHING]
    assert [advice.sentence for advice in judge({})] == [NOTHING]


def interval(low: float, high: float) -> dict:
    return measure((low + high) / 2, 900, interval=(low, high))


def both(low: float, high: float) -> dict:
    return {"accuracy": interval(low, high), "accuracy_per_token": interval(low, high)}


def forecast(high: float, low: float = -2.0) -> dict:
    """DPO's forecast between ``low`` and ``high``, and SFT's above it."""
    intervals = {"DPO": [low, high], "DPO+SFT": [1.0, 2.0]}
    return {"forecast": {name: sum(ends) / 2 for name, ends in intervals.items()}, "forecast_interval": intervals}


@pytest.mark.parametrize(
    ("rule", "below", "above"),
    [
        ("drop", {"identical": 0.0099}, {"identical": 0.01}),
        ("drop", {"duplicate": 0.0099}, {"duplicate": 0.01}),
        ("drop", {"empty": 0.0}, {"empty": 1e-6}),
        ("drop", {"no__pair": 0.0}, {"no__pair": 1e-6}),
        ("tokens", {"eos__missing": 0.0099}, {"eos__missing": 0.01}),
        ("tokens", {"border": 0.099}, {"border": 0.1}),
        ("tokens", {"template": 0.0}, {"template": 1e-6}),
        ("truncation", {"truncated": 0.049}, {"truncated": 0.05}),
        ("near-identical", {"near__identical": 0.049}, {"near__identical": 0.05}),
        ("length", {"length_auc": interval(0.64, 0.9)}, {"length_auc": interval(0.65, 0.9)}),
        ("length", {"length_auc": interval(0.1, 0.36)}, {"length_auc": interval(0.1, 0.34)}),
        ("first-words", {"first_words_accuracy": interval(0.69, 0.9)}, {"first_words_accuracy": interval(0.7, 0.9)}),
        ("refusals", {"refusal_gap": interval(0.24, 0.9)}, {"refusal_gap": interval(0.25, 0.9)}),
        ("refusals", {"refusal_gap": interval(-0.9, -0.24)}, {"refusal_gap": interval(-0.9, -0.25)}),
        ("scripts", {"scripts": 0.0099}, {"scripts": 0.01}),
        ("overlap", {"overlap": 0.0}, {"overlap": 1e-6}),
        ("content", {"content": 0.5}, {"content": 0.49}),
        ("accuracy", both(0.94, 0.99), both(0.95, 0.99)),
        ("accuracy", both(0.4, 0.5), both(0.4, 0.49)),
        ("ches", {"ches_mean": interval(0.0, 9)}, {"ches_mean": interval(0.01, 9)}),
        ("forecast", forecast(0.0), forecast(-0.01)),
        ("off-policy", {"on_policy": interval(0.1, 0.5)}, {"on_policy": interval(0.1, 0.49)}),
    ],
)
def test_a_rule_speaks_from_its_threshold_on(rule, below, above):
    assert rules(**below) == ["nothing"]
    assert rules(**above) == [rule]


def test_contradictions_are_dropped_and_are_noise():
    assert rules(contradictory=0.0099) == ["nothing"]
    assert rules(contradictory=0.01) == ["drop", "noise"]


def test_errors_come_first():
    """Noise and lost text at 10 % are errors; equal answers, a wide border and measures of the model are not."""
    changed = {"identical": 0.05, "near-identical": 0.5, "template": 0.1, "ches_mean": interval(0.5, 1.5)}
    found = [(advice.rule, advice.severity) for advice in judge({**CLEAN, **changed})]
    assert found == [("tokens", "error"), ("drop", "warning"), ("near-identical", "warning"), ("ches", "warning")]
    assert rules(contradictory=0.1, overlap=0.1, border=0.5) == ["drop", "noise", "overlap", "tokens"]
    assert judge(CLEAN)[0].severity == "note"


def test_a_model_is_judged_by_intervals():
    """One pair, three pairs, a coin flip of forty, a forecast of −1e-09: silence. The same of a thousand: words."""

    def of(n: int, right: float, per_token: float, ches: list[float] | None, dpo: list[float] | None, answers: int):
        on_policy = {"chosen_below": 0.9, "answers": answers}
        found = {"pairs": n, "accuracy": right, "accuracy_per_token": per_token, "on_policy": on_policy}
        found |= {"ches_mean": 1.0, "ches_interval": ches, "forecast": {"DPO": -1e-9, "DPO+SFT": None}}
        found |= {"forecast_interval": {"DPO": dpo, "DPO+SFT": None}}
        return [advice.rule for advice in judge(ruled(found))]

    assert of(1, 0.0, 0.0, None, None, 1) == ["nothing"]
    assert of(3, 1 / 3, 1 / 3, [-1.0, 3.0], [-1e-3, 1e-3], 3) == ["nothing"]
    assert of(40, 0.45, 0.45, [-1.0, 3.0], [-1e-3, 1e-3], 19) == ["nothing"]
    assert of(1000, 0.45, 0.45, [0.9, 1.1], [-2e-9, -1e-10], 20) == ["accuracy", "ches", "forecast", "off-policy"]
    assert of(1000, 0.45, 0.55, None, None, 0) == ["nothing"]  # the chosen answers are only the longer ones
    assert of(1000, 0.98, 0.55, None, None, 0) == ["nothing"]
    assert of(1000, 0.98, 0.98, None, None, 0) == ["accuracy"]


def test_a_shares_interval_is_wilsons():
    model = {"pairs": 40, "accuracy": 0.45, "accuracy_per_token": None, "ches_mean": None, "ches_interval": None}
    found = ruled(
        {**model, "on_policy": {"chosen_below": None, "answers": 0}, "forecast": {}, "forecast_interval": {}}
    )
    assert found["accuracy"]["interval"] == list(wilson(0.45, 40))
    assert found["accuracy_per_token"] is found["ches_mean"] is found["on_policy"] is None


def test_the_best_forecast_is_named():
    def said(*intervals: list[float]) -> str:
        named = dict(zip(("DPO", "DPO+SFT", "DPO+PLOT"), intervals, strict=False))
        values = {name: sum(ends) / 2 for name, ends in named.items()}
        (advice,) = judge({"forecast": values, "forecast_interval": named})
        return advice.sentence

    assert "take DPO+PLOT" in said([-0.6, -0.4], [0.0, 0.2], [0.1, 0.3])
    assert "take DPO+SFT" in said([-0.6, -0.4], [0.2, 0.4], [0.1, 0.3])
    assert "no other loss to do clearly better: train on" in said([-0.6, -0.4], [-0.5, 0.2], [-0.9, -0.1])
    assert "Another β does not change DPO's first step" in said([-0.6, -0.4], [0.2, 0.4])
    assert "and 1." not in said([-0.6, -0.4], [0.2, 0.4])
    assert said([0.05, 0.15], [0.2, 0.4]) == NOTHING
    assert said([-0.2, 0.0], [0.2, 0.4]) == NOTHING


def test_where_refusing_is_taught_no_rule_advises_sft():
    refusing = {"refusal_gap": interval(0.25, 0.9)}
    for changed, advised in (({}, 5), (refusing, 0)):
        others = [a for a in judge({**CLEAN, **SURE, "near-identical": 0.5, **changed}) if a.rule != "refusals"]
        assert [advice.rule for advice in others] == ["near-identical", "accuracy", "ches", "forecast", "off-policy"]
        assert sum("SFT" in advice.sentence for advice in others) == advised
    assert "take DPO+PLOT" in others[3].sentence
    no_better = {"forecast": {"DPO": -0.5}, "forecast_interval": {"DPO": [-0.6, -0.4]}}
    assert "SFT" not in judge({**CLEAN, **refusing, **no_better})[-1].sentence


def test_plot_is_no_remedy_for_answers_that_look_alike():
    said = judge({**SURE, "near-identical": 0.5})
    assert [advice.rule for advice in said if "PLOT" in advice.sentence + advice.source] == []
    assert [rule.name for rule in RULES if "PLOT" in rule.do] == ["refusals", "content"]


def test_a_contradiction_is_settled_and_teaches_no_less_than_another_pair():
    (drop, _) = judge({**CLEAN, "contradictory": 0.05})
    assert drop.sentence.startswith("Settle what is contradictory (5.0 %), or drop both pairs:")
    assert "teaches nothing" not in drop.sentence
    (drop, _) = judge({**CLEAN, "contradictory": 0.05, "identical": 0.02})
    assert drop.sentence.startswith("Drop what is identical (2.0 %): it teaches nothing, or the same twice. Settle ")


def test_the_max_length_that_is_needed_is_named():
    measured = {"truncated": 0.2, "difference-lost": 0.1, "longest_99": measure(1234, 50)}

    def said(**more) -> str:
        return judge({**measured, **more})[0].sentence

    cut = "20.0 % of the pairs are cut, and 10.0 % lose what they differ in"
    assert said() == said(context=1234) == f"{cut}: `max_length: 1234` holds 99 % of them."
    assert said(context=1000).startswith(
        f"{cut}: `max_length: 1234` would hold 99 % of them, but the model holds only"
    )
    assert f"set `max_length: 64`, at which all this was measured and {cut}" in said(context=64, capped=True)
    measured = {**measured, "truncated": 0.001, "difference-lost": 0.0}
    assert "set `max_length: 64`" in said(context=64, capped=True)  # training fails at one such pair
    assert said(context=64) == NOTHING
    measured["truncated"] = 0.0
    assert said(context=64, capped=True) == NOTHING


def test_every_warning_of_a_check_is_in_the_verdict():
    """A check that warns must not stand above "nothing wrong was found"."""
    ends = {
        "length": {"length_auc": interval(0.65, 0.9)},
        "first-words": {"first_words_accuracy": interval(0.7, 0.9)},
        "refusals": {"refusal_gap": interval(0.25, 0.9)},
        "never-refuses": {"refusal_gap": interval(-0.9, -0.25)},
    }
    for check in CHECKS.values():
        if check.thresholds[1] is not None:
            changed = ends.get(check.name, {check.name: max(check.thresholds[1], 1e-6)})
            assert judge({**CLEAN, **changed})[0].sentence != NOTHING, check.name


def test_severity_rises_with_the_share():
    check = CHECKS["contradictory"]
    assert [check.severity(share) for share in (0, 1e-9, 0.01, 0.1, 1)] == [None, "note", "warning", "error", "error"]
    assert CHECKS["near-identical"].severity(0.009) is None
    assert CHECKS["near-identical"].severity(1) == "warning"
    findings = check.finding(3, 100, range(9))
    assert findings[0].rows == [0, 1, 2, 3, 4]
    assert findings[0].sentence.startswith("3 of 100 pairs (3.0 %) contradict")
    assert at_least(findings, "warning")
    assert not at_least(findings, "error")
    assert check.finding(0, 100) == []


def test_percent():
    assert [percent(x) for x in (0, 1, 0.123, 0.00049, 0.00001)] == ["0.0 %", "100.0 %", "12.3 %", "0.05 %", "0.001 %"]


def test_the_documentation_has_the_tables():
    def threshold(value: float | None) -> str:
        return "–" if value is None else "any" if value == 0 else f"{value:g}"

    text = PAGE.read_text(encoding="utf-8")
    for check in CHECKS.values():
        start = f"| `{check.name}` | "
        row = next((line for line in text.splitlines() if line.startswith(start)), "")
        end = f" | {' | '.join(map(threshold, check.thresholds))} | {check.source} |"
        assert row.endswith(end), f"docs/doctor.md lacks a row {start}…{end}"
    for rule in RULES:
        assert f"| `{rule.name}` | {rule.when} | {rule.do} | {rule.source} |\n" in text, rule.name
