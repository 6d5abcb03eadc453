"""HarmBench's files: what is written is read, what is damaged is refused, the rate is the one derived by hand."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plot_align.errors import InputError
from plot_align.io import write_json
from plot_align.redteam.harmbench import (
    Layout,
    attack_success_rate,
    merge_test_cases,
    read_completions,
    read_results,
    read_test_cases,
    success_by_behavior,
)
from plot_align.redteam.inspect_log import attacked, of_all_judges


def row(label: int) -> dict[str, object]:
    return {"test_case": "t", "generation": "g", "label": label}


def test_the_layout_is_harmbenchs() -> None:
    layout = Layout(Path("base"), "GCG", "llama")
    assert layout.test_cases == Path("base/GCG/llama/test_cases/test_cases.json")
    assert layout.behavior_folder("x") == Path("base/GCG/llama/test_cases/test_cases_individual_behaviors/x")
    assert layout.completions("m") == Path("base/GCG/llama/completions/m.json")
    assert layout.results("m") == Path("base/GCG/llama/results/m.json")
    assert layout.results("m", "prefixes") == Path("base/GCG/llama/results-prefixes/m.json")


@pytest.mark.parametrize("name", ["tiny", "v1:dpo", "run[1]", "../up", "a~b"])
def test_results_are_found_whatever_the_models_name(tmp_path: Path, name: str) -> None:
    """Of the attacks asked for alone, and with the labels of every judge."""
    written = [Layout(tmp_path, "GCG", name), Layout(tmp_path, "SFS", "the/attacker"), Layout(tmp_path, "PEZ", name)]
    for layout in written:
        write_json(layout.results(name), {})
        write_json(layout.results("another"), {})
        write_json(layout.results(name, "prefixes"), {})
        write_json(layout.results("another", "refusal"), {})
        write_json(layout.behavior_folder("x:y") / "spent.json", {})
    found = attacked(tmp_path, name, ["SFS", "GCG", "UAT"])
    assert [layout.method for layout in found] == ["SFS", "GCG"]
    for layout, there in zip(found, (written[1], written[0]), strict=True):
        assert of_all_judges(layout, name) == [there.results(name), there.results(name, "prefixes")]
        assert layout.behavior_folder("x:y") == there.behavior_folder("x:y")


def test_single_behaviours_merge_in_the_order_asked_for(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "GCG", "llama")
    for behavior, cases in (("b", ["ü\n1"]), ("a", ["2", "3"])):
        write_json(layout.behavior_folder(behavior) / "test_cases.json", {behavior: cases})
    merged = merge_test_cases(layout, ["a", "b", "unfinished"])
    assert list(merged.items()) == [("a", ["2", "3"]), ("b", ["ü\n1"])]
    assert read_test_cases(layout.test_cases) == merged


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"b": ["1"]}, "hold 'b', expected 'a' alone"),
        ({"a": ["1"], "b": ["2"]}, "hold 'a', 'b'"),
        ({}, "hold nothing"),
    ],
)
def test_cases_of_another_behaviour_are_not_merged(tmp_path: Path, content: object, message: str) -> None:
    layout = Layout(tmp_path, "GCG", "llama")
    write_json(layout.behavior_folder("a") / "test_cases.json", content)
    with pytest.raises(InputError, match=message):
        merge_test_cases(layout, ["a"])
    assert not layout.test_cases.exists()


@given(st.dictionaries(st.text(), st.lists(st.text())))
def test_what_is_written_is_read(cases: dict[str, list[str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f.json"
        write_json(path, cases)
        assert read_test_cases(path) == cases


def test_text_is_written_as_it_is_and_half_an_emoji_escaped(tmp_path: Path) -> None:
    """An endpoint may cut an answer within an emoji; that must not end a run."""
    path = tmp_path / "f.json"
    write_json(path, {"ü": ["é"]})
    assert path.read_text(encoding="utf-8") == '{\n  "ü": [\n    "é"\n  ]\n}\n'
    write_json(path, {"ü": ["\ud83d"]})
    assert read_test_cases(path) == {"ü": ["\ud83d"]}


def test_attack_success_rate_by_hand() -> None:
    """Four cases, one and two: (2/4 + 0/1 + 2/2) / 3 = 1/2; over cases it would be 4/7, without the −1 5/9."""
    results = {"a": [row(1), row(0), row(-1), row(1)], "b": [row(0)], "c": [row(1), row(1)]}
    assert attack_success_rate(results) == 0.5
    assert math.isnan(attack_success_rate({}))


def test_success_rate_by_hand() -> None:
    """a: labels 1, 0, -1 and 1 → 2/4; b: one failure → 0; c: one success → 1; d: no case → 0."""
    found = success_by_behavior({"a": [row(1), row(0), row(-1), row(1)], "b": [row(0)], "c": [row(1)], "d": []})
    assert found == {"a": 0.5, "b": 0.0, "c": 1.0, "d": 0.0}


def test_results_and_completions_keep_what_others_added(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_json(path, {"a": [row(-1) | {"advbench_label": 1}]})
    assert read_results(path)["a"][0]["advbench_label"] == 1
    assert read_completions(path)["a"][0]["generation"] == "g"


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (read_test_cases, [1], "not a JSON object"),
        (read_test_cases, {"a": "t"}, "'a' is not of the form"),
        (read_test_cases, {"a": [1]}, "'a' is not of the form"),
        (read_completions, {"a": [{"test_case": "t"}]}, "'a' is not of the form"),
        (read_results, {"a": [row(2)]}, "'a' is not of the form"),
        (read_results, {"a": [{"test_case": "t", "generation": "g"}]}, "'a' is not of the form"),
        (
            read_results,
            {"a": [{"test_case": "t", "generation": "g", "label": True}]},
            "'a' is not of the form",
        ),
    ],
)
def test_other_shapes_are_refused(tmp_path: Path, read, content: object, message: str) -> None:
    path = tmp_path / "f.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text('{"a": ["t', encoding="utf-8")
    with pytest.raises(InputError, match="damaged; delete it to make it again"):
        read_test_cases(path)
    path.write_text('{"a": ["t"], "a": ["u"]}', encoding="utf-8")
    with pytest.raises(InputError, match="names 'a' twice"):
        read_test_cases(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_results(tmp_path / "absent.json")
