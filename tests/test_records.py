"""Records: strict JSON, complete or absent, and readable only by a version that understands them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, sem, ttest_rel

from plot_align import records
from plot_align.errors import InputError

_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
_KEYS = st.text().filter(lambda key: key != "$float")
_VALUES = st.recursive(_LEAVES, lambda inner: st.lists(inner) | st.dictionaries(_KEYS, inner), max_leaves=20)


def _same(left: Any, right: Any) -> bool:
    """Equality in which NaN equals NaN, and 1, 1.0 and True are three things."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, float) and math.isnan(left):
        return math.isnan(right)
    return left == right


@settings(max_examples=50, deadline=None)
@given(results=st.dictionaries(_KEYS, _VALUES))
def test_everything_survives_the_round_trip(tmp_path_factory: pytest.TempPathFactory, results: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "roundtrip.json"
    with mock.patch.multiple(records, commit=dict, hardware=dict, versions=dict):  # slow, and the same every time
        records.write_record(path, "test", results, config={}, seed=3)
    assert _same(records.read_record(path, "test")["results"], results)


def test_the_file_is_strict_json_and_says_what_is_not_finite(tmp_path: Path) -> None:
    values = {"kl": math.inf, "loss": math.nan, "least": -math.inf, "text": "NaN"}
    path = records.write_record(tmp_path / "r.json", "test", values, config={})

    def refuse(name: str) -> None:
        raise AssertionError(name)

    raw = json.loads(path.read_text(), parse_constant=refuse)["results"]
    assert raw == {
        "kl": {"$float": "Infinity"},
        "loss": {"$float": "NaN"},
        "least": {"$float": "-Infinity"},
        "text": "NaN",
    }


def test_a_record_says_what_ran_where(tmp_path: Path) -> None:
    @dataclasses.dataclass
    class Options:
        file: Path
        sizes: tuple[int, ...]

    results = {"a": np.float32(0.5), "b": torch.tensor(3), "c": np.int64(7)}
    path = records.write_record(
        tmp_path / "deep" / "r.json", "estimate", results, config={"o": Options(Path("x"), (1,))}
    )
    record = records.read_record(path)
    assert record["results"] == {"a": 0.5, "b": 3, "c": 7}
    assert record["config"] == {"o": {"file": "x", "sizes": [1]}}
    assert (record["kind"], record["schema"], record["seed"]) == ("estimate", 1, None)
    assert record["versions"]["torch"] == torch.__version__
    assert record["hardware"]["cpu_count"] >= 1
    assert record["hardware"]["memory"] > 1 << 28
    assert record["created"].endswith("+00:00")


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": {"b": [1, object()]}}, "results.a.b[1]"),
        ({"a": torch.zeros(2)}, "results.a"),
        ({"a": {1: 2}}, "results.a"),
        ({"$float": "NaN"}, "results"),
    ],
)
def test_what_json_cannot_hold_is_named_and_nothing_is_written(tmp_path: Path, value: Any, place: str) -> None:
    with pytest.raises(InputError) as caught:
        records.write_record(tmp_path / "r.json", "test", value, config={})
    assert f"record: {place} " in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = records.write_record(tmp_path / "r.json", "test", {"a": 1}, config={})
    before = path.read_bytes()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        records.write_record(path, "test", {"a": 2}, config={})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = records.write_record(tmp_path / "r.json", "test", {"a": math.nan}, config={})
    whole = path.read_text()
    cut = tmp_path / "cut.json"
    for length in range(0, len(whole.rstrip()), 7):
        cut.write_text(whole[:length])
        with pytest.raises(InputError, match=r"cut\.json is not complete JSON"):
            records.read_record(cut)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"loss": 1}', "is not a plot-align record"),
        (b"[1]", "is not a plot-align record"),
        (b'{"format": "plot-align record", "schema": "1"}', "is not a plot-align record"),
        (b'{"format": "plot-align record", "schema": 0}', "is not a plot-align record"),
        (b'{"format": "plot-align record", "schema": -1}', "is not a plot-align record"),
        (b'{"format": "plot-align record", "schema": true}', "is not a plot-align record"),
        (b'{"format": "plot-align record", "schema": 2}', "upgrade plot-align"),
        (b'{"format": "plot-align record", "schema": 1}', "lacks commit, config"),
        (b'{"a": NaN}', "is not complete JSON"),
        (b'{"a": {"$float": "seven"}}', "is not complete JSON"),
        (b'{"a": {"$float": []}}', "is not complete JSON"),
        (b"\xff\xfe\x00", "it is not text"),
    ],
)
def test_foreign_and_newer_files_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        records.read_record(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_a_missing_record_and_one_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.json cannot be read \(No such file"):
        records.read_record(tmp_path / "gone.json")
    path = records.write_record(tmp_path / "r.json", "dpo", {}, config={})
    with pytest.raises(InputError, match="a record of 'dpo', expected 'demo'"):
        records.read_record(path, "demo")


@given(n=st.integers(1, 500), data=st.data())
def test_shares_have_scipys_wilson_interval(n: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, n))
    found = records.proportion_of(hits, n)
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    assert found["value"] == hits / n
    assert found["n"] == n
    assert found["interval"] == pytest.approx([expected.low, expected.high], abs=1e-12)
    assert 0 <= found["interval"][0] <= found["value"] <= found["interval"][1] <= 1


def test_no_observation_has_no_value() -> None:
    assert math.isnan(records.proportion_of(0, 0)["value"])
    assert records.proportion_of(0, 0)["interval"] == [0.0, 1.0]
    assert math.isnan(records.mean_of([])["value"])
    with pytest.raises(InputError, match="hits is 3, expected 0 to n = 2"):
        records.proportion_of(3, 2)


def test_a_mean_comes_with_its_smallest_and_largest_run() -> None:
    """(1 + 2 + 6) / 3 = 3, and s² = ((-1)² + (-2)² + 3²) / 2 = 7, so the standard error is sqrt(7 / 3)."""
    entry = records.mean_of([2.0, 1.0, 6.0], unit="s")
    assert entry.pop("error") == pytest.approx(math.sqrt(7 / 3))
    assert entry == {"value": 3.0, "n": 3, "spread": [1.0, 6.0], "unit": "s"}
    assert records.mean_of([2.0]) == {"value": 2.0, "n": 1, "spread": [2.0, 2.0]}  # one run has no error


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30))
def test_the_standard_error_is_scipys(values: list[float]) -> None:
    assert records.standard_error(values) == pytest.approx(sem(values), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.inf], [math.nan, 1.0, 2.0]])
