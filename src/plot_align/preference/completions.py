"""Tokenise the rows of a preference set as TRL 1.16 does, and find the completion tokens that it scores.

Prompt extraction, EOS, chat template, tokenisation, boundary between prompt and completion, dropped rows and
truncation are those of ``DPOTrainer._prepare_dataset`` and ``DataCollatorForPreference`` (``KTOTrainer`` for rows with
a ``label``). The loss is shifted by one, so a completion token at position 0 is not scored: nothing predicts it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from plot_align.errors import InputError, legible
from plot_align.io import parse_json
from plot_align.preference.datasets import shown

PAIRED, UNPAIRED = ("chosen", "rejected"), ("completion",)

Side = tuple[list[list[int]], np.ndarray, np.ndarray, np.ndarray]  # see scored_sides()


class RowError(InputError):
    """A row that cannot be used.

    Args:
        data: ``"data"`` or ``"dataset"``. first, last: the rows among which it is; equal if the row is known.
            reason: the rest of the sentence.
    """

    def __init__(self, data: str, first: int, last: int, reason: str) -> None:
        super().__init__(data, first, last, reason)  # keeps the arguments, so that the error can be pickled
        self.data, self.first, self.last, self.reason = data, first, last, reason

    def __str__(self) -> str:
        rows = f"row {self.first}" if self.first == self.last else f"rows {self.first} to {self.last}"
        return legible(f"{self.data} {rows}: {self.reason}")


@dataclass(frozen=True)
class Rules:
    """The settings that decide how rows are counted; picklable, for the worker processes."""

    tokenizer: Any
    size: int  # V
    completions: tuple[str, ...]  # ("chosen", "rejected") or ("completion",)
    implicit: bool
    conversational: bool
    max_length: int | None
    truncation_mode: str


def scored_range(
    prompt: np.ndarray, completion: np.ndarray, max_length: int | None, truncation_mode: str
) -> tuple[np.ndarray, np.ndarray]:
    """The range of completion tokens that TRL scores, from ``start`` up to ``stop``.

    Args:
        prompt: number of prompt tokens of each row, int64 (R,).
        completion: number of completion tokens of each row, int64 (R,).
        max_length: see :func:`estimate`.
        truncation_mode: see :func:`estimate`.

    Returns:
        ``start`` and ``stop``, int64 (R,), positions within the completion, ``start ≤ stop``.
    """
    start = (prompt == 0).astype(np.int64)  # nothing predicts the first token of a sequence
    stop = completion
    if max_length is not None and truncation_mode == "keep_start":
        stop = np.clip(max_length - prompt, 0, completion)  # 0 if the prompt fills max_length: TRL drops the row
    elif max_length is not None:
        start = np.maximum(start, completion - (max_length - 1))
    return np.minimum(start, stop), stop


def scored_sides(batch: dict[str, list[Any]], first: int, rules: Rules) -> tuple[np.ndarray, list[Side]]:
    """Tokenises a batch of raw rows and finds the tokens that TRL scores.

    Args:
        batch: columns of R rows. first: index of its first row, for errors.

    Returns:
        Number of prompt tokens of each row (R,); and for each side the ids of prompt and completion (R rows), whether
        it is the chosen one (R,), and the start and stop of the scored range in these ids (R,) each.

    Raises:
        RowError: the first row that cannot be used, for any batch size.
    """
    try:
        return _scored_sides(batch, first, rules)
    except RowError:
        # The error may name a later row, found in a whole column or group: find the first one.
        for index in range(len(next(iter(batch.values())))):
            _scored_sides({name: column[index : index + 1] for name, column in batch.items()}, first + index, rules)
        raise


def _scored_sides(batch: dict[str, list[Any]], first: int, rules: Rules) -> tuple[np.ndarray, list[Side]]:
    read = read_batch(batch, first, rules)
    return read.border, scored_ranges(read, rules)


@dataclass(frozen=True)
class ReadBatch:
    """A batch of R rows as the trainer reads them.

    Attributes:
        prompts: strings, or lists of messages. answers: of each side R strings, each with EOS, or R lists of messages.
        liked: of each side whether it is the chosen one, bool (R,).
        ids: of the prompts alone, then of prompt + answer for each side; R rows each.
        border: int64 (R,). As in the trainer, the completion starts where the tokens of the prompt and of any prompt +
            completion diverge: less than the prompt's own tokens where the tokenizer merges over the border.
    """

    prompts: list[Any]
    answers: list[list[Any]]
    liked: list[np.ndarray]
    ids: list[list[list[int]]]
    border: np.ndarray


def read_batch(batch: dict[str, list[Any]], first: int, rules: Rules) -> ReadBatch:
    """Reads a batch of raw rows; ``first`` is the index of its first row.

    Raises:
        RowError: a row that cannot be used; not always the first.
    """
    prompts, sides, liked = _texts(batch, first, rules)
    ids = _tokenise(prompts, sides, batch, first, rules)
    border = np.array([_boundary(row) for row in zip(*ids, strict=True)], np.int64)  # (R,)
    return ReadBatch(prompts, sides, liked, ids, border)


def scored_ranges(read: ReadBatch, rules: Rules) -> list[Side]:
    """The tokens of a batch that TRL scores, by side; see :func:`scored_sides`."""
    found = []
    for side_ids, side_liked in zip(read.ids[1:], read.liked, strict=True):
        total = np.fromiter(map(len, side_ids), np.int64, len(side_ids))  # (R,) prompt and completion
        start, stop = scored_range(read.border, total - read.border, rules.max_length, rules.truncation_mode)
        found.append((side_ids, side_liked, read.border + start, read.border + stop))
    return found


def dropped_rows(prompt: np.ndarray, max_length: int | None, truncation_mode: str) -> int:
    """The number of rows that TRL's length filter drops."""
    return int((prompt >= max_length).sum()) if max_length is not None and truncation_mode == "keep_start" else 0


