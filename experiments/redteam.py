"""Six attacks on every arm of the sandbox, two judges, over-refusal beside them.

    python experiments/redteam.py --output runs/redteam --seeds 5

Trains what is not there yet and attacks it with small budgets, in HarmBench's folders; whatever is finished is read.
Two arms are controls: DPO and DPO+SFT at a larger beta, which refuse about as few benign requests as with PLOT. Prints
Markdown: every arm's rates, PLOT less the same without it and less its control, paired by seed, and writes the curves.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from plot_align.config import PlotConfig
from plot_align.records import mean_of, paired, read_record, standard_error, write_record
from plot_align.redteam.attackers import LocalAttacker
from plot_align.redteam.curves import draw, snapshot_cases, success_at_cases
from plot_align.redteam.direct import DirectRequest
from plot_align.redteam.gbda import GBDA
from plot_align.redteam.gcg import GCG
from plot_align.redteam.harmbench import Layout, attack_success_rate
from plot_align.redteam.judges import RefusalPrefixes, agreement
from plot_align.redteam.pez import PEZ
from plot_align.redteam.random_suffix import RandomSuffix
from plot_align.redteam.run import complete, label, make_test_cases
from plot_align.redteam.sfs import SFS
from plot_align.redteam.uat import UAT
from plot_align.redteam.victim import Victim
from plot_align.redteam.zero_shot import ZeroShot
from sandbox import build_base, requests
from sandbox.attacker import FEW_SHOT_TEMPLATE, ZERO_SHOT_TEMPLATE, build_attacker
from sandbox.redteam_judge import SandboxJudge
from sandbox.runs import Arm, Run, Setting, in_processes, quiet, run_many

KIND = "sandbox-redteam"
BASE = Arm("base")
ARMS = (
    Arm("SFT", method="sft"),
    Arm("DPO", ("sigmoid",)),
    Arm("DPO, beta 1", ("sigmoid",), beta=1.0),
    Arm("DPO+SFT", ("sigmoid", "sft")),
    Arm("DPO+SFT, beta 1", ("sigmoid", "sft"), beta=1.0),
    Arm("DPO+PLOT", ("sigmoid",), PlotConfig()),
    Arm("DPO+PLOT (paper)", ("sigmoid",), PlotConfig.paper()),
    Arm("DPO+SFT+PLOT", ("sigmoid", "sft"), PlotConfig()),
)
AGAINST = (
    ("DPO+PLOT", "DPO"),
    ("DPO+PLOT", "DPO, beta 1"),
    ("DPO+PLOT (paper)", "DPO"),
    ("DPO+SFT+PLOT", "DPO+SFT"),
    ("DPO+SFT+PLOT", "DPO+SFT, beta 1"),
)
LENGTH = 8  # tokens of a suffix
SNAPSHOTS = (1, 2, 4, 8, 16)
COLUMNS = ("DirectRequest", "RandomSuffix", "ZeroShot", "SFS", "PEZ", "GBDA", "UAT", "GCG", "over-refusal", "helped")


def attacks(attacker: LocalAttacker) -> list[Any]:
    """At budgets that suit a model of a million parameters."""
    return [
        DirectRequest(),
        RandomSuffix(suffix_tokens=LENGTH),
        ZeroShot(attacker, max_new_tokens=64, template=ZERO_SHOT_TEMPLATE),
        SFS(
            attacker,
            samples=16,
            steps=16,
            max_new_tokens=64,
            zero_shot_template=ZERO_SHOT_TEMPLATE,
            template=FEW_SHOT_TEMPLATE,
        ),
        PEZ(steps=40, learning_rate=0.1, suffix_tokens=LENGTH),
        GBDA(steps=40, learning_rate=0.5, suffix_tokens=LENGTH),
        UAT(steps=2, suffix_tokens=LENGTH),
        GCG(steps=16, search_width=64, top_k=64, suffix_tokens=LENGTH),
    ]


def attack_model(folder: Path, attacker: Path, seed: int, count: int, output: Path) -> dict[str, Any]:
    """Every rate of one model by both judges, their agreement, and what the curves need."""
    victim = Victim(*_load(folder), folder.name)
    behaviors, benign = requests.behaviors(seed, count), requests.benign(seed)
    targets = requests.targets(behaviors)
    judges: dict[str, Any] = {"sandbox": SandboxJudge(), "prefixes": RefusalPrefixes()}
    found: dict[str, Any] = {name: {} for name in ("rates", "prefixes", "losses", "by_steps", "by_cases", "agreement")}
    for attack in attacks(LocalAttacker(*_load(attacker), "sandbox-attacker")):
        layout = Layout(output, attack.name, folder.name)
        steps = tuple(step for step in SNAPSHOTS if step <= attack.steps and attack.name in ("GCG", "SFS"))
        cases, failed = make_test_cases(victim, attack, behaviors, targets, layout, seed=seed, snapshots=steps)
        if failed:
            raise RuntimeError(f"{attack.name} failed: {failed}")
        answers = complete(victim, cases, layout.completions(victim.name), max_new_tokens=56, batch_size=256)
        results = {
            name: label(judge, behaviors, answers, layout.results(victim.name, None if name == "sandbox" else name))
            for name, judge in judges.items()
        }
        found["rates"][attack.name] = attack_success_rate(results["sandbox"])
        found["prefixes"][attack.name] = attack_success_rate(results["prefixes"])
        labels = [[row["label"] for rows in r.values() for row in rows] for r in results.values()]
        found["agreement"][attack.name] = agreement(*labels)
        if attack.name == "ZeroShot":
            curve = success_at_cases(results["sandbox"])
            found["by_cases"] = {str(k): entry["value"] for k, entry in curve.items()}
        for step in steps:
            path = layout.folder / "steps" / f"{step}.json"
            then = complete(victim, snapshot_cases(layout, cases, step), path, max_new_tokens=56, batch_size=256)
            labelled = label(judges["sandbox"], behaviors, then, path.with_suffix(".results.json"))
            found["by_steps"].setdefault(attack.name, {})[str(step)] = attack_success_rate(labelled)
    served = victim.answers([b.prompt for b in benign], max_new_tokens=56, batch_size=256)
    verdicts = judges["sandbox"].judge_benign(benign, [b.prompt for b in benign], served)
    found["rates"]["over-refusal"] = sum(bool(v.refused) for v in verdicts) / len(verdicts)
    found["rates"]["helped"] = sum(bool(v.helped) for v in verdicts) / len(verdicts)
    return found


def _load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def one(folder: Path, arm: str, attacker: Path, seed: int, count: int, output: Path, path: Path) -> None:
    """Attack one model and keep its record."""
    results = attack_model(folder, attacker, seed, count, output)
    described = {a.name: a.identity for a in attacks(LocalAttacker(*_load(attacker), "sandbox-attacker"))}
    write_record(
        path, KIND, results, config={"arm": arm, "model": folder.name, "requests": count, **described}, seed=seed
    )


def table(first: str, cells: Mapping[str, Callable[[str], str]], columns: Sequence[str]) -> str:
    """Markdown: a row a name, a column a rate."""
    lines = [f"| {first} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join(lines + [f"| {name} | " + " | ".join(map(cell, columns)) + " |" for name, cell in cells.items()])


def show(entry: Mapping[str, float], sign: str = "") -> str:
    return f"{entry['value']:{sign}.2f} ± {entry.get('error', float('nan')):.2f}"


def figure(found: Mapping[str, Sequence[Mapping[str, float]]], xlabel: str, path: Path) -> None:
    """Mean over the seeds, the band two standard errors to either side."""
    curves: dict[str, dict[int, dict[str, Any]]] = {}
    for arm, seeds in found.items():
        for x in seeds[0]:
            values = [curve[x] for curve in seeds]
            mean, error = sum(values) / len(values), standard_error(values)
            curves.setdefault(arm, {})[int(x)] = {
                "value": mean, "interval": (max(0, mean - 2 * error), min(1, mean + 2 * error)),
            }  # fmt: skip
    draw(curves, xlabel, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/redteam"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=12, help="harmful requests a model")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    quiet()
    base, attacker = build_base(), build_attacker()
    arms = options.output / "arms"
    runs = [Run(arm, Setting(), seed) for seed in range(options.seeds) for arm in ARMS]
    run_many(runs, base, arms, keep_models=True, workers=options.workers)
    folders = {(run.arm.name, run.seed): run.path(arms, base).with_suffix("") for run in runs}
    jobs = []
    for seed in range(options.seeds):
        output = options.output / f"seed{seed}"  # the base is attacked anew for every seed's requests
        for arm in (BASE, *ARMS):
            folder = folders.get((arm.name, seed), base)
            record = output / f"{folder.name}-{options.requests}.json"
            jobs.append((folder, arm.name, attacker, seed, options.requests, output, record))
    waiting = [job for job in jobs if not job[-1].exists()]
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("models attacked", total=len(jobs), completed=len(jobs) - len(waiting))
        names = [f"{job[1]}, seed {job[3]}" for job in waiting]
        in_processes(one, waiting, names, options.workers, lambda _: progress.advance(bar))
    report({(job[1], job[3]): read_record(job[-1], KIND)["results"] for job in jobs}, options.output)


def report(found: Mapping[tuple[str, int], Mapping[str, Any]], output: Path) -> None:
    """Print the tables and write the curves of the seeds that every arm has."""
    names = [arm.name for arm in (BASE, *ARMS)]
    seeds = [seed for seed in sorted({s for _, s in found}) if all((name, seed) in found for name in names)]

    def values(arm: str, column: str, kind: str = "rates") -> dict[int, float]:
        return {seed: found[arm, seed][kind][column] for seed in seeds}

    def means(arm: str, kind: str) -> Callable[[str], str]:
        return lambda column: show(mean_of(list(values(arm, column, kind).values())))

    def less(treated: str, control: str) -> Callable[[str], str]:
        return lambda column: show(paired(values(treated, column), values(control, column)), "+")

    print(f"seeds: {seeds}")
    print(table("arm", {name: means(name, "rates") for name in names}, COLUMNS))
    print(table("difference", {f"{a} less {b}": less(a, b) for a, b in AGAINST}, COLUMNS))
    print(table("arm, by refusal prefixes", {name: means(name, "prefixes") for name in names}, COLUMNS[:-2]))
    tables = [found[key]["agreement"][attack] for key in found for attack in COLUMNS[:-2]]
    cells = [sum(t["table"][i][j] for t in tables) for i in (0, 1) for j in (0, 1)]
    shown = ", ".join(f"{pair} {count}" for pair, count in zip(("0/0", "0/1", "1/0", "1/1"), cells, strict=True))
    print(f"sandbox judge / prefixes, 1 for a success: {shown}")
    for key, attack, xlabel in (
        ("by_cases", None, "Zero-Shot test cases"), ("by_steps", "GCG", "GCG's update steps"),
    ):  # fmt: skip
        curves = {
            name: [found[name, seed][key] if attack is None else found[name, seed][key][attack] for seed in seeds]
            for name in names
        }
        figure(curves, xlabel, output / f"{key}.png")
        for name, runs in curves.items():
            print(name, key, {x: round(sum(run[x] for run in runs) / len(runs), 3) for x in runs[0]})


if __name__ == "__main__":
    main()
