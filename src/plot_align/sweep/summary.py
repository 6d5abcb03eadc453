"""Cells of a sweep over their seeds: means, standard errors, and paired differences to the vanilla arm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plot_align.records import mean_of, paired
from plot_align.sweep.grid import Cell, Job, value_text

_DEFT = {"deft_log": "DEFT, log-probabilities", "deft_prob": "DEFT, probabilities"}


@dataclass(frozen=True)
class Metric:
    """A number that a run reports at its end.

    Args:
        key: its name in the results.
        label: in words, with the unit.
        more_is_better: None if neither direction is better.
    """

    key: str
    label: str
    more_is_better: bool | None = None

    @property
    def heading(self) -> str:
        """The label with an arrow in the better direction."""
        return self.label + {True: " ↑", False: " ↓", None: ""}[self.more_is_better]


def summarise(runs: Mapping[Job, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Summarise the runs by cell, in order, as entries of a record.

    Args:
        runs: the metrics of each finished run, name to number.

    Returns:
        For each cell its ``method``, ``setting`` and ``plot`` (None: the vanilla arm), its ``seeds``, ``metrics``
        (name to :func:`plot_align.records.mean_of`) and, if the vanilla arm has a seed in common, ``minus_vanilla``
        (name to :func:`plot_align.records.paired`).
    """
    cells: dict[Cell, dict[int, Mapping[str, float]]] = {}
    for job, metrics in runs.items():
        cells.setdefault(job.cell, {})[job.seed] = metrics
    return [
        {
            "method": cell.method,
            "setting": dict(cell.setting),
            "plot": None if cell.plot is None else dict(cell.plot),
            "seeds": list(seeds),
            "metrics": {name: mean_of(list(of.values())) for name, of in _by_metric(seeds)},
            "minus_vanilla": {} if cell.plot is None else _differences(seeds, cells.get(cell.vanilla, {})),
        }
        for cell, seeds in cells.items()
    ]


def _by_metric(seeds: Mapping[int, Mapping[str, float]]) -> Iterator[tuple[str, dict[int, float]]]:
    """Name and seed → value of every metric that any of the seeds has."""
    for name in dict.fromkeys(name for metrics in seeds.values() for name in metrics):
        yield name, {seed: metrics[name] for seed, metrics in seeds.items() if name in metrics}


def _differences(
    treated: Mapping[int, Mapping[str, float]], control: Mapping[int, Mapping[str, float]]
) -> dict[str, dict[str, Any]]:
    without = dict(_by_metric(control))
    entries = {name: paired(of, without[name]) for name, of in _by_metric(treated) if name in without}
    return {name: entry for name, entry in entries.items() if entry["n"]}


def markdown(cells: Sequence[Mapping[str, Any]], metrics: Sequence[Metric], title: str) -> str:
    """The cells as a table of means, and one of the paired differences to the vanilla arm."""
    seeds = sorted({seed for cell in cells for seed in cell["seeds"]})
    lines = [f"# {title}", ""]
    for heading, part in (
        ("Mean ± standard error", "metrics"),
        ("Difference to the same without PLOT, paired by seed: mean ± standard error", "minus_vanilla"),
    ):
        rows = [cell for cell in cells if part == "metrics" or cell["plot"] is not None]
        axes = varying(rows)
        names = [*axes, "seeds", *(metric.heading for metric in metrics)]
        lines += [f"## {heading}", "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        for cell in rows:
            values = [axis_text(cell, axis) for axis in axes]
            entries = [entry_text(cell[part].get(metric.key)) for metric in metrics]
            lines.append(f"| {' | '.join([*values, str(len(cell['seeds'])), *entries])} |")
        lines.append("")
    everywhere = _everywhere([cell for cell in cells if cell["plot"] is not None])
    if everywhere:
        lines.append(f"With PLOT everywhere: {everywhere}.")
    lines.append(f"Seeds: {', '.join(map(str, seeds))}. ↑ more is better, ↓ less is better.")
    return "\n".join(lines) + "\n"


def _everywhere(cells: Sequence[Mapping[str, Any]]) -> str:
    """The options that all cells have in common, which get no column of the table."""
    several = varying(cells)
    options = dict.fromkeys(name for cell in cells for name in (*cell["setting"], *cell["plot"]))
    return ", ".join(
        f"{name.replace('_', ' ')} {text}"
        for name in options
        if name not in several and (text := next((t for t in (axis_text(c, name) for c in cells) if t), ""))
    )


def varying(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """The axes in which cells differ, and always ``alpha``."""
    axes = dict.fromkeys(
        ["method", *(name for cell in cells for name in cell["setting"]), "alpha"]
        + [name for cell in cells for name in cell["plot"] or {}]
    )
    several = {axis for axis in axes if len({axis_text(cell, axis) for cell in cells} - {""}) > 1}
    return [axis for axis in axes if axis in several | {"alpha"}]


def axis_text(cell: Mapping[str, Any], axis: str) -> str:
    """A cell's value on an axis; empty if it has none."""
    if axis == "method":
        return str(cell["method"])
    if axis == "alpha" and cell["plot"] is None:
        return "none"
    options = {**cell["setting"], **(cell["plot"] or {})}
    return value_text(options[axis]) if axis in options else ""


def line_name(cell: Mapping[str, Any], axes: Sequence[str], *, beside_deft: bool) -> str:
    """The name of a line through cells of different α: every other option of the term that varies."""
    plot = cell["plot"]
    if plot.get("divergence") in _DEFT:
        parts = [_DEFT[plot["divergence"]]]
        axes = [axis for axis in axes if axis != "divergence"]
    else:
        parts = ["PLOT"] if beside_deft else []
    others = [axis for axis in axes if axis in plot and axis != "alpha"]
    parts += [f"{axis.replace('_', ' ')} {value_text(plot[axis])}" for axis in others]
    return ", ".join(parts) or "with PLOT"


def has_deft(cells: Sequence[Mapping[str, Any]]) -> bool:
    """Whether some cell uses DEFT's reward instead of a divergence."""
    return any((cell["plot"] or {}).get("divergence") in _DEFT for cell in cells)


def entry_text(entry: Mapping[str, Any] | None) -> str:
    """Mean ± standard error to three significant digits of the larger; a dash if nothing was measured."""
    if entry is None or not entry["n"]:
        return "–"
    value, error = entry["value"], entry.get("error")
    size = abs(value) if error is None else max(abs(value), error)
    places = 3 if size < 1 else 2 if size < 100 else 1
    text = f"{value:.{places}f}" if 1e-3 <= size < 1e5 or size == 0 else f"{value:.2e}"
    if error is None:
        return text
    return f"{text} ± {error:.{places}f}" if "e" not in text else f"{text} ± {error:.1e}"
