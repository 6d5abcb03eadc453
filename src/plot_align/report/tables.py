"""Tables for the page, as CSV and as Markdown, and numbers formatted for people."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plot_align.results import GUARDS
from plot_align.text import markdown, one_line

Entry = str | float | int | None
_RATE = (0.0, 1.0)
# A spreadsheet takes a text that begins with one of these for a formula (OWASP, "CSV Injection").
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class Table:
    """Rows under a heading. ``name`` is the files' name; texts are not escaped."""

    name: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Entry]]

    @property
    def numeric(self) -> list[bool]:
        """For each column, whether it has only numbers."""
        return [not any(isinstance(row[i], str) for row in self.rows) for i in range(len(self.columns))]


def as_csv(table: Table) -> str:
    """CSV by RFC 4180, numbers in full, with no cell that a spreadsheet would take for a formula."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([_guarded(column) for column in table.columns])
    for row in table.rows:
        writer.writerow(["" if cell is None else _guarded(cell) if isinstance(cell, str) else cell for cell in row])
    return text.getvalue()


def _guarded(text: str) -> str:
    plain = one_line(_breaking(text), longest=10_000)
    return f"'{plain}" if plain.lstrip().startswith(_FORMULA) else plain


def _breaking(text: str) -> str:
    """With plain spaces instead of non-breaking ones, which programs do not treat as spaces."""
    return text.replace("\u00a0", " ")


def as_markdown(table: Table) -> str:
    """A Markdown table under its caption, with foreign texts escaped."""
    lines = [f"**{markdown(table.caption)}**", "", _line([markdown(column) for column in table.columns])]
    lines.append(_line(["---:" if right else "---" for right in table.numeric]))
    lines += [_line([markdown(shown(cell)) for cell in row]) for row in table.rows]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def shown(entry: Entry) -> str:
    """An entry for readers: texts as they are, numbers to four significant digits."""
    if entry is None:
        return "–"
    if isinstance(entry, str):
        return entry
    return number(entry)


def number(value: float, *, signed: bool = False) -> str:
    """Four significant digits, whole numbers in full, a true minus sign; a dash for NaN."""
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
    """Whether it is a rate, shown in per cent."""
    bounds = quantity.get("bounds")
    return bounds is not None and tuple(bounds) == _RATE


def value_text(quantity: Mapping[str, Any]) -> str:
    """The value: rates in per cent, anything else with the digits that its interval warrants."""
    return _scaled(quantity["value"], quantity)


def interval_of(quantity: Mapping[str, Any]) -> tuple[float, float] | None:
    """The interval, cut at the bounds; None if there is none."""
    if quantity.get("interval") is None:
        return None
    low, high = quantity["interval"]
    least, most = quantity.get("bounds") or (-math.inf, math.inf)
    return max(low, least), min(high, most)


def interval_text(quantity: Mapping[str, Any]) -> str:
    """The interval in the value's scale; empty if there is none."""
    ends = interval_of(quantity)
    return f"{_scaled(ends[0], quantity, unit='')} to {_scaled(ends[1], quantity)}" if ends else ""


def with_interval(quantity: Mapping[str, Any]) -> str:
    """``0.60 (0.55 to 0.65)``."""
    around = interval_text(quantity)
    return value_text(quantity) + (f" ({around})" if around else "")


def difference_text(difference: Mapping[str, Any], quantity: Mapping[str, Any]) -> str:
    """``treated − control`` with its sign; in percentage points for rates."""
    entry = {**difference, "bounds": quantity["bounds"]}
    return _scaled(difference["value"], entry, unit=" points", signed=True)


def loss_text(difference: Mapping[str, Any], quantity: Mapping[str, Any]) -> str:
    """A loss as a positive amount with its interval: ``11.7 points (5.0 to 18.3)``."""
    way = -1 if quantity["better"] == "higher" else 1
    low, high = sorted(way * end for end in difference["interval"])
    entry = {"interval": [low, high], "bounds": quantity["bounds"]}
    value, *ends = (_scaled(x, entry, unit="") for x in (way * difference["value"], low, high))
    unit = "points" if is_rate(quantity) else quantity.get("unit") or ""
    return f"{value} {unit}".rstrip() + f" ({' to '.join(ends)})"


def p_text(p: float) -> str:
    """``p < 0.001`` and ``p = 0.042``."""
    # Non-breaking spaces keep a number with its sign.
    return "p\u00a0<\u00a00.001" if p < 0.001 else f"p\u00a0=\u00a0{p:.{3 if p < 0.1 else 2}f}"


def _scaled(value: float, entry: Mapping[str, Any], *, unit: str = " %", signed: bool = False) -> str:
    """``value`` with the digits that the interval of ``entry`` warrants: two of half its width."""
    if not math.isfinite(value):
        return number(value, signed=signed)
    if is_rate(entry):
        text, rounded = f"{abs(100 * value):.1f}{unit}", round(value, 3)
    else:
        low, high = entry.get("interval") or (0.0, 0.0)
        half = (high - low) / 2
        if not 0 < half < math.inf or abs(value) >= 1e6:
            return number(value, signed=signed)
        places = min(6, max(0, 1 - math.floor(math.log10(half))))
        text, rounded = f"{abs(value):,.{places}f}", round(value, places)
    return ("−" if rounded < 0 else "+" if signed and rounded > 0 else "") + text


def arrow(better: str | None) -> str:
    """An arrow towards better; empty if neither direction is."""
    return {"higher": "↑", "lower": "↓"}.get(better or "", "")


def count(number: int, noun: str) -> str:
    """``1 test``, ``42 tests``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def section_title(section: str) -> str:
    """A section's heading."""
    return {"stem": "STEM", GUARDS: "Guards: what must not get worse"}.get(section, section.capitalize())
