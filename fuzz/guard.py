"""One case under limits of time and memory, and what counts as a finding."""

from __future__ import annotations

import faulthandler
import resource
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plot_align.errors import PlotAlignError

SECONDS = 2.0  # of the processor, for one case; ten times as long for one that waits
STUCK = 300.0  # seconds for one case: it hangs where no signal reaches, and the process ends with its stacks
MIB = 1024  # of address space beyond what the process has at the start of a case
LONGEST = 800  # characters of a message, the file's path included


class Wrong(Exception):
    """A result that the target's oracle refuses."""


class Slow(BaseException):
    """A case took too long; no ``Exception``, so that no handler swallows it."""


@dataclass(frozen=True)
class Finding:
    """Something that must not happen. ``key`` is the same for cases of one cause."""

    key: str
    said: str


@dataclass
class Tally:
    """What became of the cases of one target."""

    right: int = 0
    refused: int = 0
    failed: int = 0
    findings: dict[str, tuple[Finding, bytes]] = field(default_factory=dict)  # the first case of each

    @property
    def cases(self) -> int:
        return self.right + self.refused + self.failed

    def add(self, target: Any, data: bytes, folder: Path) -> None:
        """Run one case and count it."""
        outcome = run_case(target, data, folder)
        if isinstance(outcome, Finding):
            self.failed += 1
            self.findings.setdefault(outcome.key, (outcome, data))
        elif outcome:
            self.right += 1
        else:
            self.refused += 1


def limited(call: Callable[[], object], seconds: float) -> None:
    """``call()``, which gets :class:`Slow` beyond the time and MemoryError beyond the memory; no limit outlives it."""
    over = False

    def stop(number: int, frame: Any) -> None:
        if not over:
            raise Slow(f"more than {seconds:g} s of the processor or {10 * seconds:g} s in all")

    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGPROF, signal.SIGALRM)}
    memory = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    try:
        faulthandler.dump_traceback_later(STUCK, exit=True)
        for kind in handlers:
            signal.signal(kind, stop)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (MIB << 20), memory[1]))
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, 10 * seconds)
        call()
    finally:
        over = True  # before all else: an alarm that comes only now must not leave the rest undone
        resource.setrlimit(resource.RLIMIT_AS, memory)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        for kind, handler in handlers.items():
            signal.signal(kind, signal.SIG_IGN)  # drops one on its way, which would end the process
            signal.signal(kind, handler)


def run_case(target: Any, data: bytes, folder: Path) -> bool | Finding:
    """True for a right result, False for a clear error, else the finding."""
    try:
        limited(lambda: target.run(data, folder), getattr(target, "seconds", SECONDS))
        return True
    except PlotAlignError as error:
        complaint = unclear(str(error), target.names)
        if complaint is None:
            return False
        return Finding(f"message {complaint}: {_place(error)}", f"{complaint}: {str(error)[:300]!r}")
    except (Exception, Slow) as error:
        said = f"{type(error).__name__}: {str(error)[:300]}"
        return Finding(f"{type(error).__name__}: {_place(error)}", said)


def unclear(message: str, names: tuple[str, ...]) -> str | None:
    """Why a message is no clear sentence about the input; None if it is one."""
    if not message.isprintable():
        return "is not one printable line"
    if len(message) > LONGEST:
        return f"has more than {LONGEST} characters"
    if not any(name in message for name in names):
        return "names no place"
    return None


def _place(error: BaseException) -> str:
    """The innermost frame of the package, and what it called."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [i for i, frame in enumerate(frames) if "plot_align/" in frame.filename]
    last = frames[own[-1] if own else -1]
    return f"{last.filename.rpartition('plot_align/')[2]}:{last.name}:{last.line}"


def minimise(target: Any, data: bytes, folder: Path, tries: int = 400) -> bytes:
    """A shorter case with the same finding: parts are left out as long as it stays."""
    found = run_case(target, data, folder)
    if not isinstance(found, Finding):
        return data  # it needs what came before it
    step = max(1, len(data) // 2)
    while step and tries:
        at, shorter = 1, False  # the first byte chooses the variant
        while at < len(data) and tries:
            candidate = data[:at] + data[at + step :]
            tries -= 1
            again = run_case(target, candidate, folder)
            if isinstance(again, Finding) and again.key == found.key:
                data, shorter = candidate, True
            else:
                at += step
        step = step if shorter and step > 1 else step // 2
    return data
