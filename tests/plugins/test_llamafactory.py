"""LLaMA-Factory: its own code through ``plot-align llamafactory-train``, with the keys of its example
``train_lora/qwen3_lora_dpo.yaml``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from frameworks import PLOT, chat_model, check_same, check_sum, history, needs, plain_history, run, write_lines

from plot_align.cli.main import dispatch
from plot_align.errors import InputError

pytestmark = needs("llamafactory", "LLaMA-Factory")


@pytest.fixture(scope="module")
def example(tiny_llama, pair_rows, tmp_path_factory):
    """The example's keys, with a tiny model, a CPU's number format and three steps."""
    folder = tmp_path_factory.mktemp("llamafactory")
    rows = [
        {
            "conversations": [{"from": "human", "value": row["prompt"]}],
            **{side: {"from": "gpt", "value": row[side]} for side in ("chosen", "rejected")},
        }
        for row in pair_rows
    ]
    write_lines(folder / "pairs.jsonl", rows)
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    info = {"pairs": {"file_name": "pairs.jsonl", "formatting": "sharegpt", "ranking": True, "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return {
        "model_name_or_path": str(chat_model(tiny_llama, folder / "model")),
        "stage": "dpo",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_target": "all",
        "pref_beta": 0.1,
        "pref_loss": "sigmoid",
        "dataset": "pairs",
        "dataset_dir": str(folder),
        "template": "default",
        "cutoff_len": 128,
        "max_samples": 1000,
        "output_dir": str(folder / "out"),
        "logging_steps": 1,
        "plot_loss": False,
        "overwrite_output_dir": True,
        "report_to": "none",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "max_steps": 3,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "seed": 3,
        "use_cpu": True,
    }


def write(folder: Path, options) -> str:
    path = folder / "dpo.yaml"
    path.write_text(yaml.safe_dump(options), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def trained(example, tmp_path_factory):
    """What the command left, with three lines added to the example."""
    folder = tmp_path_factory.mktemp("run")
    path = write(folder, {**example, "plot": PLOT})
    run("plot_align.cli", "llamafactory-train", path, folder=folder)
    return Path(example["output_dir"])


def parts(options):
    """LLaMA-Factory's own arguments, pairs and model: what its ``run_dpo`` makes of the options."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_model, load_tokenizer

    model_args, data_args, training_args, finetuning_args, _ = get_train_args(dict(options))
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    dataset = get_dataset(template, model_args, data_args, training_args, stage="rm", **module)["train_dataset"]
    return module["tokenizer"], dataset, load_model(module["tokenizer"], model_args, finetuning_args, True)


@pytest.mark.slow
def test_the_command_trains_with_the_term(trained):
    check_sum(history(trained))
    written = {path.name for path in trained.iterdir()}
    assert {"adapter_model.safetensors", "plot_align.json", "preference.safetensors"} <= written
    assert "\n## PLOT\n" in (trained / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_it_logs_what_attach_logs_on_plain_trl(trained, example, tmp_path, rows):
    """The model and the tokens that LLaMA-Factory made, in TRL's own trainer and collator."""
    from datasets import Dataset

    from trl import DPOConfig, DPOTrainer

    tokenizer, dataset, model = parts(example)
    same = ("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "max_steps", "seed")
    same = (*same, "lr_scheduler_type", "warmup_ratio", "logging_steps", "report_to", "use_cpu")
    options = {name: example[name] for name in same}
    args = DPOConfig(str(tmp_path), beta=0.1, bf16=False, gradient_checkpointing=False, disable_tqdm=True, **options)
    trainer = DPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train_dataset = Dataset.from_list([tokens(row) for row in dataset])
    check_same(history(trained), plain_history(trainer, preference_of(dataset, tokenizer)))


def tokens(row):
    """A row of LLaMA-Factory's as TRL 0.24 tokenises one: prompt and completions apart."""
    start = sum(label == -100 for label in row["chosen_labels"])
    return {
        "prompt_input_ids": row["chosen_input_ids"][:start],
        "chosen_input_ids": row["chosen_input_ids"][start:],
        "rejected_input_ids": row["rejected_input_ids"][start:],
    }


def preference_of(dataset, tokenizer):
    from plot_align.preference.estimation import estimate_tokenized

    return estimate_tokenized(dataset, tokenizer, max_length=None, progress=False)


def built(monkeypatch, options):
    """The trainer that LLaMA-Factory builds, stopped before it trains."""
    from llamafactory.train.dpo.trainer import CustomDPOTrainer

    found = []

    def stop(self, *args, **kwargs):
        found.append(self)
        raise StopIteration

    monkeypatch.setattr(CustomDPOTrainer, "train", stop)
    from plot_align.plugins.llamafactory import train

    with pytest.raises(StopIteration):
        train(options)
    return found[0]


def test_without_the_block_it_does_nothing(example, monkeypatch):
    trainer = built(monkeypatch, example)
    assert "get_batch_loss_metrics" not in vars(trainer)
    assert not hasattr(trainer, "_plot_handle")


@pytest.mark.parametrize(("loss", "target"), [("sigmoid", "anchored"), ("orpo", "chosen"), ("simpo", "chosen")])
def test_each_loss_has_its_target(example, monkeypatch, loss, target):
    """Without a reference model there is nothing to anchor the target on."""
    trainer = built(monkeypatch, {**example, "pref_loss": loss, "plot": {"alpha": 0.25}})
    assert (trainer._plot_handle.config.alpha, trainer._plot_handle.config.target) == (0.25, target)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    plain = trainer._plot_handle._originals["get_batch_loss_metrics"](trainer.model, dict(batch))[0]
    loss = trainer.get_batch_loss_metrics(trainer.model, batch)[0]
    assert loss > plain + 1e-4


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        ({"stage": "sft"}, {}, "plot is set and stage is 'sft'"),
        ({}, {"USE_MCA": "1"}, "Megatron would train, which splits the head"),
        ({}, {"USE_RAY": "1"}, "Ray's workers would train without PLOT"),
        ({"plot": {"target": "best"}}, {}, "in plot: target is 'best'; expected one of"),
        ({"plot": "yes"}, {}, "plot is 'yes', expected a mapping of options"),
    ],
)
def test_what_cannot_work_is_refused_first(example, tmp_path, monkeypatch, options, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    path = write(tmp_path, {**example, "plot": PLOT, **options})
    with pytest.raises(InputError, match=message):
        dispatch(["llamafactory-train", path])
