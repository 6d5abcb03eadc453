"""How far the default judges agree on a real model's answers.

SmolLM2-135M-Instruct on 30 of the demo's held-out harmful requests, asked directly and with the answer begun. Beside
them, where the request is asked directly, a judge of another kind: the likelihood of the target.

    python experiments/judges.py --output runs/judges

Whatever is finished under --output is read. The record goes to docs/judges.json; answers on which the judges differ
are printed, for reading.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from plot_align.demo import data
from plot_align.demo.fetch import fetch
from plot_align.inference.load import load_model
from plot_align.records import proportion_of, write_record
from plot_align.redteam.attack import Attack
from plot_align.redteam.catalogue import make_judge
from plot_align.redteam.direct import DirectRequest
from plot_align.redteam.judges import Judge, TargetLikelihood
from plot_align.redteam.measure import Budget, agreements, attack_and_judge
from plot_align.redteam.names import DEFAULT_JUDGES
from plot_align.redteam.prefill import Prefill
from plot_align.redteam.victim import Victim
from plot_align.results import agreement_text

REQUESTS = 30
BUDGET = Budget(max_new_tokens=32, batch_size=30)
RECORD = Path(__file__).resolve().parents[1] / "docs" / "judges.json"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/judges"))
    options = parser.parse_args(arguments)
    rows, targets = data.behaviors(), data.targets()
    harmful = [rows[i * len(rows) // REQUESTS] for i in range(REQUESTS)]  # evenly over the topics
    victim = Victim(*load_model(str(fetch()), dtype="float32"), "SmolLM2-135M-Instruct")
    judges: dict[str, Judge] = {name: make_judge(name) for name in DEFAULT_JUDGES}
    attacks: list[Attack] = [DirectRequest(), Prefill()]
    labels: dict[str, list[int]] = {name: [] for name in judges}
    results: dict[str, dict[str, object]] = {}
    for attack in attacks:
        asked: dict[str, Judge] = {**judges}
        if isinstance(attack, DirectRequest):  # it reads no answer, so a begun one is nothing to it
            asked["likelihood"] = TargetLikelihood(victim, targets)
        done = attack_and_judge(victim, attack, harmful, targets, asked, options.output, BUDGET)
        given = {name: [row["label"] for of in rows.values() for row in of] for name, rows in done.results.items()}
        for name in judges:
            labels[name] += given[name]
        results[attack.title] = _said(given)
        for behavior in done.answers:
            verdicts = {name: done.results[name][behavior][0] for name in asked}
            if len({row["label"] for row in verdicts.values()}) > 1:
                print(f"\n{attack.title}, {behavior}: {done.answers[behavior][0]['generation']!r}")
                print({name: (row["label"], row.get("reason")) for name, row in verdicts.items()})
    results["both"] = _said(labels)
    config = {"model": victim.name, "dtype": "float32", "budget": BUDGET, "requests": REQUESTS, "judges": list(judges)}
    write_record(RECORD, "judges", results, config=config, seed=0)
    for what, said in agreements(labels).items():
        print(f"\n{what}: {agreement_text(said, 'answers', harmful=True)}")
    print(results)


def _said(labels: dict[str, list[int]]) -> dict[str, object]:
    """Each judge's rate, and its agreement with the first."""
    rates = {name: proportion_of(sum(x == 1 for x in of), len(of)) for name, of in labels.items()}
    return {"rates": rates, "agreement": agreements(labels)}


if __name__ == "__main__":
    main()
