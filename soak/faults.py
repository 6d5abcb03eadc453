"""The faults: each starts a command, does something to it, and lets go."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from soak.commands import Command
from soak.processes import Running, address_space

_DAY = 86_400
PATIENCE = 8  # seconds that a rank may give no sign of life, in place of minutes


class Missed(Exception):
    """The command had ended before the fault: this attempt does not count."""


@dataclass
class Case:
    """One injection.

    Attributes:
        folder: where the command runs. seconds, work, size, memory: of the undisturbed run: how long, seconds of the
            processor, bytes written, bytes of address space on top of those at its start.
        when: the moment of the fault, as a share of ``work``.
        first: the processes that the fault hit. ended_well: whether it may have gone through.
        broken: the file that was damaged. note: what was done, in words.
        before: called in the process of the next call, before the command. limit: seconds to wait for an end.
    """

    command: Command
    folder: Path
    random: random.Random
    when: float
    seconds: float
    work: float
    size: int
    memory: int
    limit: float = 300.0
    first: list[Running] = field(default_factory=list)
    broken: Path | None = None
    note: str = ""
    before: Callable[[int], None] = lambda rank: None
    problems: list[str] = field(default_factory=list)

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def start(self, before: Callable[[int], None] | None = None, **variables: str) -> Running:
        """The command's first call."""
        running = self.call(self.command.arguments, before, **variables)
        self.first.append(running)
        return running

    def call(
        self, arguments: tuple[str, ...], before: Callable[[int], None] | None = None, **variables: str
    ) -> Running:
        def prepared(rank: int) -> None:
            self.command.prepare()
            (before or self.before)(rank)

        return Running(
            arguments, self.folder, ranks=self.command.ranks, before=prepared,
            environment={**self.command.environment, **variables},
        )  # fmt: skip

    def until(self, running: Running) -> None:
        """Wait for the moment of the fault."""
        while running.working() < self.when * self.work:
            if running.poll():
                raise Missed
            time.sleep(0.003)

    def finish(self, running: Running) -> None:
        if not running.wait(self.limit):
            self.problems.append(f"did not end in {self.limit:.0f} s")
            for rank in range(self.command.ranks):
                running.send(signal.SIGKILL, rank)
            running.wait(10)


def none(case: Case) -> None:
    """nothing"""
    case.finish(case.start())


def kill(case: Case) -> None:
    """SIGKILL at a random moment"""
    _signalled(case, signal.SIGKILL)


def term(case: Case) -> None:
    """SIGTERM at a random moment"""
    _signalled(case, signal.SIGTERM)


def _signalled(case: Case, number: signal.Signals) -> None:
    running = case.start()
    case.until(running)
    if not running.send(number):
        raise Missed
    case.finish(running)
    if running.code() == 0:
        raise Missed


def disk_full(case: Case) -> None:
    """disk full"""
    pages = case.random.randrange(1, max(2, case.size // 4096 + 8))
    case.out.mkdir()
    mounted = _mounted(case.out, f"size={4096 * pages}")
    case.note = f"{4 * pages} KiB"

    def limited(rank: int) -> None:  # the next best: no file above a size
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096 * pages, resource.RLIM_INFINITY))

    running = case.start(None if mounted else limited)
    case.finish(running)
    if mounted:
        subprocess.run(["mount", "-o", "remount,size=1g", str(case.out)], check=True)
    if running.code() == 0:
        raise Missed


