"""Every example runs as a user runs it, one step long, on a tiny chat model and some of the demo's pairs."""

from __future__ import annotations

import math
import runpy
import sys
import tempfile
from pathlib import Path

import pytest

from plot_align.demo import data

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RUNS = [
    ["dpo"], ["sft"], ["kto"], ["aot"], ["aot", "--loss_type", "aot_unpaired"], ["grpo"], ["grpo", "--method", "rloo"],
    ["cpo"], ["cpo", "--method", "simpo"], ["cpo", "--method", "orpo"], ["dpo", "--loss_type", "sigmoid+sft"],
    ["pro"], ["loop"],
]  # fmt: skip


def test_every_example_is_run():
    assert {run[0] for run in RUNS} == {path.stem for path in EXAMPLES.glob("*.py")} - {"common"}


@pytest.mark.parametrize("run", RUNS, ids=" ".join)
def test_runs(run, tiny_base, monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    some = data.pairs("train").shuffle(seed=0).select(range(32))
    monkeypatch.setattr(data, "pairs", lambda split="train": some)
    monkeypatch.delitem(sys.modules, "common", raising=False)
    monkeypatch.setattr(sys, "argv", [*run, "--steps", "1", "--alpha", "0.5", "--model", str(tiny_base)])
    runpy.run_path(str(EXAMPLES / f"{run[0]}.py"), run_name="__main__")
    table = capsys.readouterr().out.split("first")[-1].splitlines()[1:]
    metrics = {name: [float(value) for value in values] for name, *values in map(str.split, table)}
    if run[0] == "loop":
        assert all(0 < value < math.inf for name in ("loss", "vanilla_loss") for value in metrics[f"plot/{name}"])
        return
    assert metrics["plot/alpha"] == [0.5, 0.5]
    if run[0] == "grpo":  # where all answers to a request are rewarded alike, nothing is preferred
        assert all(0 <= value < math.inf for value in metrics["plot/loss"])
        return
    for name in ("loss", "vanilla_loss", "preferred_mass", "rejected_mass", "grad_ratio"):
        assert all(0 < value < math.inf for value in metrics[f"plot/{name}"]), name
