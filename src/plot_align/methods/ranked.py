"""Ranked lists of completions, best first: rows as users have them, tokenised and collated for PRO."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length, extract_prompt
from trl.trainer.utils import pad

from plot_align.errors import InputError
from plot_align.preference.datasets import shown

OUTPUT_COLUMNS = ["prompt_ids", "ranked_ids", "rewards"]


@dataclass
class DataCollatorForRanking:
    """Pads the ranked lists of a batch; the lists of all prompts follow one another, best completion first.

    Examples have ``prompt_ids``, ``ranked_ids`` (token ids of each completion, best first) and descending ``rewards``.
    With S completions of P prompts, lists of at most n and sequences of at most T tokens, a batch has

    - ``rewards`` ``(P, n)`` float32, minus the smallest of each list: only differences matter, and large rewards would
      lose them to rounding; 0 in the padding,
    - ``list_lengths`` ``(P,)`` int64, completions of each prompt,
    - ``input_ids``, ``attention_mask``, ``completion_mask`` ``(S, T)`` int64, truncated as TRL's DPO collator does.
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        kept = slice(None)
        if self.max_length is not None:
            kept = slice(self.max_length) if self.truncation_mode == "keep_start" else slice(-self.max_length, None)
        ids, attention, completion = [], [], []
        for example in examples:
            prompt = example["prompt_ids"]
            for answer in example["ranked_ids"]:
                ids.append(torch.tensor([*prompt, *answer][kept], dtype=torch.long))
                completion.append(torch.tensor([*[0] * len(prompt), *[1] * len(answer)][kept], dtype=torch.long))
                attention.append(torch.ones_like(ids[-1]))

        def padded(rows: list[Tensor], value: int) -> Tensor:
            return pad(rows, padding_value=value, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of)

        lowered = [torch.tensor([r - example["rewards"][-1] for r in example["rewards"]]) for example in examples]
        return {
            # First, because the Trainer counts the examples of a stream by its first tensor: prompts, not completions.
            "rewards": pad(lowered, padding_value=0, padding_side="right"),
            "list_lengths": torch.tensor([len(example["ranked_ids"]) for example in examples]),
            "input_ids": padded(ids, self.pad_token_id),
            "attention_mask": padded(attention, 0),
            "completion_mask": padded(completion, 0),
        }


def prepare(dataset: Any, tokenizer: PreTrainedTokenizerBase, args: Any, name: str) -> Any:
    """Tokenises ``dataset``: ``prompt_ids``, ``ranked_ids`` (best first) and ``rewards`` (descending)."""
    first = next(iter(dataset), None)
    if first is None:
        raise InputError(f"the {name} data set is empty, expected ranked completions; check the file and the split.")
    if "ranked_ids" in first:
        return dataset
    if {"image", "images"} & set(first):
        raise InputError(f"the {name} data set has images, expected text only; PROTrainer trains language models.")
    kwargs: dict[str, Any] = {"fn_kwargs": {"name": name, "tokenizer": tokenizer}, "with_indices": True}
    kept: dict[str, Any] = {}
    if isinstance(dataset, datasets.Dataset):  # an IterableDataset knows neither
        kwargs |= {"num_proc": args.dataset_num_proc, "desc": f"Tokenizing {name} dataset"}
        kept |= {"num_proc": args.dataset_num_proc, "desc": f"Dropping fully truncated rows from {name} dataset"}
    with args.main_process_first(desc=f"preparing the {name} data set"):
        dataset = dataset.map(_tokenise, remove_columns=[c for c in first if c not in OUTPUT_COLUMNS], **kwargs)
        if args.max_length is not None and args.truncation_mode == "keep_start":
            dataset = dataset.filter(_fits, fn_kwargs={"max_length": args.max_length}, **kept)
    if isinstance(dataset, datasets.Dataset) and len(dataset) == 0:
        raise InputError(
            f"no row of the {name} data set is left: every prompt fills max_length = {args.max_length}; raise it, or "
            "set truncation_mode to keep_end."
        )
    return dataset


def _fits(row: dict[str, Any], max_length: int) -> bool:
    """Whether any completion token is left after ``keep_start``: TRL drops the other rows."""
    return len(row["prompt_ids"]) < max_length


