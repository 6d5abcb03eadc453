"""How to choose α, target, granularity and positions: DPO with PLOT in the sandbox, one option moved at a time.

    python experiments/choices.py --output runs/choices --seeds 3

Finished runs are read, not run again, so the script can be stopped and started, and several can share a folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from plot_align.records import mean_of
from plot_align.sandbox import CATEGORIES, build_base
from plot_align.sandbox.experiment import Arm, Setting, run_all
from plot_align.training import PlotConfig

VARIANTS: dict[str, dict] = {
    "relu α 0.1": {"alpha": 0.1, "target": "relu"},
    "relu α 1": {"alpha": 1.0, "target": "relu"},
    "relu α 10": {"alpha": 10.0, "target": "relu"},
    "relu α 100": {"alpha": 100.0, "target": "relu"},
    "anchored α 1": {"alpha": 1.0, "target": "anchored"},
    "anchored α 10": {"alpha": 10.0, "target": "anchored"},
    "anchored α 100": {"alpha": 100.0, "target": "anchored"},
    "shift α 10": {"alpha": 10.0, "target": "shift"},
    "softmax α 10": {"alpha": 10.0, "target": "softmax"},
    "anchored α 10, sequence": {"alpha": 10.0, "target": "anchored", "granularity": "sequence"},
    "anchored α 10, token": {"alpha": 10.0, "target": "anchored", "granularity": "token"},
    "anchored α 10, principal": {"alpha": 10.0, "target": "anchored", "geometry": "principal"},
    "anchored α 10, total variation": {"alpha": 10.0, "target": "anchored", "divergence": "tv"},
    "anchored α 10, all positions": {"alpha": 10.0, "target": "anchored", "positions": "all"},
}


def arms() -> list[Arm]:
    plain = [Arm("base"), Arm("DPO", ("sigmoid",)), Arm("DPO+SFT", ("sigmoid", "sft"))]
    terms = {name: PlotConfig.paper(target_strength=1.0, **options) for name, options in VARIANTS.items()}
    return plain + [Arm(f"DPO+PLOT {name}", ("sigmoid",), term) for name, term in terms.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/choices"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="run the variants whose name contains this")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    args = parser.parse_args()
    console = Console(width=160)
    base = build_base()
    setting = Setting(steps=args.steps, learning_rate=args.learning_rate)
    chosen = [arm for arm in arms() if args.only in arm.name]
    jobs = [(arm, seed) for seed in range(args.seeds) for arm in chosen]
    with Progress(console=console) as progress:
        task = progress.add_task("steps", total=len(jobs) * setting.steps)
        done = [0] * len(jobs)

        def on_progress(job: int, steps: int) -> None:
            done[job] = steps
            progress.update(task, completed=sum(done))

        records = run_all(jobs, setting, base, args.output, on_progress)
    found: dict[str, list[dict]] = {arm.name: [] for arm in chosen}
    for (arm, _), record in zip(jobs, records, strict=True):
        found[arm.name].append(record["results"])
    keys = ("over_refusal", "twin_help", "nll_good", "fluent", "distance")
    table = Table("", "mean of seven", "harmlessness", "helpfulness", *keys, "plot/loss", "grad ratio")
    for name, results in found.items():
        seven = [sum(r["scores"][c]["value"] for c in CATEGORIES) / len(CATEGORIES) for r in results]
        columns = [seven, *([r["scores"][c]["value"] for r in results] for c in ("harmlessness", "helpfulness"))]
        columns += [[r[key]["value"] for r in results] for key in keys]
        for key in ("plot/loss", "plot/grad_ratio"):
            last = [[log[key] for log in r["train_logs"] if key in log][-1:] for r in results]
            columns.append([value for values in last for value in values])
        entries = [mean_of(values) for values in columns]
        cells = [f"{e['value']:.3f} ({e['spread'][1] - e['spread'][0]:.2f})" for e in entries[:-2]]
        table.add_row(name, *cells, *(f"{e['value']:.3g}" for e in entries[-2:]))
    console.print(table)


if __name__ == "__main__":
    main()
