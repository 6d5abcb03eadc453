"""Work dealt to several processes by one of them, the main one, which does all the rest.

The main process runs the program as it would alone: it reads, judges, writes, prints, draws samples, asks endpoints.
The others hold copies of its models (:func:`share`) and compute what it deals to them (:func:`each`), a job at a time.
A job is what one process would compute in one go (a batch, a request under attack), so nothing depends on who does it
or on how many there are; and files, caches and endpoints have one user.
"""

from __future__ import annotations

import io
import itertools
import pickle
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from plot_align.errors import InputError, RunError, first_line

Job = TypeVar("Job")
Result = TypeVar("Result")


class LostProcesses(RunError):
    """The other processes cannot be reached: nothing more can be dealt, so the run must end."""


class _NotShared(Exception):
    """A model that the other processes do not have."""


class _RemoteTraceback(Exception):
    """Where an error arose in another process; the cause of what :func:`each` raises."""


def together(main: Callable[[], int]) -> int:
    """Run ``main`` in the main one of the processes that a launcher started, with the others at its command.

    Returns:
        What ``main`` returns; 0 in the other processes, whose errors the main one raises.

    Raises:
        LostProcesses: a process was killed or cannot be reached.
    """
    global _team
    team = _Team.joined()
    if team is None:
        return main()
    _team = team
    try:
        if team.rank == 0:
            with team.dismissed_at_the_end():
                return main()
        team.serve()
        return 0
    finally:
        _team = None


def own_device(asked: str | None) -> str:
    """Where a model of this process lies.

    Args:
        asked: by the user; None takes an accelerator where there is one, with several processes each its own.

    Raises:
        InputError: one certain accelerator was asked for, and there are several processes.
    """
    import torch

    if _team is None:
        return asked or str(torch.accelerator.current_accelerator() or "cpu")
    if asked is not None and torch.device(asked).index is not None:
        raise InputError(
            f"the device is {asked!r} for {_team.size} processes, expected one each; leave --device out, or name a "
            "kind such as cuda or cpu"
        )
    own = _team.device
    return str(own) if asked is None or torch.device(asked).type == own.type else asked


def share(build: Callable[..., Result], *arguments: Any) -> Result:
    """``build(*arguments)`` in every process, so that jobs can use it: jobs carry a reference, and no weights.

    Args:
        build: a function of a module. Of a tuple that it returns the elements are shared.
        arguments: picklable, or shared.

    Returns:
        That of this process. When it is let go of here, the others let go of theirs.

    Raises:
        Exception: what ``build`` raised, of the first process in which it did.
    """
    if _team is None or _team.computing:
        return build(*arguments)
    number = next(_team.numbers)
    try:
        message = _team.pack(("share", number, build, arguments))
    except _NotShared:
        return build(*arguments)
    return _team.share(message, number)


def each(
    function: Callable[..., Result],
    jobs: Iterable[Job],
    *,
    dealt: bool = True,
    on_main: Mapping[str, Any] | None = None,
) -> Iterator[Result]:
    """``function(job)`` for every job, in their order; each process computes one at a time.

    Args:
        function: of a module, or a ``functools.partial`` of one; its arguments, jobs and results are picklable, or
            shared. With a model that is not shared this process does all jobs.
        dealt: whether other processes may help.
        on_main: further arguments where the main process computes, e.g. what moves a bar.

    Raises:
        Exception: what the first job that failed raised, once the results before it are taken.
        LostProcesses: as :func:`together`.
    """
    more = dict(on_main or {})
    waiting = iter(jobs)
    size = _team.size if dealt and _team is not None and not _team.computing else 1
    while chosen := list(itertools.islice(waiting, size)):
        if len(chosen) > 1 and _team is not None:
            try:
                message = _team.pack(("each", function, chosen))
            except _NotShared:
                size = 1
            else:
                for outcome in _team.compute(message, more)[: len(chosen)]:
                    yield outcome.unwrapped()
                continue
        for job in chosen:
            yield function(job, **more)


@dataclass(frozen=True)
class _Outcome:
    """Of one job in one process: its result, or what it raised and where."""

    result: Any = None
    error: Exception | None = None
    trace: str = ""

    def unwrapped(self) -> Any:
        if self.error is not None:
            raise self.error from (_RemoteTraceback(self.trace) if self.trace else None)
        return self.result

    @classmethod
    def of(cls, compute: Callable[[], Any], rank: int) -> _Outcome:
        """An error of another process than the main one comes as it can travel."""
        try:
            return cls(compute())
        except Exception as error:
            if rank == 0:
                return cls(error=error)
            trace = f"\nin process {rank}:\n{traceback.format_exc()}"
            try:
                pickle.loads(pickle.dumps(error))
            except Exception:
                error = RunError(f"{type(error).__name__}: {first_line(error)}")
            return cls(error=error.with_traceback(None), trace=trace)


