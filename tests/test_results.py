"""A quantity and the comparison of two."""

from __future__ import annotations

import pytest

from plot_align.errors import InputError
from plot_align.results import compare, of_items, of_whole


def test_models_are_compared_on_the_items_they_share() -> None:
    """Differences 1, 1, 0 over a, b, c: ⅔; of 8 sign flips those of a and b alone matter: p = 2 · 2 / 8."""
    a = of_items("x", {"a": 1.0, "b": 1.0, "c": 0.0, "d": 1.0}, better="higher", bounds=(0.0, 1.0))
    b = of_items("x", {"a": 0.0, "b": 0.0, "c": 0.0, "e": 1.0}, better="higher", bounds=(0.0, 1.0))
    found = compare(a, b)
    assert found is not None
    assert found["value"] == pytest.approx(2 / 3)
    assert found["n"] == 3
    assert found["p"] == pytest.approx(0.5)


def test_weights_count_where_both_models_have_the_same() -> None:
    options = {"better": "lower", "unit": "nats"}
    a = of_items("x", {"a": 3.0, "b": 1.0}, weights={"a": 3.0, "b": 1.0}, **options)
    b = of_items("x", {"a": 1.0, "b": 1.0}, weights={"a": 3.0, "b": 1.0}, **options)
    other = of_items("x", {"a": 1.0, "b": 1.0}, weights={"a": 1.0, "b": 1.0}, **options)
    assert a["value"] == pytest.approx(2.5)
    assert compare(a, b)["value"] == pytest.approx(1.5)  # type: ignore[index]
    unlike = compare(a, other)
    assert unlike is not None
    assert unlike["value"] == pytest.approx(1.0)
    assert unlike["unweighted"] is True
    assert "unweighted" not in compare(a, b)  # type: ignore[operator]


def test_what_is_no_mean_over_items_is_not_compared() -> None:
    whole = of_whole("x", 0.5, 10, better="higher", bounds=(0.0, 1.0))
    items = of_items("x", {"a": 1.0}, better="higher", bounds=(0.0, 1.0))
    assert compare(whole, items) is None
    assert compare(items, of_items("x", {"b": 1.0}, better="higher", bounds=(0.0, 1.0))) is None


def test_an_interval_is_cut_at_the_bounds() -> None:
    assert of_whole("x", 0.9, 5, better=None, interval=(0.7, 1.1), bounds=(0.0, 1.0))["interval"] == [0.7, 1.0]


def test_scales_that_differ_are_refused() -> None:
    a = of_items("rating", {"a": 1.0}, better="higher", bounds=(1.0, 10.0))
    b = of_items("rating", {"a": 1.0}, better="higher", bounds=(0.0, 1.0))
    with pytest.raises(InputError, match="rating: one record has the bounds"):
        compare(a, b)
