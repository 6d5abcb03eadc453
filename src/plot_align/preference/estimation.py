"""Count the tokens that a TRL preference trainer trains on.

The tokens are those of TRL 1.16 that are scored, see :mod:`~completions`. One batch is in memory at a time,
and only counts are kept. Several ranks or processes share the work, see :mod:`~sharing`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from plot_align.errors import InputError
from plot_align.preference.completions import PAIRED, UNPAIRED, Rules, scored_range, scored_sides
from plot_align.preference.counting import Counts, count_batch, count_table
from plot_align.preference.datasets import load_pairs
from plot_align.preference.distribution import (
    PreferenceDistribution,
    tokenizer_name,
    vocabulary_fingerprint,
    vocabulary_size,
)
from plot_align.preference.parallel_counting import (
    Tally,
    counts_of_workers,
    own_batches,
    readable,
    shared_tally,
    splits_files,
)
from plot_align.text import terminal

__all__ = [
    "ScoredSequence",
    "estimate",
    "estimate_tokenized",
    "load_pairs",
    "open_rows",
    "progress_bar",
    "scored_pairs",
    "scored_range",
]

TRUNCATION_MODES = ("keep_start", "keep_end")


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
    distributed: bool = False,
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
        num_proc: worker processes, of ``Dataset.map``; not for streams. None or 1: none (a fast tokenizer uses every
            core anyway). Counts do not depend on it.
        batch_size: rows tokenised at a time. Counts do not depend on it.
        progress: show a progress bar on standard error (with ``distributed``, of the main rank's share).
        source: what to call the data set in the provenance; None: what the data set says of itself.
        distributed: under ``accelerate launch`` or torchrun, count this rank's share and add up at the end: every rank
            must call this, with the same data and options, and every rank gets the same counts. It is asked for and
            not guessed, because ``if rank == 0: estimate(...)`` would then wait for the others forever. Without a
            launcher it changes nothing. ``num_proc`` is for one process alone. See :mod:`~sharing` for streams.

    Returns:
        Counts over the tokenizer's ids, with their provenance.

    Raises:
        InputError: not a preference set, a row that cannot be used (named by its index, from 0), an empty data set, a
            side without any token, a tokenizer without EOS or chat template where one is needed, an argument out of
            range.
        RunError: a worker process or another rank died.
    """
    eos = "appended where missing"

    def count(rank: int, ranks: int, tally: Tally) -> None:
        nonlocal eos
        workers = _positive("num_proc", 1 if num_proc is None else num_proc)
        rows, rules = open_rows(data, tokenizer, max_length, truncation_mode, batch_size)
        if rules.conversational:
            eos = "by the chat template"
        _begin(tally, data, tokenizer, rules.size, max_length, truncation_mode, batch_size, source)
        one = partial(count_batch, rules=rules)
        if workers == 1:
            _add_all(rows, one, tally, batch_size, rank, ranks, progress)
            return
        _check_workers(workers, rows, ranks)
        assert tally.counts is not None
        try:
            for counts in counts_of_workers(rows, rules, batch_size, workers, progress):
                tally.counts.add(counts)
        except InputError:  # some bad row; counted again in order, the first is met
            _add_all(rows, one, tally, batch_size, rank, ranks, progress)
            raise

    tally = shared_tally(count, distributed)
    return _finish(tally, tokenizer, max_length, truncation_mode, eos)


