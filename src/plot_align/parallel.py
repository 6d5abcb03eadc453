"""Run one program in several processes in step, each computing some of the jobs. accelerate connects them.

Every process runs the same code on the same input. They meet only in the functions below: in :func:`each` to divide
jobs, in :func:`on_main` where only one may act (files, endpoints), in :func:`everywhere` to learn of errors. One
process computes a whole job (a batch, a request under attack), so no result depends on the number of processes.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from plot_align.errors import InputError, RunError, first_line
from plot_align.text import printable

Job = TypeVar("Job")
Result = TypeVar("Result")

LAUNCHED = "PLOT_ALIGN_LAUNCHED"  # set in the processes that accelerate starts, so that they do not start others
_BEATS = 10  # signs of life in that time
_STARTS = 6  # times that, until all have started
_DONE = "done"  # the last sign of life of a process that needs the others no more
PATIENCE = 300  # seconds without a sign of life after which a process counts as hanging; PLOT_ALIGN_PATIENCE

_state: Any = None  # accelerate's PartialState inside in_step() with several processes
_alone = False  # whether this process is computing a job by itself
_meetings = 0  # how often the processes have met
_depth = 0  # how many everywhere() calls this process is inside


class OutOfStep(RunError):
    """The processes wait for each other at different places, or one is gone: the run must end."""


def process_state(**options: Any) -> Any:
    """accelerate's ``PartialState``, also for processes on the CPU, which it joins only when told to.

    Args:
        options: of ``torch.distributed.init_process_group``, where it is not yet initialised.
    """
    import torch
    from accelerate import PartialState

    if PartialState._shared_state:  # accelerate refuses a second call with different arguments
        return PartialState()
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu, **options)


def patient_state() -> Any:
    """Like :func:`process_state`, but processes wait a month for each other (torch's default is half an hour): a job
    may take long. Within :func:`pulse` they do not wait for one that gives no sign of life; nor here, where they find
    each other."""
    patience = _patience()
    limit = threading.Timer(_STARTS * patience, _end, ["another process has not started, or hangs"])
    limit.daemon = True
    if patience > 0:
        limit.start()
    try:
        return process_state(timeout=timedelta(days=30))
    finally:
        limit.cancel()


@contextmanager
def pulse(state: Any) -> Iterator[None]:
    """Within this context every process tells the others that it lives, and ends itself if another is silent.

    A process that was killed breaks its connections, which the others notice at once. One that was stopped, or whose
    machine hangs, does not: the others would wait for it in vain.

    Args:
        state: accelerate's ``PartialState``.
    """
    patience = _patience()
    if state.num_processes == 1 or patience <= 0:
        yield
        return
    pulse_of = _Pulse(state.process_index, state.num_processes, patience)
    threads = [threading.Thread(target=run, daemon=True) for run in (pulse_of.beat, pulse_of.watch)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        pulse_of.done.set()
        threads[0].join(5)


def _patience() -> float:
    given = os.environ.get("PLOT_ALIGN_PATIENCE", str(PATIENCE))
    try:
        return float(given)
    except ValueError:
        raise InputError(f"PLOT_ALIGN_PATIENCE is {given!r}, expected seconds, e.g. 300, or 0 to wait") from None


class _Pulse:
    """The signs of life of one process, and of the others as it sees them.

    They are counted in rounds of this process: while it is stopped itself, no time passes.
    """

    def __init__(self, own: int, size: int, patience: float) -> None:
        self.own, self.patience = own, patience
        self.others = [other for other in range(size) if other != own]
        self.done = threading.Event()
        self.rounds = 0

    def beat(self) -> None:
        """Tell and hear, in rounds. They go through the store by which the processes found each other."""
        from torch.distributed import distributed_c10d

        store: Any = distributed_c10d._get_default_store()
        store = store.clone()  # a connection of its own, as each operation waits for its answer
        heard = dict.fromkeys(self.others, b"")
        silent = dict.fromkeys(self.others, 0)
        while not self.done.is_set():
            self.rounds += 1
            try:
                store.set(_pulse_of(self.own), str(self.rounds))
                there = [other for other in self.others if store.check([_pulse_of(other)])]
                beats = {other: store.get(_pulse_of(other)) for other in there}
            except Exception:
                self.done.set()  # the store is gone: a process has ended, which the next meeting tells
                return
            for other in self.others:
                now = beats.get(other, heard[other])
                silent[other] = silent[other] + 1 if now == heard[other] != _DONE.encode() else 0
                heard[other] = now
                if silent[other] > _BEATS:
                    self._end(other)
            self.done.wait(self.patience / _BEATS)
        with suppress(Exception):
            store.set(_pulse_of(self.own), _DONE)

    def watch(self) -> None:
        """End this process if the one that holds the store, the first, does not answer: no operation on it returns."""
        seen, still = 0, 0
        while not self.done.wait(self.patience / _BEATS):
            still = still + 1 if self.rounds == seen else 0
            seen = self.rounds
            if still > _BEATS:
                self._end(0)

    def _end(self, other: int) -> None:
        _end(f"process {other} has given no sign of life for {self.patience:g} seconds")


def _pulse_of(rank: int) -> str:
    return f"plot_align/pulse/{rank}"


def _end(reason: str) -> None:
    """End this process, whose main thread waits inside of a library, with a sentence."""
    message = f"{reason}; what is finished is kept, so end that process and run the command again"
    if not tell_launcher(message):
        print(f"plot-align: {printable(message)}", file=sys.stderr, flush=True)
    os._exit(1)


def tell_launcher(message: str) -> bool:
    """Hand this process's error to :func:`plot_align.cli.launch.launch`, which prints one for all processes. False if
    there is no launcher of ours."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if LAUNCHED not in os.environ or not path:
        return False
    now = time.time()  # torch elastic reads whole seconds, too coarse to find the first error
    content = {"message": message, "extraInfo": {"timestamp": str(int(now)), "time": now}}
    Path(path).write_text(json.dumps({"message": content}), encoding="utf-8")
    return True


@contextmanager
def in_step() -> Iterator[None]:
    """Within this context, the processes that a launcher started divide their work."""
    global _state
    state = patient_state()
    with pulse(state):
        if state.num_processes > 1:
            _state = state
            atexit.register(_leave)
            if not state.is_main_process:
                import datasets
                from transformers.utils import logging

                datasets.disable_progress_bars()
                logging.disable_progress_bar()
        try:
            yield
        finally:
            _state = None


def _leave() -> None:
    """Else a thread of gloo may still run when the interpreter ends, which aborts it."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def size() -> int:
    """How many processes divide the work here."""
    return 1 if _state is None or _alone else _state.num_processes


def rank() -> int:
    return 0 if _state is None else _state.process_index


def own_device(wanted: str | None) -> str:
    """The device for a model of this process.

    Args:
        wanted: what the user named; None takes an accelerator where there is one, each process its own.

    Raises:
        InputError: the user named one accelerator for several processes.
    """
    import torch

    if _state is None:
        return wanted or str(torch.accelerator.current_accelerator() or "cpu")
    if wanted is not None and torch.device(wanted).index is not None:
        raise InputError(
            f"the device is {wanted!r} for {_state.num_processes} processes, expected one each; leave --device out, "
            "or name a kind such as cuda or cpu"
        )
    own = _state.device
    return str(own) if wanted is None or torch.device(wanted).type == own.type else wanted


def each(function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
    """Yield ``function(job)`` for every job in order, on every process. Each computes one job at a time, then they
    meet.

    Args:
        function: must return picklable results.

    Raises:
        Exception: the error of the first job that failed, after the results before it were yielded.
    """
    waiting = iter(jobs)
    if size() == 1:
        yield from map(function, waiting)
        return
    while chosen := list(islice(waiting, _state.num_processes)):
        with _state.split_between_processes(chosen) as own:
            found = _Outcome.of(partial(_by_itself, function, own))
        for outcome in _meet(found):
            yield from outcome.unwrapped()


def on_main(function: Callable[[], Result]) -> Result:
    """Run ``function()`` in the main process; every process gets its result or its error."""
    if size() == 1:
        return function()
    own = _Outcome.of(lambda: _by_itself(lambda _: function(), [None])) if rank() == 0 else _Outcome([None])
    return _meet(own)[0].unwrapped()[0]


def everywhere(function: Callable[[], Result]) -> Result:
    """Run ``function()`` in every process and return its own result; an error in one is raised in all."""
    if size() == 1:
        return function()
    global _depth
    _depth += 1
    try:
        own = _Outcome.of(function)
    finally:
        _depth -= 1
    for outcome in _meet(_Outcome(None, own.error, own.trace)):
        outcome.unwrapped()
    return own.result


@dataclass(frozen=True)
class _Outcome:
    """What a process computed: a result, or an error and where it arose."""

    result: Any = None
    error: Exception | None = None
    trace: str = ""

    def unwrapped(self) -> Any:
        if self.error is None:
            return self.result
        if not self.trace:
            raise self.error
        raise self.error from RuntimeError(self.trace)

    @classmethod
    def of(cls, compute: Callable[[], Any]) -> _Outcome:
        try:
            return cls(compute())
        except OutOfStep:
            raise
        except Exception as error:
            return cls(error=error, trace=f"\nin process {rank()}:\n{traceback.format_exc()}")

    def picklable(self) -> _Outcome:
        try:
            pickle.loads(pickle.dumps(self.error))
            return self
        except Exception:
            return replace(self, error=RunError(self.said()))

    def said(self) -> str:
        return "" if self.error is None else f"{type(self.error).__name__}: {first_line(self.error)}"


def _by_itself(function: Callable[[Any], Any], jobs: Iterable[Any]) -> list[Any]:
    global _alone
    _alone = True
    try:
        return [function(job) for job in jobs]
    finally:
        _alone = False


def _meet(own: _Outcome) -> list[_Outcome]:
    """The outcome of every process, by rank.

    Raises:
        OutOfStep: another process ended, or failed outside a meeting.
    """
    global _meetings
    from accelerate.utils import gather_object

    _meetings += 1
    try:
        gathered = gather_object([((_meetings, _depth), own.picklable())])
    except RuntimeError as error:
        raise OutOfStep(
            f"another process ended or cannot be reached ({first_line(error)}); what is finished is kept, so run the "
            "command again"
        ) from error
    if len({place for place, _ in gathered}) > 1:
        failed = next((f" ({outcome.said()})" for _, outcome in gathered if outcome.error), "")
        raise OutOfStep(
            f"a process failed by itself{failed}; what is finished is kept, so fix the cause and run the command again"
        )
    return [replace(own, trace="") if number == rank() else outcome for number, (_, outcome) in enumerate(gathered)]
