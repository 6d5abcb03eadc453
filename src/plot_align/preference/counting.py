"""Counts of token ids over batches of rows: all that is ever kept of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from plot_align.errors import InputError
from plot_align.preference.completions import RowError, Rules, Side, dropped_rows, scored_range, scored_sides

LABELS = ("chosen_labels", "rejected_labels")  # prompt and completion, −100 over the prompt
# DPO's columns before TRL 0.29, and their names since
_EARLIER = {f"{part}_input_ids": f"{part}_ids" for part in ("prompt", "chosen", "rejected")}


@dataclass
class Counts:
    """Counts of some rows; all that is ever kept of them."""

    size: int  # V
    chosen: np.ndarray = field(init=False)  # (V,) int64
    rejected: np.ndarray = field(init=False)  # (V,) int64
    rows: int = 0
    dropped: int = 0

    def __post_init__(self) -> None:
        self.chosen, self.rejected = np.zeros(self.size, np.int64), np.zeros(self.size, np.int64)

    def add(self, other: Counts) -> int:
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


def _kept(lengths: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Mask over the concatenated completions (N,), N = Σ lengths: positions from ``start`` to ``stop`` of each."""
    position = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # (N,)
    return (position >= np.repeat(start, lengths)) & (position < np.repeat(stop, lengths))


def count_batch(batch: dict[str, list[Any]], first: int, rules: Rules) -> Counts:
    """Count a batch of raw rows; ``first`` is the index of its first row."""
    return count_sides(*scored_sides(batch, first, rules), rules)


def count_sides(length: np.ndarray, sides: list[Side], rules: Rules) -> Counts:
    """Count what :func:`~plot_align.preference.completions.scored_sides` found."""
    counts = Counts(rules.size)
    for side_ids, side_liked, begin, end in sides:
        ranges = zip(side_ids, begin.tolist(), end.tolist(), strict=True)
        scored = end - begin  # (R,)
        flat = np.fromiter(chain.from_iterable(row[a:b] for row, a, b in ranges), np.int64, int(scored.sum()))  # (N,)
        counts.add_tokens(flat, np.repeat(side_liked, scored))
    counts.dropped = dropped_rows(length, rules.max_length, rules.truncation_mode)
    counts.rows = len(length) - counts.dropped
    return counts


def count_table(table: Any, first: int, size: int, max_length: int | None, truncation_mode: str) -> Counts:
    """Count a batch of tokenised rows.

    Args:
        table: ``pyarrow.Table`` of R rows. first: index of its first row, for errors. size: V.
        max_length, truncation_mode: see :func:`plot_align.preference.estimation.estimate_tokenized`.

    Raises:
        InputError: other columns than those of a trainer.
        RowError: the first row that cannot be used, however the rows fall into tables.
    """
    names = set(table.column_names)
    if set(_EARLIER) <= names and not set(LABELS) <= names:
        table = table.select(list(_EARLIER)).rename_columns(list(_EARLIER.values()))
    _check_columns(table.column_names, truncation_mode)
    try:
        return _count_table(table, size, max_length, truncation_mode)
    except _Unusable:
        for index in range(table.num_rows):  # it looked at a column at a time
            try:
                _count_table(table.slice(index, 1), size, max_length, truncation_mode)
            except _Unusable as error:
                raise RowError("dataset", first + index, first + index, str(error)) from None
        raise


class _Unusable(Exception):
    """What is wrong with some row of a table."""


def _count_table(table: Any, size: int, max_length: int | None, truncation_mode: str) -> Counts:
    if set(LABELS) <= set(table.column_names):
        return _count_labels(table, size)
    counts = Counts(size)
    _, length = _flatten(table["prompt_ids"].combine_chunks(), "prompt_ids")
    for column, flat, lengths, prompt, liked in _sides(table, length):
        _check_ids(flat, column, size)
        start, stop = scored_range(prompt, lengths, max_length, truncation_mode)
        kept = _kept(lengths, start, stop)  # (N,)
        counts.add_tokens(flat[kept], np.repeat(liked, lengths)[kept])
    counts.dropped = dropped_rows(length, max_length, truncation_mode)
    counts.rows = len(length) - counts.dropped
    return counts


def _sides(table: Any, length: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Of each column of completions: its name, their ids one after another (N,), and of each completion (S,) its
    length, that of its prompt, and whether it is a chosen one. ``length`` is that of each row's prompt (R,)."""
    if "ranked_ids" in table.column_names:
        completions, number = _flatten(table["ranked_ids"].combine_chunks(), "ranked_ids")
        flat, lengths = _flatten(completions, "ranked_ids")
        liked = np.zeros(len(lengths), bool)
        liked[np.cumsum(number) - number] = True  # the best of each list stands first
        yield "ranked_ids", _int64(flat), lengths, np.repeat(length, number), liked
        return
    paired = "chosen_ids" in table.column_names
    for column in ("chosen_ids", "rejected_ids") if paired else ("completion_ids",):
        flat, lengths = _flatten(table[column].combine_chunks(), column)
        if paired:
            liked = np.full(len(lengths), column == "chosen_ids")
        else:
            liked = np.array([bool(label) for label in table["label"].to_pylist()], bool)
        yield column, _int64(flat), lengths, length, liked


def _count_labels(table: Any, size: int) -> Counts:
    """Count a batch of rows that carry labels, a ``pyarrow.Table``: what they mark, but for a row's first token."""
    counts = Counts(size)
    for column in LABELS:
        items, lengths = _flatten(table[column].combine_chunks(), column)
        flat = _int64(items)
        scored = (flat != -100) & _kept(lengths, np.ones_like(lengths), lengths)  # (N,)
        ids = flat[scored]
        _check_ids(ids, column, size)
        counts.add_tokens(ids, np.full(len(ids), column == LABELS[0]))
    counts.rows = table.num_rows
    return counts


def _check_ids(ids: np.ndarray, column: str, size: int) -> None:
    if len(ids) and (int(ids.max()) >= size or int(ids.min()) < 0):
        raise _Unusable(
            f"{column!r} has token id {int(ids.max() if ids.max() >= size else ids.min())}, expected ids below "
            f"{size}; pass the tokenizer that the trainer tokenised with"
        )


def _flatten(array: Any, column: str) -> tuple[Any, np.ndarray]:
    """Items of every list one after another, as an Arrow array (N,), and the number of them in each, int64 (R,)."""
    if array.null_count:
        raise _Unusable(f"{column!r} is missing, expected token ids; remove the row")
    return array.flatten(), _int64(array.value_lengths())


def _int64(array: Any) -> np.ndarray:
    return array.to_numpy(zero_copy_only=False).astype(np.int64)


def _check_columns(columns: list[str], truncation_mode: str) -> None:
    unpaired = {"prompt_ids", "completion_ids", "label"} <= set(columns)
    if unpaired or set(LABELS) <= set(columns):
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
