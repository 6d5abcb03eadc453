"""How far two judges agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from plot_align.errors import InputError
from plot_align.records import proportion_of


def agreement(a: Sequence[int], b: Sequence[int]) -> dict[str, Any]:
    """How far two judges agree on the same cases; −1 counts as 0, as it does in a success rate.

    Cohen's κ is (p_o − p_e) / (1 − p_e), p_o the proportion of cases with equal labels, p_e its expectation if each
    judge drew from its own rate of successes. It is NaN if p_e is 1: both judges always gave the same label.

    Source: J. Cohen, "A coefficient of agreement for nominal scales", Educ. Psychol. Meas. 20 (1960).

    Args:
        a, b: labels 1, 0 or −1, one per case, in the same order.

    Returns:
        ``equal`` (a :func:`plot_align.records.measure`), ``kappa``, ``table`` (rows: a is 0, 1; columns: b is 0, 1),
        ``undecided`` (how many −1 each gave), ``n``.

    Raises:
        InputError: the lengths differ, or a label is none of the three.
    """
    if len(a) != len(b):
        raise InputError(
            f"agreement: a has {len(a)} labels and b {len(b)}, expected one each per case; pass the same cases"
        )
    for name, labels in (("a", a), ("b", b)):
        wrong = next((x for x in labels if x not in (-1, 0, 1)), None)
        if wrong is not None:
            raise InputError(f"agreement: {name} has the label {wrong!r}, expected 1, 0 or -1; pass Judged.label")
    table = [[0, 0], [0, 0]]
    for x, y in zip(a, b, strict=True):
        table[x == 1][y == 1] += 1
    return {
        "equal": proportion_of(table[0][0] + table[1][1], len(a)),
        "kappa": _kappa(table),
        "table": table,
        "undecided": {"a": sum(x == -1 for x in a), "b": sum(x == -1 for x in b)},
        "n": len(a),
    }


def _kappa(table: list[list[int]]) -> float:
    """Cohen's κ of a 2×2 table of counts, in integers up to the division."""
    n = sum(map(sum, table))
    equal = n * (table[0][0] + table[1][1])  # n² p_o
    chance = sum(sum(table[k]) * (table[0][k] + table[1][k]) for k in (0, 1))  # n² p_e
    return (equal - chance) / (n * n - chance) if n * n > chance else math.nan
