"""Check a record by its kind: types, ranges, and that means are the means of their items.

Each check raises ValueError, KeyError or TypeError with a short reason; :mod:`plot_align.report.observations` turns it
into a sentence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from plot_align.results import ATTACK_CURVES, BUDGET_CURVES, SECTIONS

_ROUNDING = 1e-6  # of a mean, relative to its items
_LARGEST, _HEAVIEST = 1e100, 1e40  # item and weight: their products' sums, and the squares of those, stay finite


def check_frame(content: Mapping[str, Any]) -> None:
    """Check what a record of any kind has."""
    _text("kind", content["kind"])
    for name in ("config", "results", "versions", "hardware"):
        _mapping(name, content[name])
    for name, version in content["versions"].items():
        if not isinstance(version, str | None):
            raise ValueError(f"versions.{name[:40]} is no text")
    seed, gpus, commit = content["seed"], content["hardware"].get("gpus"), content["commit"]
    if seed is not None:
        _whole("seed", seed)
    if not isinstance(gpus, list | None):
        raise ValueError("hardware.gpus is no list")
    for gpu in gpus or ():
        _mapping("hardware.gpus", gpu)
    if commit is not None:
        _mapping("commit", commit)


def check_evaluation(content: Mapping[str, Any]) -> None:
    config, results = content["config"], content["results"]
    for name in ("model", "reference"):
        described = config[name]
        if name == "reference" and described is None:
            continue
        _mapping(f"config.{name}", described)
        for part in ("name", "source", "model", "template"):
            _text(f"config.{name}.{part}", described[part])
    _text("config.measure.name", _mapping("config.measure", config["measure"])["name"])
    _text("config.measure.kind", config["measure"]["kind"])
    if config["section"] not in SECTIONS:
        raise ValueError(f"config.section is {str(config['section'])[:40]!r}, which is none of {', '.join(SECTIONS)}")
    if not _mapping("results.quantities", results["quantities"]):
        raise ValueError("results.quantities is empty")
    for name, quantity in results["quantities"].items():
        check_quantity(f"results.quantities.{name[:40]}", quantity)
    if not isinstance(results.get("unfinished"), str | None):
        raise ValueError("results.unfinished is no text")
    details = _mapping("results.details", results["details"])
    check_details(details)
    for name in ("judgments", "undecided"):
        if details.get(name) is not None:
            _count(f"details.{name}", details[name])
    for name in ("unparsable", "failed"):
        _check_counted(f"details.{name}", details.get(name))


def check_quantity(place: str, quantity: Any) -> None:
    """Check that it has the form of :mod:`plot_align.results`, and that its value is the mean of its items."""
    _text(f"{place}.title", _mapping(place, quantity)["title"])
    if quantity["better"] not in ("higher", "lower", None):
        raise ValueError(f"{place}.better is none of higher, lower, null")
    check_measure(place, quantity)
    if not isinstance(quantity.get("unit"), str | None):
        raise ValueError(f"{place}.unit is no text")
    bounds = quantity["bounds"]
    if bounds is not None:
        low, high = _pair(f"{place}.bounds", bounds)
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"{place}.bounds are {low} and {high}")
    if not isinstance(quantity.get("judge"), str | None):
        raise ValueError(f"{place}.judge is no text")
    if quantity.get("agreement") is not None:
        check_agreement(f"{place}.agreement", quantity["agreement"])
    items, weights = quantity["items"], quantity["weights"]
    if items is None:
        return
    for name, value in _mapping(f"{place}.items", items).items():
        if not abs(_number(f"{place}.items", value)) <= _LARGEST:  # also of NaN
            raise ValueError(f"{place}.items has {value} under {name[:40]!r}")
        if bounds is not None and not bounds[0] - _ROUNDING <= value <= bounds[1] + _ROUNDING:
            raise ValueError(f"{place}.items has {value} under {name[:40]!r}, outside its bounds")
    if weights is not None:
        if _mapping(f"{place}.weights", weights).keys() != items.keys():
            raise ValueError(f"{place}.weights are not those of its items")
        if not all(0 <= _number(f"{place}.weights", weight) <= _HEAVIEST for weight in weights.values()):
            raise ValueError(f"{place}.weights has one that is negative or not finite, or above {_HEAVIEST:g}")
    if quantity["n"] != len(items):
        raise ValueError(f"{place}.n is {quantity['n']}, and it has {len(items)} items")
    if items:
        heavy = [1.0 if weights is None else weights[name] for name in items]
        if not sum(heavy):
            raise ValueError(f"{place}.weights are 0 throughout")
        mean = math.fsum(w * v for w, v in zip(heavy, items.values(), strict=True)) / math.fsum(heavy)
        if abs(mean - quantity["value"]) > _ROUNDING * max(1.0, *map(abs, items.values())):
            raise ValueError(f"{place}.value is {quantity['value']}, and its items average to {mean:.6g}")


def check_agreement(place: str, entry: Any) -> None:
    """Check the agreement of two judges; κ may be NaN, and the table has every case."""
    judges, table = _mapping(place, entry)["judges"], entry["table"]
    if not isinstance(judges, list) or len(judges) != 2:
        raise ValueError(f"{place}.judges are no two names")
    for name in judges:
        _text(f"{place}.judges", name)
    _number(f"{place}.kappa", entry["kappa"])
    _count(f"{place}.n", entry["n"])
    counts = [count for row in table for count in row]
    for count in counts:
        _count(f"{place}.table", count)
    if [len(row) for row in table] != [2, 2] or sum(counts) != entry["n"]:
        raise ValueError(f"{place}.table does not hold its {entry['n']} cases")


def check_measure(place: str, entry: Any) -> None:
    """Check that it has the form of :func:`plot_align.records.measure`; NaN needs n = 0."""
    value, n = _number(f"{place}.value", _mapping(place, entry)["value"]), entry["n"]
    _count(f"{place}.n", n)
    if math.isnan(value) and n:
        raise ValueError(f"{place}.value is not a number, of {n} observations")
    for part in ("interval", "spread"):
        if entry.get(part) is not None:
            low, high = _pair(f"{place}.{part}", entry[part])
            if not low <= high:
                raise ValueError(f"{place}.{part} runs from {low} to {high}")
            # NaN (n = 0) is within any interval.
            if part == "interval" and (value < low - _slack(value) or value > high + _slack(value)):
                raise ValueError(f"{place}.interval, {low} to {high}, does not hold its value {value}")
    if entry.get("error") is not None:
        _number(f"{place}.error", entry["error"])


def check_details(details: Mapping[str, Any]) -> None:
    """Check the details that the report shows: which tokens moved, the plan, and the answers."""
    for row in details.get("moved") or ():
        _text("details.moved.token", _mapping("details.moved", row)["token"])
        _finite("details.moved.change", row["change"])
        if row.get("id") is not None:
            _count("details.moved.id", row["id"])
        for name in ("d", "chosen", "rejected", "before"):
            if row.get(name) is not None:
                _finite(f"details.moved.{name}", row[name])
    for row in details.get("flows") or ():
        for name in ("from", "to"):
            _text(f"details.flows.{name}", _mapping("details.flows", row)[name])
        for name in ("mass", "cost"):
            _finite(f"details.flows.{name}", row[name])
    for name, entry in _mapping("details.answers", details.get("answers") or {}).items():
        place = f"details.answers.{name[:40]}"
        _text(f"{place}.label", _mapping(place, entry)["label"])
        for part in ("prompt", "answer", "reason"):
            _text(f"{place}.{part}", entry[part], empty=True)
    if details.get("masses") is not None:
        for who in ("model", "reference"):
            for side in ("preferred", "rejected"):
                _finite(f"details.masses.{who}.{side}", details["masses"][who][side])


def check_redteam(content: Mapping[str, Any]) -> None:
    for name, identity in _mapping("results.identities", content["results"].get("identities") or {}).items():
        place = f"results.identities.{name[:40]}"
        _text(f"{place}.model", _mapping(place, identity)["model"])
    _mapping("config.rules", content["config"].get("rules") or {})
    models = _mapping("results.models", content["results"]["models"])
    for name, found in models.items():
        place = f"results.models.{name[:40]}"
        _check_rates(place, found)
        for judge, of in _mapping(f"{place}.others", found.get("others") or {}).items():
            _check_rates(f"{place}.others.{judge[:40]}", of)
            for what in (*of["attacks"], *(name for name in ("refused", "helped") if of[name])):
                check_agreement(f"{place}.others.{judge[:40]}.agreement.{what[:40]}", of["agreement"][what])
        if found.get("judges") is not None:
            for kind in ("attacks", "benign"):
                _text(f"{place}.judges.{kind}", found["judges"][kind][0])
        for attack, title in _mapping(f"{place}.titles", found.get("titles") or {}).items():
            _text(f"{place}.titles.{attack[:40]}", title)
        _mapping(f"{place}.options", found.get("options") or {})
        for what, reasons in _mapping(f"{place}.failed", found.get("failed") or {}).items():
            _mapping(f"{place}.failed.{what[:40]}", reasons)
        for curves in (*ATTACK_CURVES, *BUDGET_CURVES):
            for attack, curve in _mapping(f"{place}.{curves}", found.get(curves) or {}).items():
                for step, entry in _mapping(f"{place}.{curves}", curve).items():
                    int(step) if curves in ATTACK_CURVES else _finite(f"{place}.{curves}", float(step))
                    check_measure(f"{place}.{curves}.{attack[:40]}.{step[:10]}", entry)
                    _pair(f"{place}.{curves}.interval", entry["interval"])


def _check_rates(place: str, found: Any) -> None:
    """Check what one judge said of one model."""
    rates = {f"attacks.{attack[:40]}": of for attack, of in _mapping(place, found)["attacks"].items()}
    for part, of in {**rates, "refused": found["refused"], "helped": found["helped"]}.items():
        for value in _mapping(f"{place}.{part}", of).values():
            if not 0 <= _number(f"{place}.{part}", value) <= 1:
                raise ValueError(f"{place}.{part} has {value}, which is no rate")
    for what, entry in _mapping(f"{place}.undecided", found.get("undecided") or {}).items():
        _check_counted(f"{place}.undecided.{what[:40]}", entry)


def check_training(content: Mapping[str, Any]) -> None:
    _mapping("config.training", content["config"]["training"])
    _mapping("results.metrics", content["results"]["metrics"])
    check_history("results.history", content["results"].get("history"))


def check_history(place: str, history: Any) -> None:
    """Check the trainer's log: a list of mappings."""
    if not isinstance(history, list | None):
        raise ValueError(f"{place} is no list")
    for entry in history or ():
        if "step" in _mapping(place, entry):
            _finite(f"{place}.step", entry["step"])
        for value in entry.values():
            if isinstance(value, int | float):
                float(value)  # OverflowError: not a number that a trainer logs