def _mounted(folder: Path, options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0


def read_only(case: Case) -> None:
    """output folder read-only, from the start or a random moment on"""
    early = case.when < 0.2
    if early:
        case.out.mkdir()
        case.out.chmod(0o555)
    running = case.start(_obey)
    if not early:
        case.until(running)
        _chmod(case.out, 0o555)
    case.finish(running)
    _chmod(case.out, 0o755)
    if running.code() == 0:
        raise Missed


def _obey(rank: int) -> None:
    """Be bound by permissions, also as root: without CAP_DAC_OVERRIDE."""
    header = struct.pack("Ii", 0x20080522, 0)
    data = ctypes.create_string_buffer(24)
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() == 0 and libc.capget(header, data) == 0:
        effective, *rest = struct.unpack("6I", data.raw)
        if libc.capset(header, struct.pack("6I", effective & ~0b10, *rest)) != 0:
            raise OSError(ctypes.get_errno(), "capset")


def _chmod(folder: Path, mode: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        for path in [folder, *folder.rglob("*")]:
            if path.is_dir():
                path.chmod(mode)


def gone(case: Case) -> None:
    """output folder removed at a random moment"""
    running = case.start()
    case.until(running)
    shutil.rmtree(case.out, ignore_errors=True)
    case.finish(running)
    case.broken = Path("out")


def in_use(case: Case) -> None:
    """the same command started a second time beside it"""
    running = case.start()
    case.until(running)
    second = case.start()
    case.finish(running)
    case.finish(second)
    case.note = f"the second ended with {second.code()}"
    if running.code() != 0:
        case.problems.append(f"the first was disturbed: {running.said()[-300:]}")


def truncated(case: Case) -> None:
    """a file cut off at a random byte before the resume"""
    path = _some_file(case)
    size = case.random.randrange(path.stat().st_size)
    os.truncate(path, size)
    case.note = f"{case.broken} at {size}"


def altered(case: Case) -> None:
    """a file altered at a random byte before the resume"""
    path = _some_file(case)
    data = bytearray(path.read_bytes())
    digits = [place for place, byte in enumerate(data) if 48 <= byte <= 57]
    if digits and case.random.random() < 0.5:  # still a number, but another
        place = case.random.choice(digits)
        data[place] = 48 + (data[place] - 48 + case.random.randrange(1, 10)) % 10
    else:
        place = case.random.randrange(len(data))
        data[place] ^= case.random.randrange(1, 256)
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    case.note = f"{case.broken} at {place}"


def _some_file(case: Case) -> Path:
    """Run to a random moment, or to the end; a file that was written until then."""
    running = case.start()
    if case.when < 0.8:
        case.until(running)
        running.send(signal.SIGKILL)
    case.finish(running)
    files = [path for path in sorted(case.out.rglob("*")) if path.is_file() and path.stat().st_size]
    if not files:
        raise Missed
    # As likely a file of each kind: a model has many, a record is one.
    kind = case.random.choice(sorted({path.suffix for path in files}))
    path = case.random.choice([path for path in files if path.suffix == kind])
    case.broken = path.relative_to(case.folder)
    return path


def memory(case: Case) -> None:
    """out of memory"""
    if case.random.random() < 0.5:
        limit = address_space("VmSize") + case.random.randrange(1, max(2, case.memory))
        case.note = "a limit on the address space"

        def before(rank: int) -> None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    else:
        after = case.when * case.seconds
        case.note = "MemoryError at a random moment"

        def before(rank: int) -> None:
            thread, raised = ctypes.c_ulong(threading.get_ident()), ctypes.py_object(MemoryError)
            timer = threading.Timer(after, ctypes.pythonapi.PyThreadState_SetAsyncExc, (thread, raised))
            timer.daemon = True
            timer.start()

    running = case.start(before)
    case.finish(running)
    if running.code() == 0:
        raise Missed


def clock(case: Case) -> None:
    """clock set back by a day: during the run, or between two"""
    if case.random.random() < 0.5:
        case.note = "during the run"
        running = case.start(lambda rank: _set_back(case.when * case.seconds))
        case.finish(running)
        if running.code() != 0:
            case.problems.append(f"it failed: {running.said()[-300:]}")
    else:
        case.note = "before the resume"
        _signalled(case, signal.SIGKILL)
        case.before = lambda rank: _set_back(0)


def _set_back(after: float) -> None:
    """Python's clocks of this process, ``after`` seconds from now."""
    import datetime

    from plot_align import records

    real, real_ns, jump = time.time, time.time_ns, time.monotonic() + after

    def late() -> bool:
        return time.monotonic() >= jump

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Clock:
            return cls.fromtimestamp(time.time(), tz)

    time.time = lambda: real() - _DAY * late()
    time.time_ns = lambda: real_ns() - _DAY * 10**9 * late()
    records.datetime = Clock  # type: ignore[misc]


def rank_killed(case: Case) -> None:
    """one of two ranks killed"""
    running = case.start()
    case.until(running)
    if not running.send(signal.SIGKILL, case.random.randrange(2)):
        raise Missed
    _bounded(case, running)


def rank_hangs(case: Case) -> None:
    """one of two ranks hanging (SIGSTOP)"""
    running = case.start(PLOT_ALIGN_PATIENCE=str(PATIENCE))
    case.until(running)
    rank = case.random.randrange(2)
    if not running.send(signal.SIGSTOP, rank):
        raise Missed
    end = time.monotonic() + 15 * PATIENCE
    while running.code(1 - rank) is None and time.monotonic() < end:
        running.poll()
        time.sleep(0.02)
    if running.code(1 - rank) is None:
        case.problems.append(f"the other rank still waited after {15 * PATIENCE} s")
    running.send(signal.SIGKILL, rank)
    _bounded(case, running)


def _bounded(case: Case, running: Running) -> None:
    case.limit = 60
    case.finish(running)
    if all(code == 0 for code in running.codes.values()):
        raise Missed


FAULTS: dict[str, Callable[[Case], None]] = {
    fault.__name__.replace("_", "-"): fault
    for fault in (
        *(none, kill, term, disk_full, read_only, gone, in_use, truncated, altered, memory, clock),
        *(rank_killed, rank_hangs),
    )
}
OF_RANKS = ("rank-killed", "rank-hangs")
