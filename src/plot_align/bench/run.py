"""Run ``plot-align bench``: whole training steps, and a profile of one."""

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

# Runs the rounds of all arms: (title, arms) → samples.
Rounds = Callable[[str, Mapping[str, Arm]], dict[str, Samples]]


@dataclass(frozen=True)
class Setting:
    """The setting of a benchmark: micro-batch, method, device, options of the term.

    ``dtype`` is that of the weights; with ``bf16``, autocast computes products in bfloat16.
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
    """Measures whole steps, and profiles one if ``trace`` names a file; returns the results of a record.

    Args:
        load: returns model and tokenizer.
        setting: see :class:`Setting`.
        rounds: runs the arms, e.g. with a progress bar.
        trace: file of the profiler's trace, or None.

    Raises:
        RunError: out of memory.
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
    """Advice for a setting that needs less memory."""
    advice = ["a smaller --rows or --length"]
    if not setting.checkpointing:
        advice.append("--gradient_checkpointing")
    if not setting.use_peft:
        advice.append("--use_peft")
    return f"{' or '.join(advice)}, or a smaller model"


def measure_step(problem: StepProblem, plot: PlotConfig, rounds: Rounds) -> dict[str, Any]:
    """Measures whole steps: ``trl``, ``off``, ``on``, ``measured``, and ``training``, the mean step of a training.

    ``arms`` compares each with ``off``; ``against_trl`` compares ``on`` and ``training`` with unchanged TRL.
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
    """Runs ``setting.repeats`` rounds; calls ``on_round`` with the title and the number of finished rounds."""

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
    """Turns an out-of-memory error into one sentence: ``what`` did not fit on ``device``; take ``remedy``.

    Raises:
        RunError: out of memory. Other errors pass through.
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
