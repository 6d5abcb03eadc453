"""The verdict: each rule speaks from its threshold on, and the page of the documentation has the tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from plot_align.doctor import judge
from plot_align.doctor.findings import CHECKS, at_least, percent
from plot_align.doctor.verdict import NOTHING, RULES
from plot_align.records import measure

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
    "accuracy": 0.7,
    "ches_mean": -3.0,
    "forecast": {"DPO": 0.1, "DPO+SFT": 0.3, "DPO+PLOT": 0.2},
    "on_policy": 0.8,
}


def rules(**changed):
    return [advice.rule for advice in judge({**CLEAN, **{name.replace("__", "-"): x for name, x in changed.items()}})]


def test_nothing_is_an_answer():
    assert [advice.sentence for advice in judge(CLEAN)] == [NOTHING]
    assert [advice.sentence for advice in judge({})] == [NOTHING]


def interval(low: float, high: float) -> dict:
    return measure((low + high) / 2, 900, interval=(low, high))


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
        ("accuracy", {"accuracy": 0.94}, {"accuracy": 0.95}),
        ("accuracy", {"accuracy": 0.5}, {"accuracy": 0.49}),
        ("ches", {"ches_mean": 0.0}, {"ches_mean": 0.01}),
        ("forecast", {"forecast": {"DPO": 0.0, "DPO+SFT": 1.0}}, {"forecast": {"DPO": -0.01, "DPO+SFT": 1.0}}),
        ("off-policy", {"on_policy": 0.5}, {"on_policy": 0.49}),
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
    changed = {"identical": 0.05, "near-identical": 0.5, "template": 0.1, "ches_mean": 1.0}
    found = [(advice.rule, advice.severity) for advice in judge({**CLEAN, **changed})]
    assert found == [("tokens", "error"), ("drop", "warning"), ("near-identical", "warning"), ("ches", "warning")]
    assert rules(contradictory=0.1, overlap=0.1, border=0.5) == ["drop", "noise", "overlap", "tokens"]
    assert judge(CLEAN)[0].severity == "note"


def test_the_best_forecast_is_named():
    def said(**forecast):
        (advice,) = judge({"forecast": {name.replace("_", "+"): value for name, value in forecast.items()}})
        return advice.sentence

    assert "take DPO+PLOT" in said(DPO=-0.5, DPO_SFT=0.1, DPO_PLOT=0.2)
    assert "take DPO+SFT" in said(DPO=-0.5, DPO_SFT=0.3, DPO_PLOT=0.2)
    assert "train by SFT first" in said(DPO=-0.1, DPO_SFT=-0.3, DPO_PLOT=-0.2)
    assert said(DPO=0.1, DPO_SFT=0.3) == NOTHING


def test_the_max_length_that_is_needed_is_named():
    (advice,) = judge({"truncated": 0.2, "difference-lost": 0.1, "longest_99": measure(1234, 50)})
    assert (
        "20.0 % of the pairs are cut, and 10.0 % lose what they differ in: `max_length: 1234` holds" in advice.sentence
    )


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
