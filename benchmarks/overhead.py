"""What PLOT costs, and what its way through the head avoids: the head alone and the whole DPO step, arm by arm.

    python benchmarks/overhead.py                                  # CPU shapes: vocabulary 32k and 128k
    python benchmarks/overhead.py --shapes llama-3.2-3b llama-3.1-8b qwen2.5-7b --dtype bfloat16   # a GPU

Arms are interleaved and compared round by round, so that a machine that slows down slows all of them. Ratios are to
``off``, the same kernel without PLOT. In a whole step ``on`` is the default (a target from the micro-batch),
``measured`` a step of it that balances alpha anew, as one in five does, and ``paper`` one target for all; ``separate``
scores and sweeps in two head passes. Of the head alone the arms have the paper's term; ``two-pass`` and
``materialised`` (which builds the logits) show what was avoided. Weights are random. The last line printed is the
record's path. Your own model: ``plot-align bench``; all that a GPU is to show: ``benchmarks/gpu.py``.
"""

from __future__ import annotations

import argparse
import functools
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from head_problem import HeadProblem
from plot_align.bench import Arm, Samples, StepProblem, compare, interleaved
from plot_align.bench.show import arms_table
from plot_align.config import PlotConfig
from plot_align.records import write_record
from shapes import SHAPES, Shape, random_weights

SHAPES = dict(SHAPES)  # a rehearsal puts small ones in their place, here and nowhere else
HEAD_ARMS = {
    "off": None,
    "on": PlotConfig.paper(),
    "on-all": PlotConfig.paper(positions="all"),
    "sequence": PlotConfig.paper(granularity="sequence"),
    "token": PlotConfig.paper(granularity="token"),
    "two-pass": None,
    "materialised": None,
}
STEP_ARMS = {
    "off": ("off", None),
    "on": ("on", PlotConfig()),
    "measured": ("measured", PlotConfig()),
    "paper": ("on", PlotConfig.paper()),
    "separate": ("on", PlotConfig.from_options(plot_backend="separate")),
    "trl": ("trl", None),
}


Correct = Callable[[dict[str, Samples]], dict[str, Samples]]


def head_arms(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Arm], Correct]:
    """The head of this shape; the arms that need no term of their own take that of ``on``."""
    plots = {name: config for name, config in HEAD_ARMS.items() if config is not None}
    problem = HeadProblem(shape.vocab, shape.hidden, shape.rows, shape.length, plots, device=device, dtype=dtype)
    return {name: functools.partial(problem.arm, name) for name in HEAD_ARMS}, problem.own_peaks


def step_arms(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Arm], Correct]:
    """DPO on a random-weight model of this shape; gradient checkpointing on a GPU."""
    model, tokenizer = random_weights(shape, device, dtype)
    problem = StepProblem(model, tokenizer, shape.rows, shape.length, checkpointing=device.type != "cpu")
    return {name: functools.partial(problem.arm, *arm) for name, arm in STEP_ARMS.items()}, dict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["cpu-32k", "cpu-128k"])
    parser.add_argument("--what", nargs="+", choices=["head", "step"], default=["head", "step"])
    parser.add_argument("--arms", nargs="+", help="some of the arms, beside off; all without it")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--output", type=Path, default=Path("runs/overhead.json"))
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)

    from rich.console import Console

    console = Console()
    warnings.simplefilter("ignore", FutureWarning)  # of transformers about TRL
    results: dict[str, Any] = {}
    for name in args.shapes:
        for what in args.what:
            with console.status(f"{name}, {what}: {args.repeats + 1} rounds"):
                arms, correct = (head_arms if what == "head" else step_arms)(SHAPES[name], device, dtype)
                chosen = {arm: step for arm, step in arms.items() if args.arms is None or arm in ("off", *args.arms)}
                samples = correct(interleaved(chosen, repeats=args.repeats, device=device))
                del arms, chosen, correct
            results[f"{name}/{what}"] = compare(samples, "off")
            console.print(arms_table(f"{name}, {what}", results[f"{name}/{what}"], {}))
    config = {
        "shapes": {name: asdict(SHAPES[name]) for name in args.shapes},
        "dtype": args.dtype,
        "repeats": args.repeats,
    }
    print(json.dumps({"record": str(write_record(args.output, "overhead", results, config=config, seed=0))}))


if __name__ == "__main__":
    main()