@dataclass
class _Team:
    """This process among the others.

    Args:
        rank, size, device: of the process, how many there are, its own device.

    ``shared`` holds, by number, what is shared: weak references in the main process, the objects in the others.
    ``computing``: whether a job is under way, in which nothing is dealt.
    """

    rank: int
    size: int
    device: Any
    shared: dict[Any, Any] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)
    computing: bool = False
    in_step: bool = True  # whether the others wait for a message

    @classmethod
    def joined(cls) -> _Team | None:
        """None where this process is the only one."""
        from plot_align.inference.ranks import be_patient, process_state

        state = process_state()
        if state.num_processes == 1:
            return None
        be_patient()  # an endpoint, or one long attack, may keep the others waiting
        return cls(state.process_index, state.num_processes, state.device)

    # ---------------------------------------------------------------------------------- the main process

    @contextmanager
    def dismissed_at_the_end(self) -> Iterator[None]:
        """The others end with the main process, unless they can no longer be told."""
        try:
            yield
        finally:
            if self.in_step:
                with suppress(LostProcesses):
                    self._send(self.pack(("end",)))

    def share(self, message: bytes, number: int) -> Any:
        outcomes = self._step(message, lambda kind, number, build, arguments: build(*arguments))
        try:
            result, *_ = [outcome.unwrapped() for outcome in outcomes]
        except Exception:  # those that succeeded would keep theirs, beside the next model
            self._step(self.pack(("drop", number)), lambda kind, number: None)
            raise
        for key, part in _parts(result, number):
            self.shared[key] = weakref.ref(part)
        return result

    def compute(self, message: bytes, more: Mapping[str, Any]) -> list[_Outcome]:
        return self._step(message, lambda kind, function, jobs: function(jobs[0], **more))

    def pack(self, message: tuple[Any, ...]) -> bytes:
        """With what the others may forget, and what is shared as a reference."""
        gone = [key for key, reference in self.shared.items() if reference() is None]
        keys = {id(reference()): key for key, reference in self.shared.items() if key not in gone}
        file = io.BytesIO()
        _Pickler(file, keys).dump((gone, message))
        for key in gone:
            del self.shared[key]
        return file.getvalue()

    def _step(self, message: bytes, own: Callable[..., Any]) -> list[_Outcome]:
        """Send, compute this process's part of it, and gather."""
        self.in_step = False  # what interrupts this process here leaves the others where they cannot be told
        self._send(message)
        outcome = _Outcome.of(lambda: self._alone(lambda: own(*self._unpack(message))), 0)
        outcomes = [outcome, *self._gather(_Outcome())[1:]]  # its own has no need to travel
        self.in_step = True
        return outcomes

    # ---------------------------------------------------------------------------------- the others

    def serve(self) -> None:
        """Compute what is dealt until the main process ends."""
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.computing = True
        while True:
            message = self._unpack(self._receive())
            if message[0] == "end":
                return
            self._gather(_Outcome.of(lambda message=message: self._serve_one(*message), self.rank))  # type: ignore[misc]

    def _serve_one(self, kind: str, *message: Any) -> Any:
        if kind == "share":
            number, build, arguments = message
            self.shared.update(_parts(build(*arguments), number))
            return None
        if kind == "drop":
            for key in [key for key in self.shared if key[0] == message[0]]:
                del self.shared[key]
            return None
        function, jobs = message
        return function(jobs[self.rank]) if self.rank < len(jobs) else None

    # ---------------------------------------------------------------------------------- both

    def _alone(self, compute: Callable[[], Any]) -> Any:
        self.computing = True
        try:
            return compute()
        finally:
            self.computing = False

    def _unpack(self, message: bytes) -> tuple[Any, ...]:
        known = self.shared if self.rank else {key: reference() for key, reference in self.shared.items()}
        gone, content = _Unpickler(io.BytesIO(message), known).load()
        for key in gone:
            self.shared.pop(key, None)
        return content

    def _send(self, message: bytes) -> None:
        from accelerate.utils import broadcast_object_list

        with _reaching():
            broadcast_object_list([message])

    def _receive(self) -> bytes:
        from accelerate.utils import broadcast_object_list

        with _reaching():
            return broadcast_object_list([None])[0]

    def _gather(self, outcome: _Outcome) -> list[_Outcome]:
        from accelerate.utils import gather_object

        with _reaching():
            return gather_object([outcome])


_team: _Team | None = None


def _parts(value: Any, number: int) -> list[tuple[tuple[int, int], Any]]:
    return [((number, i), part) for i, part in enumerate(value if isinstance(value, tuple) else (value,))]


@contextmanager
def _reaching() -> Iterator[None]:
    """What goes wrong here is no error of a measure."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcesses(
            f"another process ended or cannot be reached ({first_line(error)}); what is finished is kept, so run the "
            "command again"
        ) from error


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, keys: Mapping[int, Any]) -> None:
        from torch.nn import Module

        super().__init__(file)
        self._keys, self._model = keys, Module

    def persistent_id(self, thing: Any) -> Any:
        key = self._keys.get(id(thing))
        if key is None and isinstance(thing, self._model):
            raise _NotShared
        return key


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, known: Mapping[Any, Any]) -> None:
        super().__init__(file)
        self._known = known

    def persistent_load(self, key: Any) -> Any:
        return self._known[key]
