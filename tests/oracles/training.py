"""What a trainer's step with the term must give: TRL's own loss, plus the oracle's term on materialised logits."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch

from oracles import term
from plot_align.config import PlotConfig


def selection(
    kind: str, inputs: dict[str, Any], trainer: Any = None
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Tokens, attention and the (B, T − 1) bool masks of each role, from the batch's raw keys, row by row."""
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
    elif "prompt_input_ids" in inputs:  # DPO before TRL 0.29, whose forward joins prompt and completion
        ids, attention, scored = joined_pairs(inputs, trainer.max_length, trainer.truncation_mode)
    elif "completion_ids" in inputs:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        scored = attention.clone()
        scored[:, : inputs["prompt_ids"].size(1)] = 0
    elif kind == "DPOTrainer" and "completion_mask" in inputs:  # TRL 0.29 cuts the rows in its forward
        rows = []
        for row, seen in enumerate(inputs["attention_mask"].bool()):
            kept = (inputs[name][row][seen].tolist() for name in ("input_ids", "completion_mask"))
            rows.append(list(zip(*kept, strict=True)))
        ids, attention, scored = cut_and_padded(rows, trainer.args.max_length, trainer.args.truncation_mode)
    else:
        ids, attention = inputs["input_ids"], inputs["attention_mask"]
        scored = inputs["completion_mask"] if "completion_mask" in inputs else (inputs["labels"] != -100).long()
    masks = {role: torch.zeros(len(ids), ids.size(1) - 1, dtype=torch.bool) for role in ("chosen", "rejected", "all")}
    for row in range(len(ids)):
        masks["all"][row] = scored[row, 1:].bool()
        role = role_of(kind, inputs, row, len(ids))
        if role in masks:
            masks[role][row] = scored[row, 1:].bool()
    return ids, attention, masks


def joined_pairs(inputs: dict[str, Any], max_length: int | None, truncation_mode: str) -> tuple[torch.Tensor, ...]:
    """Ids, attention and scored tokens (2B, T) of chosen rows above rejected ones: a list for each row, truncated."""
    rows = []
    for side in ("chosen", "rejected"):
        for row in range(len(inputs["prompt_input_ids"])):
            prompt, answer = (
                inputs[f"{part}_input_ids"][row][inputs[f"{part}_attention_mask"][row].bool()].tolist()
                for part in ("prompt", side)
            )
            rows.append([(token, 0) for token in prompt] + [(token, 1) for token in answer])
    return cut_and_padded(rows, max_length, truncation_mode)


