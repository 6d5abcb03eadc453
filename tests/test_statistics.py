"""Shares, paired differences and Holm: against values derived by hand, enumeration and simulation."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from plot_align import records, statistics
from plot_align.errors import InputError
from plot_align.statistics import holm, mean, paired_difference, proportion

_RATES = st.floats(0, 1)


@given(hits=st.lists(st.booleans(), max_size=60))
def test_a_proportion_of_single_cases_is_proportion_of(hits: list[bool]) -> None:
    found, expected = proportion(hits), records.proportion_of(sum(hits), len(hits))
    assert found["interval"] == expected["interval"]
    assert found["n"] == expected["n"]
    assert found["value"] == expected["value"] or (not hits and math.isnan(found["value"]))


def test_a_proportion_of_rates_by_hand() -> None:
    """Mean of 0, ½, 1, ½ is ½. With p = ½ Wilson's interval is ½ ± ½ z / sqrt(n + z²), z = 1.959964, n = 4."""
    found = proportion([0.0, 0.5, 1.0, 0.5])
    half = 0.5 * 1.959963984540054 / math.sqrt(4 + 1.959963984540054**2)
    assert found["value"] == 0.5
    assert found["n"] == 4
    assert found["interval"] == pytest.approx([0.5 - half, 0.5 + half])


@given(values=st.lists(_RATES, min_size=1, max_size=30))
def test_a_proportion_lies_in_its_interval_within_0_and_1(values: list[float]) -> None:
    found = proportion(values)
    low, high = found["interval"]
    assert 0 <= low <= found["value"] <= high <= 1


@pytest.mark.parametrize("cases", [1, 3])
def test_the_interval_of_a_proportion_covers_as_often_as_it_says(cases: int) -> None:
    """Over 4,000 runs of 20 behaviours whose own rates vary around 0.3: at least 93.5 % of the intervals hold 0.3.

    The coverage of Wilson's interval oscillates around 95 %; with several cases a behaviour it can only grow.
    """
    rng = np.random.default_rng(0)
    own = rng.beta(0.6, 1.4, size=(4000, 20))  # mean 0.3
    rates = rng.binomial(cases, own) / cases  # (run, behaviour)
    intervals = [proportion(row)["interval"] for row in rates]
    assert np.mean([low <= 0.3 <= high for low, high in intervals]) >= 0.935


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan, 30.0])
def test_a_proportion_wants_rates(value: float) -> None:
    with pytest.raises(InputError, match=r"proportion: values\[1\] is .*, expected a number from 0 to 1; pass rates"):
        proportion([0.0, value])


def _by_name(values: list[float]) -> dict[str, float]:
    return {f"b{index}": value for index, value in enumerate(values)}


def test_a_paired_difference_by_hand() -> None:
    """Differences ½, ¼, ¼ on the shared keys: mean ⅓. Of 8 sign flips only +++ and −−− are as extreme: p = 2 / 8."""
    found = paired_difference({"a": 1.0, "b": 0.5, "c": 0.25, "x": 1.0}, {"a": 0.5, "b": 0.25, "c": 0.0, "y": 1.0})
    assert found["value"] == pytest.approx(1 / 3)
    assert found["n"] == 3
    assert found["p"] == pytest.approx(0.25)
    # All 27 resamples: the mean is ¼ for 8 of them and ½ for 1 (3.7 %, more than the 2.5 % cut off).
    assert found["interval"] == pytest.approx([0.25, 0.5])


@settings(max_examples=25, deadline=None)
@given(arms=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=8))
def test_the_p_value_is_that_of_all_sign_flips(arms: list[tuple[int, int]]) -> None:
    """Rates in quarters, so that the enumeration is exact in integers: no tie is lost to rounding."""
    differences = [a - b for a, b in arms]
    flips = [sum(map(math.prod, zip(s, differences, strict=True))) for s in _signs(len(arms))]
    below = sum(flip <= sum(differences) for flip in flips) / len(flips)
    above = sum(flip >= sum(differences) for flip in flips) / len(flips)
    found = paired_difference(_by_name([a / 4 for a, _ in arms]), _by_name([b / 4 for _, b in arms]))
    assert found["p"] == pytest.approx(min(1.0, 2 * min(below, above)))


def _signs(n: int) -> list[tuple[int, ...]]:
    return list(itertools.product((-1, 1), repeat=n))


def test_many_behaviours_have_an_interval_like_the_normal_one() -> None:
    """The oracle is mean ± z s / sqrt(n), and for p the normal tail of the mean over sqrt(Σ d² / n²)."""
    rng = np.random.default_rng(1)
    treated, control = rng.uniform(size=300) * 0.9, rng.uniform(size=300)
    found = paired_difference(_by_name(list(treated)), _by_name(list(control)), seed=4)
    d = treated - control
    half = 1.96 * d.std(ddof=1) / math.sqrt(300)
    assert found["value"] == pytest.approx(d.mean())
    assert found["interval"] == pytest.approx([d.mean() - half, d.mean() + half], abs=0.1 * half)
    tail = math.erfc(abs(d.mean()) / math.sqrt((d**2).sum() / 300**2) / math.sqrt(2))
    assert found["p"] == pytest.approx(tail, abs=0.015)


