"""Workers: every device is used, one failure costs one job, an interrupt stops all."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plot_align.errors import InputError, RunError
from plot_align.sweep import workers


@pytest.mark.parametrize(
    ("devices", "count", "expected"),
    [
        ([], 2, [None, None]),
        (["0", "1"], 2, ["0", "1"]),
        (["0", "1", "2", "3"], 2, ["0,2", "1,3"]),
        (["4", "5"], 3, ["4", "5", "4"]),
        (["0", "1"], 1, ["0,1"]),
    ],
)
def test_devices_are_dealt_round(devices: list[str], count: int, expected: list[str | None]) -> None:
    assert workers.assign_devices(devices, count) == expected


@given(devices=st.integers(1, 9), count=st.integers(1, 9))
def test_no_device_is_idle_and_no_worker_without_one(devices: int, count: int) -> None:
    dealt = workers.assign_devices([str(i) for i in range(devices)], count)
    named = [name for entry in dealt for name in str(entry).split(",")]
    assert set(named) == {str(i) for i in range(devices)}
    assert max(map(named.count, named)) <= math.ceil(count / devices)


def test_fewer_than_one_worker_is_refused() -> None:
    with pytest.raises(InputError, match="workers is 0, expected how many runs at once, 1 or more"):
        workers.assign_devices([], 0)


class Plain:
    """A worker that only counts how many jobs it has at once."""

    def __init__(self) -> None:
        self.at_once = 0
        self.stopped = False

    def stop(self) -> None:
        self.stopped = True


def test_a_failure_costs_itself_alone() -> None:
    done: list[int] = []
    pool = [Plain(), Plain()]

    def work(worker: Plain, job: int) -> None:
        worker.at_once += 1
        assert worker.at_once == 1
        time.sleep(0.005)
        worker.at_once -= 1
        if job % 3 == 1:
            raise ValueError(f"job {job}")
        done.append(job)

    failures = workers.run_jobs(range(8), pool, work)
    assert sorted(done) == [0, 2, 3, 5, 6]
    assert {index: str(error) for index, error in failures.items()} == {1: "job 1", 4: "job 4", 7: "job 7"}
    with pytest.raises(RunError) as caught:
        workers.raise_failures(failures, [f"run {i}" for i in range(8)], Path("out"))
    assert str(caught.value).startswith("3 of 8 runs failed (run 1, run 4, run 7); the first said: job 1. The ")
    workers.raise_failures({}, [], Path("out"))


def test_an_interrupt_stops_the_workers_and_starts_nothing_more() -> None:
    pool = [Plain()]
    started: list[int] = []

    def work(worker: Plain, job: int) -> None:
        started.append(job)
        signal.raise_signal(signal.SIGINT)  # as Ctrl-C: the main thread is interrupted
        deadline = time.monotonic() + 20
        while not worker.stopped and time.monotonic() < deadline:
            time.sleep(0.005)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            workers.run_jobs(range(5), pool, work)
    finally:
        signal.signal(signal.SIGINT, before)
    assert started == [0]


def test_a_command_sees_its_device_and_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    log = tmp_path / "log.txt"
    code = "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES']); sys.exit('no luck')"
    assert workers.CommandWorker("2").run([sys.executable, "-c", code], log) == 1
    assert sorted(log.read_text().split("\n")) == ["", "2", "no luck"]
    assert workers.CommandWorker(None).run([sys.executable, "-c", code], log) == 1
    assert "7" in log.read_text()


def test_a_stopped_command_ends(tmp_path: Path) -> None:
    worker = workers.CommandWorker(None)
    threading.Timer(0.3, worker.stop).start()
    started = time.monotonic()
    assert worker.run([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log.txt") != 0
    assert time.monotonic() - started < 20
    with pytest.raises(RunError, match="stopped"):
        worker.run([sys.executable, "-c", ""], tmp_path / "log.txt")


def test_gpus_keep_the_names_that_the_environment_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-8a")
    assert workers.visible_gpus() == ["4", "GPU-8a"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert workers.visible_gpus() == ["0", "1"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert workers.visible_gpus() == []
