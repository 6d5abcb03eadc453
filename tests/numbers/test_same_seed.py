"""Two runs from one seed write the same bytes, and so do runs with other numbers of workers.

On one machine, one version of everything, one number of threads (OMP_NUM_THREADS): torch adds up in another order on
more of them. ``evaluate``, ``redteam`` and ``estimate`` on several ranks: tests/inference/test_parallel.py and
tests/preference/test_estimate_ranks.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plot_align.cli.main import main

pytestmark = pytest.mark.slow
# What differs without a difference in results: when, how fast, and numbers of workers in a record's configuration.
_PASSING = re.compile(
    r"created|digest|seconds|.*runtime|.*per_second|tstamp|.*_time|num_proc|num_processes|dataset_num_proc|dataloader_.*|"
    r".*seconds.*|logging_dir|workers"
)
# The first holds the folder of the Trainer's log, which is named after the hour; the second its digest.
_DATED = ("training_args.bin", "plot_align_digests.json")


def results(folder: Path) -> dict[str, Any]:
    """Every file below ``folder``: its bytes, of JSON what does not pass."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in _DATED):
        if ".digests" in path.parts:
            continue  # of files that hold seconds
        content = path.read_bytes()
        if path.suffix == ".json":
            content = lasting(json.loads(content))
        elif path.suffix == ".jsonl":
            content = [lasting(json.loads(line)) for line in content.decode().splitlines()]
        found[str(path.relative_to(folder))] = content
    return found


def lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: lasting(entry) for key, entry in value.items() if not _PASSING.fullmatch(key)}
    return [lasting(entry) for entry in value] if isinstance(value, list) else value


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """``run("name", *arguments)``: what the command leaves in a working folder of its own."""

    def command(name: str, *arguments: object) -> dict[str, Any]:
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        assert main([str(argument) for argument in arguments]) == 0
        return results(folder)

    return command


def same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    assert first


TRAINING = {
    "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 3, "learning_rate": 1e-3, "logging_steps": 1,
    "use_cpu": "true", "bf16": "false", "report_to": "none", "gradient_checkpointing": "false", "output_dir": "out",
    "disable_tqdm": "true", "seed": 7,
}  # fmt: skip


def training(model: Path, pairs: Path, **options: Any) -> list[object]:
    given = {"model_name_or_path": model, "dataset_name": pairs, **TRAINING, **options}
    return ["dpo", *(part for name, value in given.items() for part in (f"--{name}", value))]


def test_dpo(run: Callable[..., dict[str, Any]], tiny_llama: Path, pairs_file: Path) -> None:
    """Weights, optimiser, log, preference, record, model card: twice, with workers that load and tokenise, and, so
    that the test can fail, not with another seed."""
    first = run("first", *training(tiny_llama, pairs_file))
    same(first, run("second", *training(tiny_llama, pairs_file)))
    workers = run("workers", *training(tiny_llama, pairs_file, dataloader_num_workers=2, dataset_num_proc=2))
    same(first, workers)
    other = run("other", *training(tiny_llama, pairs_file, seed=8))
    assert other["out/model.safetensors"] != first["out/model.safetensors"]
    assert {
        "out/model.safetensors",
        "out/checkpoint-4/trainer_state.json",
        "out/checkpoint-4/optimizer.pt",
    } <= first.keys()


@pytest.mark.parametrize("options", [{"granularity": "token"}, {"divergence": "sinkhorn"}, {"geometry": "sliced"}])
def test_dpo_with_other_terms(
    run: Callable[..., dict[str, Any]], options: dict[str, str], tiny_llama: Path, pairs_file: Path
) -> None:
    arguments = training(tiny_llama, pairs_file, max_steps=2, **options)
    same(run("first", *arguments), run("second", *arguments))


