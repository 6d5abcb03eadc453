"""Runs in processes of their own: killed and resumed, and two ranks on gloo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).parent / "worker.py"
ARGS = {
    "per_device_train_batch_size": 4, "learning_rate": 1e-3, "bf16": False, "use_cpu": True, "seed": 3,
    "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
    "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture
def launch(tmp_path, tiny_llama, pairs_file):
    """``launch("name", ranks=1, …)`` → the process; its weights land in ``tmp_path/name.safetensors``."""

    def start(name, *, ranks=1, plot=None, args=None, **options) -> subprocess.Popen:
        out = str(tmp_path / f"{name}.safetensors")
        args = {**ARGS, "output_dir": str(tmp_path / name), **(args or {})}
        options = {
            "method": "dpo", "model": str(tiny_llama), "data": str(pairs_file), "out": out, "args": args,
            "plot": {"alpha": 3.0, **(plot or {})}, **options,
        }  # fmt: skip
        file = tmp_path / f"{name}.options.json"
        file.write_text(json.dumps(options))
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        return subprocess.Popen(
            [*command, str(WORKER), str(file)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def finish(process):
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-3000:]


def weights(tmp_path, name):
    return load_file(tmp_path / f"{name}.safetensors")


def test_killed_and_resumed_equals_uninterrupted(launch, tmp_path):
    """SIGKILL after the second checkpoint, resume: the same weights to the bit. Anchored, so that the target too must
    come out the same the second time."""
    args = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    plot = {"target": "anchored"}
    whole = launch("whole", args=args, plot=plot)
    finish(whole)
    killed = launch("killed", args={**args, "max_steps": 8, "save_total_limit": None}, plot=plot)
    checkpoint = tmp_path / "killed" / "checkpoint-4"
    deadline = time.monotonic() + 120
    while not (checkpoint / "trainer_state.json").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert checkpoint.exists()
    assert not (tmp_path / "killed.safetensors").exists()
    assert (checkpoint / "plot_align.json").exists()
    finish(launch("killed", args=args, plot=plot, resume=str(checkpoint)))
    for name, want in weights(tmp_path, "whole").items():
        assert torch.equal(weights(tmp_path, "killed")[name], want), name


SGD = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 2, "max_grad_norm": 1e9,
       "train_sampling_strategy": "sequential"}  # fmt: skip


def check_same(got, want):
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_two_ranks_equal_the_oracle_on_two_ranks(launch, tmp_path):
    finish(launch("ours", ranks=2, args=SGD))
    finish(launch("oracle", ranks=2, args=SGD, oracle=True))
    check_same(weights(tmp_path, "ours"), weights(tmp_path, "oracle"))


@pytest.mark.parametrize(
    "plot",
    [
        {},
        {"target": "anchored", "target_scope": "batch", "alpha_schedule": "balance", "balance_ratio": 2.0},
        {"target": "relu", "target_scope": "batch"},
    ],
)
def test_pooled_ranks_equal_one_process_on_both_batches(launch, tmp_path, plot):
    """A pooled p̄ of 2 × 4 rows, unequal token counts included, is the p̄ of one process with 8 rows; so is its target
    where that is the micro-batch's own, and so are the norms that balance α."""
    finish(launch("pooled", ranks=2, plot={**plot, "pool": True}, args=SGD))
    finish(launch("single", plot=plot, args={**SGD, "per_device_train_batch_size": 8}))
    check_same(weights(tmp_path, "pooled"), weights(tmp_path, "single"))
    logs = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("pooled", "single")]
    for pooled, single in zip(*logs, strict=True):
        assert pooled["plot/loss"] == pytest.approx(single["plot/loss"], rel=1e-4)


def test_pro_on_two_ranks_equals_one_process_on_both_batches(launch, tmp_path, ranked_rows):
    """Its loss is a mean over prompts, and its metrics are of all ranks, though their lists differ in number."""
    data = tmp_path / "ranked.jsonl"
    ranked_rows.to_json(data)
    options = {"method": "pro", "data": str(data), "plot": {"pool": True}}
    finish(launch("two", ranks=2, args=SGD, **options))
    finish(launch("one", args={**SGD, "per_device_train_batch_size": 8}, **options))
    check_same(weights(tmp_path, "two"), weights(tmp_path, "one"))
    logs = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("two", "one")]
    for two, one in zip(*logs, strict=True):
        for name in ("loss/ranking", "loss/sft", "logps/best", "rank_accuracy", "entropy", "mean_token_accuracy"):
            assert two[name] == pytest.approx(one[name], rel=1e-4), name
        assert two["num_tokens"] == one["num_tokens"]
