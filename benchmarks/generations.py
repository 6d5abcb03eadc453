"""What the term costs on each generation of TRL: the environments of ``make compat``, a step with it against without.

    python benchmarks/generations.py                # prints the table of docs/cost.md, and the record's path

In each environment, DPO and SFT on a model with random weights, arms interleaved: ``off`` (TRL's loss, on our kernel
where TRL has a head to exchange, else as TRL has it), ``on`` (the default term), ``measured`` (a step that balances α,
one in five) and ``separate`` (the term by a head pass of its own). Every token that can be predicted is a completion,
and the optimiser's step is left out, so that ratios are, if anything, too large.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ARMS = {
    "off": ("off", {}),
    "on": ("on", {}),
    "measured": ("measured", {}),
    "separate": ("on", {"plot_backend": "separate"}),
}
SHAPE = {"vocab": 16_000, "hidden": 256, "layers": 3, "intermediate": 704, "heads": 4, "kv_heads": 4, "rows": 4,
         "length": 48}  # fmt: skip


def measure(repeats: int, shape: dict[str, int]) -> dict[str, Any]:
    """Every arm of DPO and SFT against ``off``, in the environment that this runs in."""
    import torch

    from plot_align.bench import StepProblem, compare, interleaved
    from plot_align.config import PlotConfig
    from shapes import Shape, random_weights

    warnings.simplefilter("ignore")
    cpu, found = torch.device("cpu"), {}
    for method in ("dpo", "sft"):
        sizes = Shape(**shape)
        model, tokenizer = random_weights(sizes, cpu, torch.float32)
        problem = StepProblem(model, tokenizer, sizes.rows, sizes.length, method=method)
        arms = {
            name: functools.partial(problem.arm, arm, PlotConfig.from_options(**options))
            for name, (arm, options) in ARMS.items()
        }
        found[method] = compare(interleaved(arms, repeats=repeats, device=cpu), "off")
    return found


def in_each_environment(repeats: int, shape: dict[str, int]) -> dict[str, dict[str, Any]]:
    """What :func:`measure` finds in each environment of the matrix, one after another."""
    sys.path.insert(0, str(ROOT / "tests" / "compat"))
    from environments import ENVIRONMENTS
    from run import build

    results = {}
    for name, requirements in ENVIRONMENTS.items():
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        options = ["--here", json.dumps(shape), "--repeats", str(repeats)]
        done = subprocess.run(
            [build(name, requirements), __file__, *options], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{name}: {done.stderr}")
        results[name] = json.loads(done.stdout.splitlines()[-1])
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """Medians, with the 95 % interval of the time."""

    def cell(entry: dict[str, Any]) -> str:
        low, high = entry["time"]["interval"]
        return f"{entry['time']['value']:.2f} ({low:.2f}–{high:.2f}), {entry['memory']['value']:.2f}"

    titles = {"on": "on", "measured": "on, balancing α", "separate": "`plot_backend: separate`"}
    lines = ["| TRL, trainer | " + " | ".join(titles.values()) + " |", "|---" * (len(titles) + 1) + "|"]
    for name, methods in results.items():
        for method, arms in methods.items():
            cells = [cell(arms[arm]) for arm in titles]
            lines.append(f"| {name.removeprefix('trl-')}, {method.upper()} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--here", metavar="SHAPE", help="measure in this environment alone and print JSON")
    parser.add_argument("--output", type=Path, default=Path("runs/generations.json"))
    args = parser.parse_args()
    if args.here is not None:
        print(json.dumps(measure(args.repeats, json.loads(args.here))))
        return
    from plot_align.records import write_record

    results = in_each_environment(args.repeats, SHAPE)
    print(table(results))
    config = {"shape": SHAPE, "repeats": args.repeats, "arms": list(ARMS)}
    print(json.dumps({"record": str(write_record(args.output, "generations", results, config=config, seed=0))}))


if __name__ == "__main__":
    main()
