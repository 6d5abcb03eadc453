"""The tests' own harness: results, errors and deaths of processes come back, each from its rank."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from processes import bounded, run, start


def work(how: str) -> object:
    rank = int(os.environ.get("RANK", -1))
    if rank == 1 and how == "raises":
        raise KeyError("only here")
    if rank == 1 and how == "leaves":
        os._exit(3)
    if how == "waits":
        time.sleep(60)
    if how == "sums":
        import torch
        import torch.distributed as dist

        dist.init_process_group("gloo")
        total = torch.tensor([rank + 1.0])
        dist.all_reduce(total)
        return total
    return rank


def test_results_come_in_order():
    assert run(work, "") == [-1]
    assert run(work, "", ranks=3) == [0, 1, 2]
    assert [float(total) for total in run(work, "sums", ranks=2)] == [3.0, 3.0]


def test_an_error_is_that_of_its_rank():
    with pytest.raises(AssertionError, match=r"^rank 1: Traceback[\s\S]*KeyError: 'only here'"):
        run(work, "raises", ranks=2)
    with start(work, "leaves", ranks=2) as processes:
        good, bad = processes.outcomes()
    assert (good.value, good.error) == (0, None)
    assert bad.error == "exit code 3"


def test_a_killed_process_says_so():
    with start(work, "waits", ranks=2) as processes:
        processes.kill(1)
        assert processes._outcome(1).error == "SIGKILL"
    assert not any(process.is_alive() for process in processes.processes)


def test_one_that_hangs_is_killed():
    with start(work, "waits", timeout=2) as processes:
        assert processes.outcomes()[0].error is not None


def test_a_command_that_says_nothing_is_killed():
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process, bounded(process, 0.2):
        assert process.stdout.readline() == b""
    assert process.returncode < 0
