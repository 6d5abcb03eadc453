"""Suites: what is refused, what is left out, what the command line fills in."""

from __future__ import annotations

from pathlib import Path

import pytest

from plot_align.errors import InputError
from plot_align.evaluation.suite import SUITES, Given, read_suite


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_that_ships_checks_out(name: str) -> None:
    """Every option and every task name of lm-eval; what needs a file of the user's is left out."""
    suite = read_suite(name, Given(reference=True))
    assert suite.entries
    for reason in suite.left_out.values():
        assert "give --" in reason or "pip install" in reason


def test_code_is_run_only_where_the_flag_is_given() -> None:
    with pytest.raises(InputError, match=r"nothing of suite paper is left.*--allow_code_execution"):
        read_suite("paper", Given(), only=["humaneval", "mbpp"])
    suite = read_suite("paper", Given(allow_code_execution=True), only=["humaneval", "mbpp"])
    assert [e.measure.allow_code_execution for e in suite.entries] == [True, True]  # type: ignore[attr-defined]


SMALL = """\
stem:
  facts: {kind: lm_eval, task: arc_easy}
helpfulness:
  pairs: {kind: preference_accuracy, pairs: some/pairs}
guards:
  refused: {kind: over_refusal}
  variety: {kind: diversity, limit: 60}
  nats: {kind: kl}
  moved: {kind: drift, pairs: some/pairs}
  sunk: {kind: displacement, pairs: some/pairs}
"""


def test_what_needs_a_reference_is_left_out_without_one(write) -> None:
    suite = read_suite(write(SMALL), Given())
    assert set(suite.left_out) == {"sunk", "nats", "moved"}
    assert "give --reference" in suite.left_out["nats"]
    assert read_suite(write(SMALL), Given(reference=True)).left_out == {}


def test_only_and_skip_take_names_sections_and_kinds(write) -> None:
    suite = read_suite(write(SMALL), Given(), only=["guards", "stem"], skip=["variety"])
    assert [e.name for e in suite.entries] == ["facts", "refused"]
    (entry,) = read_suite(write(SMALL), Given(), only=["preference_accuracy"]).entries
    assert (entry.name, entry.kind, entry.options()["kind"]) == ("pairs", "preference_accuracy", "preference_accuracy")


def test_a_limit_holds_for_every_measure_and_never_raises_one(write) -> None:
    for limit, expected in ((7, [7, 7, 7, 7]), (700, [700, 700, 700, 60])):
        suite = read_suite(write(SMALL), Given(limit=limit))
        assert [e.measure.limit for e in suite.entries] == expected  # type: ignore[attr-defined]
    suite = read_suite(write(SMALL), Given(limit=7000), only=["pairs"])
    assert suite.entries[0].measure.limit == 1000  # type: ignore[attr-defined]


def test_a_limit_takes_the_place_of_a_share(write) -> None:
    suite = write("stem:\n  a: {kind: lm_eval, task: arc_easy, limit: 0.5}\n")
    assert read_suite(suite, Given(limit=10)).entries[0].measure.limit == 10  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("helpfulnes:\n  a: {kind: kl}\n", "section 'helpfulnes'; did you mean 'helpfulness'"),
        ("stem: [a]\n", "stem in suite .* is no mapping"),
        ("stem:\n  a: {kind: lm_evl}\n", "kind 'lm_evl'; did you mean 'lm_eval'"),
        ("stem:\n  a: diversity\n", "a in suite .* has the kind 'diversity'"),
        ("stem:\n  a: {kind: diversity, prompt: b}\n", "a in suite .* has no option 'prompt'; did you mean 'prompts'"),
        ("stem:\n  a: {kind: diversity, prompts: 3}\n", "a in suite .*: prompts is 3, expected str"),
        ("stem:\n  a: {kind: lm_eval}\n", "a in suite .* lacks task"),
        ("stem:\n  a: {kind: diversity, limit: 0}\n", "a in suite .*: limit is 0"),
        ("stem:\n  ../a: {kind: diversity}\n", "which is no file name"),
        ("stem:\n  a: {kind: diversity}\nguards:\n  a: {kind: diversity}\n", "has 'a' twice"),
        ("stem: {a: {kind: [}\n", "is not valid YAML"),
        ("? [stem]\n: 1\n", "is not valid YAML"),
        (
            "guards:\n  a: {kind: diversity}\n  a: {kind: perplexity}\n",
            "line 3, has 'a' twice; rename or remove one",
        ),
    ],
)
def test_a_wrong_suite_is_refused(write, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_suite(write(text), Given())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("quik", {}, "--suite is 'quik'; did you mean 'quick'"),
        ("none.yaml", {}, "--suite none.yaml cannot be read"),
        ("quick", {"only": ["stm"]}, "--only names 'stm'; did you mean 'stem'"),
        ("quick", {"skip": ["gards"]}, "--skip names 'gards'; did you mean 'guards'"),
        ("quick", {"only": ["kl"]}, "nothing of suite quick is left to measure .kl: it compares"),
    ],
)
def test_a_wrong_request_is_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_suite(name, Given(), **options)
