"""How the default was chosen: a target from the micro-batch itself, how far to shift it, how strongly to pull.

    python experiments/targets.py --output runs/targets --seeds 3

Finished runs are read, not run again. Prints Markdown: means over the seeds, DPO unless a row says otherwise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from plot_align.config import PlotConfig
from sandbox.runs import Arm, Run, Setting
from tables import Seeds, means, run

ANCHORED = {"target": "anchored", "target_scope": "batch", "geometry": "norm"}
CHOSEN = {"target": "chosen", "target_scope": "batch", "geometry": "norm"}
TERMS = {
    "λ 0, α 3": {**ANCHORED, "target_strength": 0.0, "alpha": 3.0},
    "λ 0, α 10": {**ANCHORED, "target_strength": 0.0, "alpha": 10.0},
    "λ 0, α 30": {**ANCHORED, "target_strength": 0.0, "alpha": 30.0},
    "λ 0, α 100": {**ANCHORED, "target_strength": 0.0, "alpha": 100.0},
    "λ 0.1, α 30": {**ANCHORED, "target_strength": 0.1, "alpha": 30.0},
    "λ 0.3, α 30": {**ANCHORED, "target_strength": 0.3, "alpha": 30.0},
    "λ 1, α 3": {**ANCHORED, "target_strength": 1.0, "alpha": 3.0},
    "λ 1, α 30": {**ANCHORED, "target_strength": 1.0, "alpha": 30.0},
    "λ 0, balanced at ρ 1": {**ANCHORED, "target_strength": 0.0, "balance_ratio": 1.0},
    "λ 0, α 10, sequence": {**ANCHORED, "target_strength": 0.0, "alpha": 10.0, "granularity": "sequence"},
    "λ 0, α 30, sequence": {**ANCHORED, "target_strength": 0.0, "alpha": 30.0, "granularity": "sequence"},
    "λ 1, α 10, sequence": {**ANCHORED, "target_strength": 1.0, "alpha": 10.0, "granularity": "sequence"},
    "λ 0, α 30, all positions": {**ANCHORED, "target_strength": 0.0, "alpha": 30.0, "positions": "all"},
    "λ 0, α 3, total variation": {**ANCHORED, "target_strength": 0.0, "alpha": 3.0, "divergence": "tv"},
    "chosen tokens, α 10": {**CHOSEN, "alpha": 10.0},
    "chosen tokens, α 3, total variation": {**CHOSEN, "alpha": 3.0, "divergence": "tv"},
    "chosen tokens, α 3, Jensen-Shannon": {**CHOSEN, "alpha": 3.0, "divergence": "js"},
}
ON_SFT = {
    "DPO+SFT, λ 0, α 10": {**ANCHORED, "target_strength": 0.0, "alpha": 10.0},
    "DPO+SFT, λ 0, α 30": {**ANCHORED, "target_strength": 0.0, "alpha": 30.0},
    "DPO+SFT, λ 0, α 10, sequence": {**ANCHORED, "target_strength": 0.0, "alpha": 10.0, "granularity": "sequence"},
}
# Methods without a reference forward: the micro-batch's chosen tokens, or one anchored target for all.
ELSEWHERE = {
    "chosen tokens, ρ 1": {**CHOSEN, "balance_ratio": 1.0},
    "anchored for all, ρ 0.1": {**ANCHORED, "target_scope": "dataset", "balance_ratio": 0.1},
    "anchored for all, ρ 1": {**ANCHORED, "target_scope": "dataset", "balance_ratio": 1.0},
}
METHODS = {"SFT": "sft", "PRO": "pro", "CPO": "cpo", "SimPO": "simpo", "ORPO": "orpo"}
KEYS = ("mean_score", "over_refusal", "twin_help", "nll_good", "chosen_logp", "preference_accuracy")


def arms() -> list[Arm]:
    """Plain DPO at three β, DPO+SFT, every term on them, and the other methods."""
    sigmoid, sft = ("sigmoid",), ("sigmoid", "sft")
    found = [Arm("DPO", sigmoid), Arm("DPO, β 0.3", sigmoid, beta=0.3), Arm("DPO, β 1", sigmoid, beta=1.0)]
    found += [Arm(name, sigmoid, PlotConfig.from_options(**options)) for name, options in TERMS.items()]
    found += [
        Arm("DPO+SFT", sft),
        *(Arm(name, sft, PlotConfig.from_options(**options)) for name, options in ON_SFT.items()),
    ]
    for name, method in METHODS.items():
        beta = 2.0 if method == "simpo" else None
        found.append(Arm(name, method=method, beta=beta))
        terms = {f"{name}, {term}": PlotConfig.from_options(**options) for term, options in ELSEWHERE.items()}
        found += [Arm(title, method=method, beta=beta, plot=term) for title, term in terms.items()]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/targets"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int)
    options = parser.parse_args()
    runs = [Run(arm, Setting(), seed) for seed in range(options.seeds) for arm in arms()]
    found: dict[str, Seeds] = {}
    for done, metrics in zip(runs, run(runs, options.output, options.workers), strict=True):
        found.setdefault(done.arm.name, {})[done.seed] = metrics
    print(means(found, keys=KEYS))


if __name__ == "__main__":
    main()
