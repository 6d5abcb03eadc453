"""A sweep on a base of a few steps: records, summary, table, figures, and resuming."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from plot_align.config import PlotConfig
from plot_align.records import read_record
from plot_align.sandbox.experiment import run_arm
from plot_align.sweep import Cell, Job, expand
from plot_align.sweep.run import describe, run
from plot_align.sweep.workloads import Sandbox, sandbox_run

SMALL = {"steps": [2], "batch_size": [4], "per_category": [6], "heldout": [3]}
GRID: dict[str, list[Any]] = {**SMALL, "alpha": [0.1, 10.0], "seed": [0, 1]}
QUIET = Console(quiet=True)
TIMING = {"train_seconds"}


def results(folder: Path) -> dict[str, Any]:
    """What every record measured, timing left out."""
    found = {path.name: read_record(path)["results"] for path in sorted((folder / "records").glob("*.json"))}
    return {name: {k: v for k, v in record.items() if k not in TIMING} for name, record in found.items()}


def finish(jobs: Sequence[Job], workload: Sandbox) -> None:
    """In this process, because starting another takes longer than the run."""
    for job in jobs:
        single = sandbox_run(job)
        run_arm(single.arm, single.setting, single.seed, workload.base, workload.folder)


def test_a_sweep_and_the_same_interrupted_and_resumed(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    jobs = expand(GRID)
    cells = run(jobs, Sandbox(whole, tiny_base), whole, config={"grid": GRID}, console=QUIET, workers=1)

    workload = Sandbox(halves, tiny_base)
    finish(jobs[:3], workload)
    describe(jobs, workload, Console(width=200))
    out = capsys.readouterr().out
    assert "without PLOT: seeds 0* 1\n" in out
    assert "6 runs, 3 finished (*), 3 to run" in out
    before = {path.name: path.stat().st_mtime_ns for path in (halves / "records").iterdir()}
    resumed = run(jobs, workload, halves, config={"grid": GRID}, console=QUIET, workers=1)
    assert len(results(whole)) == 6
    assert results(halves) == results(whole)
    assert {path.name: path.stat().st_mtime_ns for path in (halves / "records").iterdir()}.items() >= before.items()

    for left, right in zip(cells, resumed, strict=True):
        for part in ("metrics", "minus_vanilla"):
            assert {k: v for k, v in left[part].items() if k not in TIMING} == {
                k: v for k, v in right[part].items() if k not in TIMING
            }
    summary = read_record(whole / "summary.json", "sweep")["results"]["cells"]
    assert [(cell["plot"], cell["seeds"]) for cell in summary] == [
        (None, [0, 1]), ({"alpha": 0.1}, [0, 1]), ({"alpha": 10.0}, [0, 1])
    ]  # fmt: skip
    records = [read_record(workload.record(job))["results"] for job in jobs if job.cell == jobs[2].cell]
    expected = sum(record["distance"]["value"] for record in records) / 2
    assert summary[2]["metrics"]["distance"]["value"] == pytest.approx(expected)
    scores = [entry["value"] for record in records for entry in record["scores"].values()]
    assert summary[2]["metrics"]["mean_score"]["value"] == pytest.approx(sum(scores) / 14)
    assert "distance to the preference distribution ↓" in (whole / "table.md").read_text()
    for metric in Sandbox.MAIN:
        assert (whole / f"{metric.key}.png").stat().st_size > 5_000


def test_finished_runs_are_read_and_the_figures_drawn_again(tiny_base: Path, tmp_path: Path) -> None:
    jobs = expand({**SMALL, "alpha": [0.0]})
    workload = Sandbox(tmp_path, tiny_base)
    finish(jobs, workload)
    path = workload.record(jobs[0])
    record = json.loads(path.read_text())
    record["results"]["distance"]["value"] = 0.125
    path.write_text(json.dumps(record))
    (cell,) = run(jobs, workload, tmp_path, config={}, console=QUIET)
    assert cell["metrics"]["distance"]["value"] == 0.125
    assert re.search(r"\| none \| 1 \|.* 0\.125 \|", (tmp_path / "table.md").read_text())


def test_a_record_does_not_depend_on_what_the_grid_spells_out(tmp_path: Path) -> None:
    workload = Sandbox(tmp_path, Path("base"))
    short = Job(Cell("dpo", (), (("alpha", 1.0),)), 0)
    long = Job(Cell("dpo", (("loss_type", "sigmoid"), ("steps", 60)), (("alpha", 1.0), ("divergence", "w1"))), 0)
    assert workload.record(short) == workload.record(long)
    other = Job(Cell("dpo", (), (("alpha", 1.0), ("divergence", "tv"))), 0)
    assert workload.record(other) != workload.record(short)


def test_a_job_becomes_its_run() -> None:
    job = Job(Cell("dpo", (("loss_type", "sigmoid+sft"), ("flipped", 0.25)), (("alpha", 2.0), ("target", "shift"))), 5)
    found = sandbox_run(job)
    assert (found.arm.loss_type, found.arm.method, found.seed) == (("sigmoid", "sft"), "dpo", 5)
    assert found.arm.plot == PlotConfig(alpha=2.0, target="shift")
    assert found.setting.flipped == 0.25
    assert sandbox_run(Job(Cell("kto"), 0)).arm.plot is None
    assert sandbox_run(Job(Cell("kto"), 0)).arm.loss_type == ()
