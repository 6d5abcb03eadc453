"""Run independent commands side by side, each worker on its own GPUs; a failure does not affect the others."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

from plot_align.errors import InputError, RunError
from plot_align.io import no_link

Job = TypeVar("Job")
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_PARENT = "PLOT_ALIGN_PARENT"  # with which a command of ours ends; see plot_align.cli.launch


def visible_gpus() -> list[str]:
    """The GPUs this process may use, as ``CUDA_VISIBLE_DEVICES`` names them; empty without any."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = [name.strip() for name in os.environ.get(_VISIBLE, "").split(",") if name.strip()]
    return named[:count] if named else [str(index) for index in range(count)]


def assign_devices(devices: Sequence[str], workers: int) -> list[str | None]:
    """``CUDA_VISIBLE_DEVICES`` of each worker. Every device is used; with more workers than devices, several use one.

    Returns:
        A value for each worker; None without devices.

    Raises:
        InputError: ``workers`` is below one.
    """
    if workers < 1:
        raise InputError(f"workers is {workers}, expected how many runs at once, 1 or more; leave it out to be chosen")
    if not devices:
        return [None] * workers
    return [",".join(devices[i::workers]) or devices[i % len(devices)] for i in range(workers)]


class CommandWorker:
    """Runs commands one at a time, each in its own process group.

    Args:
        device: their ``CUDA_VISIBLE_DEVICES``; None leaves the variable alone.
    """

    def __init__(self, device: str | None) -> None:
        self._device = device
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()  # held while starting a process, so that stop() cannot miss it
        self._stopped = False

    def run(self, command: Sequence[str], log: Path) -> int:
        """Run ``command``, write what it prints to ``log``, and return its exit code."""
        environment = os.environ | ({} if self._device is None else {_VISIBLE: self._device})
        environment[_PARENT] = str(os.getpid())
        with open(log, "wb", opener=no_link) as file:
            with self._lock:
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
        """End the running command at once, and refuse further ones."""
        with self._lock:
            self._stopped = True
            if self._process is not None and self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGTERM)


def run_jobs(
    jobs: Sequence[Job], workers: Sequence[CommandWorker], work: Callable[[CommandWorker, Job], None]
) -> dict[int, Exception]:
    """Call ``work(worker, job)`` for every job, each on the first free worker; an interrupt stops the workers.

    Args:
        jobs: started in this order.
        workers: each has one job at a time.
        work: called in its own thread.

    Returns:
        Index of each failed job, in order, and what it raised.
    """
    free: queue.SimpleQueue[CommandWorker] = queue.SimpleQueue()
    for worker in workers:
        free.put(worker)

    def run_one(job: Job) -> None:
        worker = free.get()
        try:
            work(worker, job)
        finally:
            free.put(worker)

    with ThreadPoolExecutor(len(workers)) as threads:
        futures = [threads.submit(run_one, job) for job in jobs]
        running: set[Future[None]] = set(futures)
        try:
            while running:  # wake up now and then to notice an interrupt, whichever thread got the signal
                _, running = wait(running, timeout=0.2)
        finally:
            for future in futures:  # all are done, unless interrupted
                future.cancel()
            for worker in workers:
                worker.stop()
    errors = {index: future.exception() for index, future in enumerate(futures)}
    return {index: error for index, error in errors.items() if isinstance(error, Exception)}


def raise_failures(failures: Mapping[int, Exception], names: Sequence[str], folder: Path) -> None:
    """Raise one error that names the failed runs and gives the first one's reason.

    Raises:
        RunError: there are failures.
    """
    if not failures:
        return
    failed = [names[index] for index in failures]
    shown = ", ".join(failed[:5]) + (f" and {len(failed) - 5} more" if len(failed) > 5 else "")
    reason = next(iter(failures.values()))
    raise RunError(
        f"{len(failed)} of {len(names)} runs failed ({shown}); the first said: "
        f"{(str(reason) or type(reason).__name__).rstrip('.')}. The others are in {folder}; run the same again to try "
        "only those that failed"
    ) from reason
