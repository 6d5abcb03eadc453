"""A grid over PLOT's options in the sandbox, as `plot-align sweep` has it for a training of one's own.

    python experiments/grid.py --alpha 0.01 0.1 1 10 100 --divergence w1 deft_log --seed 0 1 2 --output runs/alpha

Finished runs are read, not run again. Writes the table, each arm less the same without PLOT, and the figures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from plot_align.config import PlotConfig
from plot_align.sweep import Job, Metric, coerce, expand, keys, markdown, summarise
from plot_align.sweep.figures import draw
from sandbox.runs import Arm, Run, Setting
from tables import COLUMNS, run

METRICS = [
    Metric(key, heading.strip(" ↑↓"), heading.endswith("↑")) for key, heading, _ in COLUMNS if key != "perplexity_good"
]


def sandbox_run(job: Job) -> Run:
    options = dict(job.cell.setting)
    losses = tuple(options.pop("loss_type", "sigmoid").split("+")) if job.cell.method == "dpo" else ()
    plot = None if job.cell.plot is None else PlotConfig.from_options(**dict(job.cell.plot))
    return Run(Arm(str(job.cell), losses, plot, job.cell.method), Setting(**options), job.seed)


def main() -> None:
    known = keys()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/grid"))
    parser.add_argument("--workers", type=int)
    for name in known:
        parser.add_argument(f"--{name}", nargs="+", default=["0", "1", "2"] if name == "seed" else None)
    options = vars(parser.parse_args())
    output, workers = options.pop("output"), options.pop("workers")
    grid = {name: [coerce(known[name], value) for value in values] for name, values in options.items() if values}
    jobs = expand(grid)
    found = run([sandbox_run(job) for job in jobs], output / "records", workers)
    cells = summarise(dict(zip(jobs, found, strict=True)))
    table = markdown(cells, METRICS, "Sandbox")
    (output / "table.md").write_text(table, encoding="utf-8")
    for metric in METRICS:
        draw(cells, metric, output / f"{metric.key}.png")
    print(table)


if __name__ == "__main__":
    main()
