"""The demo's machinery on a base of a few steps: records, resuming, pairing by seed, the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from plot_align.errors import InputError
from plot_align.sandbox import demo
from plot_align.sandbox.experiment import Arm, Setting, record_path, run_all, run_arm, training_pairs
from plot_align.training import PlotConfig

SETTING = Setting(steps=2, batch_size=4, per_category=6, heldout=3)
DPO = Arm("DPO", ("sigmoid",))
PLOT = Arm("DPO+PLOT", ("sigmoid",), PlotConfig(alpha=1.0))


def test_run_all_equals_runs_one_by_one_and_reads_what_is_there(tiny_base: Path, tmp_path: Path) -> None:
    jobs = [(DPO, 0), (PLOT, 0)]
    seen: list[tuple[int, int]] = []
    first = run_all(jobs, SETTING, tiny_base, tmp_path, lambda job, steps: seen.append((job, steps)))
    assert {(0, 1), (0, 2), (1, 1), (1, 2)} <= set(seen)
    assert [record["config"]["arm"] for record in first] == ["DPO", "DPO+PLOT"]
    assert len(first[1]["results"]["train_logs"]) >= 1
    alone = run_arm(PLOT, SETTING, 0, tiny_base, tmp_path / "alone")
    assert alone["results"]["chosen_logp"]["value"] == pytest.approx(
        first[1]["results"]["chosen_logp"]["value"], rel=1e-5
    )
    # A finished run is read: the mark put into its record comes back, and nothing is trained.
    path = record_path(tmp_path, DPO, SETTING, 0, tiny_base)
    record = json.loads(path.read_text())
    record["results"]["mark"] = 1
    path.write_text(json.dumps(record))
    assert run_all(jobs, SETTING, tiny_base, tmp_path)[0]["results"]["mark"] == 1


def test_records_of_different_runs_have_different_names(tmp_path: Path) -> None:
    names = {
        record_path(tmp_path, arm, setting, seed, base)
        for arm in (DPO, PLOT, Arm("DPO+PLOT", ("sigmoid",), PlotConfig(alpha=2.0)))
        for setting in (SETTING, Setting(steps=3))
        for seed in (0, 1)
        for base in (Path("one"), Path("other"))
    }
    assert len(names) == 24


def test_flipped_pairs() -> None:
    """About the asked share is swapped, the same ones every time, and nothing else changes."""
    clean = training_pairs(Setting(per_category=40), 0)
    noisy = [training_pairs(Setting(per_category=40, flipped=0.25), 0) for _ in range(2)]
    assert noisy[0]["chosen"] == noisy[1]["chosen"]
    swapped = [a["chosen"] != b["chosen"] for a, b in zip(clean, noisy[0], strict=True)]
    assert 0.15 < sum(swapped) / len(swapped) < 0.35
    for a, b, flipped in zip(clean, noisy[0], swapped, strict=True):
        assert (b["chosen"], b["rejected"]) == (
            (a["rejected"], a["chosen"]) if flipped else (a["chosen"], a["rejected"])
        )
    with pytest.raises(InputError, match="flipped is 1"):
        record_path(Path(), DPO, Setting(flipped=1.0), 0, Path())


def result(**scores: float) -> dict:
    values = {
        "over_refusal": 0.5,
        "twin_help": 0.5,
        "nll_good": 1.0,
        "fluent": 1.0,
        "distinct_2": 0.2,
        "distance": 0.1,
    }
    entry = {key: {"value": scores.get(key, value), "n": 1} for key, value in values.items()}
    return entry | {"scores": {c: {"value": scores.get(c, 0.5), "n": 1} for c in demo.CATEGORIES}}


def test_the_verdict_says_worse_where_it_is_worse(capsys: pytest.CaptureFixture) -> None:
    """Every seed down is worse, every seed up better, mixed signs neither; less over-refusal is better."""
    from rich.console import Console

    plain = [result() for _ in range(3)]
    with_plot = [
        result(stem=0.4, coding=0.6, humanity=0.5 + (-1) ** seed * 0.1, over_refusal=0.3, nll_good=1.2)
        for seed in range(3)
    ]
    runs = {"base": plain, "DPO": plain, "DPO+SFT": plain, "DPO+PLOT": with_plot, "DPO+SFT+PLOT": plain}
    summary = demo._summary(runs, {})
    demo._print_verdict(Console(width=500), summary)
    line = capsys.readouterr().out.splitlines()[0]
    assert "better in coding, over-refusal; worse in stem, NLL of good answers; no clear sign in" in line
    assert "humanity" in line.split("no clear sign in")[1]
    assert "| stem ↑ |" in demo._markdown(summary, 3)
    assert summary["plot_minus_without"]["DPO+PLOT"]["stem"]["value"] == pytest.approx(-0.1)
