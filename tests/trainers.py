"""Tiny trainers of every supported method."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import plot_align
from plot_align.preference.distribution import PreferenceDistribution

COMMON = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "seed": 3,
}


def _home_of(method: str):
    """The module of a trainer that TRL moved to ``trl.experimental`` in 0.26."""
    try:
        return importlib.import_module(f"trl.experimental.{method}")
    except ImportError:
        return importlib.import_module("trl")


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def rows(pairs_file) -> Dataset:
    return Dataset.from_json(str(pairs_file))


@pytest.fixture(scope="session")
def preference(rows, tiny_llama) -> PreferenceDistribution:
    from plot_align.preference.estimation import estimate

    return estimate(rows, AutoTokenizer.from_pretrained(tiny_llama), progress=False)


@pytest.fixture(scope="session")
def ranked_rows(rows) -> Dataset:
    """Lists of two to four completions in no order, with rewards, some of them tied."""
    columns: dict[str, list] = {"prompt": [], "completions": [], "rewards": []}
    for index, row in enumerate(rows):
        answers = [row["rejected"], row["chosen"], f" {index} ?", " the sum is known ."][: 2 + index % 3]
        columns["prompt"].append(row["prompt"])
        columns["completions"].append(answers)
        columns["rewards"].append([{row["chosen"]: 2.5, row["rejected"]: -0.5}.get(text, 0.25) for text in answers])
    return Dataset.from_dict(columns)


@pytest.fixture
def make_trainer(tiny_llama, rows, ranked_rows, tmp_path):
    """``make_trainer("dpo", loss_type=…, peft_config=…)`` → the TRL trainer, without PLOT."""

    def make(method: str, *, cls: Any = None, extra: dict[str, Any] | None = None, **options: Any):
        import trl

        model, tokenizer = load(tiny_llama)
        options = {**COMMON, "output_dir": str(tmp_path / method), **options}
        extra = dict(extra or {})
        match method:
            case "dpo":
                config, data, base = trl.DPOConfig, rows, trl.DPOTrainer
            case "sft":
                data = rows.rename_column("chosen", "completion").remove_columns("rejected")
                config, base = trl.SFTConfig, trl.SFTTrainer
            case "kto":
                columns = {"prompt": [], "completion": [], "label": []}
                for row in rows:
                    for name in ("chosen", "rejected"):
                        columns["prompt"].append(row["prompt"])
                        columns["completion"].append(row[name])
                        columns["label"].append(name == "chosen")
                config, data, base = trl.KTOConfig, Dataset.from_dict(columns), trl.KTOTrainer
            case "pro":
                config, data, base = plot_align.PROConfig, extra.pop("data", ranked_rows), plot_align.PROTrainer
            case "grpo" | "rloo":
                data = rows.select_columns(["prompt"])
                config, base = (
                    (trl.GRPOConfig, trl.GRPOTrainer) if method == "grpo" else (trl.RLOOConfig, trl.RLOOTrainer)
                )
                options = {"num_generations": 4, "max_completion_length": 8, "temperature": 0.9, **options}
                extra["reward_funcs"] = lambda completions, **kwargs: [float(len(set(text))) for text in completions]
            case "cpo" | "simpo":
                home = _home_of("cpo")
                config, data, base = home.CPOConfig, rows, home.CPOTrainer
                options |= {"loss_type": "simpo", "cpo_alpha": 0.0} if method == "simpo" else {}
            case "orpo":
                home = _home_of("orpo")
                config, data, base = home.ORPOConfig, rows, home.ORPOTrainer
        data_name = {"train_dataset": data, "eval_dataset": extra.pop("eval_dataset", None)}
        return (cls or base)(model=model, args=config(**options), processing_class=tokenizer, **data_name, **extra)

    return make
