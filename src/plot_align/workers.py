"""Independent runs side by side: one worker a GPU or a core; what fails loses nothing of the others.

The command line's own process imports this module before anything heavy, so it imports neither torch nor trl.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol, TypeVar

from plot_align.errors import InputError, RunError

Job = TypeVar("Job")
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_ENVIRONMENT = threading.Lock()  # held while a process is started with variables of its own


class Worker(Protocol):
    """Something that does one job at a time; ``stop`` ends the job in hand at once and refuses further ones."""

    def stop(self) -> None: ...


AnyWorker = TypeVar("AnyWorker", bound=Worker)


def gpus() -> list[str]:
    """The GPUs this process may use, as ``CUDA_VISIBLE_DEVICES`` names them; empty without any."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = [name.strip() for name in os.environ.get(_VISIBLE, "").split(",") if name.strip()]
    return named[:count] if named else [str(index) for index in range(count)]


def deal(devices: Sequence[str], workers: int) -> list[str | None]:
    """What each worker sees: the devices dealt round, several workers on one where there are more of them.

    Returns:
        A value of ``CUDA_VISIBLE_DEVICES`` for each worker; None without devices.

    Raises:
        InputError: ``workers`` is below one.
    """
    if workers < 1:
        raise InputError(f"workers is {workers}, expected how many runs at once, 1 or more; leave it out to be chosen")
    if not devices:
        return [None] * workers
    return [",".join(devices[i::workers]) or devices[i % len(devices)] for i in range(workers)]


def share_out(
    jobs: Sequence[Job],
    workers: Sequence[AnyWorker],
    work: Callable[[AnyWorker, Job], None],
    on_wait: Callable[[], None] = lambda: None,
) -> dict[int, Exception]:
    """``work(worker, job)`` for every job, each on the first worker that is free.

    A job that raises costs itself alone. An interrupt (or whatever ``on_wait`` raises) stops the workers.

    Args:
        jobs: started in this order.
        workers: each has one job at a time.
        work: called in a thread of its own.
        on_wait: called in this thread every fifth of a second, and once more at the end.

    Returns:
        Index of each failed job, in order, and what it raised.
    """
    free: queue.SimpleQueue[AnyWorker] = queue.SimpleQueue()
    for worker in workers:
        free.put(worker)

    def one(job: Job) -> None:
        worker = free.get()
        try:
            work(worker, job)
        finally:
            free.put(worker)

    with ThreadPoolExecutor(max(1, len(workers))) as threads:
        futures = [threads.submit(one, job) for job in jobs]
        running: set[Future[None]] = set(futures)
        try:
            while running:
                _, running = wait(running, timeout=0.2)
                on_wait()
        finally:
            for future in running:  # none, unless interrupted
                future.cancel()
            for worker in workers:
                worker.stop()
    on_wait()
    errors = {index: future.exception() for index, future in enumerate(futures)}
    return {index: error for index, error in errors.items() if isinstance(error, Exception)}


def report_failures(failures: Mapping[int, Exception], names: Sequence[str], folder: Path) -> None:
    """One error for all that failed, the first with its reason.

    Raises:
        RunError: there is a failure.
    """
    if not failures:
        return
    failed = [names[index] for index in failures]
    shown = ", ".join(failed[:5]) + (f" and {len(failed) - 5} more" if len(failed) > 5 else "")
    reason = next(iter(failures.values()))
    raise RunError(
        f"{len(failed)} of {len(names)} runs failed ({shown}); the first said: {str(reason) or type(reason).__name__} "
        f"The others are in {folder}; run the same again to try only those that failed"
    ) from reason


class ProcessWorker:
    """A Python process that stays between its jobs, so that the libraries are imported once.

    Args:
        device: its ``CUDA_VISIBLE_DEVICES``; None leaves the variable alone.
        prepare: called first in the new process.
    """

    def __init__(self, device: str | None, prepare: Callable[[], None]) -> None:
        self._device = device
        self._prepare = prepare
        self._pool: ProcessPoolExecutor | None = None
        self._busy = False
        self._stopped = False

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(*arguments)`` in the process.

        Raises:
            RunError: the process died, or the worker was stopped.
        """
        with _ENVIRONMENT, _environment(self._device):
            if self._stopped:
                raise RunError("the worker was stopped.")
            if self._pool is None:  # forked workers would inherit the parent's OpenMP threads
                context = multiprocessing.get_context("spawn")
                self._pool = ProcessPoolExecutor(1, context, _prepare_process, (self._prepare,))
            future = self._pool.submit(function, *arguments)  # starts the process, which inherits the environment
            self._busy = True
        try:
            return future.result()
        except BrokenProcessPool:
            self._pool = None
            raise RunError("its process died, perhaps for want of memory: try fewer workers.") from None
        finally:
            self._busy = False

    def stop(self) -> None:
        with _ENVIRONMENT:
            self._stopped = True
            if self._pool is None:
                return
            if self._busy:  # it would finish its run first; one that is idle ends by itself, and cleans up
                for process in list((self._pool._processes or {}).values()):
                    process.terminate()
            self._pool.shutdown(wait=True, cancel_futures=True)


class CommandWorker:
    """Runs commands, one at a time, in a process group of their own.

    Args:
        device: their ``CUDA_VISIBLE_DEVICES``; None leaves the variable alone.
    """

    def __init__(self, device: str | None) -> None:
        self._device = device
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def run(self, command: Sequence[str], log: Path) -> int:
        """The exit code of ``command``, whose output goes to the file ``log``."""
        environment = os.environ | ({} if self._device is None else {_VISIBLE: self._device})
        with log.open("wb") as file:
            with _ENVIRONMENT:
                if self._stopped:
                    raise RunError("the worker was stopped.")
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # a launcher's children end with it
                )
            return self._process.wait()

    def stop(self) -> None:
        with _ENVIRONMENT:
            self._stopped = True
            if self._process is None or self._process.poll() is not None:
                return
            os.killpg(self._process.pid, signal.SIGTERM)


def _prepare_process(prepare: Callable[[], None]) -> None:
    # Ctrl-C reaches the whole process group; the parent answers for it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prepare()


@contextlib.contextmanager
def _environment(device: str | None) -> Iterator[None]:
    """This process's ``CUDA_VISIBLE_DEVICES`` for a moment: CUDA reads it once, early, so a child must inherit it."""
    before = os.environ.get(_VISIBLE)
    if device is not None:
        os.environ[_VISIBLE] = device
    try:
        yield
    finally:
        if before is not None:
            os.environ[_VISIBLE] = before
        elif device is not None:
            del os.environ[_VISIBLE]
