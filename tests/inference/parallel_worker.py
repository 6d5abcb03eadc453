"""What the processes of test_parallel.py do: the mechanism itself, then commands of the command line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from plot_align import parallel
from plot_align.cli import main as cli
from plot_align.inference import scoring
from plot_align.parallel import each, everywhere, in_step, on_main, rank, size


class Stubborn(Exception):
    """Cannot be sent to another process."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def times(job: int) -> tuple[int, int]:
    """The product, and which process computed it."""
    if job < 0:
        raise (Stubborn("job", str(job)) if job < -100 else ValueError(f"job {job}"))
    return 3 * job, rank()


def nested(job: int) -> list[int]:
    """Which processes compute what a job shares in turn."""
    return [process for _, process in each(times, range(job, job + 3))] + [on_main(rank), everywhere(rank)]


def fails(where: int) -> int:
    if rank() == where:
        raise Stubborn("not", "here")
    return 10 + rank()


def fails_before_meeting(where: int) -> None:
    fails(where)
    on_main(rank)


def caught(work: Callable[[], Any]) -> list[Any]:
    try:
        return [work()]
    except Exception as error:
        return [type(error).__name__, str(error), str(error.__cause__)]


def mechanism() -> dict[str, Any]:
    found: dict[str, Any] = {"size": size(), "products": list(each(times, iter(range(7))))}
    for name, jobs in (("error", [1, 2, 3, -4, 5, 6]), ("stubborn", [1, -101])):
        taken: list[int] = []
        found[name] = [taken, *caught(lambda jobs=jobs, taken=taken: taken.extend(x for x, _ in each(times, jobs)))]
    found["nested"] = list(each(nested, range(size())))
    found["main"] = on_main(rank)
    found["main fails"] = caught(lambda: on_main(lambda: fails(0)))
    found["everywhere"] = everywhere(rank)
    found["one fails"] = caught(lambda: everywhere(lambda: fails(1)))
    found["one job fails"] = caught(lambda: everywhere(lambda: list(each(times, [1, -4]))))
    found["still in step"] = [product for product, _ in each(times, [5])]
    found["alone"] = caught(lambda: everywhere(lambda: fails_before_meeting(1)))
    return found


def work(commands: list[dict[str, Any]], said: str) -> dict[str, Any]:
    """What this process found; what it printed is appended to the file ``said``."""
    with Path(said).open("a") as out:
        os.dup2(out.fileno(), 1)
    torch.set_num_threads(1)
    with in_step():
        found = mechanism()
    process, score, found["codes"] = parallel.process_state().process_index, scoring._score, []
    for command in commands:
        os.chdir(command["cwd"])
        for pattern in command.get("remove", []) if process == 0 else ():
            for path in Path().glob(pattern):
                path.unlink()
        if process == 1 and command.get("fail"):
            scoring._score = lambda *_: (_ for _ in ()).throw(RuntimeError("this process only"))
        found["codes"].append(cli.main(command["arguments"]))
        scoring._score = score
    return found
