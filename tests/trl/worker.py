"""A training script as a user writes one, run by the tests in processes of their own: killed, resumed, distributed.

    python worker.py OPTIONS.json

OPTIONS holds ``method`` (``dpo`` or ``pro``), ``model`` and ``data`` (paths), ``out`` (weights are saved there),
``args`` of the method's configuration, ``plot`` of PlotConfig, ``oracle`` (TRL's loss plus the materialised term
instead of ours) and ``resume``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from plot_align import PlotConfig, PlotDPOTrainer, PlotPROTrainer, PROConfig, estimate
from plot_align.trl import gradients
from trl import DPOConfig, DPOTrainer

# Two ranks sample other rows than one process does; of all rows the norms must be the same.
gradients._SAMPLED_ROWS = 10_000


def main(options: dict) -> None:
    tokenizer = AutoTokenizer.from_pretrained(options["model"])
    model = AutoModelForCausalLM.from_pretrained(options["model"])
    data = Dataset.from_json(options["data"])
    config, drop_in = {"dpo": (DPOConfig, PlotDPOTrainer), "pro": (PROConfig, PlotPROTrainer)}[options["method"]]
    shared = {"args": config(**options["args"]), "processing_class": tokenizer, "train_dataset": data}
    plot = PlotConfig.paper(**options["plot"])
    if options.get("oracle"):
        from oracles.training import embeddings_at_start, materialised_loss

        trainer = DPOTrainer(model, **shared)
        embeddings_at_start(trainer)
        preference = estimate(data, tokenizer, progress=False)
        original = trainer.compute_loss

        def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
            term = materialised_loss(trainer, "DPOTrainer", inputs, plot, preference)
            return original(model, dict(inputs)) + term

        trainer.compute_loss = compute_loss
    else:
        trainer = drop_in(model, plot=plot, **shared)
    trainer.train(resume_from_checkpoint=options.get("resume"))
    if trainer.is_world_process_zero():
        weights = {name: p.detach().clone().contiguous() for name, p in trainer.model.named_parameters()}
        save_file(weights, options["out"])
        history = [record for record in trainer.state.log_history if "plot/loss" in record]
        Path(options["out"]).with_suffix(".json").write_text(json.dumps(history))
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.num_processes > 1:
        # Gloo's threads now and then abort while the interpreter takes itself apart; everything is written by now.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(Path(sys.argv[1]).read_text()))
