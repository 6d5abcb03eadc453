"""Every method alone and with PLOT, and DEFT on DPO and PRO, in the sandbox.

    python experiments/methods.py --output runs/sandbox --seeds 5

Finished runs are read, not run again. Prints Markdown: the means, the seven scores, and PLOT less the same without it.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from plot_align.config import PlotConfig
from sandbox.runs import Arm, Run, Setting
from tables import Seeds, differences, means, run, scores

# SimPO's beta is on another scale.
PLAIN = (
    Arm("SFT", method="sft"),
    Arm("DPO", ("sigmoid",)),
    Arm("DPO+SFT", ("sigmoid", "sft")),
    Arm("AOT", ("aot",)),
    Arm("AOT unpaired", ("aot_unpaired",)),
    Arm("PRO", method="pro"),
    Arm("KTO", method="kto"),
    Arm("CPO", method="cpo"),
    Arm("SimPO", method="simpo", beta=2.0),
    Arm("ORPO", method="orpo"),
)
DEFT_ON = ("DPO", "PRO")
DEFT = {"log": PlotConfig.from_options(divergence="deft_log"), "prob": PlotConfig.from_options(divergence="deft_prob")}


def arms() -> list[Arm]:
    """The base, each method alone and with PLOT, and DEFT's two readings on DPO and PRO."""
    found = [Arm("base")]
    for arm in PLAIN:
        found += [arm, replace(arm, name=f"{arm.name}+PLOT", plot=PlotConfig())]
        if arm.name in DEFT_ON:
            found += [replace(arm, name=f"{arm.name}+DEFT ({r})", plot=plot) for r, plot in DEFT.items()]
    return found


def without_term(name: str) -> str:
    """The name of the arm that the term was added to."""
    return name.split("+PLOT")[0].split("+DEFT")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/sandbox"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="methods to run, e.g. DPO PRO; all without it")
    parser.add_argument("--workers", type=int)
    options = parser.parse_args()
    chosen = [arm for arm in arms() if options.only is None or without_term(arm.name) in options.only]
    runs = [Run(arm, Setting(), seed) for seed in range(options.seeds) for arm in chosen]
    found: dict[str, Seeds] = {}
    for done, metrics in zip(runs, run(runs, options.output, options.workers), strict=True):
        found.setdefault(done.arm.name, {})[done.seed] = metrics
    pairs = {name: (s, found[without_term(name)]) for name, s in found.items() if without_term(name) != name}
    print(means(found), scores(found), differences(pairs, "with less without, paired by seed"), sep="\n\n")


if __name__ == "__main__":
    main()
