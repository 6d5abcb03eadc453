"""Reading a preference set row by row, as texts and as the tokens that TRL trains on; rows that are no pairs apart."""

from __future__ import annotations

import codecs
import gzip
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from plot_align.errors import InputError
from plot_align.io import file_digest, parse_json
from plot_align.parallel import each
from plot_align.preference.completions import (
    PAIRED,
    ReadBatch,
    RowError,
    Rules,
    Side,
    read_batch,
    scored_ranges,
)
from plot_align.preference.datasets import json_fault, load_pairs, shown
from plot_align.preference.dialogues import Malformed, convert, is_dialogue
from plot_align.preference.estimation import open_rows
from plot_align.preference.parallel_counting import own_batches, readable

_DAMAGED = "_damaged"  # column of what is wrong with a line of the file


@dataclass(frozen=True)
class Pair:
    """One row, as text and as TRL tokenises it.

    Attributes:
        row: index in the data set. requests: the texts of the user's turns (of a plain prompt, the prompt).
        prompt, chosen, rejected: texts, the tools they call among them as JSON. Of a raw dialogue
            (:mod:`plot_align.preference.dialogues`) the last answers.
        raw: whether it is such a dialogue, which TRL reads as plain text.
        prompt_ids: of the prompt alone. border: where TRL lets the answers begin in the ids of prompt + answer.
        ids: of prompt + chosen and of prompt + rejected. scored: of both, start and stop of the tokens scored.
        contents, called: of both, if they are messages: their texts in order, and the names of the functions called.
        tools: those that the row offers, as JSON.
    """

    row: int
    requests: tuple[str, ...]
    prompt: str
    chosen: str
    rejected: str
    raw: bool
    prompt_ids: list[int]
    border: int
    ids: tuple[list[int], list[int]]
    scored: tuple[tuple[int, int], tuple[int, int]]
    contents: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    called: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    tools: str = ""

    @property
    def answers(self) -> tuple[str, str]:
        """Chosen and rejected."""
        return self.chosen, self.rejected

    @property
    def spoken(self) -> tuple[str, str]:
        """The same without the tools called, whose JSON is in no language."""
        if self.contents is None:
            return self.answers
        chosen, rejected = map("\n".join, self.contents)
        return chosen, rejected

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of the chosen and of the rejected answer, before truncation."""
        return len(self.ids[0]) - self.border, len(self.ids[1]) - self.border


@dataclass(frozen=True)
class Batch:
    """Consecutive pairs, and what of them is scored; or one row that is no pair, and why."""

    pairs: list[Pair]
    border: np.ndarray  # (R,)
    sides: list[Side]
    refused: RowError | None = None


def open_data(source: str | os.PathLike[str], **options: Any) -> Any:
    """:func:`plot_align.load_pairs`; of a JSON-lines file with damaged lines a stream, in which each says what it is.

    Args: see :func:`plot_align.load_pairs`.

    Raises:
        InputError: see there; or a ``name`` for what is not on the Hub.
    """
    path = Path(source)
    if options.get("name") is not None and path.exists():
        raise InputError(
            f"name is {options['name']!r}, but {path} is on this machine, and only data sets of the Hub have "
            "configurations; leave it out"
        )
    try:
        return load_pairs(source, **options)
    except InputError:
        lines = path.name.lower().endswith((".jsonl", ".jsonl.gz"))
        if not path.is_file() or not lines or options.get("split", "train") != "train" or not _has_damage(path):
            raise
        from datasets import IterableDataset

        data = IterableDataset.from_generator(_lines, gen_kwargs={"path": path})
        data.info.download_checksums = {path.name: {"sha256": file_digest(path)}}
        return data


def _has_damage(path: Path) -> bool:
    """Whether lines are what is wrong: one is no row, or has an answer of another type than those before it, at
    which Arrow's reader may stop. A file that cannot be read to its end would not be read line by line either."""
    types: dict[str, type] = {}
    try:
        for row in _lines(path):
            known = {name: type(row[name]) for name in PAIRED if row.get(name) is not None}
            if _DAMAGED in row or any(types.setdefault(name, found) is not found for name, found in known.items()):
                return True
    except (OSError, EOFError, zlib.error):
        pass
    return False


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    opener: Any = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                try:
                    text = line.decode()
                    fault = json_fault(text)
                except UnicodeDecodeError:
                    fault = "is no UTF-8"
                yield {**dict.fromkeys(PAIRED), _DAMAGED: f"line {number} {fault}"} if fault else parse_json(text)


