"""Training in processes of its own: killed and resumed, and two ranks on gloo."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import plot_align
from oracles.training import embeddings_at_start, materialised_loss
from plot_align import PlotConfig, PlotDPOTrainer, estimate
from plot_align.trl import gradients
from processes import run, start
from trl import DPOConfig, DPOTrainer

pytestmark = pytest.mark.slow  # starts processes
ARGS = {
    "per_device_train_batch_size": 4, "learning_rate": 1e-3, "bf16": False, "use_cpu": True, "seed": 3,
    "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
    "disable_tqdm": True,
}  # fmt: skip


def train(options: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """A training script as a user writes one: the weights, and what was logged of the term.

    ``oracle``: TRL's loss plus the materialised term in place of ours.
    """
    torch.set_num_threads(1)
    # Two ranks sample other rows than one process does; of all rows the norms must be the same.
    gradients._SAMPLED_ROWS = 10_000
    tokenizer = AutoTokenizer.from_pretrained(options["model"])
    model = AutoModelForCausalLM.from_pretrained(options["model"])
    data = Dataset.from_json(options["data"])
    config, drop_in = DPOConfig, PlotDPOTrainer
    if options["method"] == "pro":
        config, drop_in = plot_align.PROConfig, plot_align.PlotPROTrainer
    shared = {"args": config(**options["args"]), "processing_class": tokenizer, "train_dataset": data}
    plot = PlotConfig.paper(**options["plot"])
    if options["oracle"]:
        trainer = with_oracle(DPOTrainer(model, **shared), plot, estimate(data, tokenizer, progress=False))
    else:
        trainer = drop_in(model, plot=plot, **shared)
    trainer.train(resume_from_checkpoint=options["resume"])
    weights = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.accelerator.wait_for_everyone()
    return weights, [entry for entry in trainer.state.log_history if "plot/loss" in entry]


def with_oracle(trainer: Any, plot: PlotConfig, preference: Any) -> Any:
    embeddings_at_start(trainer)
    original = trainer.compute_loss

    def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
        term = materialised_loss(trainer, "DPOTrainer", inputs, plot, preference)
        return original(model, dict(inputs)) + term

    trainer.compute_loss = compute_loss
    return trainer


@pytest.fixture
def options(tmp_path, tiny_llama, pairs_file):
    """``options("name", ...)`` → those of :func:`train`, which saves its checkpoints in ``tmp_path/name``."""

    def make(name: str, *, method="dpo", data=pairs_file, plot=None, args=None, oracle=False, resume=None):
        return {
            "method": method, "model": str(tiny_llama), "data": str(data), "oracle": oracle, "resume": resume,
            "args": {**ARGS, "output_dir": str(tmp_path / name), **(args or {})},
            "plot": {"alpha": 3.0, **(plot or {})},
        }  # fmt: skip

    return make


def trained(options: dict[str, Any], ranks: int = 1) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    return run(train, options, ranks=ranks)[0]


def is_complete(path: Path) -> bool:
    """Whether the file is there, to its end: the Trainer writes it last."""
    try:
        return bool(json.loads(path.read_text()))
    except (FileNotFoundError, ValueError):
        return False


def test_killed_and_resumed_equals_uninterrupted(options, tmp_path, monkeypatch):
    """SIGKILL after the second checkpoint, resume: the same weights to the bit. Anchored, so that the target too must
    come out the same the second time."""
    args = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    plot = {"target": "anchored"}
    monkeypatch.setattr(gradients, "_SAMPLED_ROWS", gradients._SAMPLED_ROWS)  # restored: train() sets it
    whole, _ = train(options("whole", args=args, plot=plot))
    checkpoint = tmp_path / "killed" / "checkpoint-4"
    with start(train, options("killed", args=args, plot=plot)) as processes:
        deadline = time.monotonic() + 120
        while not is_complete(checkpoint / "trainer_state.json") and time.monotonic() < deadline:
            time.sleep(0.002)
        processes.kill(0)
        [outcome] = processes.outcomes()
    assert outcome.error == "SIGKILL"
    assert (checkpoint / "plot_align.json").exists()
    resumed, _ = train(options("killed", args=args, plot=plot, resume=str(checkpoint)))
    for name, want in whole.items():
        assert torch.equal(resumed[name], want), name


SGD = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 2, "max_grad_norm": 1e9,
       "train_sampling_strategy": "sequential"}  # fmt: skip


def check_same(got, want):
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_two_ranks_equal_the_oracle_on_two_ranks(options):
    ours, _ = trained(options("ours", args=SGD), ranks=2)
    oracle, _ = trained(options("oracle", args=SGD, oracle=True), ranks=2)
    check_same(ours, oracle)


@pytest.mark.parametrize(
    "plot",
    [
        {},
        {"target": "anchored", "target_scope": "batch", "alpha_schedule": "balance", "balance_ratio": 2.0},
        {"target": "relu", "target_scope": "batch"},
    ],
)
def test_pooled_ranks_equal_one_process_on_both_batches(options, plot):
    """A pooled p̄ of 2 × 4 rows, unequal token counts included, is the p̄ of one process with 8 rows; so is its target
    where that is the micro-batch's own, and so are the norms that balance α."""
    pooled, pooled_log = trained(options("pooled", plot={**plot, "pool": True}, args=SGD), ranks=2)
    single, single_log = trained(options("single", plot=plot, args={**SGD, "per_device_train_batch_size": 8}))
    check_same(pooled, single)
    for two, one in zip(pooled_log, single_log, strict=True):
        assert two["plot/loss"] == pytest.approx(one["plot/loss"], rel=1e-4)


def test_pro_on_two_ranks_equals_one_process_on_both_batches(options, tmp_path, ranked_rows):
    """Its loss is a mean over prompts, and its metrics are of all ranks, though their lists differ in number."""
    data = tmp_path / "ranked.jsonl"
    ranked_rows.to_json(data)
    shared = {"method": "pro", "data": data, "plot": {"pool": True}}
    two, two_log = trained(options("two", args=SGD, **shared), ranks=2)
    one, one_log = trained(options("one", args={**SGD, "per_device_train_batch_size": 8}, **shared))
    check_same(two, one)
    for of_two, of_one in zip(two_log, one_log, strict=True):
        for name in ("loss/ranking", "loss/sft", "logps/best", "rank_accuracy", "entropy", "mean_token_accuracy"):
            assert of_two[name] == pytest.approx(of_one[name], rel=1e-4), name
        assert of_two["num_tokens"] == of_one["num_tokens"]
