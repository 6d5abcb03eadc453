"""A table as the page, a CSV file and a Markdown file show it, and numbers as people read them."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plot_align.evaluation.quantity import GUARDS, Quantity
from plot_align.text import one_line

Entry = str | float | int | None
_RATE = (0.0, 1.0)
# A spreadsheet takes a text that begins so for a formula (OWASP, "CSV Injection").
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>()#|~!$])")


@dataclass(frozen=True)
class Table:
    """Rows under a heading. ``name`` is that of its files; texts are as they came from data and models."""

    name: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Entry]]


def as_csv(table: Table) -> str:
    """RFC 4180, numbers in full, with no cell that a spreadsheet would take for a formula."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([_guarded(column) for column in table.columns])
    for row in table.rows:
        writer.writerow(["" if cell is None else _guarded(cell) if isinstance(cell, str) else cell for cell in row])
    return text.getvalue()


def _guarded(text: str) -> str:
    plain = one_line(text, longest=10_000)
    return f"'{plain}" if plain.lstrip().startswith(_FORMULA) else plain


def as_markdown(table: Table) -> str:
    """A pipe table under its caption; foreign texts are shown and not obeyed."""
    numeric = [all(not isinstance(row[i], str) for row in table.rows) for i in range(len(table.columns))]
    lines = [f"**{_plain(table.caption)}**", "", _line([_plain(column) for column in table.columns])]
    lines.append(_line(["---:" if right else "---" for right in numeric]))
    lines += [_line([_plain(shown(cell)) for cell in row]) for row in table.rows]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", one_line(text, longest=200).replace("&", "&amp;")).replace("\\<", "&lt;")


def shown(entry: Entry) -> str:
    """An entry as a reader wants it: a text as it is, a number to four significant digits."""
    if entry is None:
        return "–"
    if isinstance(entry, str):
        return entry
    return number(entry)


def number(value: float, *, signed: bool = False) -> str:
    """Four significant digits, whole numbers in full, a true minus; a dash where there is no number."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        text = "∞"
    elif float(value).is_integer() and abs(value) < 1e9:
        text = f"{abs(int(value)):,}"
    elif 1e-3 <= abs(value) < 1e6:
        text = f"{abs(value):,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"
    else:
        text = f"{abs(value):.2e}"
    return ("−" if value < 0 else "+" if signed and value > 0 else "") + text


def is_rate(quantity: Mapping[str, Any]) -> bool:
    """Whether it is a share, shown in per cent."""
    bounds = quantity.get("bounds")
    return bounds is not None and tuple(bounds) == _RATE


def value_text(quantity: Mapping[str, Any]) -> str:
    """The value: a share in per cent, anything else to four digits with no unit."""
    return _scaled(quantity["value"], is_rate(quantity))


def interval_text(quantity: Mapping[str, Any]) -> str:
    """The interval in the value's scale; empty where there is none."""
    if quantity.get("interval") is None:
        return ""
    low, high = quantity["interval"]
    return f"{_scaled(low, is_rate(quantity), unit='')} to {_scaled(high, is_rate(quantity))}"


def difference_text(difference: Mapping[str, Any], quantity: Mapping[str, Any]) -> str:
    """``treated − control`` with its sign: points for shares."""
    if is_rate(quantity):
        return _scaled(difference["value"], True, unit=" points", signed=True)
    return number(difference["value"], signed=True)


def p_text(p: float) -> str:
    """``p < 0.001`` and ``p = 0.042``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def _scaled(value: float, rate: bool, *, unit: str = " %", signed: bool = False) -> str:
    if not rate or not math.isfinite(value):
        return number(value, signed=signed)
    sign = "−" if round(value, 3) < 0 else "+" if signed and round(value, 3) > 0 else ""
    return f"{sign}{abs(100 * value):.1f}{unit}"


def heading(quantity: Quantity) -> str:
    """The title with its unit and an arrow towards better."""
    unit = f" ({quantity['unit']})" if quantity.get("unit") else ""
    return f"{quantity['title']}{unit}{ {'higher': ' ↑', 'lower': ' ↓', None: ''}[quantity['better']] }"


def section_title(section: str) -> str:
    """A section as a heading has it."""
    return {"stem": "STEM", GUARDS: "Guards: what must not get worse"}.get(section, section.capitalize())