def open_pairs(
    data: Any, tokenizer: Any, max_length: int | None, truncation_mode: str, batch_size: int
) -> tuple[Any, Rules, list[RowError]]:
    """The rows from the first pair on, the rules by which TRL reads them, and the rows before, which are none.

    Raises:
        InputError: see :func:`plot_align.estimate`; or no row is a pair.
    """
    before: list[RowError] = []
    columns = getattr(data, "column_names", None)
    if columns is None or set(PAIRED) <= set(columns):
        for row, values in enumerate(readable(iter(data))):
            wrong = next((name for name in PAIRED if not isinstance(values.get(name), str | list)), None)
            if wrong is None:
                break
            reason = f"{wrong!r} is {shown(values.get(wrong))}, expected a string or a list of messages"
            before.append(RowError("data", row, row, values.get(_DAMAGED) or reason))
        else:
            if before:
                raise InputError(f"none of the {len(before):,} rows is a pair ({before[0]}); check the file")
    rows, rules = open_rows(
        data.skip(len(before)) if before else data, tokenizer, max_length, truncation_mode, batch_size
    )
    if rules.completions != PAIRED:
        raise InputError(
            "the data set has a column 'label' instead of 'chosen' and 'rejected', expected pairs; pair its rows first"
        )
    return rows, rules, before


def batches(rows: Any, rules: Rules, batch_size: int, start: int = 0) -> Iterator[Batch]:
    """The rows in order; several processes (:mod:`plot_align.parallel`) tokenise a batch each, and all get all.

    Args:
        rows, rules: of :func:`open_pairs`. start: index of the first of the rows in the data set.
    """

    def read(job: tuple[int, dict[str, list[Any]]]) -> list[Batch]:
        first, columns = job
        size = len(next(iter(columns.values())))
        return list(_batches(columns, range(start + first, start + first + size), rules))

    yield from itertools.chain.from_iterable(each(read, own_batches(rows, batch_size)))


def _batches(columns: dict[str, list[Any]], numbers: range, rules: Rules) -> Iterator[Batch]:
    """The rows as one batch; where one of them is no pair, halved until it stands alone."""
    try:
        yield _batch(read_batch(columns, numbers[0], rules), columns.get("tools"), numbers, rules)
    except RowError as error:
        if len(numbers) == 1:
            damage = columns.get(_DAMAGED, [None])[0]
            yield Batch(
                [], np.zeros(0, np.int64), [], RowError("data", numbers[0], numbers[0], damage) if damage else error
            )
            return
        middle = len(numbers) // 2
        for part in (slice(None, middle), slice(middle, None)):
            yield from _batches({name: column[part] for name, column in columns.items()}, numbers[part], rules)


def _batch(read: ReadBatch, tools: list[Any] | None, numbers: range, rules: Rules) -> Batch:
    sides = scored_ranges(read, rules)
    text = _conversation if rules.conversational else _plain(rules.tokenizer.eos_token)
    pairs = []
    ranges = [list(zip(begin.tolist(), end.tolist(), strict=True)) for _, _, begin, end in sides]
    for at, number in enumerate(numbers):
        said = text(read.prompts[at], read.answers[0][at], read.answers[1][at])
        pairs.append(
            Pair(
                number, said.requests, said.prompt, said.chosen, said.rejected, said.raw,
                read.ids[0][at], int(read.border[at]),
                (read.ids[1][at], read.ids[2][at]), (ranges[0][at], ranges[1][at]),
                said.contents, said.called, _json(tools[at]) if tools and tools[at] else "",
            )
        )  # fmt: skip
    return Batch(pairs, read.border, sides)


# --- texts ----------------------------------------------------------------------------------------------------------


