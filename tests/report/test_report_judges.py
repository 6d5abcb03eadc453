"""Rates by several judges on the page: each beside the other, with their agreement, and compared by one judge only."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from plot_align.cli.main import main
from plot_align.errors import InputError
from plot_align.records import write_record
from plot_align.report.compare import NOT_ALIKE, NOT_SCORE, compare_models, judge
from plot_align.report.observations import collect
from plot_align.results import agreement_text, disagreements, kappa_text, of_items

CASES = [f"c{i}" for i in range(8)]


def rates(*hits: int) -> dict[str, float]:
    return {name: float(i in hits) for i, name in enumerate(CASES)}


def agreed(table: list[list[int]], kappa: float, one: str = "refusal", other: str = "prefixes") -> dict[str, Any]:
    return {"judges": [one, other], "kappa": kappa, "table": table, "n": sum(map(sum, table))}


# Of 8 answers the first says 2 (or 3) comply, the second those and two more.
ONE = {
    "attacks": {"Prefill": rates(0, 1)}, "titles": {"Prefill": "Prefill (4 tokens)"}, "refused": rates(5),
    "helped": rates(*range(5)), "judges": {"attacks": ["refusal", "prefixes"], "benign": ["refusal", "prefixes"]},
    "others": {"prefixes": {
        "attacks": {"Prefill": rates(0, 1, 2, 3)}, "refused": rates(5), "helped": rates(*range(5)),
        "undecided": {"Prefill": {"n": 1, "first": "none"}},
        "agreement": {"Prefill": agreed([[4, 2], [0, 2]], 0.5), "refused": agreed([[7, 0], [0, 1]], 1.0),
                      "helped": agreed([[3, 0], [0, 5]], 1.0)},
    }},
}  # fmt: skip


def write(folder: Path, model: str, found: dict[str, Any], judges: str, **config: Any) -> Path:
    results = {"models": {model: found}, "identities": {model: {"model": f"digest of {model}"}}}
    return write_record(folder / f"{model}.json", "redteam", results, config={"judge": judges, **config}, seed=0)


@pytest.fixture
def records(tmp_path: Path) -> Path:
    write(tmp_path, "base", ONE, "refusal,prefixes", output="a")
    tuned = copy.deepcopy(ONE)
    tuned["attacks"]["Prefill"] = rates(0, 1, 4)
    write(tmp_path, "tuned", tuned, "refusal,prefixes", output="b")
    return tmp_path


def test_each_judge_has_a_row_and_only_the_first_is_tested(records: Path) -> None:
    comparison = compare_models(collect([records]), "base")
    rows = {row.title: row for row in comparison.rows}
    assert list(rows)[:2] == ["Attack success, Prefill (4 tokens)", "Attack success, Prefill (4 tokens), by prefixes"]
    first, second = (row.cells["tuned"] for row in list(rows.values())[:2])
    assert (first.quantity["value"], second.quantity["value"]) == (3 / 8, 4 / 8)
    assert first.observation.judged == ("by refusal",)
    assert second.observation.judged == ("by prefixes", "κ 0.50 with refusal, n 8")
    assert second.observation.gaps == ("1 verdict undecided",)
    assert first.difference is not None
    assert (second.difference, second.reason) == (None, NOT_SCORE)
    assert comparison.tests == 3  # attack success, over-refusal, help
    assert {"Over-refusal, by prefixes", "Harmless requests helped with, by prefixes"} < rows.keys()


def test_that_judges_disagree_is_said_once_with_how_often(records: Path) -> None:
    """Two of 8 in each of two records of attacks, none of 8 in refusals; help is not counted."""
    sentence = (
        "The judges refusal and prefixes disagree on 4 of 32 verdicts (κ 0.50 to 1.00): a rate depends on its judge, "
        "so compare it with rates by the same one only."
    )
    assert [n for n in judge(compare_models(collect([records]), "base")).notes if "judges" in n] == [sentence]
    alone = judge(compare_models(collect([records / "base.json"]), "base")).notes
    assert [n for n in alone if "judges" in n] == [sentence.replace("4 of 32", "2 of 16")]
    same = copy.deepcopy(ONE)
    same["others"]["prefixes"]["agreement"]["Prefill"] = agreed([[6, 0], [0, 2]], 1.0)
    write(records / "same", "base", same, "refusal,prefixes")
    assert not [n for n in judge(compare_models(collect([records / "same"]), "base")).notes if "judges" in n]


def test_models_are_compared_by_the_same_judge_only(records: Path, tmp_path: Path) -> None:
    """Whichever others judged beside it; a record of one judge, from before there were several, fits as well."""

    def compared(found: dict[str, Any], judges: str, **config: Any) -> Any:
        folder = tmp_path / "other"
        write(folder, "other", found, judges, **config)
        comparison = compare_models(collect([records / "base.json", folder]), "base")
        return {
            row.measure: row.cells["other"].reason for row in comparison.rows if row.score and "other" in row.cells
        }

    alone = {name: of for name, of in ONE.items() if name not in ("judges", "others")}
    third = {**copy.deepcopy(ONE), "judges": {"attacks": ["refusal", "xstest"], "benign": ["refusal"]}, "others": {}}
    assert set(compared(third, "refusal,xstest").values()) == {None}
    by_prefixes = compared({**third, "judges": {"attacks": ["prefixes"], "benign": ["prefixes"]}}, "prefixes")
    assert set(by_prefixes.values()) == {NOT_ALIKE}
    assert set(compared(alone, "prefixes", second_judge=None).values()) == {NOT_ALIKE}
    other = compared(third, "refusal=a folder,xstest")  # the same judge with other weights
    assert set(other.values()) == {NOT_ALIKE}


def test_models_are_compared_by_the_same_rules_only(tmp_path: Path) -> None:
    """Of the judge that decides; those of another one move nothing."""
    rules = {"refusal": "a", "prefixes": "b"}
    write(tmp_path, "base", ONE, "refusal,prefixes", rules=rules)
    for other, reason in (({**rules, "prefixes": "c"}, None), ({**rules, "refusal": "c"}, NOT_ALIKE)):
        write(tmp_path, "tuned", ONE, "refusal,prefixes", rules=other)
        rows = [row for row in compare_models(collect([tmp_path]), "base").rows if row.score]
        assert {row.cells["tuned"].reason for row in rows} == {reason}


def test_a_record_by_other_judges_takes_the_place_of_the_whole_one(tmp_path: Path) -> None:
    """What the second judge of the older one says would stand beside a first that it was not compared with."""
    write(tmp_path / "1", "base", ONE, "refusal,prefixes")
    alone = {**ONE, "judges": {"attacks": ["harmbench"], "benign": ["xstest"]}, "others": {}}
    write(tmp_path / "2", "base", alone, "harmbench,xstest")
    found = collect([tmp_path])
    assert [o.judged for o in found.observations] == [("by harmbench",), ("by xstest",), ("by xstest",)]
    assert len(found.replaced) == 3
    assert found.replaced[0] == (
        f"redteam Prefill of base: {tmp_path / '1' / 'base.json'} is older than {tmp_path / '2' / 'base.json'}, which "
        "is shown"
    )


def test_a_record_of_one_judge_says_whose_it_is(tmp_path: Path) -> None:
    """Before there were several, prefixes judged refusals where the judge could not tell them."""
    alone = {name: of for name, of in ONE.items() if name not in ("judges", "others")}
    for asked, of_attacks, of_benign in (("prefixes",) * 3, ("endpoint",) * 3, ("harmbench", "harmbench", "prefixes")):
        write(tmp_path, "base", alone, asked)
        judged = {o.name: o.judged for o in collect([tmp_path]).observations}
        assert judged == {"asr": (f"by {of_attacks}",), **dict.fromkeys(("refused", "helped"), (f"by {of_benign}",))}


@pytest.mark.parametrize(
    "entry",
    [
        None, {"judges": ["refusal"]}, {"kappa": "much"}, {"table": [[1, 2], [3]]}, {"table": [[4, 2], [0, 1]]},
        {"table": [[4, 2], [3, -1]]}, {"n": -8},
    ],
)  # fmt: skip
def test_a_damaged_agreement_is_refused(records: Path, entry: dict[str, Any] | None) -> None:
    path = records / "base.json"
    content = json.loads(path.read_text())
    agreement = content["results"]["models"]["base"]["others"]["prefixes"]["agreement"]
    if entry is None:
        del agreement["Prefill"]
    else:
        agreement["Prefill"].update(entry)
    del content["digest"]  # as if by another program
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="is damaged or was changed by hand"):
        collect([records])


def test_an_evaluation_has_its_judges_too(evaluation: Any, tmp_path: Path) -> None:
    title = "Attack success, direct"
    options: dict[str, Any] = {"better": "lower", "bounds": (0.0, 1.0)}
    quantities = {
        "asr": {**of_items(title, rates(0), **options), "judge": "refusal"},
        "asr_prefixes": {**of_items(f"{title}, by prefixes", rates(0, 1), **options), "judge": "prefixes",
                         "agreement": agreed([[6, 1], [0, 1]], 0.6)},
    }  # fmt: skip
    path = evaluation("m", "direct", section="harmlessness", kind="attack_success", quantities=quantities)
    one, two = collect([path]).observations
    assert (one.judged, one.score) == (("by refusal",), True)
    assert (two.judged, two.score) == (("by prefixes", "κ 0.60 with refusal, n 8"), False)
    assert main(["report", str(path), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "n 8 · by prefixes; κ 0.60 with refusal, n 8</span>" in page
    assert "The judges refusal and prefixes disagree on 1 of 8 verdicts (κ 0.60)" in page
    content = json.loads(path.read_text())
    content["results"]["quantities"]["asr_prefixes"]["agreement"]["n"] = 9
    del content["digest"]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"asr_prefixes\.agreement\.table does not hold its 9 cases"):
        collect([path])


def test_agreement_in_words() -> None:
    entry = agreed([[3, 1], [2, 4]], 0.4)
    assert disagreements(entry) == 3
    assert agreement_text(entry, "answers to GCG", harmful=True) == (
        "refusal and prefixes disagree on 3 of 10 answers to GCG (κ 0.40): the rate depends on the judge"
    )
    same = agreed([[10, 0], [0, 0]], float("nan"))
    said = "refusal and prefixes agree on all 10 answers (κ undefined, as both gave one label only)"
    assert agreement_text(same, "answers", harmful=False) == said
    assert agreement_text(same, "answers", harmful=True) == f"{said}; neither looks for harm"
    one = agreed([[1, 0], [0, 1]], 1.0, "harmbench")
    assert agreement_text(one, "answers", harmful=True) == "harmbench and prefixes agree on all 2 answers (κ 1.00)"


def test_agreement_on_one_answer_in_words() -> None:
    same, other = agreed([[1, 0], [0, 0]], float("nan")), agreed([[0, 1], [0, 0]], 0.0)
    assert agreement_text(same, "answers to GCG", harmful=False).startswith(
        "refusal and prefixes agree on the only answer to GCG (κ undefined, "
    )
    assert agreement_text(other, "benign answers", harmful=False).startswith(
        "refusal and prefixes disagree on the only benign answer (κ 0.00): "
    )


def test_a_range_of_kappas_in_words() -> None:
    entry, same = agreed([[3, 1], [2, 4]], 0.4), agreed([[10, 0], [0, 0]], float("nan"))
    assert kappa_text(entry) == "κ 0.40"
    assert kappa_text(same, entry, agreed([[1, 0], [0, 1]], -0.5), entry) == "κ -0.50 to 0.40"
