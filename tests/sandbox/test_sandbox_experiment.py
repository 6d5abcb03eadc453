"""Runs on a base of a few steps: records, resuming, pairing by seed."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from plot_align.config import PlotConfig
from plot_align.errors import InputError, RunError
from plot_align.sandbox import CATEGORIES, build_base
from plot_align.sandbox.experiment import (
    METHODS,
    Arm,
    Run,
    Setting,
    default_base,
    make_trainer,
    record_path,
    run_all,
    run_arm,
    run_many,
    training_pairs,
)

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
    plain = Arm("a", plot=PlotConfig())
    arms = [
        plain,
        *(dataclasses.replace(plain, method=method) for method in METHODS if method != "dpo"),
        dataclasses.replace(plain, name="b"),
        dataclasses.replace(plain, loss_type=("sigmoid",)),
        dataclasses.replace(plain, plot=PlotConfig(alpha=2.0)),
        dataclasses.replace(plain, learning_rate=1e-3),
        dataclasses.replace(plain, beta=0.2),
    ]
    settings = [SETTING, Setting(steps=3), dataclasses.replace(SETTING, probe=PlotConfig.paper(divergence="tv"))]
    names = {
        record_path(tmp_path, arm, setting, seed, base)
        for arm in arms
        for setting in settings
        for seed in (0, 1)
        for base in (Path("one"), Path("other"))
    }
    assert len(names) == len(arms) * len(settings) * 4


@pytest.mark.parametrize("method", [method for method in METHODS if method != "dpo"])
def test_every_method_is_judged_alike(method: str, tiny_base: Path, tmp_path: Path) -> None:
    results = run_arm(Arm(method, method=method), SETTING, 0, tiny_base, tmp_path)["results"]
    assert set(results["scores"]) == set(CATEGORIES)
    for key in ("over_refusal", "twin_help", "fluent", "chosen_logp", "rejected_logp", "preference_accuracy"):
        assert math.isfinite(results[key]["value"])
    assert all(0 <= results[f"distinct_{order}"]["value"] <= 1 for order in (1, 2, 3))
    assert results["perplexity_good"]["value"] == pytest.approx(math.exp(results["nll_good"]["value"]))
    assert results["train_seconds"]["value"] > 0
    assert results["distance"]["n"] == 7 * SETTING.heldout


def test_the_probe_is_the_same_for_every_method(tiny_base: Path, tmp_path: Path) -> None:
    """Where nothing was learnt, every method is as far from the same target as the base is."""
    still = dataclasses.replace(SETTING, steps=1, learning_rate=1e-12)
    base = run_arm(Arm("base"), still, 0, tiny_base, tmp_path)["results"]
    for method in ("sft", "kto", "pro", "orpo"):
        found = run_arm(Arm(method, method=method), still, 0, tiny_base, tmp_path)["results"]
        for key in ("distance", "nll_good"):
            assert found[key]["value"] == pytest.approx(base[key]["value"], rel=1e-6)


def test_plot_is_attached_with_the_preference_of_the_pairs(tiny_base: Path, tmp_path: Path) -> None:
    """SFT sees one side only, and its term still has a target: on the first batch it is what KTO's is."""
    logs = {}
    for method in ("sft", "kto"):
        record = run_arm(Arm(method, plot=PlotConfig.paper(alpha=1.0), method=method), SETTING, 0, tiny_base, tmp_path)
        logs[method] = next(log for log in record["results"]["train_logs"] if "plot/loss" in log)
    assert logs["sft"]["plot/loss"] == pytest.approx(logs["kto"]["plot/loss"], rel=0.2)
    assert logs["sft"]["plot/loss"] > 0