class _Said(NamedTuple):
    """The texts of a row, as in :class:`Pair`."""

    requests: tuple[str, ...]
    prompt: str
    chosen: str
    rejected: str
    raw: bool = False
    contents: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    called: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())


def _conversation(prompt: Any, chosen: Any, rejected: Any) -> _Said:
    return _Said(
        tuple(_content(message) for message in prompt if message["role"] == "user"),
        "\n".join(f"{message['role']}: {_text(message)}" for message in prompt),
        "\n".join(map(_text, chosen)),
        "\n".join(map(_text, rejected)),
        contents=(_each(_parts, chosen), _each(_parts, rejected)),
        called=(_each(_names, chosen), _each(_names, rejected)),
    )


def _each(of: Callable[[dict[str, Any]], list[str]], messages: list[dict[str, Any]]) -> tuple[str, ...]:
    return tuple(itertools.chain.from_iterable(map(of, messages)))


def _text(message: dict[str, Any]) -> str:
    """What a message says, and what it calls: an answer may be a call alone."""
    return "\n".join(filter(None, (_content(message), *map(_json, _calls(message)))))


def _content(message: dict[str, Any]) -> str:
    return " ".join(_parts(message))


def _parts(message: dict[str, Any]) -> list[str]:
    """The content, or of one in parts those with a text."""
    content = message.get("content")
    if isinstance(content, list):
        return [str(part.get("text") or "") for part in content if isinstance(part, dict)]
    return [str(content or "")]


def _names(message: dict[str, Any]) -> list[str]:
    return [str(call["name"] or "") for call in _calls(message)]


def _calls(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Name and arguments of each tool called; without its id, which is another one in every call."""
    calls = message.get("tool_calls")
    found = []
    for call in calls if isinstance(calls, list) else ():
        if isinstance(call, dict):
            function = call["function"] if isinstance(call.get("function"), dict) else call
            found.append({name: function.get(name) for name in ("name", "arguments")})
    return found


def _json(value: Any) -> str:
    if isinstance(value, str):  # as a column of tools may be
        return value
    return json.dumps(_without_nulls(value), ensure_ascii=False, default=str)


def _without_nulls(value: Any) -> Any:
    """Arrow gives each object the keys of all others, with null for a value."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _plain(eos: str) -> Callable[[str, str, str], _Said]:
    def text(prompt: str, chosen: str, rejected: str) -> _Said:
        if is_dialogue(prompt):
            try:
                row = convert(*(prompt + answer.removesuffix(eos) for answer in (chosen, rejected)))
            except Malformed:
                pass
            else:
                return _conversation(row["prompt"], row["chosen"], row["rejected"])._replace(raw=True)
        return _Said((prompt,), prompt, chosen.removesuffix(eos), rejected.removesuffix(eos))

    return text


def prompts_of(source: str | os.PathLike[str]) -> Iterator[str]:
    """The prompts of a file of any kind that :func:`plot_align.load_pairs` opens, or of a ``.txt`` file, one a line.

    Raises:
        InputError: it cannot be read, or has no column of prompts.
    """
    path = Path(source)
    if path.suffix.lower() == ".txt":
        try:
            with path.open(encoding="utf-8") as file:
                yield from filter(None, map(str.strip, file))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--overlap {path} cannot be read ({error}); name a file of prompts") from None
        return
    data = load_pairs(source)
    known = {name.lower(): name for name in data.column_names}
    column = next((known[name] for name in _PROMPT_COLUMNS if name in known), None)
    if column is None:
        raise InputError(
            f"--overlap {source} has the columns {', '.join(data.column_names)}, expected one of "
            f"{', '.join(_PROMPT_COLUMNS)}; rename its column of prompts"
        )
    for value in itertools.chain.from_iterable(batch[column] for batch in data.select_columns([column]).iter(1000)):
        turns = value if isinstance(value, list) else [value]
        for turn in turns:
            if isinstance(turn, dict) and turn.get("role") == "user":
                yield _content(turn)
            elif isinstance(turn, str):
                yield turn


_PROMPT_COLUMNS = ("prompt", "question", "instruction", "behavior", "forbidden_prompt", "turns", "messages", "text")
