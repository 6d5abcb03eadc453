"""The slow, obvious version of what the PLOT term must compute."""

from __future__ import annotations

from typing import Any

import torch

from plot_align.training.batches import policy_batch
from plot_align.training.config import PlotConfig


def materialised_loss(trainer, kind: str, inputs: dict[str, Any], config: PlotConfig, preference) -> torch.Tensor:
    """α·L_PLOT from full logits with plain torch: softmax, mean, sort, cumulative sums, target and coordinates too."""
    batch = policy_batch(kind, inputs)
    if "input_ids" in inputs:
        ids, attention = inputs["input_ids"], inputs.get("attention_mask")
    else:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logits = trainer.model(input_ids=ids, attention_mask=attention).logits[:, :-1].double()
    p = (logits / getattr(trainer, "temperature", 1.0)).softmax(-1)  # (B, T-1, V)
    mask = batch.labels[:, 1:] != -100
    if config.positions != "all":
        mask &= (batch.roles == (1 if config.positions == "chosen" else -1)).unsqueeze(-1)

    chosen, rejected = preference.chosen_counts.double(), preference.rejected_counts.double()
    target = (chosen / chosen.sum() - rejected / rejected.sum()).clamp(min=0)
    target = target / target.sum()
    x = embeddings_at_start(trainer).double().norm(dim=-1)
    x = x / (x[:, None] - x[None, :]).abs().sum() * (len(x) * (len(x) - 1))
    order = x.argsort()
    gaps = x[order].diff()

    def w1(q):
        return ((q - target)[..., order].cumsum(-1)[..., :-1].abs() * gaps).sum(-1)

    match config.granularity:
        case "batch":
            loss = w1(p[mask].mean(0)) if mask.any() else p.sum() * 0
        case "sequence":
            loss = torch.stack([w1(p[b][mask[b]].mean(0)) for b in range(len(p)) if mask[b].any()]).mean()
        case "token":
            loss = w1(p[mask]).mean()
    return config.alpha * loss


def embeddings_at_start(trainer) -> torch.Tensor:
    if not hasattr(trainer, "_embeddings_at_start"):
        trainer._embeddings_at_start = trainer.model.get_input_embeddings().weight.detach().clone()
    return trainer._embeddings_at_start