def test_a_seed_repeats_itself() -> None:
    rng = np.random.default_rng(2)
    arms = [_by_name(list(rng.uniform(size=30))) for _ in range(2)]
    assert paired_difference(*arms, seed=1) == paired_difference(*arms, seed=1)
    one, two = paired_difference(*arms, seed=1), paired_difference(*arms, seed=2)
    assert one["interval"] != two["interval"]
    assert one["p"] != two["p"]


@given(values=st.lists(_RATES, min_size=1, max_size=30))
def test_equal_arms_differ_by_nothing(values: list[float]) -> None:
    """The rule of three: up to 3 / n of the behaviours could be unlike these, by 1 at most."""
    found = paired_difference(_by_name(values), _by_name(values))
    assert found["value"] == 0
    assert found["p"] == 1
    width = min(1.0, 3 / len(values))
    assert found["interval"] == pytest.approx([-width, width])


def test_equal_differences_widen_by_the_rule_of_three() -> None:
    """d = 0.3 − 0.1 = 0.2 with n = 6, so q = ½: from 0.2 − ½·1.2 = −0.4 to 0.2 + ½·0.8 = 0.6.

    0.3 − 0.1 and 0.2 − 0 differ in the last bit, and are equal all the same.
    """
    treated, control = [0.3, 0.2] * 3, [0.1, 0.0] * 3
    assert treated[0] - control[0] != treated[1]
    found = paired_difference(_by_name(treated), _by_name(control))
    assert found["interval"] == pytest.approx([-0.4, 0.6])
    assert found["p"] == pytest.approx(2 / 64)


def test_rounding_is_no_difference() -> None:
    """0.1 + 0.2 is not 0.3 in floating point; as a difference it would give p = 2 / 64."""
    assert 0.1 + 0.2 != 0.3
    assert paired_difference(_by_name([0.1 + 0.2] * 6), _by_name([0.3] * 6))["p"] == 1


@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_the_widest_difference_stays_within_one(n: int) -> None:
    found = paired_difference(_by_name([1.0] * n), _by_name([0.0] * n))
    assert found["value"] == 1
    assert found["interval"] == pytest.approx([1 - 2 * min(1, 3 / n), 1])
    assert (found["p"] == 1) == (n == 1)


def test_what_cannot_be_paired() -> None:
    with pytest.raises(InputError, match="treated has 1 behaviours and control 2, none of them in both"):
        paired_difference({"a": 1.0}, {"b": 1.0, "c": 0.0})
    with pytest.raises(InputError, match=r"control\['a'\] is nan, expected a number from 0 to 1"):
        paired_difference({"a": 1.0}, {"a": math.nan})


def test_holm_by_hand() -> None:
    """Sorted 0.01, 0.02, 0.03, 0.3 times 4, 3, 2, 1: 0.04, 0.06, 0.06 (equal to the one before) and 0.3."""
    found = holm({"c": 0.03, "a": 0.01, "d": 0.3, "b": 0.02})
    assert list(found) == ["c", "a", "d", "b"]
    assert found == pytest.approx({"a": 0.04, "b": 0.06, "c": 0.06, "d": 0.3})
    assert holm({"a": 0.02, "b": 0.021}) == pytest.approx({"a": 0.04, "b": 0.04})  # none falls below one before it
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


@settings(deadline=None)
@given(values=st.lists(_RATES, min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_bonferroni(values: list[float]) -> None:
    """A hypothesis falls when every set it is in falls; the set S has Bonferroni's p-value |S| min p."""
    p = _by_name(values)
    sets = [s for size in range(1, len(p) + 1) for s in itertools.combinations(p, size)]
    closed = {name: max(min(1.0, len(s) * min(p[x] for x in s)) for s in sets if name in s) for name in p}
    assert holm(p) == pytest.approx(closed)


def test_holm_wants_p_values() -> None:
    with pytest.raises(InputError, match=r"holm: p_values\['a'\] is 5, expected a number from 0 to 1"):
        holm({"a": 5})


def test_a_mean_of_few_kinds_of_items_has_scipys_interval() -> None:
    """300 values of three kinds: both ends within a twentieth of the width."""
    values = np.random.default_rng(3).integers(0, 3, size=300).astype(float)
    found = mean(values.tolist(), seed=5)
    reference = scipy.stats.bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0))
    low, high = reference.confidence_interval
    assert found["value"] == pytest.approx(values.mean())
    assert found["interval"] == pytest.approx([low, high], abs=0.05 * (high - low))