def test_estimate(run: Callable[..., dict[str, Any]], tiny_tokenizer: Path, pairs_file: Path) -> None:
    """The artefact to the byte: alone, by two and by three workers, as a stream."""
    arguments = ["estimate", pairs_file, "--tokenizer", tiny_tokenizer, "--output", "p.safetensors"]
    first = run("first", *arguments)
    same(first, run("second", *arguments))
    for workers in (2, 3):
        same(first, run(f"by {workers}", *arguments, "--num_proc", workers))


@pytest.mark.parametrize("by", ["deft", "ches", "length"])
def test_filter(run: Callable[..., dict[str, Any]], by: str, tiny_llama: Path, pairs_file: Path) -> None:
    arguments = ["filter", pairs_file, "--model", tiny_llama, "--by", by, "--share", "0.3"]
    same(run("first", *arguments), run("second", *arguments))


def test_doctor(run: Callable[..., dict[str, Any]], tiny_llama: Path, pairs_file: Path) -> None:
    """The record; the page, whose figures carry no date."""
    arguments = ["doctor", pairs_file, "--model", tiny_llama, "--record", "doctor.json", "--page", "doctor.html"]
    first, second = run("first", *arguments), run("second", *arguments)
    assert first.keys() == second.keys() >= {"doctor.json", "doctor.html"}
    assert first["doctor.json"] == second["doctor.json"]


def test_redteam(run: Callable[..., dict[str, Any]], tiny_base: Path, requests_folder: Path, tmp_path: Path) -> None:
    """Test cases, answers, labels, curves and record of attacks that draw."""
    options = tmp_path / "options.yaml"
    options.write_text("gcg: {steps: 3, search_width: 8}\nbest_of_n: {n: 3}\nrandom: {}\n")
    arguments = [
        "redteam", tiny_base, "--behaviors", requests_folder / "behaviors.csv",
        "--benign", requests_folder / "benign.csv",
        "--targets", requests_folder / "targets.json",
        "--attacks", "random,best_of_n,gcg", "--options", options, "--max_new_tokens", "8",
        "--cases", "1", "--output", "out",
    ]  # fmt: skip
    first, second = run("first", *arguments), run("second", *arguments)
    pictures = {name for name in first if name.endswith((".png", ".svg"))}
    same({n: c for n, c in first.items() if n not in pictures}, {n: c for n, c in second.items() if n not in pictures})


def test_evaluate(run: Callable[..., dict[str, Any]], tiny_base: Path, chat_pairs_file: Path, tmp_path: Path) -> None:
    """Answers, items, intervals and records."""
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        f"helpfulness:\n  pairs: {{kind: preference_accuracy, pairs: {chat_pairs_file}, limit: 9}}\n"
        "guards:\n  over_refusal: {kind: over_refusal, max_new_tokens: 4, limit: 4}\n"
        "  diversity: {kind: diversity, max_new_tokens: 4, limit: 4}\n"
        f"  drift: {{kind: drift, pairs: {chat_pairs_file}, limit: 9}}\n"
    )
    arguments = ["evaluate", f"tiny={tiny_base}", "--suite", suite, "--reference", tiny_base, "--output", "out"]
    same(run("first", *arguments), run("second", *arguments))


def test_a_sweep_by_one_worker_and_by_two(
    run: Callable[..., dict[str, Any]], tiny_llama: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """Each run's numbers, and with them the summary."""
    train = tmp_path / "dpo.yaml"
    given = {"model_name_or_path": str(tiny_llama), "dataset_name": str(pairs_file), **TRAINING, "save_strategy": "no",
             "max_steps": 2}  # fmt: skip
    del given["output_dir"], given["save_steps"]
    train.write_text(json.dumps(given))  # which is YAML
    arguments = ["sweep", "--train", train, "--alpha", "0.1", "1", "--seed", "3", "--output", "out", "--workers"]

    def summary(name: str, workers: int) -> Any:
        [record] = [
            content for path, content in run(name, *arguments, workers).items()
            if path.endswith(".json") and isinstance(content, dict) and content.get("kind") == "sweep"
        ]  # fmt: skip
        return record["results"]

    assert summary("by one", 1) == summary("by two", 2)
