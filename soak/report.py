"""The page and its record, from what was injected."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from plot_align.text import markdown
from soak.commands import COMMANDS
from soak.faults import FAULTS

PAGE = "reliability.md"
RECORD = "reliability.json"
_START, _END = "<!-- made by python -m soak --report: do not edit -->", "<!-- until here -->"
_LONGEST = 2000  # characters of a problem; a traceback was cut before


def write(entries: list[dict[str, Any]], docs: Path) -> None:
    """Write the record, and put its table into the page, between two marks."""
    from plot_align.records import write_record

    counted = [entry for entry in entries if entry["result"] != "missed"]
    cells = count(counted)
    odd = [
        {key: entry[key] for key in ("command", "fault", "number", "note", "problems")}
        for entry in counted
        if entry["result"] == "other"
    ]
    write_record(docs / RECORD, "soak", {"cells": cells, "other": odd}, config={"seed": "of command, fault, number"})
    page = docs / PAGE
    before, _, rest = page.read_text(encoding="utf-8").partition(_START)
    _, _, after = rest.partition(_END)
    table = "\n".join(lines(cells, odd))
    page.write_text(f"{before}{_START}\n\n{table}\n\n{_END}{after}", encoding="utf-8")


def count(entries: Iterable[dict[str, Any]]) -> dict[str, dict[str, dict[str, int]]]:
    """Fault → command → result → how often."""
    cells: dict[str, dict[str, dict[str, int]]] = {}
    for entry in entries:
        of_fault = cells.setdefault(entry["fault"], {})
        of_command = of_fault.setdefault(entry["command"], {"same": 0, "sentence": 0, "other": 0})
        of_command[entry["result"]] += 1
    return cells


def lines(cells: dict[str, dict[str, dict[str, int]]], odd: list[dict[str, Any]]) -> list[str]:
    """The table in Markdown, and what is in its last column."""
    total: collections.Counter[str] = collections.Counter()
    found = ["| fault | command | injected | same result | one sentence | other |", "|---|---|---|---|---|---|"]
    for fault in FAULTS:
        for command in COMMANDS:
            if (cell := cells.get(fault, {}).get(command)) is not None:
                total.update(cell)
                numbers = [sum(cell.values()), cell["same"], cell["sentence"], cell["other"]]
                found.append(f"| {FAULTS[fault].__doc__} | {command} | {' | '.join(map(str, numbers))} |")
    numbers = [sum(total.values()), total["same"], total["sentence"], total["other"]]
    found.append(f"| **all** | | {' | '.join(f'**{number}**' for number in numbers)} |")
    if odd:
        found += ["", "The last column:", ""]
        for entry in odd:
            note = f" ({markdown(entry['note'])})" if entry["note"] else ""
            found.append(f"- {entry['command']}, {FAULTS[entry['fault']].__doc__}{note}:")
            found += [f"    - {markdown(problem, longest=_LONGEST)}" for problem in entry["problems"]]
    return found
