"""Curves, sweeps and costs, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plot_align.records import mean_of, write_record
from plot_align.report import runs
from plot_align.report.observations import collect


def test_curves(everything: Path) -> None:
    found = collect([everything])
    own = runs.training_curves(found)
    assert list(own) == ["loss", "plot/loss", "plot/alpha"]
    assert own["loss"]["tuned"][4.0] == 0.25


def test_attacks_have_the_curves_that_they_were_measured_on(everything: Path) -> None:
    found = list(runs.attack_curves(collect([everything])))
    assert sorted((kind, name) for kind, name, _ in found) == [
        ("by_cases", "GCG"), ("by_samples", "BestOfN"), ("by_steps", "GCG"), ("by_tokens", "Prefill")
    ]  # fmt: skip
    assert all({at: e["value"] for at, e in of["base"].items()} == {1: 0.5, 2: 1.0} for *_, of in found)


def test_budgets_compare_the_attacks_of_a_model(everything: Path) -> None:
    """One point of one attack is no curve; two attacks with a point each are compared."""
    found = list(runs.budget_curves(collect([everything])))
    assert [(kind, model) for kind, model, _ in found] == [("by_seconds", "base"), ("by_seconds", "tuned")]
    assert {name: {at: e["value"] for at, e in of.items()} for name, of in found[0][2].items()} == {
        "GCG": {0.25: 0.5},
        "PEZ": {2.5: 1.0},
    }


def test_a_sweep_has_a_line_for_each_combination(tmp_path: Path) -> None:
    def cell(plot: Any, value: float) -> dict[str, Any]:
        return {"method": "dpo", "setting": {}, "plot": plot, "seeds": [0, 1],
                "metrics": {"eval_rewards/accuracies": mean_of([value, value])}, "minus_vanilla": {}}  # fmt: skip

    cells = [cell(None, 0.4), cell({"alpha": 1.0, "divergence": "w1"}, 0.6), cell({"alpha": 0.1, "divergence": "w1"},
             0.5), cell({"alpha": 1.0, "divergence": "tv"}, 0.3),
             cell({"alpha": 2.0, "alpha_schedule": "balance"}, 0.9)]  # fmt: skip
    path = write_record(tmp_path / "s.json", "sweep", {"cells": cells, "failed": []}, config={})
    (record,) = collect([path]).records
    label, lines, without = runs.sweep_lines(record)["eval_rewards/accuracies"]
    assert label == "Reward accuracy (evaluation) ↑"
    assert {name: [(a, e["value"]) for a, e in points] for name, points in lines.items()} == {
        "divergence w1": [(0.1, 0.5), (1.0, 0.6)],
        "divergence tv": [(1.0, 0.3)],
    }
    assert without["dpo"]["value"] == 0.4


def test_costs(everything: Path) -> None:
    rows = {(row[0], row[1]): row[2:] for row in runs.costs(collect([everything])).rows}
    ratio = rows["time of a training step, with PLOT over without", str(everything / "demo.json")]
    assert list(ratio) == [1.05, 1.0, 1.1, 20, "times"]
    assert next(iter(rows["training (dpo)", "tuned"])) == 12.5


def test_what_is_preferred_where(everything: Path) -> None:
    found = runs.contexts(collect([everything]))
    assert list(found.rows) == [[90, "␣sorry", "<b>"]]  # a context that tells nothing apart is left out
