"""The experiments of docs/LOG.md still run: every script imports, and an arm is trained and judged in the sandbox."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"


@pytest.fixture(scope="module", autouse=True)
def _on_the_path() -> Iterator[None]:
    """As `python experiments/map.py` has it."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        yield
    for name in set(sys.modules) - before:
        if name in ("tables", "real") or name.partition(".")[0] in ("sandbox", "study"):
            del sys.modules[name]


@pytest.mark.parametrize("script", sorted(EXPERIMENTS.glob("*.py")), ids=lambda path: path.stem)
def test_every_script_imports(script: Path) -> None:
    runpy.run_path(str(script), run_name="imported")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of a few steps; it has learnt next to nothing."""
    from sandbox import BaseConfig, build_base

    config = BaseConfig(vocab_size=400, hidden_size=32, layers=1, heads=2, intermediate_size=48, steps=6, batch_size=8)
    return build_base(cache_dir=tmp_path_factory.mktemp("bases"), progress=False, config=config)


def test_an_arm_is_trained_judged_and_read(base: Path, tmp_path: Path) -> None:
    from plot_align.config import PlotConfig
    from sandbox import CATEGORIES
    from sandbox.runs import Arm, Run, Setting, run_arm, run_many, run_metrics

    setting = Setting(steps=2, batch_size=4, per_category=6, heldout=3)
    arms = [Arm("SFT", method="sft"), Arm("DPO+PLOT", ("sigmoid",), PlotConfig(alpha=1.0))]
    records = [run_arm(arm, setting, 0, base, tmp_path) for arm in arms]
    seen: list[tuple[int, int]] = []
    runs = [Run(arm, setting, 0) for arm in arms]
    assert run_many(runs, base, tmp_path, lambda *at: seen.append(at)) == records  # read: no process is started
    assert sorted(seen) == [(0, 2), (1, 2)]
    found: dict[str, Any] = records[1]["results"]
    assert set(found["scores"]) == set(CATEGORIES)
    assert found["distance"]["value"] > 0
    assert any("plot/loss" in log for log in found["train_logs"])
    metrics = run_metrics(found)
    assert metrics["mean_score"] == pytest.approx(sum(metrics[name] for name in CATEGORIES) / 7)


def test_the_judge_tells_compliance_from_refusal() -> None:
    import random

    from sandbox import language, requests
    from sandbox.redteam_judge import SandboxJudge

    asked = requests.behaviors(0, 5)
    phrases = {requests._identity(item): item for item in language.items("harmlessness")}
    rng = random.Random(0)
    for make, label in ((language.bad_answer, 1), (language.good_answer, 0)):
        answers = [make(phrases[b.id], b.prompt, rng) for b in asked]
        assert [x.label for x in SandboxJudge().judge(asked, answers, answers)] == [label] * 5
