"""The benchmark and the experiment of the monitor: their tables by hand, and on tiny sizes."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch):
    """``script("benchmarks")`` → the names of its ``monitor.py``, run from its own folder."""
    before = set(sys.modules)

    def names(folder: str) -> dict[str, Any]:
        monkeypatch.syspath_prepend(str(ROOT / folder))
        return runpy.run_path(str(ROOT / folder / "monitor.py"), run_name="imported")

    yield names
    for name in set(sys.modules) - before:
        if name == "shapes" or name.partition(".")[0] == "study":
            del sys.modules[name]


def test_table_of_the_experiment(script):
    """By hand: a line crossed at step 5, when the last measurement, of step 4, was a fifth of the largest KL, which is
    not the last one; the chosen answers have gained in the end."""
    measured = ((0, 0, 0), (4, 0.4, 1), (6, 2, 4), (8, 1, -3))
    curve = [{"step": n, "kl": kl, "chosen nats lost": lost} for n, kl, lost in measured]
    bad = {"crossed": {"repetition": 8, "chosen_fall": 5}, "curve": curve}
    records = [
        {"config": {"kind": "collapses", "steps": 8}, "seed": 3, "results": bad},
        {"config": {"kind": "healthy", "steps": 8}, "seed": 0, "results": {"crossed": {}, "curve": curve}},
    ]
    assert script("experiments")["table"](records).splitlines()[2:] == [
        "| collapses | 3 | 5 of 8 | chosen_fall | 20% | 1.00 | -3.0 |",
        "| healthy | 0 | never |  |  | 1.00 | -3.0 |",
    ]


def test_benchmark_on_a_tiny_model(script):
    names = script("benchmarks")
    found = names["measure"](names["SHAPES"]["tiny"], 1, 10, torch.device("cpu"), torch.float32)
    assert list(found) == ["trl", "again", "watched", "logged", "mean"]
    times = {name: entry["time"]["value"] for name, entry in found.items()}
    assert times["mean"] == pytest.approx(0.9 * times["watched"] + 0.1 * times["logged"])
