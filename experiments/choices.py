"""How to choose α, target, granularity and positions: DPO with PLOT in the sandbox, one option moved at a time.

    python experiments/choices.py --output runs/choices --seeds 3

Finished runs are read, not run again, so the script can be stopped and started, and several can share a folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from plot_align.config import PlotConfig
from sandbox.runs import Arm, Run, Setting
from tables import Seeds, means, run

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
    setting = Setting(steps=args.steps, learning_rate=args.learning_rate)
    chosen = [arm for arm in arms() if args.only in arm.name]
    runs = [Run(arm, setting, seed) for seed in range(args.seeds) for arm in chosen]
    found: dict[str, Seeds] = {}
    for done, metrics in zip(runs, run(runs, args.output), strict=True):
        found.setdefault(done.arm.name, {})[done.seed] = metrics
    print(means(found))


if __name__ == "__main__":
    main()
