"""Means with confidence intervals, paired differences, corrections for multiple tests.

The unit is the item (a behaviour, a question, a text), not the single case, because cases of one behaviour are alike.
A report compares hundreds of pairs. Where SciPy's resampling takes ten times longer, a matrix product replaces it; the
tests compare the two, and docs/LOG.md has the times.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import bootstrap
from scipy.stats import t as student

from plot_align.errors import InputError
from plot_align.records import NORMAL_95, measure, wilson

_RESAMPLES = 9999  # SciPy's default; if 2^n is no larger, all sign flips are enumerated
_LARGE = 1000  # from this many different items on, the normal law is as good as resampling, which would take seconds
_BATCH = 1_000_000  # random numbers that SciPy draws at a time
_HUGE = 1e150  # of a weighted sum: its square, for the standard error, is still a float
_SAME = 1e-12  # differences of rates closer than this are equal but for rounding


def proportion(values: Sequence[float]) -> dict[str, Any]:
    """Mean of one rate per behaviour, with a 95 % Wilson interval over the behaviours.

    With one case per behaviour this is :func:`plot_align.records.proportion_of`. With several, the interval is
    conservative: the variance of a variable in [0, 1] is at most p(1 − p), the variance that Wilson's interval
    assumes.

    Args:
        values: the rate of each behaviour, in [0, 1].

    Returns:
        A :func:`plot_align.records.measure`; NaN with the interval [0, 1] if there are no values.

    Raises:
        InputError: a value is outside [0, 1] or not a number.
    """
    rates = [_rate("proportion", f"values[{index}]", value) for index, value in enumerate(values)]
    # Rounding must not move the mean out of [0, 1].
    middle = _within(statistics.fmean(rates), 0.0, 1.0) if rates else math.nan
    return measure(middle, len(rates), interval=wilson(middle, len(rates)))


def mean(
    values: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    bounds: tuple[float, float] | None = None,
    unit: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """(Weighted) mean of one value per item with its 95 % percentile bootstrap interval over the items.

    From 1,000 different items on, the interval is the bootstrap's limit: mean ± 1.96·s, s the standard error of the
    ratio Σwv / Σw.

    If all values are equal (v), the bootstrap has no spread. With ``bounds`` the rule of three replaces it: a fraction
    of up to q = min(1, 3 / n) of the population could be other items with any value within the bounds, so the mean
    lies between v − q(v − low) and v + q(high − v). Without bounds the interval of one item is all numbers, and that
    of several equal items is their value.

    Args:
        values: one per item, finite.
        weights: one per item, not negative and not all 0, e.g. its number of tokens; resampled with it.
        bounds: (smallest, largest) possible value; None if there are none.
        unit: unit of the values.
        seed: seed of the resampling.

    Returns:
        A :func:`plot_align.records.measure`; without values NaN, and the interval is the bounds or all numbers.

    Raises:
        InputError: a value that is not finite or outside the bounds, invalid weights, or sums that overflow.
    """
    found = np.array([_finite("mean", f"values[{i}]", value, bounds) for i, value in enumerate(values)])  # (n,)
    heavy = np.ones(len(found)) if weights is None else np.array(weights, dtype=float)  # (n,)
    if heavy.shape != found.shape or not np.isfinite(heavy).all() or (heavy < 0).any():
        raise InputError(
            f"mean: weights has {len(heavy)} entries for {len(found)} values, expected one each, 0 or more"
        )
    if not len(found):
        return measure(math.nan, 0, interval=bounds or (-math.inf, math.inf), unit=unit)
    if not heavy.any():
        raise InputError("mean: all weights are 0, expected a positive one among them; count the items again")
    if not max(float(np.abs(found).max()), 1.0) * float(heavy.max()) * len(found) < _HUGE:
        raise InputError(
            f"mean: values up to {np.abs(found).max():.3g} with weights up to {heavy.max():.3g}, whose sum a float "
            "cannot hold; scale them"
        )
    heavy = np.ldexp(heavy, -math.frexp(float(heavy.max()))[1])  # exact; products of tiny weights would underflow
    middle = _within(float((heavy * found).sum() / heavy.sum()), float(found.min()), float(found.max()))
    return measure(middle, len(found), interval=_interval(found, heavy, bounds, seed), unit=unit)


def paired_difference(
    treated: Mapping[str, float],
    control: Mapping[str, float],
    *,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    weights: Mapping[str, float] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """(Weighted) mean of ``treated − control`` over the items that both have, its interval and its p-value.

    The interval is that of :func:`mean`; the differences lie within ±(high − low) of ``bounds``. The p-value is that
    of the two-sided sign-flip permutation test. It is exact if the 2ⁿ sign flips can be enumerated (n ≤ 13); otherwise
    it comes from 9,999 random flips and the observed one, or, with 1,000 or more different values, from their normal
    limit.

    Sources: B. Efron and R. Tibshirani, "An Introduction to the Bootstrap" (1993); R. A. Fisher, "The Design of
    Experiments" (1935); J. A. Hanley and A. Lippman-Hand, "If nothing goes wrong, is everything all right?",
    JAMA 249 (1983).

    Args:
        treated, control: item (e.g. a behaviour) to value.
        bounds: (smallest, largest) possible value, by default those of rates; None if there are none.
        weights: item to weight, as in :func:`mean`.
        seed: seed of the resampling.

    Returns:
        A :func:`plot_align.records.measure` (value, n, interval) with the further entry ``p``.

    Raises:
        InputError: no item is in both, or a value is not finite or outside the bounds.
    """
    keys = sorted(treated.keys() & control.keys())
    if not keys:
        raise InputError(
            f"paired_difference: treated has {len(treated)} behaviours and control {len(control)}, none of them in "
            "both, expected at least one; compare two runs on the same behaviours"
        )
    differences = np.array(
        [
            _finite("paired_difference", f"treated[{key!r}]", treated[key], bounds)
            - _finite("paired_difference", f"control[{key!r}]", control[key], bounds)
            for key in keys
        ]
    )  # (n,)
    differences[np.abs(differences) < _SAME] = 0.0
    width = None if bounds is None else bounds[1] - bounds[0]
    heavy = None if weights is None else [weights[key] for key in keys]
    entry = mean(differences.tolist(), weights=heavy, bounds=None if width is None else (-width, width), seed=seed)
    scaled = differences if heavy is None else differences * np.array(heavy)
    return {**entry, "p": _sign_flip_p(scaled, seed)}


def jackknife_interval(value: float, without: Sequence[float]) -> tuple[float, float]:
    """``value ± t·s``, ``s² = (m − 1) / m · Σ (θ_i − mean θ)²`` over the m values θ_i that leave one part out.

    t is Student's with m − 1 degrees of freedom. For statistics that are no mean over items, which drawing items with
    replacement would bias. With fewer than two parts the interval is all numbers.
    Source: B. Efron, "The Jackknife, the Bootstrap and Other Resampling Plans" (1982), chapter 2.
    """
    m = len(without)
    if m < 2:
        return -math.inf, math.inf
    spread = np.asarray(without) - np.mean(without)  # (m,)
    half = float(student.ppf(0.975, m - 1)) * math.sqrt((m - 1) / m * float(spread @ spread))
    return value - half, value + half


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values: rejecting those below α keeps the chance of any false rejection below α.

    The smallest of m p-values is multiplied by m, the next by m − 1, and so on; none may fall below a previous one.

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
    if not 0 <= value <= 1:  # also true of NaN
        raise InputError(f"{function}: {name} is {value}, expected a number from 0 to 1; pass rates, not per cent")
    return float(value)


def _finite(function: str, name: str, value: float, bounds: tuple[float, float] | None) -> float:
    if bounds == (0.0, 1.0):
        return _rate(function, name, value)
    if not math.isfinite(value):
        raise InputError(f"{function}: {name} is {value}, expected a finite number; leave undecided items out")
    if bounds is not None and not bounds[0] - _SAME <= value <= bounds[1] + _SAME:
        raise InputError(f"{function}: {name} is {value}, expected {bounds[0]:g} to {bounds[1]:g}; check its scale")
    return float(value)


def _within(value: float, low: float, high: float) -> float:
    """``value`` clipped to [low, high], because rounding may have moved it out."""
    return min(max(value, low), high)


def _interval(
    values: np.ndarray, weights: np.ndarray, bounds: tuple[float, float] | None, seed: int
) -> tuple[float, float]:
    """95 % interval of the weighted mean of ``values`` (n,)."""
    n = len(values)
    if np.ptp(values) < _SAME:
        middle, others = float(values.mean()), min(1.0, 3 / n)
        if bounds is None:
            return (middle, middle) if n > 1 else (-math.inf, math.inf)
        low, high = bounds
        return middle - others * (middle - low), middle + others * (high - middle)
    rows, counts = np.unique(np.stack([weights * values, weights], axis=1), axis=0, return_counts=True)  # (k, 2), (k,)
    if len(rows) >= _LARGE:
        middle = float((weights * values).sum() / weights.sum())
        half = NORMAL_95 * math.sqrt(float((weights**2 * (values - middle) ** 2).sum())) / float(weights.sum())
        return middle - half, middle + half
    with np.errstate(invalid="ignore"):  # a resample of weight 0 has no mean
        if _few(counts):
            sums = np.random.default_rng(seed).multinomial(n, counts / n, size=_RESAMPLES) @ rows  # (resamples, 2)
            resampled = sums[:, 0] / sums[:, 1]
        else:
            resampled = bootstrap(
                (weights * values, weights),
                lambda products, heavy, axis: products.sum(axis) / heavy.sum(axis),
                paired=True,
                vectorized=True,
                method="percentile",
                n_resamples=_RESAMPLES,
                batch=max(1, _BATCH // n),
                rng=np.random.default_rng(seed),
            ).bootstrap_distribution
        low, high = np.nanquantile(resampled, [0.025, 0.975])
    return float(low), float(high)


def _few(counts: np.ndarray) -> bool:
    """Whether drawing the number of items of each kind is faster than drawing every item."""
    return 2 * len(counts) < counts.sum()


def _sign_flip_p(differences: np.ndarray, seed: int) -> float:
    """Two-sided p-value of the mean of ``differences`` (n,) if every sign is random.

    Twice the smaller tail, as in SciPy's ``permutation_test``; a sum within rounding of the observed one is a tie.
    """
    observed, total = float(differences.sum()), float(np.abs(differences).sum())
    sizes = np.abs(differences[differences != 0])  # (n,); flipping a zero changes nothing
    n, rng = len(sizes), np.random.default_rng(seed)
    kinds, counts = np.unique(sizes, return_counts=True)  # (k,) each
    if n == 0:
        return 1.0
    if len(kinds) >= _LARGE:
        return math.erfc(abs(observed) / math.sqrt(2 * float((sizes**2).sum())))
    exact = 2**n <= _RESAMPLES
    if exact:
        flips = (1.0 - 2.0 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)) @ sizes  # (2^n,)
    elif _few(counts):
        flips = (2.0 * rng.binomial(counts, 0.5, size=(_RESAMPLES, len(counts))) - counts) @ kinds  # (resamples,)
    else:
        flips = (2.0 * rng.integers(0, 2, size=(_RESAMPLES, n), dtype=np.int8) - 1.0) @ sizes
    tails = (np.sum(flips <= observed + 1e-12 * total), np.sum(flips >= observed - 1e-12 * total))
    extra = 0 if exact else 1  # the observed arrangement is one of the random ones
    return min(1.0, 2 * (int(min(tails)) + extra) / (len(flips) + extra))
