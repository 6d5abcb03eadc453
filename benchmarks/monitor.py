"""What the monitor costs beside its answers: a DPO step with it against TRL's own, arms interleaved.

    python benchmarks/monitor.py                                     # a small model; prints the ratios
    python benchmarks/monitor.py --shape cpu-32k --repeats 30 --logging_steps 10

``watched`` is a step between two logs, ``logged`` one that a log follows: what is read before it only, the sums over
the ranks, and the metrics. ``again`` is TRL's step once more, whose ratio is 1 but for noise. The mean over the steps
from log to log is to be below 1.01. Every token is a completion, and the optimiser's step is left out, so that ratios
are, if anything, too large. The last line printed is the record's path.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from plot_align.bench import StepProblem, compare, interleaved, mixed
from plot_align.monitor.forwards import Forwards
from plot_align.records import write_record
from plot_align.trl.metrics import store
from shapes import SHAPES, Shape, random_weights

SMALL = Shape(16_000, 256, 3, 704, 4, 4, 8, 96)


@contextlib.contextmanager
def arm(problem: StepProblem, forwards: Forwards, name: str) -> Iterator[Callable[[], Any]]:
    """Yields the step of this arm."""
    trainer = problem.trainer
    with problem.arm("trl") as step:
        if name in ("trl", "again"):
            yield step
            return
        trainer.state.logging_steps = 1 if name == "logged" else 1_000_000
        forwards.install()

        def logged() -> None:
            step()
            store(trainer, forwards.take().metrics(), "train")

        try:
            yield logged if name == "logged" else step
        finally:
            forwards.remove()
            forwards.take()


def measure(shape: Shape, repeats: int, every: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Every arm against TRL's step, and the mean of the steps from log to log."""
    model, tokenizer = random_weights(shape, device, dtype)
    problem = StepProblem(model, tokenizer, shape.rows, shape.length)
    forwards = Forwards(problem.trainer)
    names = ("trl", "again", "watched", "logged")
    arms = {name: functools.partial(arm, problem, forwards, name) for name in names}
    samples = interleaved(arms, repeats=repeats, device=device)
    return compare({**samples, "mean": mixed(samples["watched"], samples["logged"], 1 / every)}, "trl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["small", *SHAPES], default="small")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--logging_steps", type=int, default=10)
    parser.add_argument("--device", default=str(torch.accelerator.current_accelerator() or "cpu"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--output", type=Path, default=Path("runs/monitor.json"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    shape = SMALL if args.shape == "small" else SHAPES[args.shape]
    found = measure(shape, args.repeats, args.logging_steps, torch.device(args.device), getattr(torch, args.dtype))
    for name, entry in found.items():
        low, high = entry["time"]["interval"]
        print(f"{name:8} {entry['time']['value']:.4f} ({low:.4f} to {high:.4f}) of TRL's step")
    config = {"shape": vars(shape), "repeats": args.repeats, "logging_steps": args.logging_steps, "dtype": args.dtype}
    print(json.dumps({"record": str(write_record(args.output, "monitor", found, config=config, seed=0))}))


if __name__ == "__main__":
    main()