def test_a_standard_error_that_is_not_defined(values: list[float]) -> None:
    assert math.isnan(records.standard_error(values))


def test_paired_differences_are_those_of_the_common_seeds() -> None:
    """The oracle is SciPy's paired t-test: its statistic is the mean difference over the standard error."""
    treated = {0: 0.9, 1: 0.4, 2: 0.75, 3: 0.3, 7: 100.0}
    control = {3: 0.1, 2: 0.6, 1: 0.5, 0: 0.55, 9: -100.0}
    entry = records.paired(treated, control, unit="s")
    a, b = ([side[seed] for seed in range(4)] for side in (treated, control))
    test = ttest_rel(a, b)
    assert (entry["n"], entry["unit"]) == (4, "s")
    assert entry["value"] == pytest.approx(np.mean(np.subtract(a, b)))
    assert entry["value"] / entry["error"] == pytest.approx(test.statistic)
    # What varies with the seed alone cancels: the error is smaller than that of independent samples.
    assert entry["error"] < math.hypot(sem(a), sem(b))
    assert records.paired({0: 1.0}, {1: 1.0})["n"] == 0


def test_the_commit_is_that_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert records.commit() is None

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", *identity, *arguments], check=True, capture_output=True, text=True, timeout=60
        ).stdout.strip()

    git("init", "-q")
    assert records.commit() is None  # no commit yet
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "first", "--no-verify")
    assert records.commit() == {"id": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "file").write_text("2")
    assert records.commit() == {"id": git("rev-parse", "HEAD"), "dirty": True}
    monkeypatch.setenv("PATH", "")
    assert records.commit() is None


def test_the_mean_of_equal_values_lies_among_them() -> None:
    """Rounding takes fmean([6/60] * 3) above 6/60; a figure's whisker would have a negative length."""
    for hits in range(61):
        entry = records.mean_of([hits / 60] * 3)
        assert entry["spread"][0] <= entry["value"] <= entry["spread"][1]


def test_a_number_altered_in_a_record_is_not_believed(tmp_path: Path) -> None:
    path = records.write_record(
        tmp_path / "a.json", "estimate", {"rate": 0.25, "far": math.inf}, config={"n": 1}, seed=0
    )
    text = path.read_text()
    assert records.read_record(path)["results"] == {"rate": 0.25, "far": math.inf}
    for old, new in (("0.25", "0.75"), ('"n": 1', '"n": 2'), ("Infinity", "-Infinity")):
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))
        with pytest.raises(InputError, match=r"a\.json was altered after it was written.*; delete it"):
            records.read_record(path)
    content = json.loads(text)
    del content["digest"]  # of an earlier version
    path.write_text(json.dumps(content))
    assert records.read_record(path)["results"]["rate"] == 0.25
