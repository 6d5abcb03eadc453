"""The monitor on two gloo ranks, with DDP and with FSDP2, against one process on the concatenated batch."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from engines import ARGS, on_cpu
from transformers import AutoModelForCausalLM, AutoTokenizer

from plot_align import PreferenceMonitor
from processes import run
from trl import DPOConfig, DPOTrainer

pytestmark = pytest.mark.slow  # starts processes


def watched(engine: str, model: str, data: str, out: str, chat_template: str, rows: int) -> dict[str, Any]:
    """Steps of four pairs over all ranks, with evaluations: what was logged, asked and said."""
    torch.set_num_threads(1)
    with on_cpu(engine) as options:
        pairs = Dataset.from_json(data)
        args = {
            **ARGS, "max_steps": 3, "per_device_train_batch_size": rows, "per_device_eval_batch_size": 1,
            "output_dir": out, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 2.0, "beta": 1.0, **options,
        }  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.chat_template = chat_template
        trainer = DPOTrainer(
            AutoModelForCausalLM.from_pretrained(model), args=DPOConfig(**args), train_dataset=pairs,
            eval_dataset=pairs.select(range(4)), processing_class=tokenizer,
        )  # fmt: skip
        monitor = PreferenceMonitor(trainer, chosen_fall=1e-9, stop_on=["repetition"], max_new_tokens=6)
        trainer.add_callback(monitor)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        trainer.accelerator.wait_for_everyone()
        logs = [
            {name: x for name, x in entry.items() if name.startswith("monitor/")}
            for entry in trainer.state.log_history
        ]  # fmt: skip
        said = [str(w.message) for w in caught if w.filename.endswith("monitor/callback.py")]
        return {
            "logs": [x for x in logs if x], "answers": [x.answer for x in monitor.answers], "said": said,
            "crossed": monitor.crossed,
        }  # fmt: skip


def test_ranks_log_what_one_process_logs(
    tiny_llama: Path, pairs_file: Path, tmp_path: Path, chat_template: str
) -> None:
    """Numbers of two ranks of two pairs are those of four pairs. The model repeats itself soon: one rank says so, and
    all stop."""
    given = (str(tiny_llama), str(pairs_file), str(tmp_path), chat_template)
    [alone] = run(watched, "ddp", *given, 4)
    assert alone["crossed"]["repetition"] == 2
    for engine in ("ddp", "fsdp2"):
        first, second = run(watched, engine, *given, 2, ranks=2)
        assert len(alone["logs"]) == len(first["logs"]) == 4  # before, two steps, and the evaluation that stops it
        for found, want in zip(first["logs"], alone["logs"], strict=True):
            assert found == pytest.approx(want, rel=1e-3, abs=1e-4), engine
        assert first["answers"] == second["answers"] == alone["answers"], engine
        assert first["crossed"] == second["crossed"] == alone["crossed"], engine
        assert first["said"] == alone["said"], engine
        assert second["said"] == [], engine
