"""The files of requests that are read, told apart by the columns in their first line.

Each row becomes one of HarmBench's, so that nothing else needs to know where a request came from.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from plot_align.errors import InputError

COLUMNS = ("Behavior", "FunctionalCategory", "SemanticCategory", "Tags", "ContextString", "BehaviorID")
Row = Mapping[str, str]


@dataclass(frozen=True)
class Format:
    """One benchmark's file of requests.

    Attributes:
        name: of the benchmark.
        columns: by which it is recognised.
        id: a row's id; the same for the same request in any excerpt of the file.
        text, category, target: the columns of the request, of its kind, and of how a complying answer begins.
        harmful: whether a row (after where it stands, for messages) asks for harm; None where the file does not say,
            as HarmBench's form serves for both.
        names_rows: the file has the ids; else they are of the texts, and two rows of one id are one request.
    """

    name: str
    columns: tuple[str, ...]
    text: str
    category: str
    id: Callable[[Row], str]
    harmful: Callable[[str, Row], bool | None] = lambda where, row: None
    target: str = ""
    names_rows: bool = True

    def as_harmbench(self, row: Row) -> dict[str, str]:
        """``row`` with HarmBench's columns; those that it lacks are empty."""
        of_harmbench = dict.fromkeys(COLUMNS, "")
        if self is HARMBENCH:
            return {**of_harmbench, **row}
        renamed = {"Behavior": row[self.text], "SemanticCategory": row[self.category], "BehaviorID": self.id(row)}
        return {**of_harmbench, **renamed}


def _digest(row: Row) -> str:
    """StrongREJECT's rows have no names, and its files are excerpts of each other, so numbers would be no ids."""
    return "strongreject_" + hashlib.sha256(row["forbidden_prompt"].strip().encode()).hexdigest()[:12]


def _slug(row: Row) -> str:
    """JailbreakBench's name of a behaviour, in lower case with underscores."""
    return re.sub(r"[\W_]+", "_", row["Behavior"].lower()).strip("_")


def _unsafe(where: str, row: Row) -> bool:
    """XSTest's label. Its first releases have none; there, the names of all unsafe types begin with "contrast"."""
    label = row.get("label", "").strip()
    if label not in ("", "safe", "unsafe"):
        raise InputError(f"{where}: the label is {label!r}, expected safe or unsafe; correct it")
    return label == "unsafe" if label else row["type"].startswith("contrast")


HARMBENCH = Format(
    "HarmBench", ("Behavior", "BehaviorID"), "Behavior", "SemanticCategory", lambda row: row["BehaviorID"]
)
FORMATS = (
    HARMBENCH,
    Format("JailbreakBench", ("Goal", "Target", "Behavior", "Category"), "Goal", "Category", _slug, target="Target"),
    Format(
        "StrongREJECT",
        ("category", "forbidden_prompt"),
        "forbidden_prompt",
        "category",
        _digest,
        lambda *_: True,
        names_rows=False,
    ),
    Format("XSTest", ("id", "prompt", "type"), "prompt", "type", lambda row: row["id"], _unsafe),
)


def recognise(path: object, header: Sequence[str]) -> Format:
    """The format of a file whose first line is ``header``.

    Raises:
        InputError: none has these columns, or one of them is there twice.
    """
    for known in FORMATS:
        if set(known.columns) <= set(header):
            for name in header:
                if name and header.count(name) > 1:
                    raise InputError(f"{path} has the column {name} {header.count(name)} times; keep one of them")
            return known
    came = f"the columns {', '.join(header)}" if any(header) else "no line of column names"
    forms = "; ".join(f"{known.name}: {', '.join(known.columns)}" for known in FORMATS)
    raise InputError(f"{path} has {came}; expected those of {forms}")
