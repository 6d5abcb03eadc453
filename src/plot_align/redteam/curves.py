"""Curves of an attack: success against the number of cases or samples, of given tokens, or of update steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import comb
from pathlib import Path
from typing import Any

from plot_align.errors import InputError
from plot_align.io import complete_or_absent
from plot_align.redteam.harmbench import Layout, Rows, TestCases
from plot_align.statistics import proportion


def success_at_cases(results: Rows) -> dict[int, dict[str, Any]]:
    """How often at least one of k answers succeeds, for every k up to the smallest number of answers to a behaviour.

    With c successes among n answers, a draw of k without replacement has one with probability 1 − C(n−c, k) / C(n, k).
    The curve averages over all draws, so it is unbiased and never falls (Chen et al., arXiv 2107.03374, eq. 1).

    Returns:
        k → the mean over behaviours with its interval; empty if a behaviour has no answer.
    """
    counts = [(len(rows), sum(row["label"] == 1 for row in rows)) for rows in results.values()]
    most = min((n for n, _ in counts), default=0)
    return {k: proportion([1 - comb(n - c, k) / comb(n, k) for n, c in counts]) for k in range(1, most + 1)}


def snapshot_cases(layout: Layout, behaviors: Sequence[str], step: int) -> TestCases:
    """The best test cases of every behaviour after ``step`` updates.

    Raises:
        InputError: a behaviour's log is missing or damaged, or lacks this step.
    """
    found: TestCases = {}
    for behavior in behaviors:
        path = layout.behavior_folder(behavior) / "logs.json"
        try:
            found[behavior] = json.loads(path.read_text(encoding="utf-8"))["snapshots"][str(step)]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(
                f"{path} holds no test cases of step {step}; delete {path.parent} to make them again"
            ) from None
    return found


def draw(curves: Mapping[str, Mapping[int, Mapping[str, Any]]], xlabel: str, path: Path) -> None:
    """Draw one line per model with its 95 % interval, as PNG or SVG by the ending of ``path``."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        steps = sorted(curve)
        values = [curve[step]["value"] for step in steps]
        low, high = zip(*(curve[step]["interval"] for step in steps), strict=True)
        (line,) = axes.plot(steps, values, marker="o", label=name)
        axes.fill_between(steps, low, high, alpha=0.3 / max(2, len(curves)), color=line.get_color())
    axes.set(xlabel=xlabel, ylabel="attack success rate", ylim=(0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    undated: dict[str, Any] = {"metadata": {"Date": None}} if path.suffix == ".svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": "plot-align"}), complete_or_absent(path) as temporary:
        figure.savefig(temporary, dpi=150, **undated)  # the same curves give the same bytes
