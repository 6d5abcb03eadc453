"""Behaviours and targets: HarmBench's files, and the requests of other benchmarks in its form."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

from plot_align.errors import InputError
from plot_align.io import complete_or_absent, parse_json, require_distinct
from plot_align.redteam.formats import COLUMNS, Format, recognise

CONTEXT_SEPARATOR = "\n\n---\n\n"
CATEGORIES = ("standard", "contextual", "copyright")
Kind = Literal["harmful", "harmless"]


@dataclass(frozen=True)
class Behavior:
    """One row of a behaviours file."""

    id: str
    text: str
    functional_category: str = "standard"
    semantic_category: str = ""
    tags: tuple[str, ...] = ()
    context: str = ""

    @property
    def prompt(self) -> str:
        """The behaviour as a user turn: its context first, if it has one."""
        return f"{self.context}{CONTEXT_SEPARATOR}{self.text}" if self.context else self.text


class Behaviors(NamedTuple):
    """What was taken from a file.

    Attributes:
        rows: the requests.
        skipped: ids of the copyright rows that were left out.
        targets: id → how a complying answer begins, where the format has a column of them.
        taken: a sentence for the user: what was taken, and what was left.
    """

    rows: list[Behavior]
    skipped: list[str]
    targets: dict[str, str]
    taken: str


def read_behaviors(path: str | os.PathLike[str], *, kind: Kind = "harmful", skip_copyright: bool = False) -> Behaviors:
    """Read the requests of one kind from a CSV file of HarmBench, JailbreakBench, StrongREJECT or XSTest.

    The columns tell which it is (:data:`plot_align.redteam.formats.FORMATS`). XSTest's file holds both kinds, and the
    other kind is left; HarmBench's and JailbreakBench's are taken as the kind that is asked for. Texts are kept
    exactly, line breaks included; ids, categories and tags are stripped.

    Args:
        path: the file, UTF-8, with or without a byte-order mark.
        kind: ``harmful`` or ``harmless``.
        skip_copyright: leave out rows of category copyright or tagged ``hash_check``, which only HarmBench's hashes of
            the protected texts can judge; otherwise they are refused.

    Raises:
        InputError: the file cannot be read, has no request of this kind, or a row is wrong; the message names its line
            and id.
    """
    path = Path(path)
    form, found = _read_rows(path)
    rows: list[Behavior] = []
    targets: dict[str, str] = {}
    copyrighted: dict[str, str] = {}  # id → file and line
    others = 0
    for where, row, behavior, harmful in found:
        if harmful is not None and harmful != (kind == "harmful"):
            others += 1
        elif behavior.functional_category == "copyright" or "hash_check" in behavior.tags:
            copyrighted[behavior.id] = where
        else:
            rows.append(behavior)
            if form.target and row[form.target].strip():
                targets[behavior.id] = row[form.target]
    require_distinct([*(behavior.id for behavior in rows), *copyrighted], f"{path}: the ids")
    if copyrighted and not skip_copyright:
        first, where = next(iter(copyrighted.items()))
        count = f"{first!r} is the first of {len(copyrighted)} rows" if len(copyrighted) > 1 else f"{first!r} is a row"
        raise InputError(
            f"{where}: {count} about copyrighted text, which no judge here can decide; leave such rows out with "
            "--skip_copyright (skip_copyright=True)"
        )
    if others and not rows:
        raise InputError(
            f"{path} ({form.name}) has no {kind} requests; name XSTest's file, which has both kinds, or one of {kind} "
            "requests in the form of HarmBench or JailbreakBench"
        )
    if not rows:
        beside = f" beside the {len(copyrighted)} about copyrighted text" if copyrighted else ""
        raise InputError(
            f"{path} has no behaviours to attack{beside}; write one row or more below the line of column names"
        )
    taken = f"{path.name} ({form.name}): {len(rows)} {kind} request{'s' * (len(rows) > 1)} taken"
    taken += f", {others} other{'s' * (others > 1)} left" if others else ""
    taken += f", {len(copyrighted)} about copyrighted text left" if copyrighted else ""
    return Behaviors(rows, list(copyrighted), targets, taken)


def read_labelled(path: str | os.PathLike[str]) -> list[tuple[Behavior, bool]]:
    """Every request of a file that says itself which are harmful (StrongREJECT's, XSTest's), and whether it is.

    Raises:
        InputError: as :func:`read_behaviors`, or the file does not say it.
    """
    form, found = _read_rows(Path(path))
    labelled = [(behavior, harmful) for _, _, behavior, harmful in found if harmful is not None]
    if not labelled:
        raise InputError(
            f"{path} ({form.name}) does not say which of its requests are harmful; name a file of XSTest or "
            "StrongREJECT, or one of .jsonl with a kind in each line"
        )
    return labelled


def default_benign() -> list[Behavior]:
    """60 harmless requests that sound harmful ("How do I kill a process that hangs on Linux?"), written for this
    package: a model that refuses them has learnt words, not harm.
    """
    with resources.as_file(resources.files("plot_align.redteam") / "benign.csv") as path:
        return read_behaviors(path).rows


def write_behaviors(path: str | os.PathLike[str], behaviors: Iterable[Behavior]) -> None:
    """Write a file that :func:`read_behaviors` reads back as equal, unless a tag holds a comma or a text a lone
    surrogate.

    Raises:
        InputError: the file cannot be written.
    """
    with complete_or_absent(Path(path)) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        # Before Python 3.13 the writer quotes a lone \r or \n only if its own line terminator has one, hence both.
        writer = csv.writer(file, lineterminator="\r\n")
        writer.writerow(COLUMNS)
        for x in behaviors:
            tags = ", ".join(x.tags)
            writer.writerow([x.text, x.functional_category, x.semantic_category, tags, x.context, x.id])


class _Read(NamedTuple):
    """One row: its file and line, for messages; its fields; the request in it, and whether that is harmful."""

    where: str
    row: dict[str, str]
    behavior: Behavior
    harmful: bool | None


def _read_rows(path: Path) -> tuple[Format, list[_Read]]:
    """The file's format and its rows."""
    line = 1
    seen: set[str] = set()
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            form = recognise(path, header)
            found = []
            line = reader.line_num + 1
            for fields in reader:
                where = f"{path}, line {line}"
                line = reader.line_num + 1  # a row may hold line breaks
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise InputError(
                        f"{where}: {len(fields)} fields came, expected {len(header)} as in the first line, in the row "
                        f"that begins with {fields[0][:40]!r}; put fields that hold commas or line breaks in double "
                        "quotes"
                    )
                row = dict(zip(header, fields, strict=True))
                behavior = _behavior(where, form.as_harmbench(row))
                if behavior.id in seen:
                    raise InputError(
                        f"{where}: the id {behavior.id!r} was used in an earlier row; give each row its own"
                        if form.names_rows
                        else f"{where}: {behavior.text[:40]!r} stands in an earlier row too; delete one of them"
                    )
                seen.add(behavior.id)
                found.append(_Read(where, row, behavior, form.harmful(where, row)))
            return form, found
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; save it as a CSV file in UTF-8") from None
    except csv.Error as error:
        raise InputError(
            f"{path}: the row that begins on line {line} is not CSV ({error}); close its double quotes, and double "
            "those within a field"
        ) from None
    except OSError as error:
        raise InputError(f"behaviours {path} cannot be read ({error.strerror}); check the path") from None


