"""``plot-align bench``: machine, head and step, one after another, into one record."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from plot_align.bench.head import OUTPUTS, HeadProblem
from plot_align.bench.machine import measure_machine
from plot_align.bench.profile import profile
from plot_align.bench.ratios import compare, extra_seconds, mixed, paired
from plot_align.bench.shapes import Shape, random_model, word_tokenizer
from plot_align.bench.step import StepProblem, measured_share
from plot_align.config import PlotConfig
from plot_align.errors import RunError, first_line
from plot_align.head import HeadSpec
from plot_align.trl.overhead import Arm, Samples, interleaved

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

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the matrix products."""
        return torch.bfloat16 if self.bf16 else self.dtype


def bench(
    load: Callable[[], tuple[Any, Any]], vocab: int, hidden: int, setting: Setting, rounds: Rounds, trace: Path | None
) -> dict[str, Any]:
    """All of it, as the results of a record: machine, head alone, whole steps, and a profile where ``trace`` says so.

    Args:
        load: makes model and tokenizer; called once the head has been measured, so that both never lie in memory.
        vocab, hidden: size of the model's head.
        setting: the micro-batch and the rest.
        rounds: how arms are run, e.g. with a progress bar.
        trace: the profiler's trace, or None.

    Raises:
        RunError: the memory is not enough.
    """
    device = setting.device
    with out_of_memory(f"{setting.rows} x {setting.length} tokens", device, _smaller(setting)):
        machine = measure_machine(setting.rows * setting.length, hidden, vocab, device, setting.compute_dtype)
        head = measure_head(vocab, hidden, setting, rounds)
        floor = head.pop("work").plot_floor(machine)
        results: dict[str, Any] = {"machine": machine.to_dict(), "head": head}
        head["plot_floor_seconds"] = floor
        extra = head["extra"]["value"]
        # Where the noise is larger than the cost there is no share to speak of.
        head["share_of_floor"] = floor / extra if extra > 0 else None
        release(device)
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
        results["step"] = measure_step(problem, setting.plot, rounds)
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


def measure_head(vocab: int, hidden: int, setting: Setting, rounds: Rounds) -> dict[str, Any]:
    """The head alone, the term on against off; ``work`` of it beside."""
    problem = HeadProblem(
        vocab,
        hidden,
        setting.rows,
        setting.length,
        {"on": setting.plot},
        device=setting.device,
        dtype=setting.dtype,
        autocast=torch.bfloat16 if setting.bf16 else None,
        method=setting.method,
        spec=HeadSpec(outputs=OUTPUTS, **setting.plot.head_options),
    )
    arms = {name: functools.partial(problem.arm, name) for name in ("off", "on")}
    samples = problem.own_peaks(rounds("the head alone", arms))
    work = problem.work("on")
    return {
        "arms": compare(samples, "off"),
        "extra": extra_seconds(samples["on"], samples["off"]),
        "flops": work.flops,
        "head_bytes": work.head_bytes,
        "plot_bytes": work.plot_bytes,
        "work": work,
    }


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


def random_weights(shape: Shape, setting: Setting) -> tuple[Any, Any]:
    """Model and tokenizer of a shape."""
    return random_model(shape, setting.device, setting.dtype), word_tokenizer(shape.vocab)


def release(device: torch.device) -> None:
    """Gives back what the last problem held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


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