def estimate_tokenized(
    dataset: Any,
    tokenizer: Any,
    *,
    max_length: int | None,
    truncation_mode: str = "keep_start",
    batch_size: int = 1000,
    progress: bool = True,
    source: str | None = None,
    distributed: bool = False,
) -> PreferenceDistribution:
    """Count the completion tokens of rows that a TRL trainer has already tokenised, e.g. ``trainer.train_dataset``.

    Args:
        dataset: ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` (``DPOTrainer``; before TRL 0.29 each ends in
            ``_input_ids``), ``prompt_ids``, ``completion_ids``, ``label`` (``KTOTrainer``), ``prompt_ids``,
            ``ranked_ids`` (``PROTrainer``: the best completion counts as chosen, all others as rejected), or
            ``chosen_labels``, ``rejected_labels`` (``CPOTrainer``, ``ORPOTrainer``). ``Dataset`` or
            ``IterableDataset``.
        tokenizer: the one they were tokenised with.
        max_length: what the trainer's collator truncates to (``args.max_length``); None: no limit. Rows of labels were
            truncated when they were tokenised: there it is only noted in the provenance.
        truncation_mode: ``args.truncation_mode`` of ``DPOConfig``; the other trainers always keep the start.
        batch_size: rows read at a time. Counts do not depend on it.
        progress: show a progress bar on standard error.
        source: what to call the data set in the provenance; None: what the data set says of itself.
        distributed: see :func:`estimate`.

    Raises:
        InputError: other columns, an id outside the tokenizer's vocabulary, an empty data set, a side without any
            token, an argument out of range.
        RunError: another rank died.
    """

    def count(rank: int, ranks: int, tally: Tally) -> None:
        _check_lengths(max_length, truncation_mode)
        _positive("batch_size", batch_size)
        _require_dataset(dataset)
        size = vocabulary_size(tokenizer)
        _begin(tally, dataset, tokenizer, size, max_length, truncation_mode, batch_size, source)
        tally.origin["fingerprint"] = None  # that of a mapped data set depends on how many processes mapped it
        one = partial(count_table, size=size, max_length=max_length, truncation_mode=truncation_mode)
        _add_all(dataset.with_format("arrow"), one, tally, batch_size, rank, ranks, progress)

    tally = shared_tally(count, distributed)
    return _finish(tally, tokenizer, max_length, truncation_mode, "as tokenised by the trainer")


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
    rows, rules = open_rows(data, tokenizer, max_length, truncation_mode, batch_size)
    if rules.completions != PAIRED:
        raise InputError(
            "the data set has a column 'label' instead of 'chosen' and 'rejected', expected pairs; pair its rows first"
        )
    for first, batch in own_batches(rows, batch_size):
        _, sides = scored_sides(batch, first, rules)
        yield from zip(*(_windows(ids, begin, end, rules) for ids, _, begin, end in sides), strict=True)


def _windows(ids: list[list[int]], begin: np.ndarray, end: np.ndarray, rules: Rules) -> Iterator[ScoredSequence]:
    for row, start, stop in zip(ids, begin.tolist(), end.tolist(), strict=True):
        yield window(row, start, stop, rules.max_length, rules.truncation_mode)


def window(row: Sequence[int], start: int, stop: int, max_length: int | None, truncation_mode: str) -> ScoredSequence:
    """The part of a row that TRL trains on; ``start`` and ``stop`` of the scored tokens count in the whole row."""
    cut = 0
    if max_length is not None and truncation_mode == "keep_end":
        cut = max(len(row) - max_length, 0)
    kept = row[cut:] if max_length is None else row[cut : cut + max_length]
    return ScoredSequence(np.array(kept, np.int32), start - cut, stop - cut)


# --- opening and closing --------------------------------------------------------------------------------------------


def _begin(
    tally: Tally,
    data: Any,
    tokenizer: Any,
    size: int,
    max_length: int | None,
    truncation_mode: str,
    batch_size: int,
    source: str | None,
) -> None:
    """What is known of the count before its first batch."""
    import datasets

    tally.counts = Counts(size)
    tally.terms = {
        "the tokenizer's fingerprint": vocabulary_fingerprint(tokenizer),
        "the number of rows": len(data) if isinstance(data, datasets.Dataset) else "that of a stream",
        "max_length": max_length,
        "truncation_mode": truncation_mode,
        "batch_size": batch_size,
    }
    known: dict[str, dict[str, Any]] = data.info.download_checksums or {data.info.dataset_name: {}}
    name, details = next(iter(known.items()))
    tally.origin = {
        "id": source or name,
        "split": None if data.split is None else str(data.split),
        "config": data.info.config_name,
        "revision": details.get("revision"),
        "sha256": details.get("sha256"),
        "fingerprint": getattr(data, "_fingerprint", None),
    }


