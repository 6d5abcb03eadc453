"""Run a sweep, or print what it would run; then write its summary, table and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from plot_align.errors import RunError, require_packages
from plot_align.io import claimed, complete_or_absent
from plot_align.records import write_record
from plot_align.sweep.figures import draw
from plot_align.sweep.grid import Job
from plot_align.sweep.summary import markdown, summarise
from plot_align.sweep.training import Training
from plot_align.text import terminal


def run(
    jobs: Sequence[Job],
    training: Training,
    output: Path,
    *,
    config: Mapping[str, Any],
    workers: int | None = None,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Run what is not finished yet, then write ``summary.json``, ``table.md`` and the figures.

    Args:
        jobs: the runs, see :func:`plot_align.sweep.expand`.
        training: performs a run.
        output: folder of the sweep.
        config: the grid and the training file, for the summary's record.
        workers: how many runs at once; None for one per GPU.
        console: where to print; None for standard output.

    Returns:
        The cells of the summary.

    Raises:
        InputError: ``output`` cannot be written.
        RunError: some runs failed; the others are finished and in the summary.
    """
    require_packages("sweep", "matplotlib", extra="report")  # for the figures, drawn last
    console = console or terminal()
    with claimed(output):
        return _run(jobs, training, output, config, workers, console)


def _run(
    jobs: Sequence[Job],
    training: Training,
    output: Path,
    config: Mapping[str, Any],
    workers: int | None,
    console: Console,
) -> list[dict[str, Any]]:
    waiting = [job for job in jobs if not training.is_finished(job)]
    if len(waiting) < len(jobs):
        finished_before = f"{len(jobs) - len(waiting)} of {len(jobs)} runs were finished before"
        console.print(f"{finished_before} and are read from {output}", soft_wrap=True)
    failure: RunError | None = None
    if waiting:
        try:
            _run_with_bar(waiting, training, workers, console)
        except RunError as error:  # write the summary of the others first
            failure = error
    finished = {job: training.metrics(job) for job in jobs if training.is_finished(job)}
    cells = summarise(finished)
    if cells:
        missing = [str(job) for job in jobs if job not in finished]
        _write(cells, missing, training, output, config, console)
    if failure is not None:
        raise failure
    return cells


def describe(jobs: Sequence[Job], training: Training, console: Console | None = None) -> None:
    """Print what would run, cell by cell, and how much of it is finished."""
    console = console or terminal()
    done = {job for job in jobs if training.is_finished(job)}
    for cell in dict.fromkeys(job.cell for job in jobs):
        of_cell = [job for job in jobs if job.cell == cell]
        seeds = " ".join(f"{job.seed}{'*' if job in done else ''}" for job in of_cell)
        console.print(f"{cell}: seeds {seeds}", soft_wrap=True)
    console.print(f"{len(jobs)} runs, {len(done)} finished (*), {len(jobs) - len(done)} to run")


def _run_with_bar(jobs: Sequence[Job], training: Training, workers: int | None, console: Console) -> None:
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=True),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("runs", total=len(jobs))
        training.run(jobs, lambda: progress.advance(task), workers)


def _write(
    cells: list[dict[str, Any]],
    missing: list[str],
    training: Training,
    output: Path,
    config: Mapping[str, Any],
    console: Console,
) -> None:
    names = list(dict.fromkeys(name for cell in cells for name in cell["metrics"]))
    main, beside = training.main_metrics(names)
    path = write_record(output / "summary.json", "sweep", {"cells": cells, "failed": missing}, config=config)
    table = markdown(cells, [*main, *beside], "Sweep")
    if missing:
        table += "\n## Without a result: these runs failed\n\n" + "".join(f"- {name}\n" for name in missing)
    with complete_or_absent(output / "table.md") as temporary:
        temporary.write_text(table, encoding="utf-8")
    figures = [output / f"{metric.key.replace('/', '-')}.png" for metric in main]
    drawn = [figure.name for metric, figure in zip(main, figures, strict=True) if draw(cells, metric, figure)]
    console.print(f"{path.name}, table.md and {', '.join(drawn) or 'no figure'} are in {output}", soft_wrap=True)