def check_sweep(content: Mapping[str, Any]) -> None:
    cells = content["results"]["cells"]
    if not isinstance(cells, list):
        raise ValueError("results.cells is no list")
    for cell in cells:
        _text("results.cells.method", _mapping("results.cells", cell)["method"])
        for name, entry in _mapping("results.cells.metrics", cell["metrics"]).items():
            check_measure(f"results.cells.metrics.{name[:40]}", entry)
        _mapping("results.cells.setting", cell["setting"])
        plot = cell["plot"]
        if plot is not None and _mapping("results.cells.plot", plot).get("alpha") is not None:
            _finite("results.cells.plot.alpha", plot["alpha"])


def check_demo(content: Mapping[str, Any]) -> None:
    for name, entry in _mapping("results.cost", content["results"]["cost"]).items():
        check_measure(f"results.cost.{name[:40]}", entry)


def check_estimate(content: Mapping[str, Any]) -> None:
    for name in ("rows", "chosen_tokens", "rejected_tokens", "preferred_ids", "rejected_ids", "total_variation"):
        _finite(f"results.{name}", content["results"][name])


def check_inspect(content: Mapping[str, Any]) -> None:
    contexts = content["results"]["contexts"]
    if not isinstance(contexts, list):
        raise ValueError("results.contexts is no list")
    for i, context in enumerate(contexts):
        for name in ("chosen_tokens", "rejected_tokens"):
            _count(f"results.contexts[{i}].{name}", context[name])
        for side in ("preferred", "rejected"):
            for token in context[side]:
                _text(f"results.contexts[{i}].{side}: a token", token["text"], empty=True)


def _check_counted(place: str, entry: Any) -> None:
    """Check an entry with a count: ``{"n": …}``."""
    if isinstance(entry, dict) and entry.get("n") is not None:
        _count(f"{place}.n", entry["n"])


def _slack(value: float) -> float:
    return _ROUNDING * max(1.0, abs(value)) if math.isfinite(value) else 0.0


def _mapping(place: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place} is no mapping")
    return value


def _text(place: str, value: Any, *, empty: bool = False) -> str:
    if not isinstance(value, str) or not (value or empty):
        raise ValueError(f"{place} is no text")
    return value


def _number(place: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{place} is no number")
    return float(value)


def _whole(place: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{place} is no whole number")
    return value


def _count(place: str, value: Any) -> int:
    if not 0 <= _whole(place, value) < 2**53:  # larger integers are not exact as floats
        raise ValueError(f"{place} is no count")
    return value


def _finite(place: str, value: Any) -> float:
    if not math.isfinite(_number(place, value)):
        raise ValueError(f"{place} is {value}")
    return float(value)


def _pair(place: str, value: Any) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{place} is no pair of numbers")
    return _number(place, value[0]), _number(place, value[1])
