"""What the experiments share: run arms under settings, and print means, standard errors and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from plot_align.records import mean_of, paired
from sandbox import CATEGORIES, build_base
from sandbox.runs import Run, quiet, run_many, run_metrics

Seeds = dict[int, dict[str, float]]  # seed → name → number

# Key, heading, places. Arrows point towards better.
COLUMNS = (
    ("mean_score", "mean of seven ↑", 3),
    ("over_refusal", "over-refusal ↓", 2),
    ("twin_help", "benign twins helped ↑", 2),
    ("nll_good", "NLL of good answers ↓", 3),
    ("perplexity_good", "perplexity ↓", 3),
    ("distinct_2", "distinct-2 ↑", 3),
    ("fluent", "fluent ↑", 2),
    ("chosen_logp", "chosen log p ↑", 2),
    ("preference_accuracy", "pairs ordered ↑", 3),
    ("distance", "distance to relu target ↓", 3),
)


def run(runs: Sequence[Run], folder: Path, workers: int | None = None) -> list[dict[str, float]]:
    """The metrics of every run, those found in ``folder`` read."""
    quiet()
    base = build_base()
    columns = (TextColumn("runs"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("steps", total=sum(run.setting.steps for run in runs))
        done = [0] * len(runs)

        def on_progress(index: int, steps: int) -> None:
            done[index] = steps
            progress.update(task, completed=sum(done))

        records = run_many(runs, base, folder, on_progress, workers=workers)
    return [run_metrics(record["results"]) for record in records]


def cell(values: Sequence[float], places: int, *, signed: bool = False) -> str:
    """Mean ± standard error."""
    entry = mean_of(list(values))
    sign = "+" if signed else ""
    error = f" ± {entry['error']:.{places}f}" if "error" in entry else ""
    return f"{entry['value']:{sign}.{places}f}{error}"


def means(arms: Mapping[str, Seeds], first: str = "arm", keys: Sequence[str] | None = None) -> str:
    """A Markdown table of the arms' means."""
    columns = [column for column in COLUMNS if keys is None or column[0] in keys]
    lines = _head(first, [heading for _, heading, _ in columns])
    for name, seeds in arms.items():
        cells = (cell([metrics[key] for metrics in seeds.values()], places) for key, _, places in columns)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def scores(arms: Mapping[str, Seeds]) -> str:
    """A Markdown table of the seven sub-preferences."""
    lines = _head("arm", CATEGORIES)
    for name, seeds in arms.items():
        cells = (cell([metrics[category] for metrics in seeds.values()], 2) for category in CATEGORIES)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def differences(
    pairs: Mapping[str, tuple[Seeds, Seeds]], first: str = "arm", keys: Sequence[str] | None = None
) -> str:
    """A Markdown table of (treated − control), paired by seed; bold where the mean is two standard errors from 0."""
    columns = [column for column in COLUMNS if keys is None or column[0] in keys]
    lines = _head(first, [heading for _, heading, _ in columns])
    for name, (treated, control) in pairs.items():
        cells = []
        for key, _, places in columns:
            entry = paired(*({seed: m[key] for seed, m in side.items()} for side in (treated, control)))
            error = entry.get("error", float("inf"))
            text = f"{entry['value']:+.{places}f} ± {error:.{places}f}"
            cells.append(f"**{text}**" if abs(entry["value"]) > 2 * error else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _head(first: str, headings: Sequence[str]) -> list[str]:
    return [f"| {first} | " + " | ".join(headings) + " |", "|---" * (len(headings) + 1) + "|"]
