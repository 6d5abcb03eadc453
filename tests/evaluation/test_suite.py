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


def test_the_sandbox_suite_has_all_seven_and_the_guards() -> None:
    suite = read_suite("sandbox", Given(reference=True))
    assert {e.section for e in suite.entries} == {
        "harmlessness", "helpfulness", "humanity", "mathematics", "reasoning", "coding", "stem", "guards",
    }  # fmt: skip
    assert suite.left_out == {}
    assert all(e.options()["kind"] == e.kind for e in suite.entries)


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


def test_what_needs_a_reference_is_left_out_without_one() -> None:
    suite = read_suite("sandbox", Given())
    assert set(suite.left_out) == {"displacement", "kl", "drift"}
    assert "give --reference" in suite.left_out["kl"]


def test_only_and_skip_take_names_sections_and_kinds() -> None:
    suite = read_suite("sandbox", Given(), only=["guards", "stem"], skip=["perplexity"])
    assert [e.name for e in suite.entries] == ["stem", "over_refusal", "diversity"]
    kinds = read_suite("sandbox", Given(), only=["sandbox"]).entries
    assert {e.kind for e in kinds} == {"sandbox"}


def test_a_limit_holds_for_every_measure_and_never_raises_one() -> None:
    suite = read_suite("sandbox", Given(limit=7), only=["stem", "diversity", "asr_direct"])
    assert [getattr(e.measure, "limit", getattr(e.measure, "count", None)) for e in suite.entries] == [7, 7, 7]
    suite = read_suite("sandbox", Given(limit=700), only=["stem", "diversity"])
    assert [getattr(e.measure, "limit", getattr(e.measure, "count", None)) for e in suite.entries] == [60, 200]


def test_a_limit_takes_the_place_of_a_share(write) -> None:
    suite = write("stem:\n  a: {kind: lm_eval, task: arc_easy, limit: 0.5}\n")
    assert read_suite(suite, Given(limit=10)).entries[0].measure.limit == 10  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("helpfulnes:\n  a: {kind: kl}\n", "section 'helpfulnes'; did you mean 'helpfulness'"),
        ("stem: [a]\n", "stem in suite .* is no mapping"),
        ("stem:\n  a: {kind: sandbx}\n", "kind 'sandbx'; did you mean 'sandbox'"),
        ("stem:\n  a: sandbox\n", "a in suite .* has the kind 'sandbox'"),
        ("stem:\n  a: {kind: sandbox, categry: stem}\n", "a has no option 'categry'; did you mean 'category'"),
        ("stem:\n  a: {kind: sandbox, category: 3}\n", "a: category is 3, expected str"),
        ("stem:\n  a: {kind: sandbox}\n", "a lacks category"),
        ("stem:\n  a: {kind: sandbox, category: stem, count: 0}\n", "count is 0"),
        ("stem:\n  ../a: {kind: sandbox, category: stem}\n", "which is no file name"),
        ("stem:\n  a: {kind: sandbox, category: stem}\nguards:\n  a: {kind: diversity}\n", "has 'a' twice"),
        ("stem: {a: {kind: [}\n", "is not valid YAML"),
        ("? [stem]\n: 1\n", "is not valid YAML"),
        (
            "guards:\n  a: {kind: diversity}\n  a: {kind: perplexity, texts: sandbox}\n",
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
        ("sandbox", {"only": ["stm"]}, "--only names 'stm'; did you mean 'stem'"),
        ("sandbox", {"skip": ["gards"]}, "--skip names 'gards'; did you mean 'guards'"),
        ("sandbox", {"only": ["kl"]}, "nothing of suite sandbox is left to measure .kl: it compares"),
    ],
)
def test_a_wrong_request_is_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_suite(name, Given(), **options)
