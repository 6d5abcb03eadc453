"""One method, three ways in: a loop of one's own, ``attach`` on TRL's trainer, and ``plot-align dpo``, all at their
defaults, take the same steps on the same batches."""

from __future__ import annotations

import json

import pytest
import torch

from oracles.training import joined_pairs
from plot_align.cli.main import main
from plot_align.plot import BalancedAlpha, PlotLoss
from plot_align.trl import attach
from trainers import load

STEPS, RATE, BETA = 3, 0.05, 0.1
SETTINGS = {
    "per_device_train_batch_size": 2, "max_steps": STEPS, "optim": "sgd", "learning_rate": RATE, "max_grad_norm": 1e9,
    "lr_scheduler_type": "constant", "beta": BETA,
}  # fmt: skip


def log_probs(logits, labels):
    """Summed over each row's completion, ``(B,)``."""
    each = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (each * (labels[:, 1:] != -100)).sum(-1)


def own_loop(folder, preference, batches):
    """Plain torch, as the README shows it: loss, term, α and gradients of each step, and the weights at the end."""
    model, reference = load(folder)[0].train(), load(folder)[0].eval()
    plot, alpha = PlotLoss(preference, reference.get_input_embeddings().weight), BalancedAlpha()
    steps = []
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        roles = torch.tensor([1, -1]).repeat_interleave(len(labels) // 2)
        outputs = model(**inputs, output_hidden_states=True)
        with torch.no_grad():
            reference_logits = reference(**inputs).logits
        margin = log_probs(outputs.logits, labels) - log_probs(reference_logits, labels)  # (2B,)
        vanilla = -torch.nn.functional.logsigmoid(BETA * (margin[roles > 0] - margin[roles < 0])).mean()
        term = plot(outputs.logits, labels, roles, reference_logits=reference_logits)
        weight = alpha(vanilla, term, outputs.hidden_states[-1])
        loss = vanilla + weight * term
        model.zero_grad()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        steps.append((float(loss.detach()), float(term.detach()), weight, gradients))
        with torch.no_grad():
            for p in model.parameters():
                p -= RATE * p.grad
    return steps, model.state_dict()


def joined(trainer, inputs):
    """The batch as the forward sees it; TRL before 0.29 joins prompt and completion there."""
    names = ("input_ids", "attention_mask", "completion_mask")
    if "prompt_input_ids" in inputs:
        return dict(zip(names, joined_pairs(inputs, trainer.max_length, trainer.truncation_mode), strict=True))
    return {name: inputs[name].clone() for name in names}


def attached(make_trainer, preference):
    """The same of a TRL trainer, and the batches it saw."""
    trainer = make_trainer("dpo", **SETTINGS)
    attach(trainer, preference)
    compute_loss, step = trainer.compute_loss, trainer.training_step
    batches, losses, gradients = [], [], []

    def keep_batch(model, inputs, *args, **kwargs):
        batches.append(joined(trainer, inputs))
        loss = compute_loss(model, inputs, *args, **kwargs)
        losses.append(float(loss.detach()))
        return loss

    def keep_gradients(*args, **kwargs):
        found = step(*args, **kwargs)
        gradients.append({name: p.grad.clone() for name, p in trainer.model.named_parameters()})
        return found

    trainer.compute_loss, trainer.training_step = keep_batch, keep_gradients
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "plot/loss" in entry]
    steps = [
        (loss, entry["plot/loss"], entry["plot/alpha"], of_step)
        for loss, entry, of_step in zip(losses, logged, gradients, strict=True)
    ]
    return steps, trainer.model.state_dict(), batches


def test_one_method(make_trainer, preference, tiny_llama, pairs_file, tmp_path):
    theirs, their_weights, batches = attached(make_trainer, preference)
    ours, our_weights = own_loop(tiny_llama, preference, batches)
    for step, (own, of_trl) in enumerate(zip(ours, theirs, strict=True)):
        assert own[:3] == pytest.approx(of_trl[:3], rel=2e-5), step
        for name, gradient in own[3].items():
            scale = gradient.abs().max().clamp(min=1e-6)
            torch.testing.assert_close(of_trl[3][name] / scale, gradient / scale, rtol=0, atol=1e-4)
    assert ours[-1][2] > 0

    preference.save(tmp_path / "preference.safetensors")
    options = {
        **SETTINGS, "model_name_or_path": tiny_llama, "dataset_name": pairs_file, "output_dir": tmp_path / "shell",
        "preference": tmp_path / "preference.safetensors", "bf16": False, "use_cpu": True, "seed": 3,
        "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True, "logging_steps": 1,
        "save_strategy": "no",
    }  # fmt: skip
    assert main(["dpo", *(text for name, value in options.items() for text in (f"--{name}", str(value)))]) == 0
    record = json.loads((tmp_path / "shell" / "plot_align_record.json").read_text())
    logged = [entry for entry in record["results"]["history"] if "plot/loss" in entry]
    for entry, own in zip(logged, ours, strict=True):
        assert (entry["plot/loss"], entry["plot/alpha"]) == pytest.approx(own[1:3], rel=2e-5)
    shell = load(tmp_path / "shell")[0].state_dict()
    for name, start in load(tiny_llama)[0].state_dict().items():
        moved = (our_weights[name] - start).abs().max()
        assert moved > 0, name
        for weights in (their_weights, shell):
            torch.testing.assert_close(weights[name] / moved, our_weights[name] / moved, rtol=0, atol=1e-3)
