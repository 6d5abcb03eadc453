"""Profile one step with torch's profiler: a trace, and the fraction of time in each of PLOT's named ranges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from plot_align.bench.timing import synchronize
from plot_align.errors import RunError
from plot_align.io import complete_or_absent

PREFIX = "plot_align/"
_STEP = PREFIX + "step"
_HEAD = (PREFIX + "head_forward", PREFIX + "head_backward")  # the whole head, including PLOT's part


def profile(step: Callable[[], object], device: torch.device, path: Path) -> dict[str, Any]:
    """Runs ``step`` once to warm up and once under the profiler.

    On a GPU the seconds of a range, and of the step, are those of the kernels that it launched. On a CPU they are
    wall-clock time.

    Args:
        step: the step to profile, with the term on.
        device: the device of the step.
        path: file of the Chrome trace (chrome://tracing, ui.perfetto.dev).

    Returns:
        ``seconds`` of the step; ``ranges``: name → seconds, calls and share of the step; ``head_share`` of the whole
        head; ``plot_share`` of the ranges that run for PLOT alone.

    Raises:
        RunError: the step ran none of PLOT's named ranges.
    """
    from torch.profiler import ProfilerActivity, record_function
    from torch.profiler import profile as torch_profile

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    step()
    synchronize(device)
    with torch_profile(activities=activities) as profiler, record_function(_STEP):
        step()
        synchronize(device)
    with complete_or_absent(path) as temporary:
        profiler.export_chrome_trace(str(temporary))

    averages = [event for event in profiler.key_averages() if event.device_type == torch.autograd.DeviceType.CPU]
    named = {event.key: event for event in averages if event.key.startswith(PREFIX)}
    total = named.pop(_STEP).cpu_time_total
    if on_gpu:
        total = sum(event.self_device_time_total for event in averages)
    if not named:
        raise RunError("the profiled step ran none of PLOT's named ranges; profile a step with the term on")
    ranges = {}
    for name, event in sorted(named.items()):
        microseconds = event.device_time_total if on_gpu else event.cpu_time_total
        ranges[name] = {"seconds": microseconds / 1e6, "calls": event.count, "share": microseconds / total}
    return {
        "trace": str(path),
        "seconds": total / 1e6,
        "ranges": ranges,
        "head_share": sum(entry["share"] for name, entry in ranges.items() if name in _HEAD),
        "plot_share": sum(entry["share"] for name, entry in ranges.items() if name not in _HEAD),
    }
