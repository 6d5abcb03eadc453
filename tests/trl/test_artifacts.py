"""What a tuned model says of itself on the Hub, whichever trainer made it. Nothing is uploaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from huggingface_hub import HfApi, ModelCard, metadata_load

from plot_align import PlotConfig, attach
from plot_align.trl import artifacts

METHODS = ["dpo", "sft", "kto", "cpo", "orpo", "grpo", "rloo", "pro"]


@pytest.fixture
def uploads(monkeypatch):
    """The folders that a trainer pushes, instead of the Hub."""
    found: list[Path] = []

    def upload_folder(*_, folder_path, **options):
        found.append(Path(folder_path))

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(transformers.trainer, "upload_folder", upload_folder, raising=False)  # transformers 4
    monkeypatch.setattr(transformers.Trainer, "_finish_current_push", lambda self: None)
    monkeypatch.setattr(transformers.Trainer, "init_hf_repo", lambda self, **options: None)
    return found


def lora():
    from peft import LoraConfig

    return {"peft_config": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")}


@pytest.mark.parametrize(
    ("method", "extra"), [*((method, dict) for method in METHODS), ("dpo", lora)], ids=[*METHODS, "lora"]
)
def test_a_pushed_model_is_tagged(method, extra, make_trainer, preference, uploads):
    trainer = make_trainer(method, max_steps=1, extra=extra())
    handle = attach(trainer, preference, PlotConfig(alpha=0.25))
    own = set(trainer._tag_names)
    assert "plot-align" not in trainer.model.model_tags
    trainer.train()
    trainer.push_to_hub()
    card = ModelCard.load(uploads[0] / "README.md")
    assert own | {"plot-align"} <= set(card.data.tags)
    assert card.data.tags.count("plot-align") == 1
    assert "α = 0.25" in card.text.split("## PLOT")[1]
    handle.detach()
    assert own | {"plot-align"} <= set(trainer.model.model_tags)  # what model.push_to_hub writes


def test_a_checkpoint_s_card_is_tagged(make_trainer, preference, tmp_path):
    """TRL writes the card with a checkpoint, and then without the model's tags."""
    trainer = make_trainer("dpo", max_steps=1, save_strategy="steps", save_steps=1)
    attach(trainer, preference)
    trainer.train()
    assert "plot-align" in metadata_load(tmp_path / "dpo" / "README.md")["tags"]


@pytest.mark.parametrize("when", ["alpha=0", "detached"])
def test_a_model_trained_without_the_term_is_not_tagged(when, make_trainer, preference, uploads):
    trainer = make_trainer("dpo", max_steps=1)
    handle = attach(trainer, preference, PlotConfig(alpha=0.0 if when == "alpha=0" else None))
    if when == "detached":
        handle.detach()
    trainer.train()
    trainer.push_to_hub()
    assert "plot-align" not in metadata_load(uploads[0] / "README.md")["tags"]
    assert "plot-align" not in trainer.model.model_tags


def test_the_mean_loss_of_a_resumed_run_is_that_of_all_steps() -> None:
    """(2 · 3 + 1 · 1) / 3 by hand; the trainer's own, of the last step alone, would be 1."""
    log = [{"loss": 3.0, "step": 2}, {"eval_loss": 9.0, "step": 2}, {"loss": 1.0, "step": 3}]
    log.append({"train_loss": 1.0, "step": 3})
    assert artifacts.mean_loss(log, 3) == pytest.approx(7 / 3, rel=1e-15)
    assert artifacts.mean_loss(log, 4) is None  # the last step is in no entry
    assert artifacts.mean_loss([], 0) is None

    def found(steps: int, resumed: bool) -> tuple[Any, Any]:
        trainer = SimpleNamespace(state=SimpleNamespace(log_history=log, global_step=steps))
        results = artifacts.results_of(trainer, {"train_loss": 1.0}, resumed=resumed)
        return results["metrics"].get("train_loss"), results["history"][-1].get("train_loss")

    assert found(3, True) == found(3, False) == (artifacts.mean_loss(log, 3),) * 2
    assert found(4, False) == (1.0, 1.0)
    assert found(4, True) == (None, None)