def cut_and_padded(
    rows: list[list[tuple[int, int]]], max_length: int | None, truncation_mode: str
) -> tuple[torch.Tensor, ...]:
    """Ids, attention and scored tokens (B, T) of rows of ``(token, whether it is scored)``."""
    if max_length is not None:
        rows = [row[-max_length:] if truncation_mode == "keep_end" else row[:max_length] for row in rows]
    ids, attention, scored = torch.zeros(3, len(rows), max(map(len, rows)), dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor([token for token, _ in tokens])
        scored[row, : len(tokens)] = torch.tensor([is_scored for _, is_scored in tokens])
        attention[row, : len(tokens)] = 1
    return ids, attention, scored


def role_of(kind: str, inputs: dict[str, Any], row: int, rows: int) -> str:
    match kind:
        case "DPOTrainer" | "CPOTrainer" | "ORPOTrainer":
            return "chosen" if row < rows / 2 else "rejected"
        case "SFTTrainer":
            return "chosen"
        case "PROTrainer":
            before = [int(inputs["list_lengths"][:p].sum()) for p in range(len(inputs["list_lengths"]))]
            return "chosen" if row in before else "rejected"
        case "KTOTrainer":
            return "chosen" if inputs["label"][row] else "rejected"
        case "GRPOTrainer" | "RLOOTrainer":
            advantage = float(inputs["advantages"][row])
            return "chosen" if advantage > 0 else "rejected" if advantage < 0 else "neither"
    raise term.Unknown(kind)


def materialised_term(trainer, kind: str, inputs: dict[str, Any], config: PlotConfig, preference) -> torch.Tensor:
    """L_PLOT without its weight."""
    ids, attention, masks = selection(kind, inputs, trainer)
    temperature = getattr(trainer, "temperature", 1.0)
    p = (trainer.model(input_ids=ids, attention_mask=attention).logits[:, :-1].double() / temperature).softmax(-1)
    q = None
    if kind in ("DPOTrainer", "KTOTrainer"):
        with torch.no_grad():
            q = reference_logits(trainer, ids, attention)[:, :-1].double().softmax(-1)
    world = term.World(
        p=p,
        q=q,
        tokens=ids[:, 1:],
        masks=masks,
        sequences=torch.arange(len(ids))[:, None].expand(len(ids), ids.size(1) - 1),
        embeddings=embeddings_at_start(trainer),
        chosen=preference.chosen_counts,
        rejected=preference.rejected_counts,
        reference=dataset_reference(trainer, kind, config) if needs_dataset_reference(config) else None,
    )
    return term.plot_loss(config, world)


def materialised_loss(trainer, kind: str, inputs: dict[str, Any], config: PlotConfig, preference) -> torch.Tensor:
    """α·L_PLOT for a constant α."""
    if config.alpha is None:
        raise term.Unknown("a balanced α without the vanilla loss")
    return config.alpha * materialised_term(trainer, kind, inputs, config, preference)


def needs_dataset_reference(config: PlotConfig) -> bool:
    return config.target == "anchored" and config.ablations.target_scope in ("auto", "dataset")


def dataset_reference(trainer, kind: str, config: PlotConfig) -> torch.Tensor:
    """The mean output of the reference over the first ``reference_rows`` rows of the training set, batch by batch."""
    if not hasattr(trainer, "_dataset_reference"):
        rows = [
            trainer.train_dataset[i] for i in range(min(config.ablations.reference_rows, len(trainer.train_dataset)))
        ]
        found = []
        for row in rows:  # one at a time: no padding
            ids, attention, masks = selection(kind, trainer.data_collator([row]), trainer)
            with torch.no_grad():
                logits = reference_logits(trainer, ids, attention, at_start=True)
            found.append(logits[:, :-1].double().softmax(-1)[masks[config.positions]])
        trainer._dataset_reference = torch.cat(found).mean(0)
    return trainer._dataset_reference


class Alpha:
    """α of each step of one trainer: a number, or held to ρ times the ratio of norms at the head's input."""

    def __init__(self, config: PlotConfig) -> None:
        self.config = config
        self.norms: list[tuple[float, float]] = []

    def __call__(self, trainer, kind: str, inputs: dict[str, Any], preference, vanilla, hidden) -> float:
        """``vanilla``: this step's loss; ``hidden``: the head's input it came from."""
        if self.config.alpha is not None and self.config.alpha_schedule in (None, "constant"):
            return self.config.alpha
        if self.config.alpha is not None or self.config.alpha_schedule not in (None, "balance"):
            raise term.Unknown(self.config.alpha_schedule)
        with head_input(trainer) as ours:
            plot = materialised_term(trainer, kind, inputs, self.config, preference)
        norms = [
            torch.autograd.grad(x, h, retain_graph=True)[0].norm() for x, h in ((vanilla, hidden), (plot, ours[0]))
        ]
        step = trainer.state.global_step
        if step < 10 or step % 5 == 0:
            self.norms.append((float(norms[0]), float(norms[1])))
        last = len(self.norms) - 1
        a, b = (sum(0.9 ** (last - i) * x[side] for i, x in enumerate(self.norms)) for side in (0, 1))
        default = 0.1 if self.config.ablations.divergence.startswith("deft_") else 0.5
        return (default if self.config.balance_ratio is None else self.config.balance_ratio) * a / b


@contextmanager
def head_input(trainer):
    """The head's input of every differentiable forward of the policy inside the block, (B, T, H) each."""
    found: list[torch.Tensor] = []

    def keep(module, args, output):
        if output.last_hidden_state.requires_grad:
            found.append(output.last_hidden_state)

    policy = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    hook = policy.base_model.register_forward_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


def reference_logits(trainer, ids, attention, *, at_start: bool = False):
    """Of the reference model; ``at_start``: before the first step, when a policy without one is its own."""
    if getattr(trainer, "ref_model", None) is not None:
        return trainer.ref_model(input_ids=ids, attention_mask=attention).logits
    if hasattr(trainer.model, "disable_adapter"):
        with trainer.model.disable_adapter():
            return trainer.model(input_ids=ids, attention_mask=attention).logits
    if at_start:
        return trainer.model(input_ids=ids, attention_mask=attention).logits
    raise term.Unknown("a trainer without a reference")


def embeddings_at_start(trainer) -> torch.Tensor:
    if not hasattr(trainer, "_embeddings_at_start"):
        trainer._embeddings_at_start = trainer.model.get_input_embeddings().weight.detach().clone()
    return trainer._embeddings_at_start
