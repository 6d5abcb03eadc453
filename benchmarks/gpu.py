"""All that a GPU is to show, in under 25 minutes on one of them, stage by stage into one record.

    python benchmarks/gpu.py                    # an 80 GB GPU; interrupted, the same command goes on where it was
    python benchmarks/gpu.py --tiny             # no GPU: the same script in Triton's interpreter, on tiny shapes

accuracy   the Triton kernels against float64: bf16, fp16, fp32, soft cap with logit scale and temperature, odd
           vocabularies up to 262,144, every granularity. No error may be larger than eager torch's in the same dtype
           plus a stated tolerance.
head       the LM head alone, PLOT on against off on the same kernel, every granularity, at 2 x 1,024 and 8 x 1,024
           tokens, and what share of the extra time the measured memory bandwidth explains.
step       whole DPO steps of random-weight Llama-3.2-3B, Llama-3.1-8B and Qwen2.5-7B, bf16, gradient checkpointing, no
           optimiser step, a reference on the policy's weights. Targets: 1.005 in time, 1.01 in peak memory, on / off;
           beside them the mean step of a training against TRL as it ships.

Every stage has a part of the minutes and stops when they are over; what it left out, it says. Exit code 1 where a
kernel is wrong or a stage failed; a missed target is a result.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined

import torch

from head_accuracy import DTYPES, cases, errors, failures, tolerance
from head_problem import OUTPUTS, HeadProblem, extra_seconds, release
from machine import measure_machine
from plot_align.bench import StepProblem, compare
from plot_align.bench.run import Setting, measure_step, out_of_memory, plain_rounds
from plot_align.bench.show import arms_table, milliseconds, ratio
from plot_align.config import PlotConfig
from plot_align.errors import InputError, PlotAlignError
from plot_align.head import HeadSpec
from plot_align.records import commit, hardware, read_record, versions, write_record
from shapes import SHAPES, Shape, random_weights

TIME_TARGET, MEMORY_TARGET = 1.005, 1.01
MODELS = ("llama-3.2-3b", "llama-3.1-8b", "qwen2.5-7b")
PLOTS = {
    "batch": PlotConfig(),
    "batch, norm": PlotConfig.from_options(geometry="norm"),
    "sequence": PlotConfig(granularity="sequence"),
    "token, norm": PlotConfig.from_options(granularity="token", geometry="norm"),
    "token, 16 slices": PlotConfig(granularity="token"),
}
VOCABULARIES = (32_000, 50_257, 128_256, 152_064, 256_001, 262_144)


@dataclass(frozen=True)
class Plan:
    """Sizes of a run: the real ones, or ``--tiny``."""

    vocabularies: tuple[int, ...]
    accuracy_rows: int
    accuracy_hidden: int
    shapes: Mapping[str, Shape]
    rows: tuple[int, ...]
    repeats: int


REAL = Plan(VOCABULARIES, 64, 256, {name: SHAPES[name] for name in MODELS}, (2, 8), 15)
TINY = Plan((67,), 7, 8, {"tiny": Shape(67, 16, 1, 16, 2, 1, length=6)}, (2,), 1)


class Run:
    """The record as it grows, and the clock."""

    def __init__(self, args: argparse.Namespace, plan: Plan, device: torch.device) -> None:
        self.output, self.plan, self.device = args.output, plan, device
        self.dtype = torch.float32 if args.tiny else torch.bfloat16  # eager bf16 is slow on a CPU
        self.end = time.monotonic() + 60 * args.minutes
        self.config = {
            "plan": plan,
            "minutes": args.minutes,
            "tiny": args.tiny,
            "plots": {name: plot.to_dict() for name, plot in PLOTS.items()},
            "tolerance": {str(dtype): tolerance(dtype, device) for dtype in DTYPES},
            "targets": {"time": TIME_TARGET, "memory": MEMORY_TARGET},
        }
        self.results: dict[str, Any] = {}
        if args.output.exists() and not args.fresh:
            self.results = self._finished()
        self.write()

    def _finished(self) -> dict[str, Any]:
        """The stages of an earlier run that are not run again."""
        record = read_record(self.output, "gpu")
        same = {"GPU": hardware()["gpus"], "versions": versions(), "sizes": self.config["tiny"]}
        came = {"GPU": record["hardware"]["gpus"], "versions": record["versions"], "sizes": record["config"]["tiny"]}
        for what, value in same.items():
            if came[what] != value:
                raise InputError(
                    f"--output {self.output} is a record of another run ({what} differ); name another file, or give "
                    "--fresh to begin anew"
                )
        if record["commit"] != commit():
            return {}  # other code: nothing of it holds
        return {name: stage for name, stage in record["results"].items() if _is_whole(stage)}

    def write(self) -> None:
        """After every stage, so that nothing is lost."""
        write_record(self.output, "gpu", self.results, config=self.config, seed=0)

    def setting(self, shape: Shape, rows: int) -> Setting:
        return Setting(
            rows=rows, length=shape.length, method="dpo", device=self.device, dtype=self.dtype, bf16=False,
            checkpointing=True, use_peft=False, plot=PlotConfig.from_options(plot_impl="triton"),
            repeats=self.plan.repeats,
        )  # fmt: skip


def _is_whole(stage: Mapping[str, Any]) -> bool:
    """Whether a stage need not be run again: it did not fail, found nothing wrong, and left nothing out."""
    return not any(stage.get(word) for word in ("failed", "wrong", "left_out"))


def accuracy(run: Run, seconds: float) -> dict[str, Any]:
    """Cases that ran, the worst of each dtype, and whatever is wrong."""
    begin, plan = time.monotonic(), run.plan
    wrong: dict[str, Any] = {}
    worst: dict[str, dict[str, Any]] = {}
    every = list(cases(plan.vocabularies[::-1]))  # the largest first: they are the likeliest to be wrong
    ran = 0
    for case in every:
        if ran and time.monotonic() - begin > seconds:
            break
        found = errors(case, rows=plan.accuracy_rows, hidden=plan.accuracy_hidden, device=run.device, impl="triton")
        ran += 1
        if failures(found):
            wrong[case.name] = {name: found[name] for name in failures(found)}
        for name, entry in found.items():
            key = f"{str(case.dtype).removeprefix('torch.')} {name}"
            if key not in worst or entry["kernel"] - entry["eager"] > worst[key]["kernel"] - worst[key]["eager"]:
                worst[key] = {**entry, "case": case.name}
    return {"cases": ran, "left_out": len(every) - ran, "wrong": wrong, "worst": worst}


def head(run: Run, seconds: float, *, shape: Shape, rows: int) -> dict[str, Any]:
    """The head alone, and each granularity's share of the floor."""
    machine = measure_machine(rows * shape.length, shape.hidden, shape.vocab, run.device, run.dtype)
    spec = HeadSpec(outputs=OUTPUTS, impl="triton")
    size = (shape.vocab, shape.hidden, rows, shape.length)
    problem = HeadProblem(*size, PLOTS, device=run.device, dtype=run.dtype, spec=spec)
    arms = {name: functools.partial(problem.arm, name) for name in ("off", *PLOTS)}
    run_rounds = plain_rounds(run.setting(shape, rows), lambda *_: None, budget=seconds)
    samples = problem.own_peaks(run_rounds("head", arms))
    floors = {}
    for name in PLOTS:
        floor = problem.work(name).plot_floor(machine)
        extra = extra_seconds(samples[name], samples["off"])
        share = floor / extra["value"] if extra["value"] > 0 else None  # the noise is larger than the cost
        floors[name] = {"floor_seconds": floor, "extra": extra, "share_of_floor": share}
    return {"machine": machine.to_dict(), "arms": compare(samples, "off"), "floors": floors}


