"""A grid over PLOT's options in the sandbox, as `plot-align sweep` has it for a training of one's own.

    python experiments/grid.py --alpha 0.01 0.1 1 10 100 --divergence w1 deft_log --seed 0 1 2 --output runs/alpha

Finished runs are read, not run again. Writes the table, each arm less the same without PLOT, and the figures.
"""

from __future__ import annotations

import sys
from pathlib import Path

from plot_align.cli.sweep import make_parser, read_grid
from plot_align.config import PlotConfig
from plot_align.sweep import Job, Metric, expand, markdown, summarise
from plot_align.sweep.figures import draw
from sandbox.runs import Arm, Run, Setting
from tables import COLUMNS, run

METRICS = [
    Metric(key, heading.strip(" ↑↓"), heading.endswith("↑")) for key, heading, _ in COLUMNS if key != "perplexity_good"
]


def sandbox_run(job: Job) -> Run:
    options = dict(job.cell.setting)
    losses = tuple(options.pop("loss_type", "sigmoid").split("+")) if job.cell.method == "dpo" else ()
    plot = None if job.cell.plot is None else PlotConfig(**dict(job.cell.plot))
    return Run(Arm(str(job.cell), losses, plot, job.cell.method), Setting(**options), job.seed)


def main() -> None:
    given = {name: value for name, value in vars(make_parser().parse(sys.argv[1:])).items() if value}
    output, workers = Path(given.pop("output", "runs/grid")), given.pop("workers", None)
    jobs = expand({"seed": [0, 1, 2], **read_grid(given)})
    found = run([sandbox_run(job) for job in jobs], output / "records", None if workers is None else int(workers))
    cells = summarise(dict(zip(jobs, found, strict=True)))
    table = markdown(cells, METRICS, "Sandbox")
    (output / "table.md").write_text(table, encoding="utf-8")
    for metric in METRICS:
        draw(cells, metric, output / f"{metric.key}.png")
    print(table)


if __name__ == "__main__":
    main()
