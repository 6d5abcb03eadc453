"""Trains TRL's own DPO trainer with ``attach`` on token ids, in a process of its own: frameworks change TRL's classes.

``python plain_trl.py SPEC.json``, a mapping of ``model``, ``rows`` (a .jsonl file of ``prompt_ids``, ``chosen_ids``,
``rejected_ids``), ``args`` (of DPOConfig) and ``plot``; its output folder then has TRL's log. With ``unsloth`` the
trainer is the one that Unsloth compiles from TRL's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def compile_unsloth() -> None:
    """What Unsloth does to TRL when it is imported on a GPU, but for loading models: its head and its DPO trainer."""
    import unsloth  # noqa: F401 (before TRL)
    from unsloth.models import rl

    rl.patch_trl_fused_lm_head_devices()
    rl.patch_trl_fused_lm_head_kernel()
    rl._patch_trl_rl_trainers("dpo_trainer")


def main(path: str) -> None:
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    if spec.get("unsloth"):
        compile_unsloth()

    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer import utils

    from plot_align.config import PlotConfig
    from plot_align.preference.estimation import estimate_tokenized
    from plot_align.trl import attach
    from trl import DPOConfig, DPOTrainer

    rows = Dataset.from_json(spec["rows"])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(spec["model"]),
        args=DPOConfig(**spec["args"]),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=tokenizer,
    )
    trainer.train_dataset = rows
    trainer._get_train_sampler = lambda *args, **kwargs: SequentialSampler(rows)
    preference = estimate_tokenized(rows, tokenizer, max_length=None, progress=False)
    head = getattr(utils, "_ChunkedLogProbFunction", None)
    attach(trainer, preference, PlotConfig.from_options(**spec["plot"]))
    trainer.train()
    trainer.state.save_to_json(str(Path(trainer.args.output_dir) / "trainer_state.json"))
    print(f"trainer {type(trainer).__module__}.{type(trainer).__name__}, head {type(head).__name__}")


if __name__ == "__main__":
    main(sys.argv[1])