def step(run: Run, seconds: float, *, shape: Shape, rows: int) -> dict[str, Any]:
    """Whole steps, and whether the targets are met."""
    setting = run.setting(shape, rows)
    model, tokenizer = random_weights(shape, setting.device, setting.dtype)
    problem = StepProblem(model, tokenizer, rows, shape.length, checkpointing=setting.checkpointing)
    found = measure_step(problem, setting.plot, plain_rounds(setting, lambda *_: None, budget=seconds))
    on, against = found["arms"]["on"], found["against_trl"]["training"]
    found["verdict"] = {
        "time": verdict(on["time"], TIME_TARGET),
        "memory": verdict(on["memory"], MEMORY_TARGET),
        "memory / TRL": verdict(against["memory"], MEMORY_TARGET),
    }
    return found


def verdict(entry: Mapping[str, Any], target: float) -> str:
    """``pass`` or ``miss`` where the whole interval is on one side, else ``undecided``; below five rounds always."""
    if not entry["n"]:
        return "not measured"
    low, high = entry["interval"]
    if entry["n"] < 5 or low <= target < high:
        return "undecided"
    return "pass" if high <= target else "miss"


Stage = Callable[[Run, float], dict[str, Any]]


def stages(plan: Plan) -> dict[str, tuple[float, Stage]]:
    """Name → its weight in the time that is left, and the stage."""
    found: dict[str, tuple[float, Stage]] = {"accuracy": (4.0, accuracy)}
    for name, shape in plan.shapes.items():
        for rows in plan.rows:
            found[f"head/{name}/{rows} x {shape.length}"] = (1.0, functools.partial(head, shape=shape, rows=rows))
    for name, shape in plan.shapes.items():
        for rows in plan.rows:
            part = functools.partial(step, shape=shape, rows=rows)
            found[f"step/{name}/{rows} x {shape.length}"] = (2.5, part)
    return found


