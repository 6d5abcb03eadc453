"""A process that was stopped, unlike one that was killed, breaks no connection: the others end all the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import accelerate.utils  # noqa: F401 (long imports are no part of what is timed)
import pytest

import processes
from plot_align.parallel import everywhere, in_step, on_main, rank

pytestmark = pytest.mark.slow


def meet(stopped: int | None, busy: float = 0.0) -> int:
    """Meet twice. Between the two one process stops, or is busy for longer than the others wait for a sign of life."""
    with in_step():
        on_main(rank)
        if rank() == stopped:
            os.kill(os.getpid(), signal.SIGSTOP)
        if rank() == 1:
            time.sleep(busy)
        return everywhere(rank)


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_ends_the_run(
    stopped: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first also holds what the processes find each other by."""
    monkeypatch.setenv("PLOT_ALIGN_PATIENCE", "6")
    with processes.start(meet, stopped, ranks=2) as both:
        other = both.processes[1 - stopped]
        other.join(150)
        assert other.exitcode == 1
    said = capfd.readouterr().err
    assert f"plot-align: process {stopped} has given no sign of life for 6 seconds; what is finished is kept" in said
    assert "Traceback" not in said


def test_a_busy_process_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLOT_ALIGN_PATIENCE", "6")
    assert processes.run(meet, None, 12.0, ranks=2) == [0, 1]


def test_a_process_that_never_starts_is_not_waited_for() -> None:
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(processes._free_port()), "ACCELERATE_USE_CPU": "true"}
    program = "import accelerate.utils\nfrom plot_align.parallel import in_step\nwith in_step(): print('met')"
    found = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **ranks, **place, "PLOT_ALIGN_PATIENCE": "1"},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert (found.returncode, found.stdout) == (1, "")
    assert "plot-align: another process has not started, or hangs; what is finished is kept" in found.stderr
