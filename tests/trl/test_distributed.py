"""DDP, FSDP2 and ZeRO on two and four gloo ranks against one process on the concatenated batch: loss, every gradient.

The one process is TRL's trainer plus the materialised term of ``oracles/training.py``. A gradient agrees where its
largest deviation is below 1e-5 of the tensor's largest entry.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from engines import ALL_ROWS, PAPER, build, record, train_all, train_once
from transformers import AutoModelForCausalLM, AutoTokenizer

from oracles.training import embeddings_at_start, materialised_loss
from plot_align import PlotConfig, estimate
from plot_align.trl import gradients
from processes import run

pytestmark = pytest.mark.slow  # starts processes
TOLERANCE = 1e-5
TWICE = {"gradient_accumulation_steps": 2}
ANCHORED = {"target": "anchored", "target_scope": "batch"}
POOLED_DPO = {"method": "dpo", "plot": {"pool": True}}
LOCAL_DPO = {"method": "dpo", "plot": ANCHORED, "args": TWICE}
POOLED_SFT = {"method": "sft", "plot": {"pool": True, "target": "chosen", "target_scope": "batch"}}
LOCAL_SFT = {"method": "sft", "plot": {"granularity": "sequence"}, "args": TWICE}
LORA = {"method": "dpo", "plot": {"pool": True, **ANCHORED}, "peft": True}
# These have no oracle: they are compared with ours in one process, which other tests hold to the oracle.
BALANCE = {
    "method": "dpo", "plot": {"pool": True, **ANCHORED, "alpha": None, "balance_ratio": 2.0}, "args": {"max_steps": 2},
}  # fmt: skip
BALANCE_CPO = {  # its logits are read; without its NLL, which is a mean over the tokens of each rank
    "method": "cpo", "plot": {"pool": True, "alpha": None, "balance_ratio": 2.0},
    "args": {"max_steps": 2, "cpo_alpha": 0.0},
}  # fmt: skip
DATASET = {"method": "dpo", "plot": {"pool": True, "target": "anchored", "reference_rows": 12}}
DATASET_SFT = {"method": "sft", "plot": {"pool": True, "target": "anchored", "reference_rows": 12}}


@pytest.fixture(scope="session")
def uneven(pairs_file, tmp_path_factory) -> Path:
    """Pairs whose chosen answers are twice as long on every second rank of four rows."""
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    for place, row in enumerate(rows):
        row["chosen"] *= 1 + place // 4 % 2
    path = tmp_path_factory.mktemp("uneven") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def launch(tmp_path, tiny_llama, uneven):
    """``launch(ranks, cases)`` → what the first rank found in each case: gradients and log, or the error."""

    def train(ranks: int, cases: list[dict[str, Any]]) -> dict[str, Any]:
        return run(train_all, cases, str(tiny_llama), str(uneven), str(tmp_path), ranks=ranks, timeout=400)[0]

    return train


@pytest.fixture
def one_process(tmp_path, tiny_llama, uneven, monkeypatch):
    """``one_process(case, ranks)`` → the same in this process on all ranks' rows at once; of the oracle, if it can."""

    monkeypatch.setattr(gradients, "_SAMPLED_ROWS", ALL_ROWS)

    def train(case: dict[str, Any], ranks: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        folder, data = str(tiny_llama), Dataset.from_json(str(uneven))
        preference = estimate(data, AutoTokenizer.from_pretrained(folder), progress=False)
        args = {**case.get("args", {}), "per_device_train_batch_size": 4 * ranks, "use_cpu": True}
        plot = PlotConfig.from_options(**{**PAPER, **case["plot"]})
        if plot.alpha is None or (plot.target, plot.ablations.target_scope) == ("anchored", "dataset"):
            return train_once({**case, "args": args}, folder, data, preference, str(tmp_path / "one"))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        args["output_dir"] = str(tmp_path / "one")
        trainer = build(case["method"], model, folder, data, args, case.get("peft", False))
        kind = type(trainer).__name__
        embeddings_at_start(trainer)
        original = trainer.compute_loss

        def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
            parts = [inputs] if plot.pool else [rows_of(inputs, kind, rank, ranks) for rank in range(ranks)]
            terms = [materialised_loss(trainer, kind, part, plot, preference) for part in parts]
            vanilla = original(model, dict(inputs), num_items_in_batch=num_items_in_batch)
            scaled = trainer.current_gradient_accumulation_steps if kind == "SFTTrainer" else 1  # DPO: by the Trainer
            return vanilla + torch.stack(terms).mean() / scaled

        trainer.compute_loss = compute_loss
        return record(trainer)

    return train


def rows_of(inputs: dict[str, Any], kind: str, rank: int, ranks: int) -> dict[str, Any]:
    """One rank's rows of the concatenated batch; pairs are chosen rows above rejected ones."""
    sides = 2 if kind == "DPOTrainer" else 1
    part = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            each = value.view(sides, ranks, -1, *value.shape[1:])
            value = each[:, rank].reshape(-1, *value.shape[1:])
        part[name] = value
    return part


def check_agree(name: str, got: Any, want: tuple[dict[str, torch.Tensor], dict[str, Any]]) -> None:
    assert not isinstance(got, str), f"{name}: {got[-2000:]}"
    (gradients, said), (expected, oracle) = got, want
    assert gradients.keys() == expected.keys()
    for parameter, gradient in expected.items():
        deviation = float((gradients[parameter] - gradient).abs().max())
        assert deviation <= TOLERANCE * float(gradient.abs().max()), (name, parameter, deviation)
    assert any(float(gradient.abs().max()) > 1e-3 for gradient in expected.values()), name
    tokens = said["tokens"]
    assert any(len(set(at_step)) > 1 for at_step in zip(*tokens, strict=True)), f"{name}: equal counts {tokens}"
    steps = [[x for x in log if "loss" in x] for log in (said["log"], oracle["log"])]
    for of_ranks, of_one in zip(*steps, strict=True):
        assert of_ranks["loss"] == pytest.approx(of_one["loss"], rel=TOLERANCE), name
        for key in ("plot/loss", "plot/alpha", "plot/grad_ratio"):
            if key in of_one:
                assert of_ranks[key] == pytest.approx(of_one[key], rel=TOLERANCE), (name, key)


def on_engines(cases: dict[str, dict[str, Any]], engines: list[str]) -> list[dict[str, Any]]:
    return [
        {**case, "name": f"{name}-{engine}", "engine": engine} for name, case in cases.items() for engine in engines
    ]


def test_two_ranks_of_ddp_and_fsdp2(launch, one_process):
    cases = {
        "pooled_dpo": POOLED_DPO, "local_dpo": LOCAL_DPO, "pooled_sft": POOLED_SFT, "local_sft": LOCAL_SFT,
        "lora": LORA, "balance": BALANCE, "balance_cpo": BALANCE_CPO, "dataset": DATASET,
    }  # fmt: skip
    more = [
        # The first rank alone loads the weights; the others' are empty until training starts.
        {**DATASET_SFT, "engine_options": {"cpu_ram_efficient_loading": True}, "by_name": True, "name": "sft_by_name"},
        {**BALANCE, "groups": "root", "name": "balance_in_the_roots_group"},
        {**BALANCE_CPO, "groups": "root", "name": "balance_cpo_in_the_roots_group"},
        {**POOLED_DPO, "groups": "own", "name": "own_group"},
        {**POOLED_DPO, "plot": {"plot_backend": "separate"}, "name": "separate"},
    ]
    found = launch(2, on_engines(cases, ["ddp", "fsdp2"]) + [{**case, "engine": "fsdp2"} for case in more])
    for name, case in cases.items():
        want = one_process(case, 2)
        for engine in ("ddp", "fsdp2"):
            check_agree(f"{name}-{engine}", found[f"{name}-{engine}"], want)
    check_agree("sft_by_name", found["sft_by_name"], one_process(DATASET_SFT, 2))
    check_agree("balance_in_the_roots_group", found["balance_in_the_roots_group"], one_process(BALANCE, 2))
    check_agree("balance_cpo_in_the_roots_group", found["balance_cpo_in_the_roots_group"], one_process(BALANCE_CPO, 2))
    assert "InputError: the LM head is sharded on its own" in found["own_group"]
    assert "InputError: plot_backend is 'separate' and the LM head is sharded" in found["separate"]


def test_four_ranks_of_ddp_and_fsdp2(launch, one_process):
    cases = {"pooled_dpo": {**POOLED_DPO, "plot": {"pool": True, **ANCHORED}}, "local_sft": {**LOCAL_SFT, "args": {}}}
    found = launch(4, on_engines(cases, ["ddp", "fsdp2"]))
    for name, case in cases.items():
        want = one_process(case, 4)
        for engine in ("ddp", "fsdp2"):
            check_agree(f"{name}-{engine}", found[f"{name}-{engine}"], want)


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed; on a CPU: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed",
)
def test_two_ranks_of_zero_2_and_3(launch, one_process):
    cases = {
        "pooled_dpo": POOLED_DPO, "local_dpo": LOCAL_DPO, "local_sft": LOCAL_SFT, "balance": BALANCE,
        "dataset": {**DATASET, "by_name": True},
    }  # fmt: skip
    found = launch(
        2, [*on_engines(cases, ["zero2", "zero3"]), {**DATASET_SFT, "by_name": True, "engine": "zero3", "name": "sft"}]
    )
    for name, case in cases.items():
        want = one_process(case, 2)
        for engine in ("zero2", "zero3"):
            check_agree(f"{name}-{engine}", found[f"{name}-{engine}"], want)
    assert "the policy, which is its own reference, is sharded by ZeRO-3" in found["sft"]
