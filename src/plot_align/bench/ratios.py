"""Compare arms round by round: median ratio, quartiles, bootstrap interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from plot_align.bench.timing import Samples
from plot_align.records import measure

_RESAMPLES = 9999


def paired_ratio(ours: list[float] | list[int], base: list[float] | list[int]) -> tuple[float, float, float]:
    """Median, lower and upper quartile of the rounds' ratios; NaN if the base was not measured."""
    if not base or min(base) <= 0:
        return (float("nan"),) * 3
    ratios = [a / b for a, b in zip(ours, base, strict=True)]
    if len(ratios) == 1:
        return (ratios[0],) * 3
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, low, high


def paired(ours: Sequence[float], base: Sequence[float], *, seed: int = 0) -> dict[str, Any]:
    """Median of the rounds' ratios ``ours / base`` as an entry of a record.

    Its ``interval`` is the 95 % percentile bootstrap interval of the median over the rounds, its ``spread`` the
    smallest and largest ratio, ``quartiles`` the middle half. NaN if the base was not measured.
    """
    middle, low, high = paired_ratio(list(ours), list(base))
    rounds = len(ours)
    if math.isnan(middle):
        return measure(middle, 0)
    ratios = np.array(ours, dtype=float) / np.array(base, dtype=float)  # (n,)
    drawn = np.random.default_rng(seed).integers(rounds, size=(_RESAMPLES, rounds))
    ends = np.quantile(np.median(ratios[drawn], axis=1), [0.025, 0.975])
    entry = measure(middle, rounds, interval=(ends[0], ends[1]), spread=(ratios.min(), ratios.max()))
    return {**entry, "quartiles": [low, high]}


def compare(samples: Mapping[str, Samples], base: str) -> dict[str, Any]:
    """Each arm against ``base``: ratios of time and of peak memory, with their medians.

    If they were counted, also the page ``faults`` of a step and its seconds in the system's ``kernel``.
    """
    result = {}
    for name, sample in samples.items():
        rounds = len(sample.seconds)
        quartiles = statistics.quantiles(sample.seconds, n=4, method="inclusive") if rounds > 1 else sample.seconds * 3
        result[name] = {
            "time": paired(sample.seconds, samples[base].seconds),
            "memory": paired(sample.peak, samples[base].peak),
            "seconds": {**measure(quartiles[1], rounds, unit="s"), "quartiles": [quartiles[0], quartiles[2]]},
            "peak": measure(statistics.median(sample.peak), rounds, unit="B"),
        }
        if sample.faults:
            result[name]["faults"] = measure(statistics.median(sample.faults), rounds)
            result[name]["kernel"] = measure(statistics.median(sample.kernel), rounds, unit="s")
    return result


def mixed(usual: Samples, other: Samples, share: float) -> Samples:
    """The mean step of a training in which ``share`` of the steps are ``other`` ones; the peak is the larger one."""
    pairs = zip(usual.seconds, other.seconds, strict=True)
    return Samples(
        [(1 - share) * a + share * b for a, b in pairs],
        [max(a, b) for a, b in zip(usual.peak, other.peak, strict=True)],
    )
