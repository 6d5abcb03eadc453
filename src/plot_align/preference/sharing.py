"""Counting on several ranks: whose batches are whose, and the one reduction at the end.

Every rank counts its own batches and talks to the others only when it is done: they gather a short report of each,
agree on the first error if there is one, and add up their counts. So the counts, and the row that an error names, are
those of one process.

How the batches are dealt:

- ``Dataset``: consecutive rows, as many for each rank.
- ``IterableDataset`` of enough shards: whole shards, each read by one rank.
- any other ``IterableDataset``: of its batches every ``ranks``-th. Each rank reads all of the stream and tokenises its
  own, so that reading does not get faster: give a large stream at least as many shards (files) as ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from plot_align.errors import InputError, PlotAlignError, RunError, first_line
from plot_align.inference.ranks import process_state
from plot_align.preference.completions import RowError
from plot_align.preference.counting import Counts

# What `datasets` applies to each row for itself, so that the shards of a stream hold the rows of the whole. Others do
# not: take() and skip() of a shard are not those of the stream, and a batched map() may mix rows.
_ROW_BY_ROW = {
    "ArrowExamplesIterable",
    "ExamplesIterable",
    "FilteredExamplesIterable",
    "FormattedExamplesIterable",
    "MappedExamplesIterable",
    "SelectColumnsIterable",
    "VerticallyConcatenatedMultiSourcesExamplesIterable",
}


class Share(NamedTuple):
    """The part of rank ``rank`` of ``ranks``."""

    rank: int = 0
    ranks: int = 1


class Batch(NamedTuple):
    """Consecutive rows.

    Attributes:
        shard: which shard of a stream they are from; 0 where it is read as a whole.
        first: index of the first of them, within the shard.
        rows: as the data set gives them; the range of their indices, for a worker to read; or what the reader raised.
    """

    shard: int
    first: int
    rows: Any


@dataclass
class Tally:
    """What a rank has counted so far, and where it is.

    Attributes:
        counts: of the batches done; None before the first is begun.
        seen: number of rows of each shard in them.
        at: shard and row of the batch in hand; before the first of all, as long as none is.
        terms: what must be the same on every rank, by name.
        origin: where the data are from, as the provenance says it.
    """

    counts: Counts | None = None
    seen: dict[int, int] = field(default_factory=dict)
    at: tuple[int, int] = (-1, 0)
    terms: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)


def own_batches(data: Any, batch_size: int, share: Share, *, lazy: bool = False) -> Iterator[Batch]:
    """This rank's batches in order. What the reader raises comes as the last of them, in its place.

    Args:
        data: ``Dataset`` or ``IterableDataset``, the same on every rank.
        lazy: of a ``Dataset``, only the range of the rows.

    Raises:
        InputError: the stream was already split among the ranks.
    """
    import datasets

    if isinstance(data, datasets.Dataset):
        own = _consecutive(data, share)
        for start in own[::batch_size]:
            rows = range(start, min(start + batch_size, own.stop))
            yield Batch(0, start, rows if lazy else data[rows.start : rows.stop])
    elif shards := shards_to_deal(data, share.ranks):
        for shard in range(share.rank, shards, share.ranks):
            yield from _read(data.shard(shards, shard), batch_size, shard)
    else:
        for number, batch in enumerate(_read(data, batch_size, 0)):
            if number % share.ranks == share.rank or isinstance(batch.rows, Exception):
                yield batch


def own_rows(data: Any, share: Share) -> int | None:
    """Number of rows in :func:`own_batches`; None where only reading tells."""
    import datasets

    return len(_consecutive(data, share)) if isinstance(data, datasets.Dataset) else None


def _consecutive(data: Any, share: Share) -> range:
    return range(len(data) * share.rank // share.ranks, len(data) * (share.rank + 1) // share.ranks)


def shards_to_deal(stream: Any, ranks: int) -> int:
    """How many shards of a stream are dealt to the ranks; 0 where each rank reads all of it."""
    if ranks == 1:
        return 0
    if getattr(stream, "_distributed", None) is not None:
        raise InputError(
            "data was already split with split_dataset_by_node, expected the whole stream on every rank; pass it as "
            "it was before (or count each part without distributed=True, and merge)"
        )
    if stream.epoch or getattr(stream, "_starting_state_dict", None):  # shuffled again, or resumed: shard() forgets it
        return 0
    shards = int(stream.num_shards)
    fair = -(-shards // ranks) * ranks <= 1.25 * shards  # the rank with most of them has at most a quarter more
    return shards if fair and _row_by_row(getattr(stream, "_ex_iterable", None)) else 0


def _row_by_row(source: Any) -> bool:
    if type(source).__name__ not in _ROW_BY_ROW:
        return False
    if getattr(source, "with_indices", False) or getattr(source, "batched", False):
        return False
    inner = [*getattr(source, "ex_iterables", ()), *filter(None, [getattr(source, "ex_iterable", None)])]
    return all(map(_row_by_row, inner))


def _read(stream: Any, batch_size: int, shard: int) -> Iterator[Batch]:
    first = 0
    for rows in guarded(stream.iter(batch_size=batch_size)):
        yield Batch(shard, first, rows)
        if not isinstance(rows, Exception):
            first += rows.num_rows if hasattr(rows, "num_rows") else len(next(iter(rows.values())))


def guarded(stream: Iterator[Any]) -> Iterator[Any]:
    """``stream``; what its reader raises comes as its last item, a sentence: a bad line is only met on the way."""
    try:
        yield from stream
    except Exception as error:
        yield InputError(
            f"the data set cannot be read further ({type(error).__name__}: {' '.join(str(error).split())}); correct "
            "the file, or load it without streaming to learn which row it is"
        )


# --- the reduction --------------------------------------------------------------------------------------------------


@dataclass
class _Report:
    """What a rank says of itself at the end; ``error`` is the one that stopped it."""

    terms: dict[str, Any]
    origin: dict[str, Any]
    seen: dict[int, int]
    at: tuple[int, int]
    error: PlotAlignError | None


def shared_tally(work: Callable[[Share, Tally], None], distributed: bool) -> Tally:
    """Do ``work`` on this rank's share and add up what all ranks have counted.

    Args:
        work: counts a share into a tally.
        distributed: every rank of the launched job calls this, for its share; False: this process does all of it.

    Returns:
        The tally, with the counts of all ranks and the main one's origin: the same everywhere.

    Raises:
        InputError, RunError: what stopped any rank, the same on all of them: the first in the order of the rows.
        RunError: another rank ended before it was done.
    """
    tally = Tally()
    state = process_state() if distributed else None
    if state is None or state.num_processes == 1:
        work(Share(), tally)
        return tally
    stopped: Exception | None = None
    try:
        work(Share(state.process_index, state.num_processes), tally)
    except Exception as error:  # whatever it is, the others wait
        stopped = error
    try:
        _agree(tally, stopped, state.process_index)
        _add_up(tally, state.device)
    except RuntimeError as error:
        if isinstance(error, PlotAlignError) or error is stopped:
            raise
        raise RunError(
            f"rank {state.process_index} could not add its counts to those of the other ranks, one of which most "
            f"likely ended early ({first_line(error)}); look at what the others said, and run again"
        ) from None
    return tally


def _agree(tally: Tally, stopped: Exception | None, rank: int) -> None:
    """Raises what stopped any rank, or what the ranks do not have in common; else takes over the main one's origin."""
    from accelerate.utils import gather_object

    error = stopped if isinstance(stopped, PlotAlignError) else None
    if stopped is not None and error is None:
        error = RunError(f"rank {rank} failed while counting ({type(stopped).__name__}: {first_line(stopped)})")
    reports = gather_object([_Report(tally.terms, tally.origin, tally.seen, tally.at, error)])
    failed = [(_position(report), other) for other, report in enumerate(reports) if report.error is not None]
    if failed:
        (shard, _), other = min(failed)
        first = reports[other].error
        if isinstance(first, RowError):  # of the shards before its own all rows were read, by this rank or by others
            first = first.moved(sum(rows for report in reports for at, rows in report.seen.items() if at < shard))
        if stopped is not None and other == rank and not isinstance(stopped, PlotAlignError):
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


def _position(report: _Report) -> tuple[int, int]:
    """Shard and row of its error."""
    shard, row = report.at
    return shard, report.error.first if isinstance(report.error, RowError) else row


def _add_up(tally: Tally, device: torch.device) -> None:
    from accelerate.utils import reduce

    counts = tally.counts
    assert counts is not None  # no rank was stopped
    own = np.concatenate([counts.chosen, counts.rejected, [counts.rows, counts.dropped]])  # (2V + 2,) int64
    everyone = reduce(torch.from_numpy(own).to(device), "sum").cpu().numpy()
    counts.chosen, counts.rejected = everyone[: counts.size].copy(), everyone[counts.size : -2].copy()
    counts.rows, counts.dropped = int(everyone[-2]), int(everyone[-1])
