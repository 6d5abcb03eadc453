"""One program that several processes run in step, each computing its part of the jobs; accelerate connects them.

Every process runs the same code on the same input. They meet in the functions below and nowhere else: in :func:`each`
to share jobs, in :func:`on_main` where one alone may act (files, endpoints), in :func:`everywhere` to learn of errors.
A job is what one process computes in one go (a batch, a request under attack), so no result depends on their number.
"""

from __future__ import annotations

import atexit
import os
import pickle
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from plot_align.errors import InputError, RunError, first_line

Job = TypeVar("Job")
Result = TypeVar("Result")

_state: Any = None  # accelerate's PartialState inside of in_step() with several processes
_alone = False  # whether a job is under way, which this process computes by itself
_meetings = 0  # how often the processes have met
_depth = 0  # in how many everywhere() this process is


class OutOfStep(RunError):
    """The processes no longer wait for each other at the same place, or one is gone: the run must end."""


def process_state(**options: Any) -> Any:
    """accelerate's ``PartialState``, also for processes on the CPU, which it joins only where it is told to.

    Args:
        options: of ``torch.distributed.init_process_group``, where it is not yet initialised.
    """
    import torch
    from accelerate import PartialState

    if PartialState._shared_state:  # a second call with other arguments than the first is an error there
        return PartialState()
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu, **options)


def patient_state() -> Any:
    """As :func:`process_state`; processes wait a month for each other, where half an hour is torch's default."""
    return process_state(timeout=timedelta(days=30))


@contextmanager
def in_step() -> Iterator[None]:
    """Within, the processes that a launcher started share their work."""
    global _state
    state = patient_state()
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
    """How many processes share the work at this place."""
    return 1 if _state is None or _alone else _state.num_processes


def rank() -> int:
    return 0 if _state is None else _state.process_index


def own_device(asked: str | None) -> str:
    """Where a model of this process lies.

    Args:
        asked: by the user; None takes an accelerator where there is one, with several processes each its own.

    Raises:
        InputError: one certain accelerator was asked for, and there are several processes.
    """
    import torch

    if _state is None:
        return asked or str(torch.accelerator.current_accelerator() or "cpu")
    if asked is not None and torch.device(asked).index is not None:
        raise InputError(
            f"the device is {asked!r} for {_state.num_processes} processes, expected one each; leave --device out, or "
            "name a kind such as cuda or cpu"
        )
    own = _state.device
    return str(own) if asked is None or torch.device(asked).type == own.type else asked


def each(function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
    """``function(job)`` for every job in order, on every process; each computes one at a time, then they meet.

    Args:
        function: its results are picklable.

    Raises:
        Exception: what the first job that failed raised, once the results before it are taken.
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
    """``function()`` of the main process; every process gets its result, or its error."""
    if size() == 1:
        return function()
    own = _Outcome.of(lambda: _by_itself(lambda _: function(), [None])) if rank() == 0 else _Outcome([None])
    return _meet(own)[0].unwrapped()[0]


def everywhere(function: Callable[[], Result]) -> Result:
    """``function()`` in every process, each with its own result; an error of one is raised in all."""
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
    """What a process got: a result, or an error and where it arose."""

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
        OutOfStep: another process ended, or failed where the others did not meet.
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
            f"a process failed by itself{failed}; what is finished is kept, so mend it and run the command again"
        )
    return [replace(own, trace="") if number == rank() else outcome for number, (_, outcome) in enumerate(gathered)]
