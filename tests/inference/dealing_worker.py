"""What the processes of ``test_dealing.py`` do: the mechanism itself, then commands of the command line.

    python -m torch.distributed.run ... dealing_worker.py SPEC.json OUT

SPEC holds a list of commands; what the main process found goes to OUT.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from plot_align.inference.dealing import each, share, together
from plot_align.inference.ranks import process_state
from torch import nn

from plot_align.cli import main as cli
from plot_align.inference import dealing, scoring


class Stubborn(Exception):
    """Cannot be sent to another process."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def layer(value: float) -> tuple[nn.Linear, dict[str, float]]:
    made = nn.Linear(1, 1, bias=False)
    nn.init.constant_(made.weight, value)
    return made, Weakly(value=value)


class Weakly(dict[str, Any]):
    """A dictionary that can be let go of."""


def times(model: nn.Linear, job: int, seen: list[int] | None = None) -> tuple[float, int]:
    """The product, and which process computed it."""
    if seen is not None:
        seen.append(job)
    if job < 0:
        raise (Stubborn("job", str(job)) if job < -100 else ValueError(f"job {job}"))
    return model(torch.tensor([float(job)])).item(), process_state().process_index


def nested(model: nn.Linear, job: int) -> list[int]:
    """Which processes compute what a job deals in turn."""
    return [rank for _, rank in each(partial(times, model), range(job, job + 3))]


def known(job: int) -> int:
    """How many things this process keeps for jobs."""
    assert dealing._team is not None
    return len(dealing._team.shared)


def fails_elsewhere() -> int:
    if process_state().process_index:
        raise Stubborn("not", "here")
    return 0


def what(error: BaseException) -> list[str]:
    return [type(error).__name__, str(error), str(error.__cause__)]


def mechanism(found: dict[str, Any]) -> int:
    size = process_state().num_processes
    model, note = share(layer, 3.0)
    seen: list[int] = []
    found["products"] = list(each(partial(times, model), iter(range(7)), on_main={"seen": seen}))
    found["seen here"] = seen
    found["note"] = note["value"]
    for name, jobs in (("error", [1, 2, 3, -4, 5, 6]), ("stubborn", [1, -101]), ("own", [-7, 2])):
        taken: list[float] = []
        try:
            for product, _ in each(partial(times, model), jobs):
                taken.append(product)
        except Exception as error:
            found[name] = [taken, *what(error)]
    found["nested"] = list(each(partial(nested, model), range(size)))
    found["alone"] = [rank for _, rank in each(partial(times, model), range(size), dealt=False)]
    found["not shared"] = [rank for _, rank in each(partial(times, nn.Linear(1, 1)), range(size + 1))]
    try:
        share(fails_elsewhere)
    except Exception as error:
        found["share"] = what(error)
    other, _ = share(layer, 5.0)
    before = list(each(known, range(size)))
    del model, note
    gc.collect()
    found["let go"] = [before, list(each(known, range(size)))]
    found["after"] = [product for product, _ in each(partial(times, other), range(size))]
    return 5


def main() -> None:
    spec, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    found["code"] = together(lambda: mechanism(found))
    rank = process_state().process_index
    found["codes"] = []
    score = scoring._score
    for command in spec:
        os.chdir(command["cwd"])
        if rank and command.get("fail"):
            scoring._score = lambda *_: (_ for _ in ()).throw(RuntimeError("this process only"))
        found["codes"].append(cli.main(command["arguments"]))
        scoring._score = score
    if rank == 0:
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
