"""The slow, obvious version of what the PLOT term must compute."""

from __future__ import annotations

from typing import Any

import torch

from plot_align.config import PlotConfig


def selection(kind: str, inputs: dict[str, Any], positions: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, attention and the (B, T − 1) bool mask of selected positions, from the batch's raw keys, row by row."""
    if "chosen_labels" in inputs:
        sides = [
            (inputs[f"{side}_input_ids"][row], inputs[f"{side}_attention_mask"][row], inputs[f"{side}_labels"][row])
            for side in ("chosen", "rejected")
            for row in range(len(inputs["chosen_labels"]))
        ]
        ids, attention, scored = torch.zeros(3, len(sides), max(len(side[0]) for side in sides), dtype=torch.long)
        for row, (tokens, seen, labels) in enumerate(sides):
            ids[row, : len(tokens)], attention[row, : len(seen)] = tokens, seen
            scored[row, : len(labels)] = labels != -100
    elif "completion_ids" in inputs:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        scored = attention.clone()
        scored[:, : inputs["prompt_ids"].size(1)] = 0
    else:
        ids, attention = inputs["input_ids"], inputs["attention_mask"]
        scored = inputs["completion_mask"] if "completion_mask" in inputs else (inputs["labels"] != -100).long()
    mask = torch.zeros(len(ids), ids.size(1) - 1, dtype=torch.bool)
    for row in range(len(ids)):
        match kind:
            case "DPOTrainer" | "CPOTrainer" | "ORPOTrainer":
                role = "chosen" if row < len(ids) / 2 else "rejected"
            case "SFTTrainer":
                role = "chosen"
            case "PROTrainer":
                before = [int(inputs["list_lengths"][:p].sum()) for p in range(len(inputs["list_lengths"]))]
                role = "chosen" if row in before else "rejected"
            case "KTOTrainer":
                role = "chosen" if inputs["label"][row] else "rejected"
            case _:
                advantage = float(inputs["advantages"][row])
                role = "chosen" if advantage > 0 else "rejected" if advantage < 0 else "neither"
        if positions in ("all", role):
            mask[row] = scored[row, 1:].bool()
    return ids, attention, mask


def materialised_loss(trainer, kind: str, inputs: dict[str, Any], config: PlotConfig, preference) -> torch.Tensor:
    """α·L_PLOT from full logits with plain torch: softmax, mean, sort, cumulative sums, target and coordinates too."""
    ids, attention, mask = selection(kind, inputs, config.positions)
    logits = trainer.model(input_ids=ids, attention_mask=attention).logits[:, :-1].double()
    p = (logits / getattr(trainer, "temperature", 1.0)).softmax(-1)  # (B, T-1, V)

    if config.ablations.divergence == "deft_log":
        score = (logits / getattr(trainer, "temperature", 1.0)).log_softmax(-1) @ preference.difference()  # (B, T-1)
        if config.granularity == "sequence":
            means = [score[b][mask[b]].mean() for b in range(len(p)) if mask[b].any()]
            return -config.alpha * torch.stack(means).mean()
        return -config.alpha * score[mask].mean()
    target = dataset_target(preference)
    if config.ablations.target_scope == "batch":
        target = batch_target(trainer, kind, inputs, config, preference)
    w1 = distance(
        config.ablations.divergence, config.ablations.geometry, embeddings_at_start(trainer).double(), preference
    )

    match config.granularity:
        case "batch":
            loss = w1(p[mask].mean(0), target) if mask.any() else p.sum() * 0
        case "sequence":
            rows = [b for b in range(len(p)) if mask[b].any()]
            each = target if isinstance(target, dict) else dict.fromkeys(rows, target)
            loss = torch.stack([w1(p[b][mask[b]].mean(0), each[b]) for b in rows]).mean()
        case "token":
            loss = w1(p[mask], target).mean()
    return config.alpha * loss


def distance(divergence, geometry, e, preference):
    """``D(q, P)`` as the definitions have it: pairwise costs, no potentials, nothing shared with the package."""
    if divergence == "deft_prob":
        return lambda q, target: -(q @ preference.difference())
    if divergence == "tv":
        return lambda q, target: (q - target).abs().sum(-1) / 2
    if divergence == "emo":
        cost = 1 - torch.nn.functional.cosine_similarity(e[:, None], e[None, :], dim=-1)
        return lambda q, target: torch.einsum("...i,ij,j->...", q, cost, target)
    x = e.norm(dim=-1) if geometry == "norm" else torch.arange(len(e)).double()
    x = x / (x[:, None] - x[None, :]).abs().sum() * (len(x) * (len(x) - 1))
    order = x.argsort()
    gaps = x[order].diff()
    return lambda q, target: ((q - target)[..., order].cumsum(-1)[..., :-1].abs() * gaps).sum(-1)


def dataset_target(preference) -> torch.Tensor:
    target = preference.difference().clamp(min=0)
    return target / target.sum()


def batch_target(trainer, kind, inputs, config, preference):
    """The micro-batch's own target; for granularity="sequence" and an anchor, ``{row: target}``."""
    ids, attention, mask = selection(kind, inputs, config.positions)
    if config.target == "anchored":
        with torch.no_grad():
            logits = reference_logits(trainer, ids, attention)[:, :-1].double()
        q = logits.softmax(-1)

        def moved(mean):
            target = (mean + config.target_strength * preference.difference()).clamp(min=0)
            return target / target.sum()

        if config.granularity == "sequence":
            return {b: moved(q[b][mask[b]].mean(0)) for b in range(len(q)) if mask[b].any()}
        return moved(q[mask].mean(0))
    shares = []
    for role in ("chosen", "rejected"):
        _, _, mask = selection(kind, inputs, role)
        tokens = ids[:, 1:][mask].tolist()
        shares.append(torch.tensor([tokens.count(v) / max(1, len(tokens)) for v in range(preference.vocab_size)]))
    weights = (shares[0] if config.target == "chosen" else (shares[0] - shares[1]).clamp(min=0)).double()
    return weights / weights.sum()


def reference_logits(trainer, ids, attention):
    if getattr(trainer, "ref_model", None) is not None:
        return trainer.ref_model(input_ids=ids, attention_mask=attention).logits
    with trainer.model.disable_adapter():
        return trainer.model(input_ids=ids, attention_mask=attention).logits


def embeddings_at_start(trainer) -> torch.Tensor:
    if not hasattr(trainer, "_embeddings_at_start"):
        trainer._embeddings_at_start = trainer.model.get_input_embeddings().weight.detach().clone()
    return trainer._embeddings_at_start
