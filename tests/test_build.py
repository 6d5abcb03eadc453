"""Options by name and type."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from plot_align.errors import InputError
from plot_align.io import build


@dataclass
class Sample:
    steps: int = 1
    rate: float | None = None
    names: tuple[str, ...] | None = None
    prices: tuple[float, float] | None = None
    extra: dict[str, Any] | None = None
    on: bool = False
    hidden: str = field(default="x", init=False)


def test_values_reach_their_fields() -> None:
    given = {"steps": 3, "rate": 2, "names": ["a", "b"], "prices": [1, 2.5], "extra": {"k": 1}, "on": True}
    made = build(Sample, given, "sample")
    assert made == Sample(3, 2, ("a", "b"), (1, 2.5), {"k": 1}, True)
    assert build(Sample, {"rate": None, "names": None}, "sample") == Sample()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stps": 3}, "sample has no option 'stps'; did you mean 'steps'"),
        ({"hidden": "y"}, "sample has no option 'hidden'"),
        ({"steps": "3"}, "sample: steps is '3', expected int; correct it"),
        ({"steps": 1.5}, "steps is 1.5, expected int"),
        ({"steps": True}, "steps is True, expected int"),
        ({"steps": None}, "steps is None, expected int"),
        ({"on": 1}, "on is 1, expected bool"),
        ({"names": "a"}, r"names is 'a', expected list\[str\] \| null"),
        ({"names": [1]}, r"names is \[1\]"),
        ({"prices": [1]}, r"prices is \[1\], expected list\[float, float\] \| null"),
        ({"extra": []}, r"extra is \[\], expected dict"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(Sample, given, "sample")
    with pytest.raises(InputError, match="has no option 'steps'"):
        build(Sample, {"steps": 3}, "sample", steps=4)
