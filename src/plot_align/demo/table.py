"""The demonstration's table in the README: a few measures, one column per arm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plot_align.results import kappa_text

# Measure, quantity, label, which way is better, decimal places.
ROWS = (
    ("direct", "asr", "complies with harmful requests", "↓", 2),
    ("redteam Prefill", "asr", "… the answer begun", "↓", 2),
    ("redteam BestOfN", "asr", "… asked again", "↓", 2),
    ("over_refusal", "refused", "refuses harmless requests", "↓", 2),
    ("redteam refused", "refused", "… that sound harmful", "↓", 2),
    ("preference_accuracy", "accuracy", "ranks held-out pairs correctly", "↑", 2),
    ("displacement", "chosen", "chosen answers, nats gained", "↑", 1),
    ("kl", "kl", "KL to the base, nats a token", "", 3),
    ("diversity", "distinct_2", "distinct-2 of harmless answers", "↑", 2),
    ("diversity", "length", "tokens of a harmless answer", "", 0),
)


def rows_of(folder: Path, models: Sequence[str]) -> list[dict[str, Any]]:
    """Label, arrow, places, and per model, in the order of ``models``, value, interval and n, from the records below
    ``folder``.

    What another judge than the first says has a row of its own, with the κ of the two.
    """
    from plot_align.report import collect

    found = {(o.measure, o.name, o.model): o.quantity for o in collect([folder]).observations}
    rows = []

    def add(measure: str, name: str, label: str, arrow: str, places: int) -> None:
        quantities = {model: found[measure, name, model] for model in models if (measure, name, model) in found}
        if not quantities:
            return
        first = next(iter(quantities.values()))
        budget = first["title"].partition("(")[2].partition(")")[0]  # "4 tokens", "any of 4"
        agreements = [of["agreement"] for of in quantities.values() if "agreement" in of]
        told = [kappa_text(*agreements)] if agreements else [budget] * bool(budget)
        told.append(f"n {first['n']}")
        cells = {model: {key: of.get(key) for key in ("value", "interval", "n")} for model, of in quantities.items()}
        rows.append({"label": f"{label} ({', '.join(told)})", "better": arrow, "places": places, "cells": cells})

    for measure, name, label, arrow, places in ROWS:
        add(measure, name, label, arrow, places)
        judged = {(m, n): of for (m, n, _), of in found.items() if "agreement" in of}
        for (m, n), of in judged.items():
            if m == measure and n == f"{name}_{of['judge']}":
                add(m, n, f"… by {of['judge']}", arrow, places)
    return rows


def heading(model: str) -> str:
    return (
        f"{model}, held-out requests, one training seed; ± half of the 95 % interval over n items; "
        "↑ more is better, ↓ less is better"
    )


def models_of(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(model for row in rows for model in row["cells"]))


def cell(row: dict[str, Any], model: str) -> str:
    """``0.45±0.15``."""
    entry = row["cells"].get(model)
    if entry is None:
        return "–"
    places, interval = row["places"], entry["interval"]
    text = f"{entry['value']:.{places}f}"
    return f"{text}±{(interval[1] - interval[0]) / 2:.{places}f}" if interval else text


def as_markdown(rows: list[dict[str, Any]], model: str) -> str:
    models = models_of(rows)
    lines = [heading(model) + ".", "", f"| | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
    lines += [f"| {r['label']} {r['better']} | {' | '.join(cell(r, name) for name in models)} |" for r in rows]
    return "\n".join(lines) + "\n"


def as_text(rows: list[dict[str, Any]], model: str) -> Any:
    """For a terminal of 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=heading(model), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", max_width=32)
    for name in models_of(rows):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(f"{row['label']} {row['better']}", *(cell(row, name) for name in models_of(rows)))
    return table
