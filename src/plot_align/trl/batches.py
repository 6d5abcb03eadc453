"""Reads the micro-batches of TRL's trainers. No other module knows their keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from plot_align.errors import InputError
from plot_align.preference.batch import Batch

# Experimental in TRL: their loss reads `outputs.logits`, and evaluation does not go through `compute_loss`.
LOGITS_TRAINERS = ("CPOTrainer", "ORPOTrainer")
SUPPORTED = ("DPOTrainer", "SFTTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer", "PROTrainer", *LOGITS_TRAINERS)
_HOMES = ("trl.trainer.", "trl.experimental.", "plot_align.methods.pro")  # PRO's trainer is ours


def trainer_kind(trainer: Any) -> str:
    """Name of the supported trainer class that ``trainer`` is an instance of.

    Raises:
        InputError: it is none of :data:`SUPPORTED`.
    """
    for cls in type(trainer).__mro__:
        if cls.__module__.startswith(_HOMES) and cls.__name__ in SUPPORTED:
            return cls.__name__
        # Unsloth compiles TRL's source anew, a module for each trainer, which has the class's name.
        kind = cls.__name__.removeprefix("Unsloth")
        if cls.__module__ == cls.__name__ == f"Unsloth{kind}" and kind in SUPPORTED:
            return kind
    raise InputError(
        f"trainer is a {type(trainer).__name__}, which PLOT cannot be attached to; expected one of "
        f"{', '.join(SUPPORTED)} or a subclass: for any other training loop add plot_align.PlotLoss to its loss."
    )


def is_earlier_kto(trainer: type) -> bool:
    """Whether a KTO trainer is that of TRL before 1.8, whose batches have another form."""
    experimental = any(cls.__module__.startswith("trl.experimental.kto") for cls in trainer.__mro__)
    return experimental or hasattr(trainer, "get_batch_loss_metrics")


def model_inputs(kind: str, inputs: Mapping[str, Any], trainer: Any = None) -> dict[str, Tensor]:
    """The inputs that a ``kind`` trainer passes to the policy, without labels; offline methods only. See
    :func:`policy_batch`."""
    if "prompt_input_ids" in inputs and kind == "DPOTrainer":
        ids, attention, _ = _concatenated(inputs, trainer.max_length, trainer.truncation_mode)
        return {"input_ids": ids, "attention_mask": attention}
    if kind == "DPOTrainer" and hasattr(trainer, "_truncate_inputs") and "completion_mask" in inputs:
        ids, attention, _ = _truncated(inputs, trainer)
        return {"input_ids": ids, "attention_mask": attention}
    if kind in LOGITS_TRAINERS:
        # Padding is masked, so any token id will do.
        return {name: _stacked(inputs, name, 0) for name in ("input_ids", "attention_mask")}
    return {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}


def policy_batch(kind: str, inputs: Mapping[str, Any], trainer: Any = None) -> Batch:
    """The :class:`Batch` of the inputs to ``compute_loss`` of a ``kind`` trainer, as its forward sees it.

    ``trainer``: where TRL's DPO trainer truncates pairs in its forward (before 0.29), it says how.
    """
    match kind:
        case "DPOTrainer":
            labels = _pair_labels(inputs, trainer)  # (2B, T)
            return Batch(labels, _pair_roles(labels))
        case "CPOTrainer" | "ORPOTrainer":
            labels = _stacked(inputs, "labels", -100)  # (2B, T)
            return Batch(labels, _pair_roles(labels))
        case "SFTTrainer":
            labels = inputs["labels"]
            segments = None
            if "position_ids" in inputs:
                segments = (inputs["position_ids"] == 0).long().cumsum(-1).sub(1).clamp(min=0)
            roles = torch.ones(labels.size(0), dtype=torch.int8, device=labels.device)
            return Batch(labels, roles, segments=segments)
        case "KTOTrainer":
            ids, completion = inputs["input_ids"], inputs["completion_mask"]
            desirable = torch.as_tensor(inputs["label"], dtype=torch.bool, device=ids.device)
            return Batch(ids.masked_fill(completion == 0, -100), desirable.to(torch.int8) * 2 - 1)
        case "GRPOTrainer" | "RLOOTrainer":
            completion = inputs["completion_ids"]  # (B, C)
            ids = torch.cat([inputs["prompt_ids"], completion], dim=1)  # (B, T)
            seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            labels = ids.masked_fill(seen == 0, -100)
            labels[:, : -completion.size(1)] = -100
            keep = None
            if inputs.get("tool_mask") is not None:
                keep = torch.cat([inputs["prompt_mask"], inputs["tool_mask"]], dim=1).bool()
            advantages = inputs["advantages"]
            if advantages.dim() > 1:
                advantages = advantages.mean(-1)
            return Batch(labels, advantages.sign().to(torch.int8), keep=keep)
        case "PROTrainer":
            ids, completion = inputs["input_ids"], inputs["completion_mask"]  # (S, T): lists one after another
            best = best_of_each_list(inputs["list_lengths"], ids.size(0))
            return Batch(ids.masked_fill(completion == 0, -100), best.to(torch.int8) * 2 - 1)
    raise InputError(f"trainer kind is {kind!r}; expected one of {', '.join(SUPPORTED)}.")


def best_of_each_list(list_lengths: Tensor, completions: int) -> Tensor:
    """``(S,)`` bool: the best completion of each prompt, which is the first of its list.

    Args:
        list_lengths: ``(P,)`` number of completions of each prompt; the lists follow one another.
        completions: S, the sum of ``list_lengths``.
    """
    best = torch.zeros(completions, dtype=torch.bool, device=list_lengths.device)
    best[list_lengths.cumsum(0) - list_lengths] = True
    return best


def _pair_labels(inputs: Mapping[str, Any], trainer: Any) -> Tensor:
    """``(2B, T)`` labels of the chosen rows above the rejected ones, in each form that DPO's batches have had."""
    if "completion_mask" in inputs:  # TRL 0.29 and later
        ids, completion = inputs["input_ids"], inputs["completion_mask"]
        if hasattr(trainer, "_truncate_inputs"):
            ids, _, completion = _truncated(inputs, trainer)
        return ids.masked_fill(completion == 0, -100)
    if "labels" in inputs:  # frameworks with collators of their own
        return inputs["labels"]
    if "prompt_input_ids" in inputs:  # TRL before 0.29
        ids, _, completion = _concatenated(inputs, trainer.max_length, trainer.truncation_mode)
        return ids.masked_fill(completion == 0, -100)
    raise InputError(
        f"the DPO batch has the keys {', '.join(map(str, inputs))}; expected input_ids with completion_mask or "
        "labels, or prompt_input_ids, chosen_input_ids and rejected_input_ids: use TRL's data collator."
    )


