"""Draw a metric against α: mean and standard error of every line of the grid, with the vanilla level."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plot_align.io import complete_or_absent
from plot_align.sweep.grid import value_text
from plot_align.sweep.summary import Metric, axis_text, has_deft, line_name, varying

_COLUMNS = 3  # panels side by side
_MARKERS = "osDv^PX*"
_GREY = "#555555"
_VANILLA = "without PLOT"


def draw(cells: Sequence[Mapping[str, Any]], metric: Metric, path: Path) -> bool:
    """Write one PNG: a panel for each method and setting, a line for each combination of the term's other options.

    Args:
        cells: as :func:`plot_align.sweep.summarise` returns them.
        metric: on the vertical axis.
        path: the file.

    Returns:
        False, without writing a file, if no cell has the metric and a positive α.
    """
    from matplotlib.figure import Figure

    shown = [cell for cell in cells if metric.key in cell["metrics"]]
    # A balanced term has no α.
    shown = [cell for cell in shown if cell["plot"] is None or _has_alpha(cell["plot"])]
    with_plot = [cell for cell in shown if cell["plot"] is not None]
    if not with_plot:
        return False
    deft = has_deft(shown)
    axes_of_lines = [axis for axis in varying(with_plot) if axis != "alpha"]
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for cell in with_plot:
        lines.setdefault(line_name(cell, axes_of_lines, beside_deft=deft), []).append(cell)
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for cell in shown:
        panels.setdefault(_panel_name(cell, shown), []).append(cell)
    styles = _styles(list(lines))
    alphas = sorted({float(cell["plot"]["alpha"]) for cell in with_plot})

    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    width = max(6.4, 5.0 * columns)
    entries = [_VANILLA, *lines]
    legend_columns = max(1, min(len(entries), int(width * 10 / (max(map(len, entries)) + 8))))
    legend_height = 0.22 * math.ceil(len(entries) / legend_columns)
    figure = Figure(figsize=(width, 3.6 * rows + 0.6 + legend_height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    handles: dict[str, Any] = {}
    for axes, (title, members) in zip(grid, panels.items(), strict=False):
        for cell in members:
            if cell["plot"] is None:
                handles[_VANILLA] = _level(axes, cell["metrics"][metric.key])
        for name, line in lines.items():
            points = [cell for cell in line if cell in members]
            if points:
                handles[name] = _line(axes, points, metric.key, styles[name])
        axes.set_xscale("log")
        _ticks(axes, alphas)
        axes.set_title(textwrap.fill(title, 44), fontsize=10)
        axes.set_xlabel("weight of the term: α of PLOT, ω of DEFT" if deft else "α, the weight of the PLOT term")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[::columns]:
        axes.set_ylabel(textwrap.fill(metric.label, 34))
    named = [name for name in entries if name in handles]
    figure.legend(
        [handles[name] for name in named],
        named,
        loc="outside lower center",
        ncols=legend_columns,
        frameon=False,
        fontsize=9,
    )
    figure.suptitle(textwrap.fill(_title(metric, shown), int(width * 12)), fontsize=11)
    with complete_or_absent(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return True


def _has_alpha(plot: Mapping[str, Any]) -> bool:
    return plot.get("alpha") is not None and plot.get("alpha_schedule") != "balance"


def _title(metric: Metric, cells: Sequence[Mapping[str, Any]]) -> str:
    fewest, most = (of(len(cell["seeds"]) for cell in cells) for of in (min, max))
    seeds = f"{most} seeds" if fewest == most else f"{fewest} to {most} seeds"
    what = "one run each" if most == 1 else f"mean and standard error of {seeds}"
    return f"{metric.label[0].upper()}{metric.label[1:]}: {what}"


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each line; DEFT's are dash-dotted."""
    from matplotlib import colormaps

    few = len(names) <= 10
    return {
        name: {
            "color": colormaps["tab10"](i) if few else colormaps["viridis"](i / len(names)),
            "marker": _MARKERS[i % len(_MARKERS)],
            "linestyle": "-." if name.startswith("DEFT") else "-",
        }
        for i, name in enumerate(names)
    }


def _panel_name(cell: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> str:
    several = set(varying(cells))
    parts = [cell["method"].upper()]
    for name in cell["setting"]:
        if name == "loss_type":
            parts.append(f"loss {axis_text(cell, name)}")
        elif name in several:
            parts.append(f"{name.replace('_', ' ')} {axis_text(cell, name)}")
    return ", ".join(parts)


def _level(axes: Any, entry: Mapping[str, Any]) -> Any:
    value, error = entry["value"], entry.get("error", 0.0)
    axes.axhspan(value - error, value + error, color=_GREY, alpha=0.12, linewidth=0)
    return axes.axhline(value, color=_GREY, linestyle="--", linewidth=1.5)


def _line(axes: Any, cells: Sequence[Mapping[str, Any]], key: str, style: Mapping[str, Any]) -> Any:
    points = sorted((float(c["plot"]["alpha"]), c["metrics"][key]) for c in cells)
    alphas = [alpha for alpha, _ in points]
    values = [entry["value"] for _, entry in points]
    errors = [entry.get("error", 0.0) for _, entry in points]
    low = [value - error for value, error in zip(values, errors, strict=True)]
    high = [value + error for value, error in zip(values, errors, strict=True)]
    if len(points) > 1:
        axes.fill_between(alphas, low, high, color=style["color"], alpha=0.15, linewidth=0)
    else:  # a band of zero width would be invisible
        axes.errorbar(alphas, values, errors, color=style["color"], capsize=3)
    return axes.plot(alphas, values, markersize=5, linewidth=1.6, **style)[0]


def _ticks(axes: Any, alphas: Sequence[float]) -> None:
    """Ticks at the α that were run, if they are far enough apart, rather than at decades; a margin on both sides."""
    span = math.log(alphas[-1] / alphas[0])
    if all(math.log(b / a) > span / 9 for a, b in itertools.pairwise(alphas)):
        axes.set_xticks(alphas, [value_text(alpha) for alpha in alphas])
        axes.set_xticks([], minor=True)
    axes.set_xlim(alphas[0] / 1.5, alphas[-1] * 1.5)
