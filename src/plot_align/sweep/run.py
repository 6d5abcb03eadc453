"""Runs a sweep, or says what it would run; then its summary, table and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from plot_align.errors import RunError, require_packages
from plot_align.io import complete_or_absent, require_writable
from plot_align.records import write_record
from plot_align.sweep.figures import draw
from plot_align.sweep.grid import Job
from plot_align.sweep.summary import markdown, summarise
from plot_align.sweep.workloads import Workload


def run(
    jobs: Sequence[Job],
    workload: Workload,
    output: Path,
    *,
    config: Mapping[str, Any],
    workers: int | None = None,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Runs what is not finished yet, then writes ``summary.json``, ``table.md`` and the figures.

    Args:
        jobs: the runs, see :func:`plot_align.sweep.expand`.
        workload: what a run is.
        output: folder of the sweep.
        config: the grid and the workload, for the summary's record.
        workers: how many runs at once; None: the workload's choice.
        console: where to print; None: standard output.

    Returns:
        The cells of the summary.

    Raises:
        InputError: ``output`` cannot be written.
        RunError: some runs failed; the others are finished and in the summary.
    """
    require_packages("sweep", "matplotlib", extra="report")  # for the figures, drawn last
    console = console or Console()
    require_writable(output)
    waiting = [job for job in jobs if not workload.record(job).exists()]
    if len(waiting) < len(jobs):
        finished_before = f"{len(jobs) - len(waiting)} of {len(jobs)} runs were finished before"
        console.print(f"{finished_before} and are read from {output}", soft_wrap=True)
    failure: RunError | None = None
    if waiting:
        try:
            _run_with_bar(waiting, workload, workers, console)
        except RunError as error:  # the summary of the others comes first
            failure = error
    finished = {job: workload.metrics(job) for job in jobs if workload.record(job).exists()}
    cells = summarise(finished)
    if cells:
        missing = [str(job) for job in jobs if job not in finished]
        _write(cells, missing, workload, output, config, console)
    if failure is not None:
        raise failure
    return cells


def describe(jobs: Sequence[Job], workload: Workload, console: Console | None = None) -> None:
    """Prints what would run, cell by cell, and how much of it is finished."""
    console = console or Console()
    done = {job for job in jobs if workload.record(job).exists()}
    for cell in dict.fromkeys(job.cell for job in jobs):
        of_cell = [job for job in jobs if job.cell == cell]
        seeds = " ".join(f"{job.seed}{'*' if job in done else ''}" for job in of_cell)
        console.print(f"{cell}: seeds {seeds}", highlight=False, soft_wrap=True)
    console.print(f"{len(jobs)} runs, {len(done)} finished (*), {len(jobs) - len(done)} to run", highlight=False)


def _run_with_bar(jobs: Sequence[Job], workload: Workload, workers: int | None, console: Console) -> None:
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=True),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"{len(jobs)} runs", total=float(len(jobs)))
        done = [0.0] * len(jobs)

        def on_progress(index: int, share: float) -> None:
            done[index] = share
            left = sum(share < 1 for share in done)
            progress.update(task, completed=sum(done), description=f"{len(jobs) - left} of {len(jobs)} runs")

        workload.run(jobs, on_progress, workers)


def _write(
    cells: list[dict[str, Any]],
    missing: list[str],
    workload: Workload,
    output: Path,
    config: Mapping[str, Any],
    console: Console,
) -> None:
    names = list(dict.fromkeys(name for cell in cells for name in cell["metrics"]))
    main, beside = workload.main_metrics(names)
    path = write_record(output / "summary.json", "sweep", {"cells": cells, "failed": missing}, config=config)
    table = markdown(cells, [*main, *beside], "Sweep")
    if missing:
        table += "\n## Without a result: these runs failed\n\n" + "".join(f"- {name}\n" for name in missing)
    with complete_or_absent(output / "table.md") as temporary:
        temporary.write_text(table, encoding="utf-8")
    figures = [output / f"{metric.key.replace('/', '-')}.png" for metric in main]
    drawn = [figure.name for metric, figure in zip(main, figures, strict=True) if draw(cells, metric, figure)]
    console.print(f"{path.name}, table.md and {', '.join(drawn) or 'no figure'} are in {output}", soft_wrap=True)
