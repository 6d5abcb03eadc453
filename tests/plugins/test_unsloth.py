"""Unsloth: the trainer that its own code compiles from TRL's, with its head in place.

Where Unsloth is not installed, a replica: a copy of TRL's source, renamed as Unsloth renames it.
"""

from __future__ import annotations

import inspect
import json
import sys
import types
from pathlib import Path

import pytest
from frameworks import PLOT, check_same, check_sum, history, needs, run, write_lines

import trl
from plot_align.config import PlotConfig
from plot_align.errors import InputError
from plot_align.trl import attach
from plot_align.trl.batches import trainer_kind

ARGS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",  # and others of which Unsloth changes the default
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "optim": "adamw_torch",
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "seed": 3,
}
# Unsloth's own mode for tests without a GPU. Triton's kernels would be interpreted there.
WITHOUT_GPU = {"UNSLOTH_ALLOW_CPU": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "TRITON_INTERPRET": "1"}


@pytest.fixture
def spec(tiny_llama, pair_rows, tmp_path):
    """Writes the specification of a training by ``plain_trl.py``, and runs it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    rows = [
        {
            "prompt_ids": tokenizer(row["prompt"])["input_ids"],
            **{
                f"{side}_ids": [*tokenizer(row[side])["input_ids"], tokenizer.eos_token_id]
                for side in ("chosen", "rejected")
            },
        }
        for row in pair_rows
    ]
    lines = write_lines(tmp_path / "rows.jsonl", rows)

    def train(name: str, **environment: str) -> tuple[str, list[dict[str, float]]]:
        args = {**ARGS, "output_dir": str(tmp_path / name)}
        plot = {**PLOT, "plot_impl": "torch"}
        content = {"model": str(tiny_llama), "rows": str(lines), "args": args, "plot": plot}
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({**content, "unsloth": name == "unsloth"}), encoding="utf-8")
        script = str(Path(__file__).parent / "plain_trl.py")
        printed = run(script, str(path), folder=tmp_path, **WITHOUT_GPU, **environment)
        return printed, history(tmp_path / name)

    return train


@needs("unsloth", "Unsloth")
@pytest.mark.slow
def test_the_trainer_that_unsloth_compiles_logs_what_trls_logs(spec):
    printed, ours = spec("unsloth")
    assert "trainer UnslothDPOTrainer.UnslothDPOTrainer, head _UnslothFusedLinearHead" in printed
    check_sum(ours)
    _, plain = spec("plain")
    check_same(ours, plain)


@needs("unsloth", "Unsloth")
@pytest.mark.slow
def test_unsloths_own_preference_loss_is_refused(spec):
    with pytest.raises(
        AssertionError, match="InputError: UNSLOTH_FUSED_PREFERENCE_LOSS is 1, with which Unsloth's DPO"
    ):
        spec("unsloth", UNSLOTH_FUSED_PREFERENCE_LOSS="1")


@pytest.fixture
def replica(monkeypatch):
    """TRL's DPO trainer compiled from its source under the names that Unsloth gives."""
    theirs = inspect.getmodule(trl.DPOTrainer)
    source = inspect.getsource(theirs).replace("from ..", "from trl.").replace("from .", "from trl.trainer.")
    source = source.replace("class DPOTrainer(", "class _UnslothDPOTrainer(")
    source += "\n\nclass UnslothDPOTrainer(_UnslothDPOTrainer):\n    pass\n"
    module = types.ModuleType("UnslothDPOTrainer")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, theirs.__file__, "exec"), vars(module))
    return module.UnslothDPOTrainer


def test_a_renamed_copy_of_trls_trainer_trains_as_trls(make_trainer, preference, replica):
    logs = []
    for cls in (replica, None):
        trainer = make_trainer("dpo", cls=cls)
        assert trainer_kind(trainer) == "DPOTrainer"
        attach(trainer, preference, PlotConfig.from_options(**PLOT))
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    assert trl.DPOTrainer not in replica.__mro__
    check_sum(logs[0])
    check_same(*logs)


def test_its_own_preference_loss_is_refused_for_the_copy_alone(make_trainer, preference, replica, monkeypatch):
    monkeypatch.setenv("UNSLOTH_FUSED_PREFERENCE_LOSS", "1")
    with pytest.raises(InputError, match=r"set it to 0 before importing Unsloth\.$"):
        attach(make_trainer("dpo", cls=replica), preference)
    attach(make_trainer("dpo"), preference)


def test_its_other_trainers_are_refused(make_trainer, preference):
    renamed = type("UnslothSFTTrainer", (trl.SFTTrainer,), {"__module__": "UnslothSFTTrainer"})
    with pytest.raises(
        InputError, match=r"^trainer is Unsloth's SFTTrainer, whose loss does not come from the LM head"
    ):
        attach(make_trainer("sft", cls=renamed), preference)


@pytest.mark.parametrize(("module", "name"), [("UnslothDPOTrainer", "DPOTrainer"), ("mine", "UnslothDPOTrainer")])
def test_only_unsloths_own_names_count(module, name):
    with pytest.raises(InputError, match=f"^trainer is a {name}, which PLOT cannot be attached to"):
        trainer_kind(type(name, (), {"__module__": module})())
