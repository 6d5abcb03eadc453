"""Curves of an attack: success against its cases, samples, given tokens, update steps, or what it spends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import comb
from pathlib import Path
from typing import Any

from plot_align.errors import InputError
from plot_align.io import complete_or_absent, parse_json
from plot_align.redteam.harmbench import Layout, Rows, TestCases
from plot_align.statistics import proportion

Rung = tuple[float, float]  # cost, success rate


def success_at_cases(results: Rows) -> dict[int, dict[str, Any]]:
    """How often at least one of k answers succeeds, for every k up to the smallest number of answers to a behaviour.

    With c successes among n answers, a draw of k without replacement has one with probability 1 − C(n−c, k) / C(n, k).
    The curve averages over all draws, so it is unbiased and never falls (Chen et al., arXiv 2107.03374, eq. 1).

    Returns:
        k → the mean over behaviours with its interval; empty if a behaviour has no answer.
    """
    rates = [success_of_samples(rows) for rows in results.values()]
    return {k: proportion([of[k - 1] for of in rates]) for k in range(1, min(map(len, rates), default=0) + 1)}


def success_of_samples(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """How often one of 1, 2, … n answers succeeds, over all draws as in :func:`success_at_cases`."""
    n, c = len(rows), sum(row["label"] == 1 for row in rows)
    return [1 - comb(n - c, k) / comb(n, k) for k in range(1, n + 1)]


def success_within(rungs: Mapping[str, Sequence[Rung]]) -> dict[float, dict[str, Any]]:
    """Success rate if every behaviour is given the same budget: that of the last rung that it pays for, 0 before.

    Args:
        rungs: behaviour → (cost, success rate) in the order of the attack: what it had spent, and what it had by then.

    Returns:
        Budget → the mean over behaviours with its interval, at the budgets that bring every behaviour to its first
        rung, its second, and so on.
    """
    most = max(map(len, rungs.values()), default=0)
    budgets = sorted({max(of[j][0] for of in rungs.values() if j < len(of)) for j in range(most)})

    def within(budget: float, of: Sequence[Rung]) -> float:
        return next((rate for cost, rate in reversed(of) if cost <= budget), 0.0)

    return {budget: proportion([within(budget, of) for of in rungs.values()]) for budget in budgets}


def snapshot_cases(layout: Layout, cases: TestCases, step: int) -> TestCases:
    """The best test cases of every behaviour after ``step`` updates; a behaviour that a limit ended before keeps its
    last. Empty if all ended before.

    Args:
        cases: the last ones.

    Raises:
        InputError: a behaviour's log is missing or damaged.
    """
    found: TestCases = {}
    for behavior in cases:
        path = layout.behavior_folder(behavior) / "logs.json"
        try:
            snapshots = parse_json(path.read_text(encoding="utf-8"))["snapshots"]
            if str(step) in snapshots:
                found[behavior] = snapshots[str(step)]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{path} holds no snapshots; delete {path.parent} to make them again") from None
    return {**cases, **found} if found else {}


def draw(
    curves: Mapping[str, Mapping[float, Mapping[str, Any]]], xlabel: str, path: Path, *, budget: bool = False
) -> None:
    """Draw one line per model with its 95 % interval, as PNG or SVG by the ending of ``path``.

    Args:
        budget: draw one line per attack instead, over a logarithmic budget; success stays until the next point.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        steps = sorted(curve)
        values = [curve[step]["value"] for step in steps]
        low, high = zip(*(curve[step]["interval"] for step in steps), strict=True)
        (line,) = axes.plot(steps, values, marker="o", label=name, drawstyle="steps-post" if budget else "default")
        faint = 0.3 / max(2, len(curves))
        axes.fill_between(steps, low, high, alpha=faint, color=line.get_color(), step="post" if budget else None)
        if len(steps) == 1:
            axes.vlines(steps, low, high, color=line.get_color())
    axes.set(xlabel=xlabel, ylabel="attack success rate", ylim=(0, 1))
    if budget:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    undated: dict[str, Any] = {"metadata": {"Date": None}} if path.suffix == ".svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": "plot-align"}), complete_or_absent(path) as temporary:
        figure.savefig(temporary, dpi=150, **undated)  # the same curves give the same bytes