def _add_all(
    data: Any, count: Callable[[Any, int], Counts], tally: Tally, batch_size: int, rank: int, ranks: int, shown: bool
) -> None:
    """Add up the batches of one rank in order, under the bar of the main one; the others have about as much to do.

    Args:
        count: of the rows of a batch, and the index of the first of them.
    """
    import datasets

    assert tally.counts is not None
    tally.numbered = not splits_files(data, ranks)
    label = "counting tokens" if ranks == 1 else f"counting tokens, process 1 of {ranks}"
    total = -(-len(data) // ranks) if isinstance(data, datasets.Dataset) else None
    with progress_bar(label, shown and rank == 0, total) as advance:
        for tally.at, rows in own_batches(data, batch_size, rank, ranks):
            advance(tally.counts.add(count(rows, tally.at)))


def _check_workers(workers: int, data: Any, ranks: int) -> None:
    import datasets

    if not isinstance(data, datasets.Dataset):
        raise InputError(
            f"num_proc is {workers} for a stream, expected none, as only a Dataset is split among workers; leave it "
            "out (several ranks share a stream), or load the data set without streaming"
        )
    if ranks > 1:
        raise InputError(f"num_proc is {workers} on {ranks} ranks, expected none; start more ranks instead")


def open_rows(
    data: Any, tokenizer: Any, max_length: int | None, truncation_mode: str, batch_size: int
) -> tuple[Any, Rules]:
    """The rows to read (only the columns used, as Python objects), and the rules as the first of them shows them.

    Args and errors are those of :func:`estimate`.
    """
    from transformers import PreTrainedTokenizerBase

    _check_lengths(max_length, truncation_mode)
    _positive("batch_size", batch_size)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(
            f"tokenizer is a {type(tokenizer).__name__}, expected a transformers tokenizer; of a processor, pass "
            "processor.tokenizer"
        )
    in_memory = _require_dataset(data)
    if not in_memory or data.format["type"] != "custom":
        data = data.with_format(None)  # Python objects
    first = next(readable(iter(data)), None)
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
    if completions == UNPAIRED and truncation_mode != "keep_start":
        raise InputError(
            f"truncation_mode is {truncation_mode!r}, but KTOTrainer, which trains on rows with a label, only keeps "
            "the start; use keep_start"
        )
    used = (*(() if implicit else ("prompt",)), *completions, "label", "tools", "chat_template_kwargs")
    if in_memory:
        data = data.select_columns([name for name in used if name in columns])  # decode no more than that
    size = vocabulary_size(tokenizer)
    return data, Rules(tokenizer, size, completions, implicit, conversational, max_length, truncation_mode)


def _layout(columns: tuple[str, ...]) -> tuple[tuple[str, ...], bool]:
    """Completion columns, and whether the prompt is implicit."""
    listed = ", ".join(columns) or "none"
    if "prompt_ids" in columns:
        raise InputError(f"the data set is already tokenised (columns {listed}); use estimate_tokenized")
    if {"image", "images"} & set(columns):
        raise InputError(
            f"the data set has images (columns {listed}), expected text only; images have no token counts"
        )
    if set(PAIRED) <= set(columns):
        return PAIRED, "prompt" not in columns
    if {"prompt", "completion", "label"} <= set(columns):
        return UNPAIRED, False
    missing = [name for name in PAIRED if name not in columns]
    raise InputError(
        f"the data set has no column {' and no column '.join(map(repr, missing))} (columns: {listed}), expected "
        "chosen and rejected (and prompt, where they do not contain it), or prompt, completion and label; rename its "
        "columns"
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


def _require_dataset(data: Any) -> bool:
    """True for a ``Dataset``, False for an ``IterableDataset``; anything else is refused."""
    import datasets

    if isinstance(data, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise InputError(f"data has the splits {', '.join(data)}, expected one data set; pass data[split]")
    if isinstance(data, datasets.Dataset | datasets.IterableDataset):
        return isinstance(data, datasets.Dataset)
    raise InputError(
        f"data is a {type(data).__name__}, expected a datasets.Dataset or IterableDataset; open files with load_pairs"
    )


def _finish(
    tally: Tally, tokenizer: Any, max_length: int | None, truncation_mode: str, eos: str
) -> PreferenceDistribution:
    """The counts with their provenance."""
    from plot_align.records import versions

    counts = tally.counts
    assert counts is not None
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
                **tally.origin,
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
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    bar = Progress(
        *columns,
        TimeRemainingColumn(),
        console=terminal(sys.stderr),
        disable=not shown,
        auto_refresh=False,  # no thread beside the tokenizer's
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