def _tokenise(row: dict[str, Any], index: int, name: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    where = f"{name} data row {index}"
    prompt, completions, rewards = ranked_row(row, where)
    if isinstance(prompt, str):
        eos = tokenizer.eos_token
        if eos is None:
            raise InputError("the tokenizer has no EOS token, which every trained answer ends with; set eos_token.")
        texts = [prompt + (text if text.endswith(eos) else text + eos) for text in completions]
        prompt_ids, *joined = tokenizer([prompt, *texts])["input_ids"]
    else:
        if not tokenizer.chat_template:
            raise InputError(
                f"{where} is a conversation, but the tokenizer has no chat template; use the tokenizer of an "
                "instruction-tuned model, or set its chat_template."
            )
        tools = row.get("tools")
        options = {
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
            "tokenize": True,
            "return_dict": True,
            **(row.get("chat_template_kwargs") or {}),
        }
        prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)["input_ids"]
        joined = tokenizer.apply_chat_template([prompt + answer for answer in completions], **options)["input_ids"]
    # As in TRL, the completion starts where the tokens of the prompt and of any prompt + completion diverge.
    start = min(common_prefix_length(prompt_ids, ids) for ids in joined)
    if start < len(prompt_ids):
        warnings.warn(
            "the tokens of a prompt alone are no prefix of those of prompt and completion (a chat template that "
            "renders it differently, or tokens that merge across the boundary); the completion starts where they "
            "diverge, and the rest of the prompt is left out. End prompts on a token boundary to avoid it.",
            stacklevel=2,
        )
    return {"prompt_ids": prompt_ids[:start], "ranked_ids": [ids[start:] for ids in joined], "rewards": rewards}


def ranked_row(row: dict[str, Any], where: str) -> tuple[Any, list[Any], list[float]]:
    """The prompt of a row in any of :class:`PROTrainer`'s formats, its completions from best to worst, their rewards.

    Args:
        row: a row of the data set.
        where: name of the row in an error.

    Raises:
        InputError: see :class:`PROTrainer`.
    """
    if "completions" in row:
        prompt, completions, rewards = row.get("prompt"), row["completions"], row.get("rewards")
        if "rewards" in row and not isinstance(rewards, Sequence):
            raise InputError(f"{where}: 'rewards' is {shown(rewards)}, expected a list of numbers; complete the row.")
    else:
        prompt, completions, rewards = _pair(row, where)
    _check_texts(prompt, completions, where)
    if rewards is None:
        rewards = [float(rank) for rank in reversed(range(len(completions)))]
    if len(rewards) != len(completions):
        raise InputError(
            f"{where}: there are {len(rewards)} rewards for {len(completions)} completions, expected one each; "
            "correct or remove the row."
        )
    for reward in rewards:
        if not _is_finite(reward):
            raise InputError(
                f"{where}: a reward is {shown(reward)}, expected a finite number; correct or remove the row."
            )
    if min(rewards) == max(rewards):
        raise InputError(
            f"{where}: all rewards are {rewards[0]:g}, so there is nothing to rank; remove the row, or drop the "
            "rewards and order the completions from best to worst."
        )
    order = sorted(range(len(rewards)), key=lambda i: -rewards[i])  # stable: ties keep the order of the data
    return prompt, [completions[i] for i in order], [float(rewards[i]) for i in order]


def _pair(row: dict[str, Any], where: str) -> tuple[Any, list[Any], list[float] | None]:
    if "chosen" not in row or "rejected" not in row:
        raise InputError(
            f"{where} has the columns {', '.join(row)}, expected prompt and completions (and rewards), or chosen and "
            "rejected; rename them."
        )
    if "prompt" not in row:
        for side in ("chosen", "rejected"):
            if not row[side]:
                raise InputError(
                    f"{where}: {side!r} is {shown(row[side])}, so it shares no prompt with the other answer; complete "
                    "or remove the row."
                )
        row = {**row, **extract_prompt({"chosen": row["chosen"], "rejected": row["rejected"]})}
    pair = [row["chosen"], row["rejected"]]
    if "score_chosen" not in row or "score_rejected" not in row:
        return row["prompt"], pair, None
    better, worse = row["score_chosen"], row["score_rejected"]
    if _is_finite(better) and _is_finite(worse) and better < worse:
        raise InputError(
            f"{where}: score_chosen is {better:g} and score_rejected {worse:g}, expected the first higher; swap or "
            "remove the row, or drop both columns."
        )
    return row["prompt"], pair, [better, worse]


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False


def _check_texts(prompt: Any, completions: Any, where: str) -> None:
    if not isinstance(completions, list) or len(completions) < 2:
        number = f"{len(completions)} of them" if isinstance(completions, list) else shown(completions)
        raise InputError(
            f"{where}: 'completions' is {number}, expected a list of two or more; complete or remove the row."
        )
    conversational = isinstance(prompt, list)
    expected = "a list of messages" if conversational else "a string"
    named = [("'prompt'", prompt), *((f"completion {i}", text) for i, text in enumerate(completions))]
    for what, value in named:
        if not (_are_messages(value) if conversational else isinstance(value, str)):
            raise InputError(
                f"{where}: {what} is {shown(value)}, expected {expected}; prompt and completions are all strings or "
                "all lists of messages: complete or remove the row."
            )


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)
