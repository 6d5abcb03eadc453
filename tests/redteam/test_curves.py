"""Curves: the share of draws with a success against every draw enumerated, snapshots read back, figures written."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from plot_align.errors import InputError
from plot_align.io import write_json
from plot_align.redteam.curves import draw, snapshot_cases, success_at_cases
from plot_align.redteam.harmbench import Layout


def rows(*labels: int) -> list[dict[str, object]]:
    return [{"test_case": "t", "generation": "g", "label": label} for label in labels]


def test_success_at_cases_equals_every_draw_enumerated() -> None:
    results = {"a": rows(1, 0, -1, 0), "b": rows(0, 0, 0), "c": rows(1, 1, 0, 1, 0)}
    found = success_at_cases(results)
    assert sorted(found) == [1, 2, 3]
    for k, entry in found.items():
        rates = []
        for cases in results.values():
            draws = list(combinations([row["label"] == 1 for row in cases], k))
            rates.append(sum(map(any, draws)) / len(draws))
        assert entry["value"] == pytest.approx(sum(rates) / 3)
        assert entry["n"] == 3
    assert success_at_cases({"a": rows(1), "b": []}) == {}


def test_snapshots_are_those_of_the_log(tmp_path: Path) -> None:
    """At 5 a has a snapshot, and b, which had ended, its last case; 9 was reached by neither."""
    layout, last = Layout(tmp_path, "GCG", "m"), {"a": ["last of a"], "b": ["last of b"]}
    write_json(layout.behavior_folder("a") / "logs.json", {"snapshots": {"2": ["two"], "5": ["five"]}})
    write_json(layout.behavior_folder("b") / "logs.json", {"snapshots": {"2": ["zwei"]}})
    assert snapshot_cases(layout, last, 2) == {"a": ["two"], "b": ["zwei"]}
    assert snapshot_cases(layout, last, 5) == {"a": ["five"], "b": ["last of b"]}
    assert snapshot_cases(layout, last, 9) == {}
    with pytest.raises(InputError, match=r"holds no snapshots; delete .*c to make them again"):
        snapshot_cases(layout, {"c": ["case"]}, 2)


def test_a_figure_is_written(tmp_path: Path) -> None:
    draw({"m": success_at_cases({"a": rows(1, 0)})}, "test cases", tmp_path / "c.svg")
    text = (tmp_path / "c.svg").read_text(encoding="utf-8")
    assert text.startswith("<?xml")


def test_the_same_curves_give_the_same_bytes(tmp_path: Path) -> None:
    curves = {"m": success_at_cases({"a": rows(1, 0), "b": rows(0, 1)})}
    for ending in ("png", "svg"):
        paths = [tmp_path / f"{name}.{ending}" for name in "ab"]
        for path in paths:
            draw(curves, "cases", path)
        assert paths[0].read_bytes() == paths[1].read_bytes()
