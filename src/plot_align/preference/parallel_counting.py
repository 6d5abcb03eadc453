"""Counting on several ranks or in several processes: which rows each counts, and how the counts are added up.

Each rank counts its own rows and meets the others once, at the end. There they agree on the first error in the data
set's order, if there is one, and add up their counts with one all-reduce. So the counts, and the row that an error
names, are those of one process.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plot_align.errors import InputError, PlotAlignError, RunError, first_line
from plot_align.parallel import process_state
from plot_align.preference.completions import RowError, Rules
from plot_align.preference.counting import Counts, count_batch

Batch = tuple[int, Any]  # index of the first row in the data set, and the rows


@dataclass
class Tally:
    """What a rank has counted so far.

    Attributes:
        counts: None before the first batch.
        at: index of the row it has come to. numbered: whether that is its place in the whole data set.
        terms: what must be the same on every rank, by name.
        origin: where the data are from, as the provenance says it.
    """

    counts: Counts | None = None
    at: int = -1
    numbered: bool = True
    terms: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)


# --- which rows -----------------------------------------------------------------------------------------------------


def own_batches(data: Any, batch_size: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
    """The batches of one rank: of a ``Dataset`` consecutive rows; of a stream whole files, or every n-th batch.

    Every n-th batch means that each rank reads the whole stream. It is taken where files cannot be told apart: their
    number is no multiple of the ranks', or the stream was mapped, filtered, cut or shuffled, and its parts do not hold
    the rows of the whole. Of whole files, rows are numbered as the rank meets them.

    Raises:
        InputError: the stream was already split among the ranks, or cannot be read further.
    """
    import datasets
    from datasets.distributed import split_dataset_by_node

    if isinstance(data, datasets.Dataset):
        if len(data) < ranks:  # which datasets does not split
            ranks = 1
            if rank > 0:
                return
        own = split_dataset_by_node(data, rank, ranks)
        before = sum(len(split_dataset_by_node(data, other, ranks)) for other in range(rank))
        for start in range(0, len(own), batch_size):
            yield before + start, own[start : start + batch_size]
        return
    if getattr(data, "_distributed", None) is not None and ranks > 1:
        raise InputError(
            "data was already split with split_dataset_by_node, expected the whole stream on every rank; pass it as "
            "it was before (or count each part without distributed=True, and merge)"
        )
    in_files = splits_files(data, ranks)
    first, own = 0, split_dataset_by_node(data, rank, ranks) if in_files else data
    for number, rows in enumerate(readable(own.iter(batch_size))):
        if in_files or number % ranks == rank:
            yield first, rows
        first += rows.num_rows if hasattr(rows, "num_rows") else len(next(iter(rows.values())))


def splits_files(data: Any, ranks: int) -> bool:
    """Whether each rank reads files of its own."""
    plain = type(getattr(data, "_ex_iterable", None)).__name__ in ("ArrowExamplesIterable", "ExamplesIterable")
    begun = plain and (data.epoch or getattr(data, "_starting_state_dict", None))  # shuffled again, or resumed
    return ranks > 1 and plain and not begun and data.num_shards % ranks == 0


def readable(stream: Iterator[Any]) -> Iterator[Any]:
    """``stream``; what its reader raises comes as a sentence: a bad line is only met on the way."""
    try:
        yield from stream
    except Exception as error:
        raise InputError(
            f"the data set cannot be read further ({type(error).__name__}: {' '.join(str(error).split())}); correct "
            "the file, or load it without streaming to learn which row it is"
        ) from error


# --- worker processes -----------------------------------------------------------------------------------------------


def counts_of_workers(data: Any, rules: Rules, batch_size: int, workers: int, shown: bool) -> Iterator[Counts]:
    """The counts of all batches of a ``Dataset``, made by the processes of ``Dataset.map``.

    What they make lies on disk on its way here: of each batch the ids that occur, and how often.

    Raises:
        InputError: some bad row; not always the first.
        RunError: a process died.
    """

    def count(rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        found = count_batch(rows, indices[0], rules)
        ids = np.flatnonzero(found.chosen + found.rejected)
        return {
            "ids": [ids],
            "chosen": [found.chosen[ids]],
            "rejected": [found.rejected[ids]],
            "rows": [found.rows],
            "dropped": [found.dropped],
        }

    with tempfile.TemporaryDirectory() as folder, _bars(shown):
        try:
            made = data.map(
                count,
                with_indices=True,
                batched=True,
                batch_size=batch_size,
                num_proc=workers,
                remove_columns=data.column_names,
                load_from_cache_file=False,
                cache_file_name=str(Path(folder) / "counts.arrow"),
                new_fingerprint="counts",  # else the tokenizer would be hashed
                desc="counting tokens",
            )
        except PlotAlignError:
            raise
        except RuntimeError as error:
            raise RunError(
                f"a worker process died while counting (num_proc = {workers}), most likely for lack of memory "
                f"({first_line(error)}); use a smaller num_proc or batch_size"
            ) from error
        for row in made.with_format("numpy"):
            counts = Counts(rules.size, int(row["rows"]), int(row["dropped"]))
            counts.chosen[row["ids"]], counts.rejected[row["ids"]] = row["chosen"], row["rejected"]
            yield counts


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Bars of ``datasets``, or none."""
    import datasets

    hidden = datasets.are_progress_bars_disabled()
    if not shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()


