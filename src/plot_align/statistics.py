"""Statistics of rates: a share with its interval, paired arms, several tests at once.

The unit is the behaviour (or whatever a rate belongs to), never the single case: cases of one behaviour are alike.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import bootstrap, permutation_test

from plot_align.errors import InputError
from plot_align.records import measure, wilson

_RESAMPLES = 9999  # scipy.stats' own default; sign flips are enumerated where 2^n is no more
_BATCH = 1000  # resamples held in memory at once
_SAME = 1e-12  # differences of rates closer than this differ by rounding only


def share(values: Sequence[float]) -> dict[str, Any]:
    """Mean of one rate per behaviour, with a 95 % Wilson interval over the behaviours.

    With one case a behaviour this is :func:`plot_align.records.share_of`. With several, the interval is conservative:
    the variance of a variable in [0, 1] is at most p(1 − p), which is what Wilson's interval takes it for.

    Args:
        values: the rate of each behaviour, in [0, 1].

    Returns:
        A :func:`plot_align.records.measure`; NaN with the interval [0, 1] where there are no values.

    Raises:
        InputError: a value is outside [0, 1] or not a number.
    """
    rates = [_rate("share", f"values[{index}]", value) for index, value in enumerate(values)]
    # Rounding must not carry the mean past the ends.
    mean = min(max(statistics.fmean(rates), 0.0), 1.0) if rates else math.nan
    return measure(mean, len(rates), interval=wilson(mean, len(rates)))


def paired_difference(treated: Mapping[str, float], control: Mapping[str, float], *, seed: int = 0) -> dict[str, Any]:
    """Mean of ``treated − control`` over the behaviours that both have, its interval and its p-value.

    The interval is the 95 % percentile bootstrap's over behaviours. Where all differences are equal (d) the bootstrap
    knows no spread, so the rule of three takes its place: a behaviour of another kind, at a rate of q = min(1, 3 / n)
    at most, could lie anywhere in [−1, 1], which puts the mean between d − q(1 + d) and d + q(1 − d).

    The p-value is that of the two-sided sign-flip permutation test: exact where the 2ⁿ sign flips are few enough to
    be enumerated (n ≤ 13), from 9,999 random ones otherwise.

    Sources: B. Efron and R. Tibshirani, "An Introduction to the Bootstrap" (1993); R. A. Fisher, "The Design of
    Experiments" (1935); J. A. Hanley and A. Lippman-Hand, "If nothing goes wrong, is everything all right?",
    JAMA 249 (1983).

    Args:
        treated, control: behaviour to rate in [0, 1].
        seed: of the resampling.

    Returns:
        A :func:`plot_align.records.measure` (value, n, interval) with the entry ``p`` besides.

    Raises:
        InputError: no behaviour is in both, or a rate is outside [0, 1].
    """
    keys = sorted(treated.keys() & control.keys())
    if not keys:
        raise InputError(
            f"paired_difference: treated has {len(treated)} behaviours and control {len(control)}, none of them in "
            "both, expected at least one; compare two runs on the same behaviours"
        )
    differences = np.array(
        [
            _rate("paired_difference", f"treated[{key!r}]", treated[key])
            - _rate("paired_difference", f"control[{key!r}]", control[key])
            for key in keys
        ]
    )  # (n,)
    differences[np.abs(differences) < _SAME] = 0.0
    mean = float(differences.mean())
    entry = measure(mean, len(keys), interval=_interval(differences, seed))
    return {**entry, "p": _sign_flip_p(differences, seed)}


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values: rejecting those below α keeps the chance of any false rejection below α.

    The smallest of m p-values is multiplied by m, the next by m − 1, and so on; none may fall below one before it.

    Source: S. Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6 (1979).

    Args:
        p_values: name to p-value.

    Returns:
        Name to adjusted p-value, in the order given.

    Raises:
        InputError: a p-value is outside [0, 1] or not a number.
    """
    checked = {name: _rate("holm", f"p_values[{name!r}]", p) for name, p in p_values.items()}
    adjusted, largest = dict(checked), 0.0
    for place, name in enumerate(sorted(checked, key=lambda name: checked[name])):
        largest = max(largest, min(1.0, (len(checked) - place) * checked[name]))
        adjusted[name] = largest
    return adjusted


def _rate(function: str, name: str, value: float) -> float:
    if not 0 <= value <= 1:  # NaN is not, either
        raise InputError(f"{function}: {name} is {value}, expected a number from 0 to 1; pass rates, not per cent")
    return float(value)


def _interval(differences: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % interval of the mean of ``differences`` (n,)."""
    if np.ptp(differences) < _SAME:
        mean, rate = float(differences.mean()), min(1.0, 3 / len(differences))
        return mean - rate * (1 + mean), mean + rate * (1 - mean)
    found = bootstrap(
        (differences,),
        np.mean,
        n_resamples=_RESAMPLES,
        batch=_BATCH,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def _sign_flip_p(differences: np.ndarray, seed: int) -> float:
    """Two-sided p-value of the mean of ``differences`` (n,) when every sign could as well be the other."""
    if len(differences) == 1 or not differences.any():
        return 1.0  # SciPy wants two observations; of one, both sign flips are as extreme
    return float(
        permutation_test(
            (differences,),
            np.mean,
            permutation_type="samples",
            n_resamples=_RESAMPLES,
            batch=_BATCH,
            alternative="two-sided",
            random_state=np.random.default_rng(seed),
        ).pvalue
    )