@pytest.mark.parametrize("few", [False, True])
def test_a_weighted_mean_resamples_weights_with_their_values(few: bool) -> None:
    """SciPy's paired bootstrap of a ratio; ``few``: 60 items of 6 kinds."""
    rng = np.random.default_rng(4)
    size = 6 if few else 60
    weights = np.resize(rng.integers(1, 40, size=size).astype(float), 60)
    values = np.resize(rng.normal(2.0, 1.0, size=size), 60) + weights / 20
    found = mean(values.tolist(), weights=weights.tolist(), seed=1)

    def ratio(v: np.ndarray, w: np.ndarray, axis: int = -1) -> np.ndarray:
        return (v * w).sum(axis) / w.sum(axis)

    reference = scipy.stats.bootstrap(
        (values, weights), ratio, paired=True, method="percentile", rng=np.random.default_rng(0)
    )
    low, high = reference.confidence_interval
    assert found["value"] == pytest.approx(float(ratio(values, weights)))
    assert found["interval"] == pytest.approx([low, high], abs=0.05 * (high - low))


@pytest.mark.parametrize("few", [False, True])
def test_the_p_value_is_scipys(few: bool) -> None:
    """40 differences: SciPy's sign-flip permutation test with its own random signs; ``few``: of 4 sizes and 0."""
    rng = np.random.default_rng(6)
    d = np.clip(np.round(rng.normal(0.6, 2.0, size=40)), -4, 4) if few else rng.normal(0.15, 1.0, size=40)
    found = paired_difference(_by_name(list(d)), _by_name([0.0] * 40), bounds=None, seed=2)
    reference = scipy.stats.permutation_test((d,), np.mean, permutation_type="samples", rng=np.random.default_rng(0))
    assert found["p"] == pytest.approx(reference.pvalue, abs=0.02)


def test_no_spread_within_bounds_is_the_rule_of_three_and_without_them_what_is_known() -> None:
    """Ten ratings of 4 on a scale from 1 to 10: q = 0.3, so 4 − 0.3·3 to 4 + 0.3·6."""
    assert mean([4.0] * 10, bounds=(1.0, 10.0))["interval"] == pytest.approx([3.1, 5.8])
    assert mean([4.0] * 10)["interval"] == [4.0, 4.0]
    assert mean([4.0])["interval"] == [-math.inf, math.inf]
    assert mean([], bounds=(0.0, 1.0))["interval"] == [0.0, 1.0]
    assert math.isnan(mean([])["value"])


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([1.0, math.nan], {}, r"values\[1\] is nan, expected a finite number"),
        ([0.5, 11.0], {"bounds": (1.0, 10.0)}, r"values\[0\] is 0.5, expected 1 to 10"),
        ([1.0, 2.0], {"weights": [1.0]}, "weights has 1 entries for 2 values"),
        ([1.0, 2.0], {"weights": [1.0, -1.0]}, "0 or more"),
        ([1.0, 2.0], {"weights": [0.0, 0.0]}, "all weights are 0"),
    ],
)
def test_a_mean_refuses(values: list[float], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        mean(values, **options)


def test_weights_move_a_paired_difference() -> None:
    """Differences 1 and 0 with weights 3 and 1: ¾."""
    found = paired_difference({"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 0.0}, weights={"a": 3.0, "b": 1.0})
    assert found["value"] == pytest.approx(0.75)


def test_proportions_have_the_quantiles_and_p_values_of_the_binomial() -> None:
    """A resampled proportion of n items is binomial; with equal sizes the sign-flip test is the sign test."""
    n, right = 400, 130
    entry = mean([1.0] * right + [0.0] * (n - right))
    expected = [float(scipy.stats.binom.ppf(q, n, right / n)) / n for q in (0.025, 0.975)]
    assert entry["interval"] == pytest.approx(expected, abs=1.01 / n)  # one item: 9,999 resamples, not all
    treated = {str(i): float(i < 60) for i in range(n)}
    control = {str(i): float(60 <= i < 95) for i in range(n)}  # 60 gained, 35 lost
    expected_p = float(scipy.stats.binomtest(60, 95).pvalue)
    assert paired_difference(treated, control)["p"] == pytest.approx(expected_p, abs=0.005)


@pytest.mark.parametrize("weighted", [False, True])
def test_many_items_have_the_interval_and_p_value_that_resampling_tends_to(
    weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """6,000 items, by the normal law and, with the bound raised, by resampling."""
    rng = np.random.default_rng(8)
    values = rng.gamma(2.0, size=6000) - 1.97
    weights = rng.integers(1, 30, size=6000).astype(float) if weighted else None
    treated = _by_name(values.tolist())
    zero = dict.fromkeys(treated, 0.0)
    heavy = None if weights is None else dict(zip(treated, weights.tolist(), strict=True))

    def both() -> tuple[list[float], float]:
        found = paired_difference(treated, zero, bounds=None, weights=heavy)
        return found["interval"], found["p"]

    (low, high), p = both()
    monkeypatch.setattr(statistics, "_LARGE", 10**9)
    resampled, random_p = both()
    assert [low, high] == pytest.approx(resampled, abs=0.04 * (high - low))
    assert p == pytest.approx(random_p, abs=0.02)
    assert 0.001 < p < 0.999
