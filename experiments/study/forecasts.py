"""``docs/forecast.md``, forecast against measured, and what filters did, for ``docs/results.md``: from the records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import rankdata

from plot_align.records import read_record
from study.data import HELD_OUT

LOSSES = ("DPO", "DPO+SFT", "DPO+PLOT")
RESAMPLES = 2000
INTRO = """\
`python experiments/forecast.py --data FOLDER` makes the records, `--report` this page. SmolLM2-135M-Instruct,
{steps} steps of {pairs} pairs at {rate:g}. Forecast and measured are the change of the log-probability of held-out
chosen answers, in nats of a whole answer: forecast for one step at the full learning rate, before any training
(`plot_align.doctor.forecast`); measured after all steps. ± is a standard error over the answers.
"""
FILTERED = """\
DPO, {steps} steps of {pairs}, on the same number of human pairs: the {share:.0%} that `plot-align filter` keeps, by
CHES or by length, or as many at random. `experiments/forecast.py --filters`. A value is the mean of the seeds (the
smallest to the largest).
"""
MEASURES = {  # of the runs on filtered pairs: title: scores
    "chosen, nats gained": "gained/chosen", "rejected, nats gained": "gained/rejected",
    "refuses harmful": "refuses/harmful", "refuses StrongREJECT": "refuses/StrongREJECT",
    "refuses twins": "refuses/benign", "refuses ordinary": "refuses/ordinary", "KL": "kl",
}  # fmt: skip


class Point(NamedTuple):
    """One run: ``(answers,)`` measured change, and forecast change by optimizer; ``ranked``: their rank correlation
    over the answers, with AdamW's forecast; ``ches``: the mean length-normalised CHES of the pairs."""

    name: str
    loss: str
    measured: np.ndarray
    forecast: dict[str, np.ndarray]
    ranked: float
    ches: float


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation, ties at their mean rank; NaN where all values of a side are equal."""
    ranks = [rankdata(side) - (len(a) + 1) / 2 for side in (a, b)]
    size = np.sqrt((ranks[0] @ ranks[0]) * (ranks[1] @ ranks[1]))
    return float(ranks[0] @ ranks[1] / size) if size > 0 else float("nan")


def interval(points: Sequence[Point], statistic: Callable[[Sequence[Point]], float]) -> tuple[float, float]:
    """95 % bootstrap interval that draws whole data sets, whose runs are no independent observations."""
    names = sorted({point.name for point in points})
    draw = np.random.default_rng(0)
    found = []
    for _ in range(RESAMPLES):
        drawn = [names[i] for i in draw.integers(len(names), size=len(names))]
        value = statistic([point for name in drawn for point in points if point.name == name])
        if np.isfinite(value):
            found.append(value)
    return tuple(np.quantile(found, [0.025, 0.975])) if found else (float("nan"), float("nan"))


def correlation(points: Sequence[Point], optimizer: str) -> float:
    """Over runs: of the mean forecast and the mean measured change."""
    return spearman([p.forecast[optimizer].mean() for p in points], [p.measured.mean() for p in points])


def within(points: Sequence[Point]) -> float:
    """The mean over runs of the correlation over a run's answers."""
    return float(np.nanmean([p.ranked for p in points]))


def signs(points: Sequence[Point], optimizer: str) -> float:
    """Share of the runs whose mean change has the sign that was forecast."""
    return float(np.mean([(p.forecast[optimizer].mean() > 0) == (p.measured.mean() > 0) for p in points]))


def read(folder: Path) -> tuple[list[Point], dict[str, Any]]:
    """The runs that have a forecast, and the configuration of the last one."""
    points, config = [], {}
    for path in sorted((folder / "forecast").glob("*/seed-*.json")):
        record = read_record(path, "forecast study")
        config, scores = record["config"], record["results"]["scores"]
        for loss in LOSSES:
            other = folder / loss / path.parent.name / path.name
            if other.exists():
                measured = np.array(read_record(other, "forecast study")["results"]["scores"]["held_out"])
                forecast = {name: np.array(scores[name][loss]) for name in ("adamw", "sgd")}
                similarity = float(np.mean(scores["ches_normalised"]))
                ranked = spearman(forecast["adamw"], measured)
                points.append(Point(config["data"], loss, measured, forecast, ranked, similarity))
    return points, config


def write(folder: Path, page: Path) -> None:
    parts = ["# Does the forecast come true?\n"]
    points, config = read(folder)
    if points:
        parts.append(INTRO.format(steps=config["steps"], pairs=config["pairs"], rate=config["learning_rate"]))
        parts += [table(points), "", correlations(points), ""]
    page.write_text("\n".join(parts), encoding="utf-8")


def table(points: Sequence[Point]) -> str:
    lines = [
        "| pairs | loss | CHES, normalised | forecast, AdamW | forecast, SGD | measured |",
        "|---|---|---|---|---|---|",
    ]
    for p in points:
        forecast = " | ".join(_mean(p.forecast[name]) for name in ("adamw", "sgd"))
        lines.append(f"| {p.name} | {p.loss} | {p.ches:.1f} | {forecast} | {_mean(p.measured)} |")
    return "\n".join(lines)


def correlations(points: Sequence[Point]) -> str:
    """Rank correlations with their intervals, of all runs and by loss; CHES as a rival for DPO."""
    lines = [
        "| Spearman's ρ (95 % over data sets) | runs | AdamW | SGD | a run's answers, AdamW | sign right, AdamW |",
        "|---|---|---|---|---|---|",
    ]
    groups = {"all": list(points), **{loss: [p for p in points if p.loss == loss] for loss in LOSSES}}
    for name, group in groups.items():
        if group:
            cells = [
                _with_interval(group, lambda some: correlation(some, "adamw")),
                _with_interval(group, lambda some: correlation(some, "sgd")),
                _with_interval(group, within),
                f"{signs(group, 'adamw'):.2f}",
            ]
            lines.append(f"| {name} | {len(group)} | {' | '.join(cells)} |")
    dpo = groups["DPO"]
    if dpo:

        def rival(some: Sequence[Point]) -> float:
            return spearman([-p.ches for p in some], [p.measured.mean() for p in some])

        lines.append(f"| DPO, by −CHES | {len(dpo)} | {_with_interval(dpo, rival)} | | | |")
    return "\n".join(lines)


def filters(paths: Sequence[Path]) -> str:
    """The mean of each measure over items and seeds, with the smallest and largest seed."""
    lines = [
        FILTERED.format(**read_record(paths[0], "forecast study")["config"]),
        f"| kept by | seeds | {' | '.join(MEASURES)} |",
        "|---" * (len(MEASURES) + 2) + "|",
    ]
    for by in sorted({path.parent.name for path in paths}):
        runs = [read_record(path, "forecast study")["results"]["scores"] for path in paths if path.parent.name == by]
        cells = []
        for key in MEASURES.values():
            human = slice(HELD_OUT if key.startswith("gained/") else None)  # the pairs of ours come after them
            means = [float(np.mean(run[key][human])) for run in runs]
            cells.append(f"{np.mean(means):.2f} ({min(means):.2f} to {max(means):.2f})")
        lines.append(f"| {by} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: np.ndarray) -> str:
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{values.mean():+.3g} ± {error:.2g}"


def _with_interval(points: Sequence[Point], statistic: Callable[[Sequence[Point]], float]) -> str:
    low, high = interval(points, statistic)
    return f"{statistic(points):.2f} ({low:.2f} to {high:.2f})"
