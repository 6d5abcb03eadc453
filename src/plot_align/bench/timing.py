"""Arms of an experiment run in turn: seconds, peak memory and page faults of each one's step, round by round."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Samples:
    """Measurements of one arm, round by round.

    ``seconds`` of a step; bytes that it held at its ``peak``; its page ``faults`` and the processors' seconds in the
    operating system's ``kernel``, most of which are those faults: what memory costs that is given back and asked for
    anew. What an arm frees is given back before the next one, so that peaks compare: a training has fewer faults. The
    last two are empty where the system does not count them.
    """

    seconds: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    faults: list[int] = field(default_factory=list)
    kernel: list[float] = field(default_factory=list)


Arm = Callable[[], AbstractContextManager[Callable[[], Any]]]


def interleaved(
    arms: Mapping[str, Arm],
    *,
    repeats: int,
    device: torch.device,
    budget: float = math.inf,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, Samples]:
    """Runs every arm once a round, the order rotating, so that a machine that slows down slows all of them.

    An arm is a context that yields its step; only the step is measured, not what the context sets up. The first
    round warms up and is dropped. Peak memory is the allocator's on CUDA, the process's resident set
    elsewhere on Linux, and not measured on other systems.

    Args:
        arms: name → arm.
        repeats: rounds that are kept, at most.
        device: where the steps run.
        budget: seconds after which no further round begins, once one is kept.
        on_round: is told how many rounds are done, the first one among them.
    """
    names = list(arms)
    samples = {name: Samples() for name in names}
    begin = time.perf_counter()
    for repeat in range(repeats + 1):
        if repeat > 1 and time.perf_counter() - begin > budget:
            break
        for k in range(len(names)):
            name = names[(k + repeat) % len(names)]
            with arms[name]() as step:
                _reset_peak(device)
                before, start = _usage(), time.perf_counter()
                step()
                synchronize(device)
                seconds, after = time.perf_counter() - start, _usage()
            if repeat:
                samples[name].seconds.append(seconds)
                samples[name].peak.append(_peak(device))
                if before is not None and after is not None:
                    samples[name].faults.append(after.ru_minflt - before.ru_minflt)
                    samples[name].kernel.append(after.ru_stime - before.ru_stime)
        if on_round is not None:
            on_round(repeat + 1)
    return samples


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return
    _trim()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's way to reset the peak resident set
    except OSError:
        return


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _usage() -> Any:
    """What the system has counted of this process; None on Windows."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF)


def held(device: torch.device) -> int:
    """Bytes that are held now, of the memory whose peaks :func:`interleaved` takes; 0 where it takes none."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    _trim()
    return _status("VmRSS")


def _trim() -> None:
    """Gives freed memory back to the system, where glibc keeps it: else a peak would count what another arm left."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _status(name: str) -> int:
    """Bytes that Linux tells of this process under ``name``; 0 elsewhere."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((int(row.split()[1]) * 1024 for row in status.splitlines() if row.startswith(name)), 0)