def show(console: Any, name: str, found: Mapping[str, Any]) -> None:
    """What a stage found."""
    if "failed" in found:
        console.print(f"{name}: failed, {found['failed']}", style="red", markup=False)
        return
    if name == "accuracy":
        left = f", {found['left_out']} left out for lack of time" if found["left_out"] else ""
        console.print(f"accuracy: {found['cases']} heads{left}, {len(found['wrong'])} wrong", markup=False)
        for case, wrong in found["wrong"].items():
            console.print(f"  {case}: {wrong}", style="red", markup=False)
        return
    console.print(arms_table(name, found["arms"], {}))
    for arm, entry in found.get("floors", {}).items():
        share = entry["share_of_floor"]
        console.print(
            f"  {arm}: extra {milliseconds(entry['extra']['value'])}, floor {milliseconds(entry['floor_seconds'])}, "
            + ("within the noise" if share is None else f"{100 * share:.0f} % of it"),
            markup=False,
        )
    if "verdict" in found:
        against = found["against_trl"]["training"]
        console.print(f"  training / TRL: time {ratio(against['time'])}, memory {ratio(against['memory'])}")
        targets = {"time": TIME_TARGET, "memory": MEMORY_TARGET, "memory / TRL": MEMORY_TARGET}
        for what, word in found["verdict"].items():
            console.print(f"  {what} <= {targets[what]}: {word}", style="green" if word == "pass" else "yellow")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU, kernels interpreted")
    parser.add_argument("--minutes", type=float, default=23.0, help="for all stages (%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="stages whose name begins so: accuracy, head, step")
    parser.add_argument("--fresh", action="store_true", help="do not read what an earlier run has finished")
    parser.add_argument("--output", type=Path, help="the record (runs/gpu.json; runs/gpu-tiny.json)")
    args = parser.parse_args()
    args.output = args.output or Path("runs/gpu-tiny.json" if args.tiny else "runs/gpu.json")

    from rich.console import Console

    console = Console()
    warnings.simplefilter("ignore", FutureWarning)  # of transformers about TRL
    try:
        if args.tiny:
            console.print("tiny shapes in the interpreter: what is checked holds, its times say nothing")
        if not args.tiny and not torch.cuda.is_available():
            raise InputError("no GPU is here; use --tiny to run the kernels in Triton's interpreter")
        run = Run(args, TINY if args.tiny else REAL, torch.device("cpu" if args.tiny else "cuda"))
        wrong = _run(run, console, args.only)
    except PlotAlignError as error:
        console.print(f"gpu.py: {error}", style="red", markup=False)
        return error.exit_code
    console.print(f"record: {args.output}", markup=False, soft_wrap=True)
    return int(wrong)


def _run(run: Run, console: Any, only: list[str] | None) -> bool:
    """All stages that are due; whether anything is wrong."""
    every = {name: stage for name, stage in stages(run.plan).items() if only is None or name.startswith(tuple(only))}
    if not every:
        raise InputError(f"--only is {' '.join(only or [])}, expected stages of {', '.join(stages(run.plan))}")
    wrong = False
    for index, (name, (weight, stage)) in enumerate(every.items()):
        if name not in run.results:
            left = list(every.values())[index:]
            seconds = max(0.0, run.end - time.monotonic()) * weight / sum(weight for weight, _ in left)
            with console.status(f"{name}, at most about {seconds:.0f} s"):
                run.results[name] = _guarded(stage, run, seconds, name)
                release(run.device)
            run.write()
        show(console, name, run.results[name])
        wrong = wrong or "failed" in run.results[name] or bool(run.results[name].get("wrong"))
    return wrong


def _guarded(stage: Stage, run: Run, seconds: float, name: str) -> dict[str, Any]:
    """A stage that fails, in Triton's compiler or in a library, must not cost the others."""
    begin = time.monotonic()
    try:
        with out_of_memory(name, run.device, "a GPU with more of it"):
            found = stage(run, seconds)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    return {**found, "wall_seconds": time.monotonic() - begin}


if __name__ == "__main__":
    sys.exit(main())