# --- the reduction --------------------------------------------------------------------------------------------------


@dataclass
class _Report:
    """What a rank says of itself at the end; ``error`` is the one that stopped it."""

    terms: dict[str, Any]
    origin: dict[str, Any]
    numbered: bool
    at: int
    error: PlotAlignError | None


def shared_tally(work: Callable[[int, int, Tally], None], distributed: bool) -> Tally:
    """Let every rank do its part of ``work``, and add up what they have counted.

    Args:
        work: counts into a tally the part of a rank of so many.
        distributed: every rank of the launched job calls this, for its part; False: this process does all of it.

    Returns:
        The tally, with the counts of all ranks and the main one's origin: the same everywhere.

    Raises:
        InputError, RunError: what stopped any rank, the same on all of them: the first in the order of the rows.
        RunError: another rank ended before it was done.
    """
    tally = Tally()
    state = process_state() if distributed else None
    if state is None or state.num_processes == 1:
        work(0, 1, tally)
        return tally
    stopped: Exception | None = None
    try:
        work(state.process_index, state.num_processes, tally)
    except Exception as error:  # whatever it is, the others wait
        stopped = error
    try:
        _agree(work, tally, stopped, state)
        _add_up(tally, state.device)
    except RuntimeError as error:
        if isinstance(error, PlotAlignError) or error is stopped:
            raise
        raise RunError(
            f"rank {state.process_index} could not add its counts to those of the other ranks, one of which most "
            f"likely ended early ({first_line(error)}); look at what the others said, and run again"
        ) from None
    return tally


def _agree(work: Callable[[int, int, Tally], None], tally: Tally, stopped: Exception | None, state: Any) -> None:
    """Raises what stopped any rank, or what the ranks do not have in common; else takes over the main one's origin."""
    from accelerate.utils import gather_object

    rank = state.process_index
    error = stopped if isinstance(stopped, PlotAlignError) else None
    if stopped is not None and error is None:
        error = RunError(f"rank {rank} failed while counting ({type(stopped).__name__}: {first_line(stopped)})")
    at = error.first if isinstance(error, RowError) else tally.at
    reports = gather_object([_Report(tally.terms, tally.origin, tally.numbered, at, error)])
    failed = [(report.at, other) for other, report in enumerate(reports) if report.error is not None]
    if failed:
        _, other = min(failed)
        first = reports[other].error
        if not all(report.numbered for report in reports):
            first = gather_object([_first_error(work) if rank == 0 else None])[0] or first
        elif other == rank and error is not stopped and stopped is not None:
            raise stopped  # with where it came from
        assert first is not None
        raise first
    for other, report in enumerate(reports):
        for name, value in report.terms.items():
            if value != reports[0].terms[name]:
                raise InputError(
                    f"{name} is {value!r} on rank {other} and {reports[0].terms[name]!r} on rank 0, expected the same "
                    "on every rank; give all of them the same data and options"
                )
    tally.origin = reports[0].origin


def _first_error(work: Callable[[int, int, Tally], None]) -> PlotAlignError | None:
    """What stops one process that counts everything: it alone can number the rows of a stream."""
    try:
        work(0, 1, Tally())
    except PlotAlignError as error:
        return error
    return None


def _add_up(tally: Tally, device: torch.device) -> None:
    from accelerate.utils import reduce

    counts = tally.counts
    assert counts is not None  # no rank was stopped
    own = np.concatenate([counts.chosen, counts.rejected, [counts.rows, counts.dropped]])  # (2V + 2,) int64
    everyone = reduce(torch.from_numpy(own).to(device), "sum").cpu().numpy()
    counts.chosen, counts.rejected = everyone[: counts.size].copy(), everyone[counts.size : -2].copy()
    counts.rows, counts.dropped = int(everyone[-2]), int(everyone[-1])
