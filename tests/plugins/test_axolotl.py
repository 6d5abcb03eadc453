"""Axolotl: its own code and its own command, with the keys of its example ``llama-3/instruct-dpo-lora-8b.yml``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from frameworks import PLOT, chat_model, check_same, check_sum, history, needs, plain_history, run, write_lines

from plot_align.errors import InputError

pytestmark = needs("axolotl", "Axolotl")
PLUGIN = "plot_align.plugins.axolotl.PlotPlugin"


@pytest.fixture(scope="module")
def example(tiny_llama, pair_rows, tmp_path_factory):
    """The example's keys, with a tiny model, a CPU's number format and three steps."""
    folder = tmp_path_factory.mktemp("axolotl")
    rows = [
        {
            "conversation": [{"role": "user", "content": row["prompt"]}],
            **{side: {"role": "assistant", "content": row[side]} for side in ("chosen", "rejected")},
        }
        for row in pair_rows
    ]
    pairs = write_lines(folder / "pairs.jsonl", rows)
    return {
        "base_model": str(chat_model(tiny_llama, folder / "model")),
        "chat_template": "tokenizer_default",
        "rl": "dpo",
        "datasets": [
            {
                "path": str(pairs),
                "ds_type": "json",
                "split": "train",
                "type": "chat_template.default",
                "field_messages": "conversation",
                "field_chosen": "chosen",
                "field_rejected": "rejected",
                "message_property_mappings": {"role": "role", "content": "content"},
                "roles": {"system": ["system"], "user": ["user"], "assistant": ["assistant"]},
            }
        ],
        "dataset_prepared_path": str(folder / "prepared"),
        "val_set_size": 0,
        "output_dir": str(folder / "out"),
        "sequence_len": 128,
        "sample_packing": False,
        "pad_to_sequence_len": True,
        "adapter": "lora",
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0,
        "lora_target_linear": True,
        "gradient_accumulation_steps": 2,
        "micro_batch_size": 2,
        "max_steps": 3,
        "optimizer": "adamw_torch",
        "lr_scheduler": "cosine",
        "learning_rate": 1e-2,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "warmup_steps": 1,
        "saves_per_epoch": 1,
        "weight_decay": 0.0,
        "seed": 3,
    }


def load(example, tmp_path, **options):
    """Axolotl's configuration of the example, as its command reads it."""
    from axolotl.cli.config import load_cfg

    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump({**example, **options}), encoding="utf-8")
    return load_cfg(str(path))


@pytest.fixture(scope="module")
def trained(example, tmp_path_factory):
    """What ``axolotl train`` left, with three lines added to the example."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "dpo.yml").write_text(yaml.safe_dump({**example, "plot": PLOT}), encoding="utf-8")
    run("axolotl.cli.train", "dpo.yml", folder=folder, AXOLOTL_DO_NOT_TRACK="1", WANDB_MODE="disabled")
    return example["output_dir"]


@pytest.mark.slow
def test_its_command_trains_with_the_term(trained, tmp_path):
    out = Path(trained)
    check_sum(history(out / "checkpoint-3"))
    assert {"adapter_model.safetensors", "plot_align.json", "preference.safetensors"} <= {
        x.name for x in out.iterdir()
    }
    assert "\n## PLOT\n" in (out / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_it_logs_what_attach_logs_on_plain_trl(trained, example, tmp_path):
    """The arguments that Axolotl made, the rows that it prepared, and TRL's own trainer."""
    from datasets import load_from_disk
    from peft import PeftConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    from trl import DPOTrainer

    args = torch.load(Path(trained) / "checkpoint-3" / "training_args.bin", weights_only=False)
    args.output_dir = str(tmp_path)
    (prepared,) = (path.parent for path in Path(example["dataset_prepared_path"]).glob("*/state.json"))
    lora = PeftConfig.from_pretrained(trained)
    lora.inference_mode = False
    set_seed(example["seed"])
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(example["base_model"]),
        args=args,
        train_dataset=load_from_disk(prepared),
        processing_class=AutoTokenizer.from_pretrained(example["base_model"]),
        peft_config=lora,
    )
    check_same(history(Path(trained) / "checkpoint-3"), plain_history(trainer))


def test_it_is_registered_by_installation():
    from axolotl.integrations.base import PluginManager, get_builtin_plugins

    assert PLUGIN in get_builtin_plugins()
    assert PLUGIN in PluginManager.get_instance().plugins


def test_without_the_block_it_does_nothing(make_trainer, example, tmp_path):
    from axolotl.core.trainers.dpo import AxolotlDPOTrainer
    from axolotl.integrations.base import PluginManager

    trainer = make_trainer("dpo", cls=AxolotlDPOTrainer)
    before = dict(vars(trainer)), list(trainer.callback_handler.callbacks)
    cfg = load(example, tmp_path)
    PluginManager.get_instance().post_trainer_create(cfg, trainer)
    PluginManager.get_instance().post_train(cfg, trainer.model)
    assert (dict(vars(trainer)), list(trainer.callback_handler.callbacks)) == before


def test_with_the_block_the_term_is_attached_to_its_trainer(make_trainer, example, tmp_path):
    from axolotl.core.trainers.dpo import AxolotlDPOTrainer
    from axolotl.integrations.base import PluginManager

    trainer = make_trainer("dpo", cls=AxolotlDPOTrainer)
    PluginManager.get_instance().post_trainer_create(load(example, tmp_path, plot={"alpha": 0.25}), trainer)
    assert trainer._plot_handle.config.alpha == 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dpo_use_liger_kernel": True}, "dpo_use_liger_kernel is on, and Liger's loss builds no logits"),
        ({"rl": None}, "plot is set and rl is not"),
        ({"plot": {"alfa": 0.1}}, "unknown option 'alfa' in plot; did you mean 'alpha'"),
        (
            {"plot": {"preference": "missing.safetensors"}},
            "in plot: preference file missing.safetensors does not exist",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_is_loaded(example, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        load(example, tmp_path, **{"plot": PLOT, **options})
