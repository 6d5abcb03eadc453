"""Functions run in processes of their own that find each other over gloo, as a launcher would start them.

    run(count, folder, ranks=2)                  # what each rank returned, in order; an error of one is an error here

    with start(train, options) as processes:     # one process; or several, some of which end badly
        processes.kill(0)
        [outcome] = processes.outcomes()

The function stands at the top of a module, as it is pickled by its name; arguments and results are pickled too. Ranks
see what torchrun sets (``RANK``, ``WORLD_SIZE``, ...) before any library is imported; one process alone sees none.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What a process returned, or its traceback, or the signal or exit code that ended it before either."""

    value: Any = None
    error: str | None = None


class Processes:
    """Processes that have been started; leaving the block kills those that still run."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...], ranks: int, timeout: float) -> None:
        context = multiprocessing.get_context("spawn")
        self.deadline = time.monotonic() + timeout
        port, work = _free_port(), pickle.dumps((function, arguments))
        self.processes, self.ends = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(work, rank, ranks, port, timeout, theirs))
            process.start()
            theirs.close()  # the end of a dead process is then closed for good
            self.processes.append(process)
            self.ends.append(ours)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def kill(self, rank: int) -> None:
        """SIGKILL, as the system sends it where memory runs out."""
        self.processes[rank].kill()

    def outcomes(self) -> list[Outcome]:
        """Waits for all of them; one that is not done in time is killed."""
        return [self._outcome(rank) for rank in range(len(self.processes))]

    def _outcome(self, rank: int) -> Outcome:
        process = self.processes[rank]
        try:
            if not self.ends[rank].poll(max(0.0, self.deadline - time.monotonic())):
                process.kill()
                return Outcome(error=f"rank {rank} was not done in time")
            return pickle.loads(self.ends[rank].recv_bytes())
        except EOFError:  # it ended without a word
            process.join()
            code = process.exitcode or 0
            return Outcome(error=signal.Signals(-code).name if code < 0 else f"exit code {code}")


def start(function: Callable[..., Any], *arguments: Any, ranks: int = 1, timeout: float = 240) -> Processes:
    """``function(*arguments)`` in ``ranks`` new processes."""
    return Processes(function, arguments, ranks, timeout)


def run(function: Callable[..., Any], *arguments: Any, ranks: int = 1, timeout: float = 240) -> list[Any]:
    """What ``function(*arguments)`` returned in each of ``ranks`` new processes.

    Raises:
        AssertionError: a process failed; with the traceback of each that did.
    """
    with start(function, *arguments, ranks=ranks, timeout=timeout) as processes:
        outcomes = processes.outcomes()
    errors = [f"rank {rank}: {outcome.error}" for rank, outcome in enumerate(outcomes) if outcome.error is not None]
    if errors:
        raise AssertionError("\n".join(errors))
    return [outcome.value for outcome in outcomes]


@contextlib.contextmanager
def bounded(process: subprocess.Popen[Any], seconds: float = 120) -> Iterator[None]:
    """Kills ``process`` at the end of the block, or where that does not come in time, so that a read of it ends."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _work(work: bytes, rank: int, ranks: int, port: int, timeout: float, end: Connection) -> None:
    faulthandler.dump_traceback_later(timeout, exit=True)  # says where ranks wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"
    if ranks > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    try:
        function, arguments = pickle.loads(work)  # imports the function's module, and torch with it
        said = pickle.dumps(Outcome(function(*arguments)))
    except BaseException:
        said = pickle.dumps(Outcome(error=traceback.format_exc()))
    end.send_bytes(said)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads now and then abort while the interpreter takes itself apart