def _behavior(where: str, row: Mapping[str, str]) -> Behavior:
    identity = row["BehaviorID"].strip()
    # The id becomes a folder's name.
    if not identity or identity in (".", "..") or any(c in identity for c in "/\\\0"):
        raise InputError(
            f"{where}: the id is {row['BehaviorID']!r}, expected a name without slashes; give the row one"
        )
    if not row["Behavior"].strip():
        raise InputError(f"{where}: {identity!r} asks for nothing; write what is asked for, or delete the row")
    category = row["FunctionalCategory"].strip() or "standard"
    if category not in CATEGORIES:
        raise InputError(
            f"{where}: {identity!r} has the FunctionalCategory {category!r}, expected {', '.join(CATEGORIES)}"
        )
    if category == "contextual" and not row["ContextString"].strip():
        raise InputError(f"{where}: {identity!r} is contextual and has no ContextString; add it")
    tags = tuple(tag.strip() for tag in row["Tags"].split(",") if tag.strip())
    return Behavior(identity, row["Behavior"], category, row["SemanticCategory"].strip(), tags, row["ContextString"])


def read_targets(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read HarmBench's targets file: ``{BehaviorID: "Sure, here …"}``.

    Raises:
        InputError: the file cannot be read, is no such JSON object, names an id twice, or has an empty target.
    """
    targets = read_json_object(path, "targets", '"Sure, here …"')
    for identity, target in targets.items():
        if not isinstance(target, str) or not target.strip():
            raise InputError(
                f"targets {path}: the target of {identity!r} is not a text; write how a complying answer begins"
            )
    return targets


def read_json_object(path: str | os.PathLike[str], what: str, shape: str) -> dict[str, Any]:
    """Read a JSON file of HarmBench: one object, keyed by BehaviorID.

    Args:
        what: what the file holds, ``shape``: how a value looks, both for the message.

    Raises:
        InputError: the file cannot be read, is damaged, is no object, or names a key twice.
    """
    try:
        content = parse_json(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=_unique)
    except _RepeatedKeyError as error:
        raise InputError(f"{what} {path} names {error.args[0]!r} twice; keep one of them") from None
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read ({error.strerror}); check the path") from None
    except ValueError:
        raise InputError(
            f"{what} {path} is not complete JSON, so it is damaged; delete it to make it again, or get it anew"
        ) from None
    if not isinstance(content, dict):
        raise InputError(f'{what} {path} is not a JSON object; expected {{"BehaviorID": {shape}}}')
    return content


class _RepeatedKeyError(Exception):
    """A JSON object repeats a key, of which Python's reader would silently keep the last value."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _RepeatedKeyError(key)
        found[key] = value
    return found


def require_targets(behaviors: Sequence[Behavior], targets: Mapping[str, str], attack: str) -> None:
    """Check that every behaviour has a target.

    Raises:
        InputError: some have none; the first ones are named.
    """
    missing = [behavior.id for behavior in behaviors if behavior.id not in targets]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise InputError(
            f"{attack} needs a target for every behaviour, and there is none for {shown}; name a file that has "
            "them with --targets"
        )
