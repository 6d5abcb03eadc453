"""Batches counted here, or by worker processes."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

from plot_align.errors import RunError
from plot_align.preference.completions import Rules
from plot_align.preference.counting import Counts, count_batch
from plot_align.preference.sharing import Batch

Result = Callable[[], Counts]  # the counts of a batch, or raises what is wrong with it
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>

_WORKER: tuple[Any, Rules] | None = None  # data set and rules of a worker process, sent to it once


def counted_here(batches: Iterator[Batch], count: Callable[[Any, int], Counts]) -> Generator[tuple[Batch, Result]]:
    """Each batch with its result, counted when that is asked for by ``count(rows, index of the first)``."""
    for batch in batches:
        yield batch, _raising(batch.rows) or partial(count, batch.rows, batch.first)


def counted_in_processes(
    data: Any, batches: Iterator[Batch], rules: Rules, workers: int
) -> Generator[tuple[Batch, Result]]:
    """Each batch with its result, in order, counted by ``workers`` processes; at most two for each are under way.

    Args:
        data: a ``Dataset``, of which the batches are ranges; or a stream, which is read here and sent to them.

    Raises:
        RunError: by a result: its process died.
    """
    import multiprocessing

    import datasets

    # Forking hands the data set over without a copy. Elsewhere than on Linux it is unsafe with threads around.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    shared = data if isinstance(data, datasets.Dataset) else None
    under_way: deque[tuple[Batch, Result]] = deque()
    # The tokenizer warns on every fork unless this is set by then.
    unset = os.environ.get("TOKENIZERS_PARALLELISM") is None
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(shared, rules))
    try:
        for batch in batches:
            under_way.append((batch, _raising(batch.rows) or _submitted(pool, batch, workers)))
            if len(under_way) == 2 * workers:
                yield under_way.popleft()
        while under_way:
            yield under_way.popleft()
    finally:
        pool.shutdown(cancel_futures=True)
        if unset:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)


def _raising(rows: Any) -> Result | None:
    """The result of what could not be read; None where it could."""
    if not isinstance(rows, Exception):
        return None

    def result() -> Counts:
        raise rows

    return result


def _submitted(pool: ProcessPoolExecutor, batch: Batch, workers: int) -> Result:
    future: Future[Counts] | None
    try:
        future = pool.submit(_work, batch.rows, batch.first)
    except BrokenProcessPool:
        future = None

    def result() -> Counts:
        try:
            if future is not None:
                return future.result()
        except BrokenProcessPool:
            pass
        raise RunError(
            f"a worker process died while counting (num_proc = {workers}), most likely for lack of memory; use a "
            "smaller num_proc or batch_size"
        )

    return result


def _start_worker(data: Any, rules: Rules) -> None:
    global _WORKER
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent answers for it
    if sys.platform == "linux":
        # Were the parent killed, this process would wait for work forever, and hold open what it inherited: the
        # connections by which other ranks notice that the parent is gone.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread each: the processes are the parallelism, and the
    # tokenizer's thread pool does not survive a fork
    _WORKER = data, rules


def _work(rows: Any, first: int) -> Counts:
    assert _WORKER is not None
    data, rules = _WORKER
    return count_batch(data[rows.start : rows.stop] if isinstance(rows, range) else rows, first, rules)
