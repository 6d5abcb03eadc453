"""A small fixed part of the soak, and that it notices what it should."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from soak import __main__ as soak  # noqa: E402 (the folder stands beside tests/)
from soak import compare, report  # noqa: E402
from soak.commands import COMMANDS  # noqa: E402
from soak.faults import FAULTS  # noqa: E402

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="faults are injected as Linux has them"),
    pytest.mark.xdist_group("soak"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("soak")


def injected(folder: Path, faults: str, commands: str, name: str = "record.json") -> list[dict[str, Any]]:
    """What the soak wrote down, of one injection each."""
    record = soak.Record(folder / name)
    arguments = ["--faults", faults, "--commands", commands, "--number", "1", "--folder", str(folder)]
    options = soak.make_parser().parse_args(arguments)
    soak.soak(options, record)
    return soak.Record(folder / name).entries


def test_a_filter_goes_on_to_the_same_result(folder: Path) -> None:
    faults = "kill,term,altered,in-use"
    entries = injected(folder, faults, "filter")
    assert {entry["fault"] for entry in entries} == set(faults.split(","))
    results = [entry["result"] for entry in entries]
    assert set(results) <= {"same", "sentence", "missed"}, entries  # missed: the run was done before its moment
    assert results.count("missed") < 2, entries
    assert injected(folder, faults, "filter") == entries  # all of it is done


def test_another_result_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next call keeps another share of the pairs."""
    command = COMMANDS["filter"]
    again = tuple("0.25" if argument == "0.5" else argument for argument in command.arguments)
    monkeypatch.setitem(COMMANDS, "filter", replace(command, again=again))
    (entry,) = injected(folder, "kill", "filter", "other.json")
    assert entry["result"] == "other"
    assert any("kept.jsonl differs" in problem for problem in entry["problems"])


@pytest.mark.slow
def test_longer_commands(folder: Path) -> None:
    entries = injected(folder, "kill,altered,disk-full", "estimate,dpo,evaluate,redteam", "longer.json")
    assert {entry["result"] for entry in entries} <= {"same", "sentence", "missed"}, entries


def test_times_are_left_out_and_numbers_are_not(tmp_path: Path) -> None:
    for name, rate, second in (("a", 0.25, 3), ("b", 0.25, 4), ("c", 0.75, 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "r.json").write_text(f'{{"created": {second}, "results": {{"rate": {rate}}}}}')
        (tmp_path / name / "page.html").write_text(f"made 2026-01-02 10:0{second} UTC in 1.{second} s: {rate}")
    a, b, c = (compare.snapshot(tmp_path / name) for name in "abc")
    assert compare.differences(a, b) == []
    assert len(compare.differences(a, c)) == 2
    (tmp_path / "b" / ".part.1.r.json").touch()
    (tmp_path / "b" / "page.html").unlink()
    assert compare.differences(a, compare.snapshot(tmp_path / "b")) == [
        ".part.1.r.json is left over", "page.html is missing",
    ]  # fmt: skip
    assert list(compare.snapshot(tmp_path / "b", (r"^\.part",))) == ["r.json"]


def test_the_table_counts(tmp_path: Path) -> None:
    problems = ["it said 'out/kept.jsonl is no file'" + " and more" * 40, "a <b>.json is missing"]
    entries = [
        {"command": "filter", "fault": "kill", "number": number, "note": "at 3", "result": result, "problems": found}
        for number, (result, found) in enumerate(
            [("same", []), ("same", []), ("sentence", []), ("other", problems), ("missed", [])]
        )
    ]
    (tmp_path / report.PAGE).write_text("before\n<!-- made by python -m soak --report: do not edit -->\nold\n"
                                        "<!-- until here -->\nafter\n")  # fmt: skip
    for _ in range(2):
        report.write(entries, tmp_path)
        page = (tmp_path / report.PAGE).read_text()
        assert f"| {FAULTS['kill'].__doc__} | filter | 4 | 2 | 1 | 1 |" in page
        assert "| **all** | | **4** | **2** | **1** | **1** |" in page
        assert f"\n- filter, {FAULTS['kill'].__doc__} (at 3):\n    - it said 'out/kept" in page
        assert " and more\n    - a &lt;b\\>.json is missing\n" in page  # to its end
        assert (page.startswith("before"), page.endswith("after\n"), "old" in page) == (True, True, False)
