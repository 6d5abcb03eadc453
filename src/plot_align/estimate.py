"""Count the tokens that a TRL preference trainer trains on.

The tokens are those of TRL 1.16: the same prompt extraction, EOS, chat template, tokenisation, boundary between
prompt and completion, dropped rows and truncation as ``DPOTrainer._prepare_dataset`` followed by
``DataCollatorForPreference`` (``KTOTrainer`` for rows with a ``label``). Of those, the tokens that are scored: the
loss is shifted by one, so a completion token at position 0, which nothing predicts, is left out.

One batch is in memory at a time, and only counts are kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch

from plot_align.errors import InputError, RunError
from plot_align.preference import (
    PreferenceDistribution,
    tokenizer_name,
    vocabulary_fingerprint,
    vocabulary_size,
)
from plot_align.reading import load_pairs, shown

__all__ = [
    "ScoredSequence",
    "estimate",
    "estimate_tokenized",
    "load_pairs",
    "progress_bar",
    "scored_pairs",
    "scored_range",
]

TRUNCATION_MODES = ("keep_start", "keep_end")
_PAIRED, _UNPAIRED = ("chosen", "rejected"), ("completion",)
_LABELS = ("chosen_labels", "rejected_labels")  # prompt and completion, −100 over the prompt


def estimate(
    data: Any,
    tokenizer: Any,
    *,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    num_proc: int | None = None,
    batch_size: int = 1000,
    progress: bool = True,
    source: str | None = None,
) -> PreferenceDistribution:
    """Count the completion tokens that ``DPOTrainer`` trains on, over chosen and over rejected answers.

    Every format of TRL's preference trainers: standard or conversational, with a ``prompt`` column or with the prompt
    implicit in both answers, with ``tools`` and ``chat_template_kwargs``; and the unpaired ``prompt``,
    ``completion``, ``label`` of ``KTOTrainer``. (``KTOTrainer`` given pairs unpairs them first, and then truncates
    each on its own: count with :func:`estimate_tokenized` there.)

    Args:
        data: ``datasets.Dataset`` or ``IterableDataset`` (see :func:`load_pairs`).
        tokenizer: the one the trainer is given.
        max_length: longest sequence of prompt and completion in tokens, as in ``DPOConfig``; None: no limit.
        truncation_mode: ``"keep_start"`` or ``"keep_end"``, as in ``DPOConfig``.
        num_proc: worker processes. None or 1: none (a fast tokenizer uses every core anyway). Counts do not depend on
            it.
        batch_size: rows tokenised at a time. Counts do not depend on it.
        progress: show a progress bar on standard error.
        source: what to call the data set in the provenance; None: what the data set says of itself.

    Returns:
        Counts over the tokenizer's ids, with their provenance.

    Raises:
        InputError: not a preference set, a row that cannot be used (named by its index, from 0), an empty data set, a
            side without any token, a tokenizer without EOS or chat template where one is needed, an argument out of
            range.
        RunError: a worker process died.
    """
    rows, rules, batches, total = _open(data, tokenizer, max_length, truncation_mode, batch_size)
    workers = _positive("num_proc", 1 if num_proc is None else num_proc)
    with progress_bar("counting tokens", progress, total) as advance:
        if workers == 1:
            counts = _Counts(rules.size)
            for first, batch in batches(lazy=False):
                advance(counts.add(_count_batch(batch, first, rules)))
        else:
            counts = _count_in_processes(rows, batches(lazy=True), rules, workers, advance)
    eos = "by the chat template" if rules.conversational else "appended where missing"
    return _finish(counts, data, tokenizer, max_length, truncation_mode, eos, source)


def estimate_tokenized(
    dataset: Any,
    tokenizer: Any,
    *,
    max_length: int | None,
    truncation_mode: str = "keep_start",
    batch_size: int = 1000,
    progress: bool = True,
    source: str | None = None,
) -> PreferenceDistribution:
    """Count the completion tokens of rows that a TRL trainer has already tokenised, e.g. ``trainer.train_dataset``.

    Args:
        dataset: ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` (``DPOTrainer``), ``prompt_ids``,
            ``completion_ids``, ``label`` (``KTOTrainer``), ``prompt_ids``, ``ranked_ids`` (``PROTrainer``: the best
            completion counts as chosen, all others as rejected), or ``chosen_labels``, ``rejected_labels``
            (``CPOTrainer``, ``ORPOTrainer``). ``Dataset`` or ``IterableDataset``.
        tokenizer: the one they were tokenised with.
        max_length: what the trainer's collator truncates to (``args.max_length``); None: no limit. Rows of labels were
            truncated when they were tokenised: there it is only noted in the provenance.
        truncation_mode: ``args.truncation_mode`` of ``DPOConfig``; the other trainers always keep the start.
        batch_size: rows read at a time. Counts do not depend on it.
        progress: show a progress bar on standard error.
        source: what to call the data set in the provenance; None: what the data set says of itself.

    Raises:
        InputError: other columns, an id outside the tokenizer's vocabulary, an empty data set, a side without any
            token, an argument out of range.
    """
    _check_lengths(max_length, truncation_mode)
    _positive("batch_size", batch_size)
    total = _number_of_rows(dataset)
    counts = _Counts(vocabulary_size(tokenizer))
    stream = dataset.with_format("arrow").iter(batch_size=batch_size)
    with progress_bar("counting tokens", progress, total) as advance:
        for first, table in _numbered(stream):
            _check_tokenized(table.column_names, truncation_mode)
            if set(_LABELS) <= set(table.column_names):
                advance(counts.add(_count_labels(table, first, counts.size)))
            else:
                advance(counts.add(_count_table(table, first, counts.size, max_length, truncation_mode)))
    return _finish(counts, dataset, tokenizer, max_length, truncation_mode, "as tokenised by the trainer", source)


class ScoredSequence(NamedTuple):
    """Prompt and completion as the trainer's collator hands them to the model.

    Attributes:
        ids: int32 (L,), truncated.
        start, stop: ids[start:stop] are the scored tokens of the completion, ``1 ≤ start`` where there are any;
            ``start == stop`` where none is scored, as in a row that TRL's length filter drops.
    """

    ids: np.ndarray
    start: int
    stop: int


def scored_pairs(
    data: Any,
    tokenizer: Any,
    *,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    batch_size: int = 1000,
) -> Iterator[tuple[ScoredSequence, ScoredSequence]]:
    """Chosen and rejected of every pair in order, exactly the tokens that :func:`estimate` counts in their context.

    Args and errors are those of :func:`estimate`; rows with a ``label``, which are no pairs, are refused too.
    """
    _, rules, batches, _ = _open(data, tokenizer, max_length, truncation_mode, batch_size)
    if rules.completions != _PAIRED:
        raise InputError(
            "the data set has a column 'label' instead of 'chosen' and 'rejected', expected pairs; pair its rows first"
        )
    for first, batch in batches(lazy=False):
        _, sides = _scored(batch, first, rules)
        yield from zip(*(_windows(ids, begin, end, rules) for ids, _, begin, end in sides), strict=True)


def _windows(ids: list[list[int]], begin: np.ndarray, end: np.ndarray, rules: _Rules) -> Iterator[ScoredSequence]:
    for row, start, stop in zip(ids, begin.tolist(), end.tolist(), strict=True):
        cut = 0
        if rules.max_length is not None and rules.truncation_mode == "keep_end":
            cut = max(len(row) - rules.max_length, 0)
        kept = row[cut:] if rules.max_length is None else row[cut : cut + rules.max_length]
        yield ScoredSequence(np.array(kept, np.int32), start - cut, stop - cut)


# --- counting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rules:
    """What decides how a batch of rows is counted; picklable, for the worker processes."""

    tokenizer: Any
    size: int  # V
    completions: tuple[str, ...]  # ("chosen", "rejected") or ("completion",)
    implicit: bool
    conversational: bool
    max_length: int | None
    truncation_mode: str


@dataclass
class _Counts:
    """Counts of some rows; all that is ever kept of them."""

    size: int  # V
    chosen: np.ndarray = field(init=False)  # (V,) int64
    rejected: np.ndarray = field(init=False)  # (V,) int64
    rows: int = 0
    dropped: int = 0

    def __post_init__(self) -> None:
        self.chosen, self.rejected = np.zeros(self.size, np.int64), np.zeros(self.size, np.int64)

    def add(self, other: _Counts) -> int:
        """Add ``other``; returns how many rows it has read."""
        self.chosen += other.chosen
        self.rejected += other.rejected
        self.rows += other.rows
        self.dropped += other.dropped
        return other.rows + other.dropped

    def add_tokens(self, ids: np.ndarray, liked: np.ndarray) -> None:
        """Count token ids (N,), with True (N,) where one stands in a chosen completion."""
        self.chosen += np.bincount(ids[liked], minlength=self.size)
        self.rejected += np.bincount(ids[~liked], minlength=self.size)


def scored_range(
    prompt: np.ndarray, completion: np.ndarray, max_length: int | None, truncation_mode: str
) -> tuple[np.ndarray, np.ndarray]:
    """Which of a row's completion tokens TRL scores: those from ``start`` up to ``stop``.

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
        stop = np.clip(max_length - prompt, 0, completion)  # 0 where the prompt fills max_length: TRL drops the row
    elif max_length is not None:
        start = np.maximum(start, completion - (max_length - 1))
    return np.minimum(start, stop), stop


def _kept(lengths: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Mask over the concatenated completions (N,), N = Σ lengths: positions from ``start`` to ``stop`` of each."""
    position = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # (N,)
    return (position >= np.repeat(start, lengths)) & (position < np.repeat(stop, lengths))


def _count_batch(batch: dict[str, list[Any]], first: int, rules: _Rules) -> _Counts:
    """Count a batch of raw rows; ``first`` is the index of its first row."""
    length, sides = _scored(batch, first, rules)
    counts = _Counts(rules.size)
    for side_ids, side_liked, begin, end in sides:
        ranges = zip(side_ids, begin.tolist(), end.tolist(), strict=True)
        scored = end - begin  # (R,)
        flat = np.fromiter(chain.from_iterable(row[a:b] for row, a, b in ranges), np.int64, int(scored.sum()))  # (N,)
        counts.add_tokens(flat, np.repeat(side_liked, scored))
    counts.dropped = _dropped(length, rules.max_length, rules.truncation_mode)
    counts.rows = len(length) - counts.dropped
    return counts


def _scored(
    batch: dict[str, list[Any]], first: int, rules: _Rules
) -> tuple[np.ndarray, list[tuple[list[list[int]], np.ndarray, np.ndarray, np.ndarray]]]:
    """Number of prompt tokens of each row (R,); and of each side the ids of prompt and completion (R rows), whether
    it is the chosen one (R,), and from where to where in these ids TRL scores (R,) each."""
    prompts, sides, liked = _texts(batch, first, rules)
    ids = _tokenise(prompts, sides, batch, first, rules)
    # The boundary is the trainer's: where the prompt alone and prompt + completion diverge, for any of its answers.
    length = np.array([_boundary(row) for row in zip(*ids, strict=True)], np.int64)  # (R,)
    found = []
    for side_ids, side_liked in zip(ids[1:], liked, strict=True):
        total = np.fromiter(map(len, side_ids), np.int64, len(side_ids))  # (R,) prompt and completion
        start, stop = scored_range(length, total - length, rules.max_length, rules.truncation_mode)
        found.append((side_ids, side_liked, length + start, length + stop))
    return length, found


def _count_table(table: Any, first: int, size: int, max_length: int | None, truncation_mode: str) -> _Counts:
    """Count a batch of tokenised rows, a ``pyarrow.Table``."""
    counts = _Counts(size)
    _, length = _flatten(table["prompt_ids"].combine_chunks(), "prompt_ids", first)
    for column, flat, lengths, prompt, liked in _sides(table, length, first):
        _check_ids(flat, column, size)
        start, stop = scored_range(prompt, lengths, max_length, truncation_mode)
        kept = _kept(lengths, start, stop)  # (N,)
        counts.add_tokens(flat[kept], np.repeat(liked, lengths)[kept])
    counts.dropped = _dropped(length, max_length, truncation_mode)
    counts.rows = len(length) - counts.dropped
    return counts


def _sides(
    table: Any, length: np.ndarray, first: int
) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Of each column of completions: its name, their ids one after another (N,), and of each completion (S,) its
    length, that of its prompt, and whether it is a chosen one. ``length`` is that of each row's prompt (R,)."""
    if "ranked_ids" in table.column_names:
        completions, number = _flatten(table["ranked_ids"].combine_chunks(), "ranked_ids", first)
        flat, lengths = _flatten(completions, "ranked_ids", first)
        liked = np.zeros(len(lengths), bool)
        liked[np.cumsum(number) - number] = True  # the best of each list stands first
        yield "ranked_ids", _int64(flat), lengths, np.repeat(length, number), liked
        return
    paired = "chosen_ids" in table.column_names
    for column in ("chosen_ids", "rejected_ids") if paired else ("completion_ids",):
        flat, lengths = _flatten(table[column].combine_chunks(), column, first)
        if paired:
            liked = np.full(len(lengths), column == "chosen_ids")
        else:
            liked = np.array([bool(label) for label in table["label"].to_pylist()], bool)
        yield column, _int64(flat), lengths, length, liked


def _count_labels(table: Any, first: int, size: int) -> _Counts:
    """Count a batch of rows that carry labels, a ``pyarrow.Table``: what they mark, but for a row's first token."""
    counts = _Counts(size)
    for column in _LABELS:
        items, lengths = _flatten(table[column].combine_chunks(), column, first)
        flat = _int64(items)
        scored = (flat != -100) & _kept(lengths, np.ones_like(lengths), lengths)  # (N,)
        ids = flat[scored]
        _check_ids(ids, column, size)
        counts.add_tokens(ids, np.full(len(ids), column == _LABELS[0]))
    counts.rows = table.num_rows
    return counts


def _check_ids(ids: np.ndarray, column: str, size: int) -> None:
    if len(ids) and (int(ids.max()) >= size or int(ids.min()) < 0):
        raise InputError(
            f"dataset column {column!r} has token id {int(ids.max() if ids.max() >= size else ids.min())}, "
            f"expected ids below {size}; pass the tokenizer that the trainer tokenised with"
        )


def _flatten(array: Any, column: str, first: int) -> tuple[Any, np.ndarray]:
    """Items of every list one after another, as an Arrow array (N,), and the number of them in each, int64 (R,)."""
    if array.null_count:
        row = first + int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise InputError(f"dataset row {row}: {column!r} is missing, expected token ids; remove the row")
    return array.flatten(), _int64(array.value_lengths())


def _int64(array: Any) -> np.ndarray:
    return array.to_numpy(zero_copy_only=False).astype(np.int64)


def _dropped(prompt: np.ndarray, max_length: int | None, truncation_mode: str) -> int:
    """How many rows TRL's length filter drops."""
    return int((prompt >= max_length).sum()) if max_length is not None and truncation_mode == "keep_start" else 0


def _boundary(row: tuple[list[int], ...]) -> int:
    """Number of prompt tokens of a row: prompt ids first, then prompt + completion ids for each answer."""
    from trl.data_utils import common_prefix_length

    prompt, answers = row[0], row[1:]
    if all(answer[: len(prompt)] == prompt for answer in answers):
        return len(prompt)  # what common_prefix_length would return, found at C speed
    return min(common_prefix_length(prompt, answer) for answer in answers)


# --- rows to texts to tokens ----------------------------------------------------------------------------------------


def _texts(
    batch: dict[str, list[Any]], first: int, rules: _Rules
) -> tuple[list[Any], list[list[Any]], list[np.ndarray]]:
    """Prompts (R), completions of each side (R each), and for each side whether it is the chosen one, (R,) bool."""
    rows = len(next(iter(batch.values())))
    expected = "a list of messages" if rules.conversational else "a string"
    for name in (() if rules.implicit else ("prompt",)) + rules.completions:
        for index, value in enumerate(batch.get(name, [None] * rows)):
            if not (_are_messages(value) if rules.conversational else isinstance(value, str)):
                raise InputError(
                    f"data row {first + index}: {name!r} is {shown(value)}, expected {expected} as in the first row; "
                    "complete the row or remove it"
                )
    sides = [batch[name] for name in rules.completions]
    if rules.implicit:
        extracted = []
        for index, (chosen, rejected) in enumerate(zip(*sides, strict=True)):
            if not chosen or not rejected:
                raise InputError(
                    f"data row {first + index}: {'rejected' if chosen else 'chosen'!r} is empty, so it shares no "
                    "prompt with the other answer; complete the row or remove it"
                )
            extracted.append(_extract(chosen, rejected))
        prompts = [row[0] for row in extracted]
        sides = [[row[1] for row in extracted], [row[2] for row in extracted]]
    else:
        prompts = batch["prompt"]
    if rules.conversational:
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise InputError(
                    f"data row {first + index}: chosen and rejected share no first message, expected a common prompt; "
                    "make both start with the same turns or remove the row"
                )
    else:
        eos = rules.tokenizer.eos_token
        sides = [[text if text.endswith(eos) else text + eos for text in side] for side in sides]
    if rules.completions == _PAIRED:
        return prompts, sides, [np.full(rows, True), np.full(rows, False)]
    labels = batch.get("label", [None] * rows)
    for index, label in enumerate(labels):
        if label not in (0, 1):
            raise InputError(
                f"data row {first + index}: 'label' is {shown(label)}, expected true or false; complete the row"
            )
    return prompts, sides, [np.array(labels, bool)]


def _extract(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """TRL's ``extract_prompt`` (prompt, chosen, rejected), with most of the prompt found at C speed beforehand."""
    from trl.data_utils import extract_prompt

    block = 64
    common, shorter = 0, min(len(chosen), len(rejected))
    while common + block <= shorter and chosen[common : common + block] == rejected[common : common + block]:
        common += block
    common = max(common - 1, 0)  # extract_prompt looks at the character before the first difference
    row = extract_prompt({"chosen": chosen[common:], "rejected": rejected[common:]})
    return chosen[:common] + row["prompt"], row["chosen"], row["rejected"]


def _tokenise(
    prompts: list[Any], sides: list[list[Any]], batch: dict[str, list[Any]], first: int, rules: _Rules
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
                raise InputError(
                    f"data rows {first + members[0]} to {first + members[-1]}: the tokenizer's chat template refused "
                    f"a conversation ({type(error).__name__}: {' '.join(str(error).split())}); correct the roles in "
                    "these rows or set another chat template"
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
            options = {"tools": json.loads(tools) if isinstance(tools, str) else tools, **(kwargs or {})}
            key = json.dumps(options, sort_keys=True, default=repr)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"data row {first + index}: 'tools' or 'chat_template_kwargs' cannot be read ({error}), expected JSON "
                "schemas and a mapping; correct the row"
            ) from None
        groups.setdefault(key, (options, []))[1].append(index)
    return groups.values()


# --- opening and closing --------------------------------------------------------------------------------------------


def _open(
    data: Any, tokenizer: Any, max_length: int | None, truncation_mode: str, batch_size: int
) -> tuple[Any, _Rules, Callable[..., Iterator[tuple[int, Any]]], int | None]:
    """The rows to read (only the columns used, as Python objects), the rules as its first row shows them, the function
    that opens its batches, and the number of rows where that is known."""
    from transformers import PreTrainedTokenizerBase

    _check_lengths(max_length, truncation_mode)
    _positive("batch_size", batch_size)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(
            f"tokenizer is a {type(tokenizer).__name__}, expected a transformers tokenizer; of a processor, pass "
            "processor.tokenizer"
        )
    total = _number_of_rows(data)
    if total is None or data.format["type"] != "custom":
        data = data.with_format(None)  # Python objects
    first = next(_guarded(iter(data)), None)
    if first is None:
        raise InputError("the data set is empty, expected at least one preference pair; check the file and the split")
    columns = tuple(data.column_names or first)
    completions, implicit = _layout(columns)
    value = next((first.get(name) for name in completions if first.get(name) is not None), None)
    conversational = isinstance(value, list)
    if conversational and not tokenizer.chat_template:
        raise InputError(
            f"the data set is conversational, but tokenizer {tokenizer_name(tokenizer)} has no chat template; use the "
            "tokenizer of an instruction-tuned model, or set tokenizer.chat_template"
        )
    if conversational and not implicit and isinstance(first.get("prompt"), str):
        raise InputError(
            "the data set has a string 'prompt' beside conversations in 'chosen' and 'rejected', expected both of one "
            "kind; remove the prompt column (the turns that both share become the prompt), or make it a conversation"
        )
    if not conversational and tokenizer.eos_token is None:
        raise InputError(
            f"tokenizer {tokenizer_name(tokenizer)} has no EOS token, which every trained answer ends with; set "
            "tokenizer.eos_token"
        )
    if completions == _UNPAIRED and truncation_mode != "keep_start":
        raise InputError(
            f"truncation_mode is {truncation_mode!r}, but KTOTrainer, which trains on rows with a label, only keeps "
            "the start; use keep_start"
        )
    used = (*(() if implicit else ("prompt",)), *completions, "label", "tools", "chat_template_kwargs")
    if total is not None:
        data = data.select_columns([name for name in used if name in columns])  # decode no more than that
    size = vocabulary_size(tokenizer)
    rules = _Rules(tokenizer, size, completions, implicit, conversational, max_length, truncation_mode)

    def batches(lazy: bool) -> Iterator[tuple[int, Any]]:
        """Index of the first row, and the rows as columns; lazy: only their range, where a worker can read them."""
        if total is not None:
            for start in range(0, total, batch_size):
                rows = range(start, min(start + batch_size, total))
                yield start, rows if lazy else data[rows.start : rows.stop]
        else:
            yield from _numbered(data.iter(batch_size=batch_size))

    return data, rules, batches, total


def _numbered(stream: Iterator[Any]) -> Iterator[tuple[int, Any]]:
    """Each batch with the index of its first row."""
    first = 0
    for batch in _guarded(stream):
        yield first, batch
        first += batch.num_rows if hasattr(batch, "num_rows") else len(next(iter(batch.values())))


def _guarded(stream: Iterator[Any]) -> Iterator[Any]:
    """``stream``, with whatever its reader raises as a sentence: a stream meets a bad line only when it gets there."""
    while True:
        try:
            item = next(stream)
        except StopIteration:
            return
        except Exception as error:
            raise InputError(
                f"the data set cannot be read further ({type(error).__name__}: {' '.join(str(error).split())}); "
                "correct the file, or load it without streaming to learn which row it is"
            ) from None
        yield item


def _layout(columns: tuple[str, ...]) -> tuple[tuple[str, ...], bool]:
    """Completion columns, and whether the prompt is implicit."""
    listed = ", ".join(columns) or "none"
    if "prompt_ids" in columns:
        raise InputError(f"the data set is already tokenised (columns {listed}); use estimate_tokenized")
    if {"image", "images"} & set(columns):
        raise InputError(
            f"the data set has images (columns {listed}), expected text only; images have no token counts"
        )
    if set(_PAIRED) <= set(columns):
        return _PAIRED, "prompt" not in columns
    if {"prompt", "completion", "label"} <= set(columns):
        return _UNPAIRED, False
    missing = [name for name in _PAIRED if name not in columns]
    raise InputError(
        f"the data set has no column {' and no column '.join(map(repr, missing))} (columns: {listed}), expected "
        "chosen and rejected (and prompt, where they do not contain it), or prompt, completion and label; rename its "
        "columns"
    )


def _check_tokenized(columns: list[str], truncation_mode: str) -> None:
    unpaired = {"prompt_ids", "completion_ids", "label"} <= set(columns)
    if unpaired or set(_LABELS) <= set(columns):
        if truncation_mode != "keep_start":
            trainer = "KTOTrainer" if unpaired else "CPOTrainer and ORPOTrainer"
            raise InputError(
                f"truncation_mode is {truncation_mode!r}, expected keep_start, the only mode of {trainer}; "
                "use keep_start"
            )
    elif not any(
        {"prompt_ids", *names} <= set(columns) for names in (("chosen_ids", "rejected_ids"), ("ranked_ids",))
    ):
        raise InputError(
            f"dataset has the columns {', '.join(columns)}, expected prompt_ids, chosen_ids and rejected_ids, or "
            "prompt_ids, completion_ids and label, or prompt_ids and ranked_ids, or chosen_labels and "
            "rejected_labels; use estimate on a data set that is not tokenised"
        )


def _check_lengths(max_length: int | None, truncation_mode: str) -> None:
    if max_length is not None:
        _positive("max_length", max_length)
    if truncation_mode not in TRUNCATION_MODES:
        raise InputError(f"truncation_mode is {truncation_mode!r}, expected {' or '.join(TRUNCATION_MODES)}")


def _positive(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} is {value!r}, expected a whole number of 1 or more")
    return value


def _number_of_rows(data: Any) -> int | None:
    """Rows of a ``Dataset``; None for an ``IterableDataset``."""
    import datasets

    if isinstance(data, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise InputError(f"data has the splits {', '.join(data)}, expected one data set; pass data[split]")
    if isinstance(data, datasets.IterableDataset):
        return None
    if isinstance(data, datasets.Dataset):
        return len(data)
    raise InputError(
        f"data is a {type(data).__name__}, expected a datasets.Dataset or IterableDataset; open files with load_pairs"
    )


def _finish(
    counts: _Counts,
    data: Any,
    tokenizer: Any,
    max_length: int | None,
    truncation_mode: str,
    eos: str,
    source: str | None,
) -> PreferenceDistribution:
    """The counts with their provenance."""
    from plot_align.records import versions

    read = counts.rows + counts.dropped
    if read == 0:
        raise InputError("the data set is empty, expected at least one preference pair; check the file and the split")
    for side, tokens in (("chosen", counts.chosen), ("rejected", counts.rejected)):
        if not tokens.any():
            raise InputError(
                f"no {side} token is left of {read} rows ({counts.dropped} have a prompt that fills max_length = "
                f"{max_length}), expected completions on both sides; raise max_length or check the data set"
            )
    template = tokenizer.chat_template
    origin: dict[str, dict[str, Any]] = data.info.download_checksums or {data.info.dataset_name: {}}
    name, details = next(iter(origin.items()))
    found = versions()
    provenance = {
        "tokenizer": {"fingerprint": vocabulary_fingerprint(tokenizer), "size": counts.size},
        "policy": {
            "template": None
            if eos == "appended where missing" or not template
            else hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest(),
            "eos": eos,
            "eos_token": tokenizer.eos_token,
            "max_length": max_length,
            "truncation_mode": truncation_mode,
        },
        "sources": [
            {
                "id": source or name,
                "split": None if data.split is None else str(data.split),
                "config": data.info.config_name,
                "revision": details.get("revision"),
                "sha256": details.get("sha256"),
                "fingerprint": getattr(data, "_fingerprint", None),
                "tokenizer": tokenizer_name(tokenizer),
                "rows": counts.rows,
                "dropped_rows": counts.dropped,
                "tokens": {"chosen": int(counts.chosen.sum()), "rejected": int(counts.rejected.sum())},
                "versions": {
                    key: found[key] for key in ("plot-align", "trl", "transformers", "tokenizers", "datasets")
                },
            }
        ],
    }
    return PreferenceDistribution(torch.from_numpy(counts.chosen), torch.from_numpy(counts.rejected), provenance)


@contextlib.contextmanager
def progress_bar(label: str, shown: bool, total: int | None, unit: str = "rows") -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error; yields the function that moves it on by a number of ``unit``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    bar = Progress(
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not shown,
        auto_refresh=False,  # its refresh thread might hold a lock at the moment the workers are forked
    )
    with bar:
        task = bar.add_task("", total=total)
        drawn = time.monotonic()

        def advance(rows: int) -> None:
            nonlocal drawn
            bar.advance(task, rows)
            if time.monotonic() - drawn > 0.1:
                bar.refresh()
                drawn = time.monotonic()

        yield advance


# --- worker processes -----------------------------------------------------------------------------------------------

_WORKER: tuple[Any, _Rules] | None = None  # data set and rules of a worker process, sent to it once


def _start_worker(data: Any, rules: _Rules) -> None:
    global _WORKER
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread each: the processes are the parallelism, and the
    # tokenizer's thread pool does not survive a fork
    _WORKER = data, rules


def _work(first: int, batch: Any) -> _Counts:
    assert _WORKER is not None
    data, rules = _WORKER
    return _count_batch(data[batch.start : batch.stop] if isinstance(batch, range) else batch, first, rules)


def _count_in_processes(
    data: Any, batches: Iterator[tuple[int, Any]], rules: _Rules, workers: int, advance: Callable[[int], None]
) -> _Counts:
    """Add up batches counted by ``workers`` processes. At most two batches for each of them are under way."""
    import multiprocessing

    # Forking hands the data set over without a copy. Elsewhere than on Linux it is unsafe with threads around.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    counts = _Counts(rules.size)
    under_way: deque[Future[_Counts]] = deque()
    shared = data if _number_of_rows(data) is not None else None  # a stream is read here, and its batches are sent
    # The tokenizer warns on every fork unless this is set by then.
    unset = os.environ.get("TOKENIZERS_PARALLELISM") is None
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(shared, rules))
    try:
        for first, batch in batches:
            under_way.append(pool.submit(_work, first, batch))
            if len(under_way) == 2 * workers:
                advance(counts.add(under_way.popleft().result()))
        while under_way:  # in order, so that the first bad row is the one reported
            advance(counts.add(under_way.popleft().result()))
    except BrokenProcessPool:
        raise RunError(
            f"a worker process died while counting (num_proc = {workers}), most likely for lack of memory; use a "
            "smaller num_proc or batch_size"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
        if unset:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
    return counts


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(message, dict) and "role" in message for message in value)
