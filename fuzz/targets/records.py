"""Records: the frame, each kind's contents, and the page that `report` makes of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import strategies as st

from fuzz.guard import Wrong
from fuzz.spoil import json_file
from fuzz.targets import joined, write
from plot_align.records import _decode, _encode, mean_of, measure, read_record
from plot_align.report import compare
from plot_align.report.observations import collect
from plot_align.report.page import build
from plot_align.report.page import write as write_page
from plot_align.results import of_items, of_whole
from plot_align.statistics import proportion

_MODEL = {"name": "tuned", "source": "models/tuned", "model": "digest", "template": "t", "dtype": "float32"}
_ITEMS = {f"item {i}": float(i % 2) for i in range(6)}
_CURVE = {"1": proportion([0.0, 1.0]), "2": proportion([1.0, 1.0])}
_ANSWER = {"prompt": "p", "answer": "a", "label": "helped", "reason": ""}
_KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # kind → config, results
    "evaluation": (
        {"model": _MODEL, "reference": {**_MODEL, "name": "base"}, "suite": "quick", "section": "guards",
         "measure": {"name": "drift", "kind": "drift"}, "data": {}},
        {"quantities": {"score": of_items("Score", _ITEMS, better="higher", bounds=(0.0, 1.0)),
                        "tv": of_whole("TV", 0.2, 9, better=None, interval=(0.1, 0.3))},
         "details": {"judgments": 3, "unparsable": {"n": 1}, "failed": {"n": 0}, "undecided": 1,
                     "moved": [{"token": " the", "id": 1, "change": 0.02, "before": 0.1, "d": 0.0,
                                "chosen": 1, "rejected": 4}],
                     "flows": [{"from": "a", "to": "b", "mass": 0.02, "cost": 0.5}],
                     "masses": {w: {"preferred": 0.6, "rejected": 0.3} for w in ("model", "reference")},
                     "answers": dict.fromkeys(_ITEMS, _ANSWER)},
         "unfinished": None},
    ),
    "redteam": (
        {"judge": "prefixes", "model": "m"},
        {"models": {"tuned": {"attacks": {"GCG": {"a": 1.0, "b": 0.5}}, "refused": {"c": 0.0, "d": 1.0},
                              "helped": {"c": 1.0, "d": 0.0}, "by_cases": {"GCG": _CURVE}, "by_steps": {"GCG": _CURVE},
                              "titles": {"GCG": "GCG"}, "options": {"GCG": {}},
                              "failed": {"GCG": {"c": "out of steps"}},
                              "undecided": {"GCG": {"n": 1, "first": "no verdict"}}}},
         "identities": {"tuned": {"model": "digest", "template": "t", "dtype": "float32"}}},
    ),
    "dpo": (
        {"training": {"output_dir": "runs/tuned"}},
        {"metrics": {"train_runtime": 12.5},
         "history": [{"step": s, "loss": 1 / s, "plot/alpha": 0.1} for s in (1, 2, 3)]},
    ),
    "sweep": (
        {"grid": {}},
        {"cells": [{"method": "dpo", "setting": {}, "plot": plot, "seeds": [0, 1],
                    "metrics": {"rewards/margins": mean_of([0.2, 0.3])}, "minus_vanilla": {}}
                   for plot in (None, {"alpha": 0.1}, {"alpha": 1.0})], "failed": []},
    ),
    "demo": ({}, {"cost": {"time_ratio": measure(1.05, 20, spread=(1.0, 1.1))}}),
    "estimate": ({}, {"rows": 9, "chosen_tokens": 90, "rejected_tokens": 80, "preferred_ids": 4, "rejected_ids": 3,
                      "total_variation": 0.1}),
    "inspect": ({}, {"contexts": [{"chosen_tokens": 40, "rejected_tokens": 50, "preferred": [{"text": " sorry"}],
                                   "rejected": [{"text": "<b>"}]}]}),
}  # fmt: skip


def _record(kind: str) -> dict[str, Any]:
    config, results = _KINDS[kind]
    return {
        "format": "plot-align record", "schema": 1, "kind": kind, "created": "2026-01-02T03:04:05+00:00",
        "config": config, "seed": 0, "versions": {"torch": "2.9", "peft": None}, "hardware": {"cpu": "x", "gpus": [],
        "memory": 1}, "commit": {"id": "0", "dirty": False}, "results": results,
    }  # fmt: skip


_RECORDS = [_record(kind) for kind in _KINDS]


@st.composite
def _cases(draw: Any) -> bytes:
    record = _RECORDS[draw(st.sampled_from((0, 0, 1, 1, *range(len(_RECORDS)))))]
    return joined(draw(st.integers(0, 39)), draw(json_file(record, 2)))


class Records:
    """One accepted record in forty is drawn as a page, which takes longer than all the rest."""

    seconds = 20.0
    name = "records"
    names = ("case.json",)
    seeds: ClassVar[list[bytes]] = [
        joined(int(i not in (0, 3)), json.dumps(record).encode()) for i, record in enumerate(_RECORDS)
    ]
    cases = _cases()

    def run(self, data: bytes, folder: Path) -> None:
        path = write(folder, "case.json", data[1:])
        record = read_record(path)
        for part in ("config", "results"):
            if isinstance(record[part], dict):
                encoded = json.dumps(_encode(record[part], part), allow_nan=False)  # as write_record has it
                if _text(json.loads(encoded, object_hook=_decode)) != _text(record[part]):
                    raise Wrong(f"{part} does not read back")
        collected = collect([path])
        for observation in collected.observations:
            items, weights = observation.quantity["items"], observation.quantity["weights"]
            if items:
                heavy = {name: 1.0 if weights is None else weights[name] for name in items}
                mean = sum(heavy[n] * items[n] for n in items) / sum(heavy.values())
                if not math.isclose(mean, observation.quantity["value"], rel_tol=1e-5, abs_tol=1e-5):
                    raise Wrong(f"a value of {observation.quantity['value']} whose items average to {mean}")
        compare.judge(compare.compare_models(collected, compare.choose_baseline(collected, None)[0]))
        if data[:1] == b"\x00":
            write_page(build(collected), folder / "page.html")


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
