"""Records as the commands write them."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plot_align.records import write_record
from plot_align.results import of_items

Evaluation = Callable[..., Path]


def rates(n: int, share: float, seed: int) -> dict[str, float]:
    """``n`` items of 0 or 1."""
    drawn = np.random.default_rng(seed).random(n) < share
    return {f"item {i}": float(hit) for i, hit in enumerate(drawn)}


def write_evaluation(
    folder: Path,
    model: str,
    measure: str = "gsm8k",
    items: Mapping[str, float] | None = None,
    *,
    section: str = "mathematics",
    kind: str = "harness",
    name: str = "score",
    title: str = "GSM8K",
    better: str | None = "higher",
    quantities: Mapping[str, Any] | None = None,
    details: Mapping[str, Any] | None = None,
    reference: str | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    digest: str | None = None,
    path: str | None = None,
    unfinished: str | None = None,
    data: Mapping[str, str] | None = None,
) -> Path:
    """A record of kind ``evaluation``; a score of half of 40 items, where nothing else is said."""
    if quantities is None:
        found = rates(40, 0.5, 0) if items is None else items
        quantities = {name: of_items(title, found, better=better, bounds=(0.0, 1.0))}  # type: ignore[arg-type]

    def described(who: str) -> dict[str, str]:
        return {
            "name": who,
            "source": f"models/{who}",
            "model": digest or f"digest of {who}",
            "template": "t",
            "dtype": "float32",
        }

    return write_record(
        folder / (path or f"{model.encode().hex()[:40]}/{measure}.json"),
        "evaluation",
        {"quantities": quantities, "details": details or {}, "unfinished": unfinished},
        config={
            "model": described(model),
            "reference": None if reference is None else described(reference),
            "suite": "quick",
            "section": section,
            "measure": {"name": measure, "kind": kind, **(options or {})},
            "data": data or {},
        },
        seed=seed,
    )


def answers(items: Mapping[str, float], one: str, zero: str, model: str = "") -> dict[str, Any]:
    """Details as :mod:`plot_align.evaluation.safety` writes them. ``model``: who is attacked in words of its own."""
    return {
        "answers": {
            name: {
                "prompt": f"What about {name}? {model}".strip(),
                "answer": f"This is {one if hit else zero}.\n\n\t{'And so on. ' * 80}",
                "label": one if hit else zero,
                "reason": "",
            }
            for name, hit in items.items()
        }
    }


@pytest.fixture(scope="session")
def evaluation_in() -> Evaluation:
    """:func:`write_evaluation` itself."""
    return write_evaluation


@pytest.fixture
def evaluation(tmp_path: Path) -> Evaluation:
    """:func:`write_evaluation` below ``tmp_path / "records"``."""
    return functools.partial(write_evaluation, tmp_path / "records")


# Twenty judgements and four requests that failed; five say no rating.
JUDGED = {
    "judgments": 20,
    "unparsable": {"n": 5, "where": [{"question_id": 81, "turn": 2}], "first": "It is <b>good</b>."},
    "failed": {"n": 4, "where": [{"question_id": 82, "turn": 1}], "first": "timed out"},
}
MOVED = [
    {"token": " the", "id": 1, "change": 0.02, "before": 0.1, "d": 0.01, "chosen": 9, "rejected": 4},
    {"token": "</script>", "id": 2, "change": 0.01, "before": 0.1, "d": -0.01, "chosen": 1, "rejected": 4},
    {"token": "$x$", "id": 3, "change": -0.01, "before": 0.1, "d": 0.0, "chosen": 1, "rejected": 1},
    {"token": "{{7*7}}", "id": 4, "change": -0.02, "before": 0.1, "d": -0.02, "chosen": 1, "rejected": 7},
]
DRIFT = {
    "moved": MOVED,
    "flows": [
        {"from": "{{7*7}}", "to": " the", "mass": 0.02, "cost": 0.5},
        {"from": "$x$", "to": "</script>", "mass": 0.01, "cost": 1.5},
    ],
    "masses": {
        "model": {"preferred": 0.6, "rejected": 0.3},
        "reference": {"preferred": 0.5, "rejected": 0.4},
    },
}


@pytest.fixture
def everything(tmp_path: Path, all_kinds: Path) -> Path:
    """A copy of :func:`all_kinds` to be spoilt."""
    return Path(shutil.copytree(all_kinds, tmp_path / "records"))


@pytest.fixture(scope="session")
def all_kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a record of every kind that is shown, and one that is not."""
    from plot_align.records import mean_of, measure
    from plot_align.results import of_whole
    from plot_align.statistics import proportion

    folder = tmp_path_factory.mktemp("all") / "records"
    evaluation = functools.partial(write_evaluation, folder)
    for model, shift in (("base", 0.0), ("tuned", 0.3)):
        evaluation(model, items=rates(60, 0.4 + shift, 1))
        refused, attacked = rates(60, 0.2 + shift, 2), rates(60, 0.6 - shift, 3)
        evaluation(model, "over_refusal", refused, section="guards", kind="over_refusal", name="refused",
                   better="lower", title="Over-refusal",
                   details=answers(refused, "refused", "helped"))  # fmt: skip
        evaluation(model, "attack", attacked, section="harmlessness", kind="attack_success", name="asr",
                   better="lower", title="Attack success, gcg",
                   details=answers(attacked, "complied", "did not comply", model))  # fmt: skip
    evaluation("tuned", "drift", section="guards", kind="drift", reference="base", details=DRIFT,
               quantities={"tv": of_whole("Mean output", 0.2, 900, better=None, interval=(0.1, 0.3))})  # fmt: skip
    evaluation("tuned", "mt_bench", section="humanity", kind="mt_bench", title="MT-Bench", details=JUDGED,
               unfinished="4 judgements failed, the first: timed out")  # fmt: skip
    history = [{"step": s, "loss": 1 / s, "plot/loss": 0.5 / s, "plot/alpha": 0.1} for s in range(1, 30)]
    write_record(folder / "dpo.json", "dpo", {"metrics": {"train_runtime": 12.5}, "history": history},
                 config={"training": {"output_dir": "runs/tuned"}}, seed=1)  # fmt: skip
    cells = [
        {"method": "dpo", "setting": {}, "plot": plot, "seeds": [0, 1],
         "metrics": {"eval_rewards/accuracies": mean_of([0.5, 0.6]), "rewards/margins": mean_of([0.2, 0.3])},
         "minus_vanilla": {}}
        for plot in (None, {"alpha": 0.1}, {"alpha": 1.0})
    ]  # fmt: skip
    write_record(folder / "sweep.json", "sweep", {"cells": cells, "failed": []}, config={"grid": {}})
    write_record(folder / "demo.json", "demo", {"cost": {"time_ratio": measure(1.05, 20, spread=(1.0, 1.1))}},
                 config={})  # fmt: skip
    counts = {"rows": 9, "chosen_tokens": 90, "rejected_tokens": 80, "preferred_ids": 4, "rejected_ids": 3,
              "total_variation": 0.1}  # fmt: skip
    write_record(folder / "estimate.json", "estimate", counts, config={})
    contexts = [
        {"chosen_tokens": 40, "rejected_tokens": 50, "preferred": [{"text": " sorry"}], "rejected": [{"text": "<b>"}]},
        {"chosen_tokens": 4, "rejected_tokens": 5, "preferred": [], "rejected": []},
    ]
    write_record(folder / "contexts.json", "inspect", {"contexts": contexts}, config={})
    curve = {"1": proportion([0.0, 1.0]), "2": proportion([1.0, 1.0])}
    attacked = {
        "attacks": {"GCG": {"a": 1.0, "b": 0.5}}, "refused": {"c": 0.0, "d": 1.0}, "helped": {"c": 1.0, "d": 0.0},
        "by_cases": {"GCG": curve}, "by_steps": {"GCG": curve}, "by_samples": {"BestOfN": curve},
        "by_tokens": {"Prefill": curve}, "by_seconds": {"GCG": {"0.25": curve["1"]}, "PEZ": {"2.5": curve["2"]}},
        "by_forward_tokens": {"GCG": {"812.4": curve["1"]}},
        "titles": {"GCG": "GCG (as asked)"}, "failed": {"GCG": {"c": "out of steps"}},
        "undecided": {"GCG": {"n": 1, "first": "no verdict"}, "benign requests": {"n": 2, "first": "no verdict"}},
    }  # fmt: skip
    identities = {name: {"model": f"digest of {name}", "template": "t", "dtype": "float32"}
                  for name in ("base", "tuned")}  # fmt: skip
    write_record(folder / "redteam.json", "redteam",
                 {"models": {"base": attacked, "tuned": attacked}, "identities": identities},
                 config={"judge": "prefixes"}, seed=0)  # fmt: skip
    write_record(folder / "filter.json", "filter", {"kept": 1}, config={})
    return folder
