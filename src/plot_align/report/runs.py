"""Contents of records other than observations of a model: training curves, a sweep's cells, costs, counts of pairs."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from plot_align.report.observations import TRAINING, Collected, Record
from plot_align.report.tables import Entry, Table, arrow
from plot_align.results import ATTACK_CURVES, BUDGET_CURVES
from plot_align.text import readable

# Of the trainer's log: key, label. The first ones that a run has are drawn.
CURVES = (
    ("loss", "Loss"),
    ("plot/vanilla_loss", "Loss without the PLOT term"),
    ("plot/loss", "The PLOT term"),
    ("plot/alpha", "α, the weight of the PLOT term"),
    ("rewards/margins", "Reward margin"),
    ("rewards/accuracies", "Reward accuracy"),
    ("rewards/chosen", "Reward of chosen answers"),
    ("rewards/rejected", "Reward of rejected answers"),
)
# Of a sweep's cell: key, label, which way is better.
METRICS = (
    ("eval_loss_without_plot", "Loss without the PLOT term (evaluation)", "lower"),
    ("eval_rewards/accuracies", "Reward accuracy (evaluation)", "higher"),
    ("eval_rewards/margins", "Reward margin (evaluation)", "higher"),
    ("loss_without_plot", "Loss without the PLOT term (last log)", "lower"),
    ("rewards/accuracies", "Reward accuracy (last log)", "higher"),
    ("rewards/margins", "Reward margin (last log)", "higher"),
)
Curve = dict[float, float]


def training_curves(collected: Collected) -> dict[str, dict[str, Curve]]:
    """From the training records: key of :data:`CURVES` → run → step → value; runs of the same name are averaged."""
    lines: dict[str, dict[str, dict[float, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for record in collected.of_kind(*TRAINING):
        for entry in record.results.get("history") or ():
            for key, _ in CURVES:
                value = entry.get(key)
                if "step" in entry and isinstance(value, int | float) and math.isfinite(value):
                    lines[key][run_name(record)][float(entry["step"])].append(float(value))
    return {
        key: {
            name: {step: math.fsum(values) / len(values) for step, values in sorted(curve.items())}
            for name, curve in lines[key].items()
        }
        for key, _ in CURVES
        if key in lines
    }


def run_name(record: Record) -> str:
    """The name of a training run: its output folder."""
    training = record.config.get("training") or {}
    folder = str(training.get("output_dir") or record.name)
    return folder.replace("\\", "/").rstrip("/").rpartition("/")[2] or record.name


def sweep_lines(record: Record) -> dict[str, tuple[str, dict[str, list[tuple[float, Any]]], dict[str, Any]]]:
    """Metric → its label, line → [(α, entry)] by rising α, and method → entry of the arm without PLOT.

    A line is one combination of the term's other options. A balanced term has no α and is left out.
    """
    cells = record.results["cells"]
    fixed = [c for c in cells if c["plot"] and c["plot"].get("alpha") and c["plot"].get("alpha_schedule") != "balance"]
    options = [{**(c.get("setting") or {}), **c["plot"], "method": c["method"]} for c in fixed]
    axes = [
        axis
        for axis in dict.fromkeys(axis for of in options for axis in of)
        if axis not in ("alpha", "alpha_schedule") and len({json.dumps(of.get(axis)) for of in options}) > 1
    ]
    found = {}
    for key, label, better in METRICS:
        lines: dict[str, list[tuple[float, Any]]] = defaultdict(list)
        for cell, of in zip(fixed, options, strict=True):
            if key in cell["metrics"]:
                name = ", ".join(f"{axis.replace('_', ' ')} {of.get(axis)}" for axis in axes) or "with PLOT"
                lines[name].append((float(cell["plot"]["alpha"]), cell["metrics"][key]))
        if lines:
            without = {c["method"]: c["metrics"][key] for c in cells if c["plot"] is None and key in c["metrics"]}
            ordered = {name: sorted(points, key=lambda point: point[0]) for name, points in lines.items()}
            found[key] = (f"{label} {arrow(better)}", ordered, without)
    return found


def costs(collected: Collected) -> Table:
    """What PLOT and each run cost: ratios to the same without the term, seconds, and counts."""
    rows: list[list[Entry]] = []
    names = {
        "time_ratio": "time of a training step, with PLOT over without",
        "memory_ratio": "peak memory, with PLOT over without",
    }
    for record in collected.of_kind("demo"):
        for key, entry in record.results["cost"].items():
            low, high = entry.get("spread") or (None, None)
            rows.append([names.get(key, key), record.name, entry["value"], low, high, entry["n"], "times"])
    for record in collected.of_kind(*TRAINING):
        seconds = record.results["metrics"].get("train_runtime")
        if isinstance(seconds, int | float):
            rows.append([f"training ({record.kind})", run_name(record), seconds, None, None, 1, "s"])
    for record in collected.of_kind("evaluation"):
        cost = record.results["details"].get("cost")
        if isinstance(cost, int | float):
            measure, model = record.config["measure"]["name"], record.config["model"]["name"]
            rows.append([f"judging of {measure}", model, cost, None, None, 1, "in the currency of its prices"])
    columns = ["what", "of", "value", "least", "most", "n", "unit"]
    return Table("costs", "Costs; least and most are the middle half of a ratio's rounds", columns,
                 rows)  # fmt: skip


def counts(collected: Collected) -> Table:
    """What ``plot-align estimate`` counted."""
    keys = ("rows", "chosen_tokens", "rejected_tokens", "preferred_ids", "rejected_ids", "total_variation")
    rows = [[record.name, *(record.results[key] for key in keys)] for record in collected.of_kind("estimate")]
    columns = ["record", "pairs", "chosen tokens", "rejected tokens", "preferred ids", "rejected ids",
               "total variation"]  # fmt: skip
    return Table("preference_counts", "What the preference was counted from", columns, rows)


def contexts(collected: Collected) -> Table:
    """What `plot-align inspect --pairs` found to be preferred where; of the newest record."""
    records = sorted(collected.of_kind("inspect"), key=lambda record: record.at)
    rows = [
        [
            context["chosen_tokens"] + context["rejected_tokens"],
            *(", ".join(readable(token["text"]) for token in context[side]) for side in ("preferred", "rejected")),
        ]
        for context in (records[-1].results["contexts"] if records else [])
        if context["preferred"] or context["rejected"]
    ]
    caption = "What is preferred where: tokens told apart within each kind of answer, as the model clusters them"
    return Table("preference_contexts", caption, ["tokens", "preferred", "rejected"], rows)


def attack_curves(collected: Collected) -> Iterable[tuple[str, str, dict[str, Mapping[float, Any]]]]:
    """(one of ATTACK_CURVES, attack, model → number → entry); the newest of each model, if it has two points."""
    found: dict[tuple[str, str], dict[str, Mapping[float, Any]]] = defaultdict(dict)
    for record in sorted(collected.of_kind("redteam"), key=lambda record: record.at):
        for model, of in record.results["models"].items():
            for kind in ATTACK_CURVES:
                for attack, curve in (of.get(kind) or {}).items():
                    if len(curve) > 1:
                        points = sorted((int(number), entry) for number, entry in curve.items())
                        found[kind, attack][model] = dict(points)
    return [(kind, attack, of) for (kind, attack), of in found.items()]


def budget_curves(collected: Collected) -> Iterable[tuple[str, str, dict[str, Mapping[float, Any]]]]:
    """(one of BUDGET_CURVES, model, attack → budget → entry); the newest of each attack, if there are two points."""
    found: dict[tuple[str, str], dict[str, Mapping[float, Any]]] = defaultdict(dict)
    for record in sorted(collected.of_kind("redteam"), key=lambda record: record.at):
        for model, of in record.results["models"].items():
            for kind in BUDGET_CURVES:
                for attack, curve in (of.get(kind) or {}).items():
                    found[kind, model][attack] = dict(sorted((float(at), entry) for at, entry in curve.items()))
    return [(kind, model, of) for (kind, model), of in found.items() if sum(map(len, of.values())) > 1]
