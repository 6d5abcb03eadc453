"""Measure the steps of several arms in turn: seconds, peak memory and page faults, round by round."""

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

    ``seconds`` of a step; its ``peak`` memory in bytes; its page ``faults``; and the processor seconds in the
    operating system's ``kernel``, most of which are spent on those faults. Memory that an arm frees is returned to the
    system before the next arm, so that peaks are comparable; a training therefore has fewer faults. ``faults`` and
    ``kernel`` are empty if the system does not count them.
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
    """Runs every arm once per round in rotating order, so that a slow phase of the machine affects all arms alike.

    An arm is a context that yields its step; only the step is measured, not the set-up. The first round warms up and
    is dropped. Peak memory is the allocator's on CUDA, the process's resident set elsewhere on Linux, and not measured
    on other systems.

    Args:
        arms: name → arm.
        repeats: maximal number of rounds that are kept.
        device: the device of the steps.
        budget: seconds after which no further round begins; at least one round is kept.
        on_round: called with the number of finished rounds, including the first.
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
    """Waits until the device is idle."""
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
    """The system's resource usage of this process; None on Windows."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF)


def held(device: torch.device) -> int:
    """Bytes of memory in use, of the kind whose peak :func:`interleaved` measures; 0 if it measures none."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    _trim()
    return _status("VmRSS")


def _trim() -> None:
    """Returns freed memory that glibc keeps to the system: otherwise a peak would include another arm's memory."""
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _status(name: str) -> int:
    """The field ``name`` of this process's status in bytes on Linux; 0 elsewhere."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((int(row.split()[1]) * 1024 for row in status.splitlines() if row.startswith(name)), 0)