def _truncated(inputs: Mapping[str, Any], trainer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention and completion mask as the model sees them: TRL 0.29 truncates them in its forward."""
    return trainer._truncate_inputs(inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"])


def _concatenated(
    inputs: Mapping[str, Any], max_length: int | None, truncation_mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``(2B, T)`` ids, attention and completion mask of chosen rows above rejected ones, without the padding between
    prompt and completion: what ``concatenated_forward`` of TRL before 0.29 hands to the model."""
    pairs = {name: torch.cat([inputs[f"prompt_{name}"]] * 2) for name in ("input_ids", "attention_mask")}
    answers = {name: _stacked(inputs, name, 0) for name in pairs}
    ids, seen = (torch.cat([pairs[name], answers[name]], dim=1) for name in pairs)
    completion = torch.cat([torch.zeros_like(pairs["attention_mask"]), answers["attention_mask"]], dim=1)
    place = seen.cumsum(1) - 1  # (2B, ·) of each token in its row
    length = seen.sum(1, keepdim=True)  # (2B, 1)
    width = int(length.max())
    if max_length is not None:
        width = min(width, max_length)
        place = place - (length - width).clamp(min=0) * (truncation_mode == "keep_end")
    kept = seen.bool() & (place >= 0) & (place < width)
    row, column = kept.nonzero(as_tuple=True)[0], place[kept]
    blank = ids.new_zeros(ids.size(0), width)  # padding is masked, so any token id will do
    return tuple(blank.index_put((row, column), x[kept]) for x in (ids, seen, completion))  # type: ignore[return-value]


def _pair_roles(rows: Tensor) -> Tensor:
    """``(2B,)`` roles of B chosen rows above B rejected ones."""
    roles = torch.ones(rows.size(0), dtype=torch.int8, device=rows.device)
    roles[rows.size(0) // 2 :] = -1
    return roles


def _stacked(inputs: Mapping[str, Any], name: str, fill: int) -> Tensor:
    """``(2B, T)`` chosen rows above rejected ones, the shorter side padded, as CPO's ``concatenated_inputs`` does."""
    sides = [inputs[f"{side}_{name}"] for side in ("chosen", "rejected")]
    length = max(side.size(1) for side in sides)
    return torch.cat([functional.pad(side, (0, length - side.size(1)), value=fill) for side in sides])