def _boundary(row: tuple[list[int], ...]) -> int:
    """Number of prompt tokens of a row: prompt ids first, then prompt + completion ids for each answer."""
    prompt, answers = row[0], row[1:]
    if all(answer[: len(prompt)] == prompt for answer in answers):
        return len(prompt)
    shared = ([a == b for a, b in zip(prompt, answer, strict=False)] for answer in answers)
    return min([*same, False].index(False) for same in shared)


def _texts(
    batch: dict[str, list[Any]], first: int, rules: Rules
) -> tuple[list[Any], list[list[Any]], list[np.ndarray]]:
    """Prompts (R), completions of each side (R each), and for each side whether it is the chosen one, (R,) bool."""
    rows = len(next(iter(batch.values())))
    expected = "a list of messages" if rules.conversational else "a string"
    for name in (() if rules.implicit else ("prompt",)) + rules.completions:
        for index, value in enumerate(batch.get(name, [None] * rows)):
            if not (_are_messages(value) if rules.conversational else isinstance(value, str)):
                raise _refused(
                    first + index,
                    f"{name!r} is {shown(value)}, expected {expected} as in the first row; complete the row or "
                    "remove it",
                )
    sides = [batch[name] for name in rules.completions]
    if rules.implicit:
        extracted = []
        for index, (chosen, rejected) in enumerate(zip(*sides, strict=True)):
            if not chosen or not rejected:
                raise _refused(
                    first + index,
                    f"{'rejected' if chosen else 'chosen'!r} is empty, so it shares no prompt with the other answer; "
                    "complete the row or remove it",
                )
            extracted.append(_extract(chosen, rejected))
        prompts = [row[0] for row in extracted]
        sides = [[row[1] for row in extracted], [row[2] for row in extracted]]
    else:
        prompts = batch["prompt"]
    if rules.conversational:
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise _refused(
                    first + index,
                    "chosen and rejected share no first message, expected a common prompt; make both start with the "
                    "same turns or remove the row",
                )
    else:
        eos = rules.tokenizer.eos_token
        sides = [[text if text.endswith(eos) else text + eos for text in side] for side in sides]
    if rules.completions == PAIRED:
        return prompts, sides, [np.full(rows, True), np.full(rows, False)]
    labels = batch.get("label", [None] * rows)
    for index, label in enumerate(labels):
        if label not in (0, 1):
            raise _refused(first + index, f"'label' is {shown(label)}, expected true or false; complete the row")
    return prompts, sides, [np.array(labels, bool)]


