"""Where PLOT helps: little data, noisy labels, long training, weak and strong beta; with and without the SFT term.

    python experiments/map.py --output runs/sandbox --seeds 5

Finished runs are read, not run again. Prints Markdown: the means of every arm in every setting, and PLOT less the same
without it, paired by seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from plot_align.config import PlotConfig
from sandbox.runs import Arm, Run, Setting
from tables import Seeds, differences, means, run

SETTINGS = {
    "standard": Setting(),
    "10 pairs a category": Setting(per_category=10),
    "30 pairs a category": Setting(per_category=30),
    "20 % flipped": Setting(flipped=0.2),
    "40 % flipped": Setting(flipped=0.4),
    "120 steps": Setting(steps=120),
    "120 steps, 30 % flipped": Setting(steps=120, flipped=0.3),
    "beta 0.02": Setting(beta=0.02),
    "beta 0.3": Setting(beta=0.3),
    "beta 1": Setting(beta=1.0),
    "learning rate 1e-3": Setting(learning_rate=1e-3),
    "4 pairs a step": Setting(batch_size=4),
}
ARMS = (
    Arm("DPO", ("sigmoid",)),
    Arm("DPO+PLOT", ("sigmoid",), PlotConfig()),
    Arm("DPO+SFT", ("sigmoid", "sft")),
    Arm("DPO+SFT+PLOT", ("sigmoid", "sft"), PlotConfig()),
)
COMPARISONS = (("DPO+PLOT", "DPO"), ("DPO+SFT+PLOT", "DPO+SFT"), ("DPO+PLOT", "DPO+SFT"))
KEYS = ("mean_score", "over_refusal", "twin_help", "nll_good", "fluent", "chosen_logp", "preference_accuracy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/sandbox"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int)
    options = parser.parse_args()
    places = [(name, arm) for _ in range(options.seeds) for name in SETTINGS for arm in ARMS]
    runs = [Run(arm, SETTINGS[name], i // (len(SETTINGS) * len(ARMS))) for i, (name, arm) in enumerate(places)]
    found: dict[str, dict[str, Seeds]] = {name: {} for name in SETTINGS}
    for (name, arm), done, metrics in zip(places, runs, run(runs, options.output, options.workers), strict=True):
        found[name].setdefault(arm.name, {})[done.seed] = metrics
    print(means({f"{s}: {arm}": seeds for s, arms in found.items() for arm, seeds in arms.items()}, "setting", KEYS))
    for treated, control in COMPARISONS:
        pairs = {setting: (arms[treated], arms[control]) for setting, arms in found.items()}
        print(f"\n{treated} less {control}, paired by seed:\n")
        print(differences(pairs, "setting", KEYS))


if __name__ == "__main__":
    main()
