"""``plot-align bench``: whole training steps, and a profile of one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from plot_align.bench.profile import profile
from plot_align.bench.ratios import compare, mixed, paired
from plot_align.bench.step import StepProblem, measured_share
from plot_align.bench.timing import Arm, Samples, interleaved
from plot_align.config import PlotConfig
from plot_align.errors import RunError, first_line

# How an arm's rounds are run: what runs, its arms → their samples.
Rounds = Callable[[str, Mapping[str, Arm]], dict[str, Samples]]


@dataclass(frozen=True)
class Setting:
    """What is measured: a micro-batch, a method, a device, the term.

    ``dtype`` is that of the weights; with ``bf16`` the products are taken in bfloat16 under autocast.
    """

    rows: int
    length: int
    method: str
    device: torch.device
    dtype: torch.dtype
    bf16: bool
    checkpointing: bool
    use_peft: bool
    plot: PlotConfig
    repeats: int


def bench(load: Callable[[], tuple[Any, Any]], setting: Setting, rounds: Rounds, trace: Path | None) -> dict[str, Any]:
    """The results of a record: whole steps, and a profile where ``trace`` names a file.

    Args:
        load: makes model and tokenizer.
        setting: the micro-batch and the rest.
        rounds: how arms are run, e.g. with a progress bar.
        trace: the profiler's trace, or None.

    Raises:
        RunError: the memory is not enough.
    """
    device = setting.device
    with out_of_memory(f"{setting.rows} x {setting.length} tokens", device, _smaller(setting)):
        model, tokenizer = load()
        problem = StepProblem(
            model,
            tokenizer,
            setting.rows,
            setting.length,
            method=setting.method,
            checkpointing=setting.checkpointing,
            use_peft=setting.use_peft,
            bf16=setting.bf16,
        )
        results: dict[str, Any] = {"step": measure_step(problem, setting.plot, rounds)}
        if trace is not None:
            with problem.arm("on", setting.plot) as step:
                results["profile"] = profile(step, device, trace)
    return results


def _smaller(setting: Setting) -> str:
    """What would need less memory."""
    advice = ["a smaller --rows or --length"]
    if not setting.checkpointing:
        advice.append("--gradient_checkpointing")
    if not setting.use_peft:
        advice.append("--use_peft")
    return f"{' or '.join(advice)}, or a smaller model"


def measure_step(problem: StepProblem, plot: PlotConfig, rounds: Rounds) -> dict[str, Any]:
    """Whole steps: ``trl``, ``off``, ``on``, ``measured``, and ``training``, the mean step of a training.

    ``arms`` are against ``off``; ``against_trl`` are ``on`` and ``training`` against TRL as it ships.
    """
    arms = {name: functools.partial(problem.arm, name, plot) for name in ("trl", "off", "on", "measured")}
    samples = rounds("whole steps", arms)
    share = measured_share(plot)
    samples["training"] = mixed(samples["on"], samples["measured"], share)
    arms_results = compare(samples, "off")
    ratio = arms_results["training"]["time"]["value"]
    trl = samples["trl"]
    return {
        "arms": arms_results,
        "against_trl": {
            name: {
                "time": paired(samples[name].seconds, trl.seconds),
                "memory": paired(samples[name].peak, trl.peak),
            }
            for name in ("on", "training")
        },
        "measured_share": share,
        "plot_share": 1 - 1 / ratio,
    }


def plain_rounds(setting: Setting, on_round: Callable[[str, int], None], *, budget: float = float("inf")) -> Rounds:
    """Rounds of ``setting.repeats``; ``on_round`` is told what runs and how many rounds are done."""

    def run(what: str, arms: Mapping[str, Arm]) -> dict[str, Samples]:
        return interleaved(
            arms,
            repeats=setting.repeats,
            device=setting.device,
            budget=budget,
            on_round=functools.partial(on_round, what),
        )

    return run


@contextlib.contextmanager
def out_of_memory(what: str, device: torch.device, remedy: str) -> Iterator[None]:
    """Turns an allocator's failure into one sentence: ``what`` did not fit on ``device``, so take ``remedy``.

    Raises:
        RunError: the memory is not enough. Whatever else is raised passes through.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
        if not is_memory:
            raise
        raise RunError(
            f"{what} did not fit into the memory of {device} ({first_line(error)}); take {remedy}"
        ) from error
