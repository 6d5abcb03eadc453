"""The demo from the model to the page on a tiny chat model, interrupted and gone on, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from plot_align.demo import run as demo
from plot_align.demo import train as training
from plot_align.demo.table import ROWS, as_markdown, cell, rows_of
from plot_align.errors import InputError
from plot_align.records import read_record
from plot_align.redteam import DEFAULT_JUDGES

pytestmark = pytest.mark.xdist_group("demo")  # its module fixtures are costly: once, on one worker
SMALL = demo.Size(
    steps=4, harmful=3, benign=4, pairs=6, attacked=2, prefill=1, samples=2, rounds=1,
    seconds={"model": 1, "train": 1, "evaluate": 1, "attack": 1, "cost": 1},
)  # fmt: skip
ARMS = [arm.name for arm in training.ARMS]


@pytest.fixture(scope="module", autouse=True)
def small() -> Any:
    """Few steps and requests, in float32, and short answers to look at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "QUICK", SMALL)
        patch.setattr(demo, "FLOAT32_STEPS", 1)
        patch.setattr(demo, "fast_bf16", lambda: False)
        patch.setattr(demo, "NEW_TOKENS", 6)
        yield


@pytest.fixture(scope="module")
def finished(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("demo") / "run"
    assert demo.main(quick=True, output=output, model=str(tiny_base)) == 0
    return output


def weights(output: Path, arm: str) -> dict[str, torch.Tensor]:
    return load_file(output / "models" / arm / "model.safetensors")


def test_it_ends_with_models_records_a_table_and_a_page(finished: Path, tiny_base: Path) -> None:
    for arm in ARMS:
        record = read_record(finished / "models" / arm / "plot_align_record.json", "dpo")
        assert record["results"]["steps"] == SMALL.steps
        assert not list((finished / "models" / arm).glob("checkpoint-*"))
    logged = {
        arm: read_record(finished / "models" / arm / "plot_align_record.json")["results"]["history"] for arm in ARMS
    }
    assert all("plot/loss" in entry for entry in logged["DPO+PLOT"][:-1])
    assert not any("plot/loss" in entry for arm in ("DPO", "DPO+SFT") for entry in logged[arm])
    page = (finished / "report.html").read_text(encoding="utf-8")
    for part in ("Answers side by side", "The transport itself", "Prefill", "BestOfN"):
        assert part in page
    rows = read_record(finished / "summary.json", "demo")["results"]["rows"]
    assert [set(row["cells"]) for row in rows] == [{"base", *ARMS}] * len(rows)
    judged = [name for _, name, *_ in ROWS if name in ("asr", "refused")]
    assert len(rows) == len(ROWS) + len(judged) * (len(DEFAULT_JUDGES) - 1)
    direct = read_record(finished / "evaluation" / "DPO" / "direct.json")["results"]["quantities"]["asr"]
    assert rows[0]["label"] == f"complies with harmful requests (n {SMALL.harmful})"
    assert rows[0]["cells"]["DPO"]["value"] == direct["value"]
    assert f"… the answer begun (1 token, n {SMALL.attacked})" in [row["label"] for row in rows]
    assert (finished / "demo.png").stat().st_size > 10_000
    assert (finished / "table.md").read_text().count("\n|") == len(rows) + 2


def test_the_arms_differ_and_start_from_the_same_model(finished: Path, tiny_base: Path) -> None:
    base = load_file(tiny_base / "model.safetensors")
    tuned = {arm: weights(finished, arm) for arm in ARMS}
    name = next(name for name in base if "mlp" in name)
    steps = {arm: (of[name] - base[name]).norm() for arm, of in tuned.items()}
    assert all(0 < step < base[name].norm() for step in steps.values())
    for one, other in (("DPO", "DPO+SFT"), ("DPO", "DPO+PLOT"), ("DPO+SFT", "DPO+PLOT")):
        assert not torch.equal(tuned[one][name], tuned[other][name])


def test_a_second_call_does_nothing_again(finished: Path, tiny_base: Path) -> None:
    answered = [path for path in (finished / "redteam").rglob("*.json") if path.parent.name == "completions"]
    assert answered
    made = [*finished.rglob("*.safetensors"), *(finished / "evaluation").rglob("*.json"), *answered]
    made.append(finished / "cost.json")
    before = {path: path.stat().st_mtime_ns for path in made}
    assert demo.main(quick=True, output=finished, model=str(tiny_base)) == 0
    assert {path: path.stat().st_mtime_ns for path in made} == before


@pytest.mark.slow
def test_interrupted_in_training_and_in_judging_it_ends_the_same(
    finished: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after a checkpoint of the second arm, then before the attacks: the weights are the same to the bit."""
    output = tmp_path / "run"
    ordinary = training.train

    def stopped(arm: Any, *args: Any, **kwargs: Any) -> None:
        *args, on_step = args

        def on_step_then_stop(step: int) -> None:
            on_step(step)
            if arm.name == "DPO+SFT" and step == 3:
                raise KeyboardInterrupt

        ordinary(arm, *args, on_step_then_stop, **kwargs)

    monkeypatch.setattr(demo, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        demo.main(quick=True, output=output, model=str(tiny_base))
    assert [path.name for path in (output / "models" / "DPO+SFT").glob("checkpoint-*")] == ["checkpoint-2"]
    seen: list[int] = []

    def watched(arm: Any, *args: Any, **kwargs: Any) -> None:
        *args, on_step = args
        ordinary(arm, *args, lambda step: (seen.append(step), on_step(step)), **kwargs)

    def no_attack(name: str, *args: Any) -> int:
        if name == "redteam":
            raise KeyboardInterrupt
        return command(name, *args)

    command = demo._command
    monkeypatch.setattr(demo, "train", watched)
    monkeypatch.setattr(demo, "_command", no_attack)
    with pytest.raises(KeyboardInterrupt):
        demo.main(quick=True, output=output, model=str(tiny_base))
    monkeypatch.setattr(demo, "_command", command)
    assert seen == [4, 2, 3, 4, 1, 2, 3, 4]  # the first arm was finished, the second went on from its checkpoint
    assert demo.main(quick=True, output=output, model=str(tiny_base)) == 0
    for arm in ARMS:
        one, other = weights(finished, arm), weights(output, arm)
        assert all(torch.equal(one[name], other[name]) for name in one), arm
    names = ["base", *ARMS]
    assert rows_of(output, names) == rows_of(finished, names)


def test_another_demo_is_not_mixed_with_this_one(finished: Path, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="another setting"):
        demo.main(quick=True, output=finished, model=str(tiny_base), seed=1)
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copyfile(finished / "demo.json", copy / "demo.json")
    there = json.loads((copy / "demo.json").read_text())
    (copy / "demo.json").write_text(json.dumps({**there, "trl": "0.1"}))
    with pytest.raises(InputError, match="another trl"):
        demo.main(quick=True, output=copy, model=str(tiny_base))
    assert sorted(path.name for path in copy.iterdir()) == ["demo.json"]


def test_a_folder_of_something_else_is_not_taken(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "preference.safetensors").write_bytes(b"of another run")
    with pytest.raises(InputError, match="something else"):
        demo.main(quick=True, output=tmp_path, model=str(tiny_base))
    assert [path.name for path in tmp_path.iterdir()] == ["preference.safetensors"]


def test_the_suite_reads_back_whatever_the_folder_is_called(tmp_path: Path) -> None:
    import yaml

    folder = tmp_path / "a, b: {c} #1"
    demo._Files.write(folder, SMALL)
    suite = yaml.safe_load((folder / "suite.yaml").read_text())
    assert suite["guards"]["over_refusal"]["benign"] == f"{folder}/benign.csv"
    assert Path(suite["harmlessness"]["direct"]["behaviors"]).is_file()


def test_requests_are_taken_evenly_from_all_topics() -> None:
    """The file goes by topic: of 12 topics 12 requests name 12, where the first 12 would name 4 at most."""
    rows = demo.data.behaviors()
    some = demo._evenly(rows, 12)
    assert len({row.semantic_category for row in some}) >= 10 > len({row.semantic_category for row in rows[:12]})
    assert demo._evenly([1, 2, 3], 5) == [1, 2, 3]


def test_a_measure_that_failed_leaves_the_page_and_the_figure(finished: Path, tiny_base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "evaluation" / "DPO" / "over_refusal.json").unlink()
    order = ["DPO+SFT", "base", "DPO+PLOT", "DPO"]
    rows = rows_of(copy, order)
    assert [list(row["cells"]) for row in rows[:2]] == [order] * 2
    demo.draw(copy, ["base", *ARMS], copy / "again.png")
    assert (copy / "again.png").stat().st_size > 10_000
    row = next(row for row in rows if row["label"].startswith("refuses harmless"))
    assert set(row["cells"]) == {"base", "DPO+SFT", "DPO+PLOT"}
    assert cell(row, "DPO") == "–"


def test_the_clock_scales_what_is_left_by_how_the_machine_kept_to_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nominally 10 s for each of ten stages. A slow download says nothing; a training of 20 s doubles the rest."""
    from rich.console import Console

    now = 100.0
    monkeypatch.setattr(demo.time, "monotonic", lambda: now)
    seconds = dict.fromkeys(("model", "train", "evaluate", "attack", "cost"), 10.0)
    clock = demo._Clock(Console(), demo.Size(1, 1, 1, 1, 1, 1, 1, 1, seconds))
    clock.begin("one", "model")
    now += 600
    clock.begin("two", "train")
    now += 20
    clock.begin("three", "train")
    now += 0.5  # found finished: says nothing about the machine
    clock.begin("four", "train")
    clock.begin("page", None)
    out = capsys.readouterr().out
    assert "one · about 2 min left" in out  # 100 s
    assert "two · about 2 min left" in out  # 90 s
    assert "three · about 3 min left" in out  # 8 stages of 20 s
    assert "four · about 2 min left" in out  # 7 stages: 140 s
    assert "page · nearly done" in out


def test_a_cell_is_the_value_and_half_the_interval() -> None:
    row = {
        "label": "a",
        "better": "↓",
        "places": 2,
        "cells": {"DPO": {"value": 0.25, "interval": [0.1, 0.42], "n": 40}},
    }
    assert cell(row, "DPO") == "0.25±0.16"
    assert cell(row, "base") == "–"
    assert "| a ↓ | 0.25±0.16 |" in as_markdown([row], "a model")


def test_other_pairs(tiny_base: Path, tmp_path: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--dataset``: they are what is trained on, and what the preference is counted from."""
    trained: list[Any] = []
    monkeypatch.setattr(demo, "train", lambda arm, setting, model, pairs, *rest: trained.append(pairs))
    monkeypatch.setattr(demo, "_command", lambda *args: 0)
    monkeypatch.setattr(demo, "_cost", lambda *args: {})
    monkeypatch.setattr(
        demo,
        "rows_of",
        lambda folder, models: [
            {"label": "a", "better": "", "places": 2, "cells": {"base": {"value": 1.0, "interval": None, "n": 1}}}
        ],
    )
    monkeypatch.setattr(demo, "draw", lambda *args: None)
    output = tmp_path / "out"
    assert demo.main(quick=True, output=output, model=str(tiny_base), dataset=str(pairs_file)) == 0
    assert [len(pairs) for pairs in trained] == [24] * 3
    assert json.loads((output / "demo.json").read_text())["dataset"] == str(pairs_file)