def test_each_trainer_is_what_its_method_says(tiny_base: Path, tmp_path: Path) -> None:
    """Class, loss, rate, beta, and as many pairs a step."""

    def make(**options: object):
        return make_trainer(Arm("a", **options), SETTING, 0, tiny_base, str(tmp_path))  # type: ignore[arg-type]

    aot = make(loss_type=("aot",), beta=0.7)
    assert (type(aot).__name__, aot.args.loss_type, aot.args.beta) == ("DPOTrainer", ["aot"], 0.7)
    sft = make(method="sft", learning_rate=0.5)
    assert (type(sft).__name__, sft.args.learning_rate) == ("SFTTrainer", 0.5)
    assert len(sft.train_dataset) == 7 * SETTING.per_category
    kto = make(method="kto")
    assert (type(kto).__name__, kto.args.beta, kto.args.per_device_train_batch_size) == ("KTOTrainer", 0.1, 8)
    assert sum(kto.train_dataset["label"]) * 2 == len(kto.train_dataset) == 2 * 7 * SETTING.per_category
    cpo, simpo = make(method="cpo"), make(method="simpo")
    assert (type(cpo).__name__, cpo.args.loss_type, cpo.args.cpo_alpha) == ("CPOTrainer", "sigmoid", 1.0)
    assert (type(simpo).__name__, simpo.args.loss_type, simpo.args.cpo_alpha) == ("CPOTrainer", "simpo", 0.0)
    assert type(make(method="orpo")).__name__ == "ORPOTrainer"
    pro = make(method="pro")
    assert (type(pro).__name__, pro.args.sft_weight) == ("PROTrainer", 0.05)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "ppo"}, "method is 'ppo'; expected one of dpo, sft"),
        ({"method": "sft", "loss_type": ("aot",)}, "loss_type is 'aot' and method is 'sft', which has one loss"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; expected a positive number, or None"),
        ({"beta": -1.0}, "beta is -1.0; expected a positive number, or None"),
    ],
)
def test_an_arm_that_cannot_be_is_refused(options: dict, said: str) -> None:
    with pytest.raises(InputError) as caught:
        Arm("a", **options)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps is 0; expected a number of 1 or more"),
        ({"batch_size": 0}, "batch_size is 0; expected a number of 1 or more"),
        ({"learning_rate": float("inf")}, "learning_rate is inf; expected a positive number"),
        ({"flipped": 1.0}, "flipped is 1.0; expected a share of the pairs"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(options: dict, said: str) -> None:
    with pytest.raises(InputError) as caught:
        Setting(**options)
    assert str(caught.value).startswith(said)


def test_a_failed_run_loses_none_of_the_others(tiny_base: Path, tmp_path: Path) -> None:
    """KL to a target without full support is infinite in the first step; the runs around it finish."""
    kl = Arm("DPO+KL", ("sigmoid",), PlotConfig.paper(divergence="kl", alpha=1.0))
    runs = [Run(arm, SETTING, 0) for arm in (kl, DPO)]
    with pytest.raises(RunError) as caught:
        run_many(runs, tiny_base, tmp_path, workers=1)
    said = str(caught.value)
    assert said.startswith("1 of 2 runs failed (DPO+KL, seed 0); the first said: the PLOT loss is infinite at step 0")
    assert said.endswith(f"The others are in {tmp_path}; run the same again to try only those that failed")
    assert runs[1].path(tmp_path, tiny_base).exists()
    assert not runs[0].path(tmp_path, tiny_base).exists()


def test_the_default_base_is_where_it_is_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLOT_ALIGN_CACHE", str(tmp_path))
    default_base().mkdir(parents=True)  # found, so nothing is built
    assert build_base() == default_base()


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


def test_a_kept_checkpoint_is_the_model_that_was_judged(tiny_base: Path, tmp_path: Path) -> None:
    """Its log-probabilities are the record's; a record without its checkpoint is trained again."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from plot_align.sandbox import evaluate_model

    run = Run(DPO, SETTING, 0)
    run_arm(DPO, SETTING, 0, tiny_base, tmp_path)
    checkpoint = run.path(tmp_path, tiny_base).with_suffix("")
    assert not checkpoint.exists()
    record = run_arm(DPO, SETTING, 0, tiny_base, tmp_path, keep_model=True)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    found = evaluate_model(model, tokenizer, per_category=SETTING.heldout, twins=SETTING.heldout)
    assert found["chosen_logp"]["value"] == pytest.approx(record["results"]["chosen_logp"]["value"], rel=1e-6)
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    before = evaluate_model(base, tokenizer, per_category=SETTING.heldout, twins=SETTING.heldout)
    assert before["chosen_logp"]["value"] != pytest.approx(found["chosen_logp"]["value"], rel=1e-6)