def _extract(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """TRL's ``extract_prompt`` (prompt, chosen, rejected), sped up: compares blocks of the prompt beforehand."""
    from trl.data_utils import extract_prompt

    block = 64
    common, shorter = 0, min(len(chosen), len(rejected))
    while common + block <= shorter and chosen[common : common + block] == rejected[common : common + block]:
        common += block
    common = max(common - 1, 0)  # extract_prompt looks at the character before the first difference
    row = extract_prompt({"chosen": chosen[common:], "rejected": rejected[common:]})
    return chosen[:common] + row["prompt"], row["chosen"], row["rejected"]


def _tokenise(
    prompts: list[Any], sides: list[list[Any]], batch: dict[str, list[Any]], first: int, rules: Rules
) -> list[list[list[int]]]:
    """Token ids of the prompts alone, then of prompt + completion for each side; R rows each."""
    joined = [[prompt + answer for prompt, answer in zip(prompts, side, strict=True)] for side in sides]
    if not rules.conversational:
        ids = _call(rules.tokenizer, list(chain(prompts, *joined)))  # one call keeps every core busy
        return [ids[at : at + len(prompts)] for at in range(0, len(ids), len(prompts))]
    result: list[list[list[int]]] = [[[]] * len(prompts) for _ in range(1 + len(sides))]
    for options, members in _by_template_options(batch, first, len(prompts)):
        for slot, (texts, extra) in enumerate(
            [(prompts, {"add_generation_prompt": True}), *((j, {}) for j in joined)]
        ):
            try:
                # As TRL's _tokenize calls it for one conversation; a batch gives the same ids.
                encoded = rules.tokenizer.apply_chat_template(
                    [texts[member] for member in members], tokenize=True, return_dict=True, **extra, **options
                )["input_ids"]
            except Exception as error:  # a template may raise anything
                raise RowError(
                    "data",
                    first + members[0],
                    first + members[-1],
                    f"the tokenizer's chat template refused a conversation ({type(error).__name__}: "
                    f"{' '.join(str(error).split())}); correct its roles or set another chat template",
                ) from None
            for member, row in zip(members, encoded, strict=True):
                result[slot][member] = row
    return result


def _call(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]


def _by_template_options(
    batch: dict[str, list[Any]], first: int, rows: int
) -> Iterable[tuple[dict[str, Any], list[int]]]:
    """Rows grouped by their ``tools`` and ``chat_template_kwargs``, as arguments of ``apply_chat_template``."""
    groups: dict[str, tuple[dict[str, Any], list[int]]] = {}
    tools_column = batch.get("tools") or [None] * rows
    options_column = batch.get("chat_template_kwargs") or [{}] * rows
    for index, (tools, kwargs) in enumerate(zip(tools_column, options_column, strict=True)):
        try:
            options = {"tools": parse_json(tools) if isinstance(tools, str) else tools, **(kwargs or {})}
            key = json.dumps(options, sort_keys=True, default=repr)
        except (TypeError, ValueError) as error:
            raise _refused(
                first + index,
                f"'tools' or 'chat_template_kwargs' cannot be read ({error}), expected JSON schemas and a mapping; "
                "correct the row",
            ) from None
        groups.setdefault(key, (options, []))[1].append(index)
    return groups.values()


def _refused(row: int, reason: str) -> RowError:
    return RowError("data", row, row, reason)


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(message, dict) and "role" in message for message in value)
