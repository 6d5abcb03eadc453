"""What the term costs: steps with PLOT and without it on the same kernel, interleaved, in time and peak memory."""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plot_align.config import PlotConfig
from plot_align.head import HeadOutput, HeadSpec, causal_lm, fused_head
from plot_align.preference.batch import Pooling
from plot_align.trl.backends import FusedBackend
from plot_align.trl.batches import policy_batch, trainer_kind
from plot_align.trl.checks import makes_reference_forward
from plot_align.trl.reference import reference_model
from plot_align.trl.term import HeadResult


class _WithoutPlot(FusedBackend):
    """Our kernel in TRL's place with nothing to sweep up: what PLOT is compared with."""

    def sweep(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor, spec: HeadSpec
    ) -> HeadOutput:
        head = fused_head(hidden, weight, bias, targets, replace(spec, workspace=self.workspace))
        nothing = Pooling(hidden.new_zeros(0), None, hidden.new_zeros(0))
        self.result = HeadResult(head, nothing, hidden, rows)  # once a step, as with PLOT
        return head

    def sweep_reference(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor, spec: HeadSpec
    ) -> HeadOutput:
        self.reference = hidden.new_zeros(0)
        return fused_head(hidden, weight, bias, targets, replace(spec, workspace=self.workspace))


@contextmanager
def without_plot(trainer: Any, config: PlotConfig | None = None) -> Iterator[None]:
    """While open, the head passes of a trainer without PLOT run on our kernel, the policy's and the reference's.

    Args:
        trainer: without a term.
        config: the options whose kernel it is (``plot_impl``, ``plot_block_mib``); ``None`` takes the defaults.
    """
    kind = trainer_kind(trainer)
    anchor = causal_lm(reference_model(trainer)) if makes_reference_forward(trainer, kind) else None
    nothing: Any = torch.nn.Module()
    backend = _WithoutPlot(causal_lm(trainer.model), nothing, anchor, trainer.accelerator.autocast)
    backend.head_options = (config or PlotConfig()).head_options
    original = trainer.compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with backend.capture(policy_batch(kind, inputs)):
            result = original(model, inputs, *args, **kwargs)
        backend.take()
        return result

    trainer.compute_loss = compute_loss
    try:
        yield
    finally:
        del trainer.compute_loss
        backend.remove()


@dataclass
class Samples:
    """Measurements of one arm, round by round.

    ``seconds`` of a step; bytes that it held at its ``peak``; its page ``faults`` and the processors' seconds in the
    operating system's ``kernel``, most of which are those faults: what memory costs that is given back and asked for
    anew. What an arm frees is given back before the next one, so that peaks compare: a training has fewer faults. The
    last two are empty where the system does not count them.
    """

    seconds: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    faults: list[int] = field(default_factory=list)
    kernel: list[float] = field(default_factory=list)


Arm = Callable[[], AbstractContextManager[Callable[[], Any]]]


def interleaved(
    arms: Mapping[str, Arm],
    *,
    repeats: int,
    device: torch.device,
    budget: float = math.inf,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, Samples]:
    """Runs every arm once a round, the order rotating, so that a machine that slows down slows all of them.

    An arm is a context that yields its step; only the step is measured, not what the context sets up. The first
    round warms up and is dropped. Peak memory is the allocator's on CUDA, the process's resident set
    elsewhere on Linux, and not measured on other systems.

    Args:
        arms: name → arm.
        repeats: rounds that are kept, at most.
        device: where the steps run.
        budget: seconds after which no further round begins, once one is kept.
        on_round: is told how many rounds are done, the first one among them.
    """
    names = list(arms)
    samples = {name: Samples() for name in names}
    begin = time.perf_counter()
    for repeat in range(repeats + 1):
        if repeat > 1 and time.perf_counter() - begin > budget:
            break
        for k in range(len(names)):
            name = names[(k + repeat) % len(names)]
            with arms[name]() as step:
                _reset_peak(device)
                before, start = _usage(), time.perf_counter()
                step()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds, after = time.perf_counter() - start, _usage()
            if repeat:
                samples[name].seconds.append(seconds)
                samples[name].peak.append(_peak(device))
                if before is not None and after is not None:
                    samples[name].faults.append(after.ru_minflt - before.ru_minflt)
                    samples[name].kernel.append(after.ru_stime - before.ru_stime)
        if on_round is not None:
            on_round(repeat + 1)
    return samples


def paired_ratio(ours: list[float] | list[int], base: list[float] | list[int]) -> tuple[float, float, float]:
    """Median of the rounds' ratios and their lower and upper quartile; NaN where the base was not measured."""
    if not base or min(base) <= 0:
        return (float("nan"),) * 3
    ratios = [a / b for a, b in zip(ours, base, strict=True)]
    if len(ratios) == 1:
        return (ratios[0],) * 3
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, low, high


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return
    _trim()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's way to reset the peak resident set
    except OSError:
        return


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _usage() -> Any:
    """What the system has counted of this process; None on Windows."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF)


def held(device: torch.device) -> int:
    """Bytes that are held now, of the memory whose peaks :func:`interleaved` takes; 0 where it takes none."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    _trim()
    return _status("VmRSS")


def _trim() -> None:
    """Gives freed memory back to the system, where glibc keeps it: else a peak would count what another arm left."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _status(name: str) -> int:
    """Bytes that Linux tells of this process under ``name``; 0 elsewhere."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((int(row.split()[1]) * 1024 for row in status.splitlines() if row.startswith(name)), 0)
