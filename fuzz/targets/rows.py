"""Preference rows in files: opened, checked, tokenised, counted."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import strategies as st

from fuzz.guard import Wrong
from fuzz.spoil import TEXTS, as_bytes, as_json, as_lines, junk, spoilt
from fuzz.targets import joined, write
from fuzz.tiny import tokenizer
from plot_align.doctor.data import examine
from plot_align.doctor.pairs import open_data
from plot_align.methods.ranked import ranked_row
from plot_align.preference.datasets import load_pairs, require_pairs, require_ranked
from plot_align.preference.dialogues import as_conversations
from plot_align.preference.estimation import estimate
from plot_align.preference.parallel_counting import readable

_STANDARD = [
    {"prompt": "what is one plus two ?", "chosen": " the sum is three .", "rejected": " no idea ."},
    {"prompt": "what is two ?", "chosen": " one plus one , gladly .", "rejected": " leave me alone ."},
]
_IMPLICIT = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in _STANDARD]
_CHAT = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }
    for row in _STANDARD
]
_CHAT_IMPLICIT = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in _CHAT]
_UNPAIRED = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for row in _STANDARD
    for side in ("chosen", "rejected")
]
_DIALOGUES = [
    {side: f"\n\nHuman: {row['prompt']}\n\nAssistant:{row[side]}" for side in ("chosen", "rejected")}
    for row in _STANDARD
]
_TOOLS = [{**row, "tools": [], "chat_template_kwargs": {"x": 1}} for row in _CHAT]
_RANKED = [
    {"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"], " ?"], "rewards": [1.0, 0.5, -2]}
    for row in _STANDARD
]
_SCORED = [{**row, "score_chosen": 8.5, "score_rejected": 2} for row in _STANDARD]
_KINDS = (_STANDARD, _IMPLICIT, _CHAT, _CHAT_IMPLICIT, _UNPAIRED, _DIALOGUES, _TOOLS)
_LISTS = (_RANKED, _SCORED, _CHAT_IMPLICIT)
# File, whether it is read as a stream, max_length, truncation_mode. The second way is through Arrow, thrice as slow.
_WAYS = (
    ("case.jsonl", True, 64, "keep_start"),
    ("case.json", True, None, "keep_start"),
    ("case.csv", True, 64, "keep_start"),
    ("case.jsonl", False, 64, "keep_end"),
    ("case.jsonl.gz", True, 8, "keep_start"),
    ("case.jsonl", True, 8, "keep_end"),
    ("case.jsonl", True, 64, "keep_start"),  # by the doctor, which leaves out what is no pair
    ("case.jsonl", True, None, "keep_start"),  # as ranked lists, for PRO
)
_DOCTOR, _PRO = 6, 7


def _csv(rows: Any) -> str:
    """``rows`` as CSV, quoted throughout."""
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    names = list(dict.fromkeys(str(name) for row in rows for name in row))
    cells = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    return "\n".join(",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in cells) + "\n"


@st.composite
def _cases(draw: Any) -> bytes:
    way = draw(st.sampled_from((0, 0, 0, 1, 2, 4, 5, _DOCTOR, _PRO) * 3 + (3,)))
    kinds = _LISTS if way == _PRO else _KINDS
    kind = kinds[draw(st.integers(0, len(kinds) - 1))]
    texts = st.one_of(st.sampled_from(TEXTS), st.text(max_size=40), junk)
    rows = draw(spoilt(kind, 2, texts))
    match way:
        case 1:
            content = draw(as_json(rows))
        case 2:
            content = draw(as_bytes(_csv(rows)))
        case _:
            content = draw(as_lines(rows))
    return joined(way, content)


def _lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


class Rows:
    name = "rows"
    names = (
        "case.",
        "data row",
        "training row",
        "data set",
        "training set",
        "no chosen",
        "no rejected",
        "mode is",
        "rows is a pair",
    )
    seeds: ClassVar[list[bytes]] = [
        *(joined(0, _lines(kind)) for kind in _KINDS if kind is not _DIALOGUES),
        joined(3, _lines(_DIALOGUES)),
        joined(1, json.dumps(_STANDARD).encode()),
        joined(2, _csv(_STANDARD).encode()),
        joined(5, _lines(_STANDARD)),
        *(joined(_DOCTOR, _lines(kind)) for kind in (_STANDARD, _CHAT, _DIALOGUES)),
        *(joined(_PRO, _lines(kind)) for kind in _LISTS),
    ]
    cases = _cases()

    def __init__(self) -> None:
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        tokenizer()

    def run(self, data: bytes, folder: Path) -> None:
        name, stream, max_length, mode = _WAYS[data[0] % len(_WAYS) if data else 0]
        content = gzip.compress(data[1:], 1) if name.endswith(".gz") else data[1:]
        path = write(folder, name, content)
        way = data[0] % len(_WAYS) if data else 0
        if way in (_DOCTOR, _PRO):
            (examined if way == _DOCTOR else ranked)(path)
            return
        try:
            opened = load_pairs(path, streaming=stream)
            if not stream:
                opened = as_conversations(opened)
            require_pairs(opened) if "label" not in (opened.column_names or ()) else None
            options: dict[str, Any] = {"max_length": max_length, "truncation_mode": mode, "progress": False}
            found = estimate(opened, tokenizer(), **options)
            again = estimate(opened, tokenizer(), batch_size=1, **options)
            if found != again:
                raise Wrong("the counts depend on the batch size")
            rows = list(opened)
        finally:
            shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
        if all(isinstance(row.get("prompt"), str) and isinstance(row.get("chosen"), str) for row in rows):
            expected = naive_counts(rows, max_length, mode)
            for side, counts in zip(expected, (found.chosen_counts, found.rejected_counts), strict=True):
                if side != {i: int(n) for i, n in enumerate(counts) if n}:
                    raise Wrong("counts that a loop over the rows does not find")


def examined(path: Path) -> None:
    """The doctor's examination, whatever the rows are."""
    found, again = (
        examine(open_data(path, streaming=True), tokenizer(), max_length=64, batch_size=size, progress=False)
        for size in (1000, 1)
    )
    if _text(found) != _text(again):
        raise Wrong("the examination depends on the batch size")
    if not 0 < found.pairs <= found.rows or any(count > found.rows for count in found.length_differences.values()):
        raise Wrong(f"{found.pairs} pairs of {found.rows} rows")


def _text(found: Any) -> str:
    return json.dumps(dataclasses.asdict(found), allow_nan=False, sort_keys=True)


def ranked(path: Path) -> None:
    """Each row as a ranked list: best first, and nothing lost."""
    data = load_pairs(path, streaming=True)
    require_ranked(data)
    for index, row in enumerate(readable(iter(data))):
        _, completions, rewards = ranked_row(row, f"data row {index}")
        if sorted(rewards, reverse=True) != rewards or rewards[0] == rewards[-1] or len(rewards) != len(completions):
            raise Wrong(f"rewards in the order {rewards}")
        given = row.get("completions", [row.get("chosen"), row.get("rejected")])
        if len(completions) != len(given):
            raise Wrong("a completion is lost")


def shared(first: list[int], second: list[int]) -> int:
    """How many ids both begin with."""
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return i
    return min(len(first), len(second))


def naive_counts(rows: list[dict[str, Any]], max_length: int | None, mode: str) -> tuple[Counter, Counter]:
    """The scored tokens of each side, row by row: the answer with EOS, behind what both share with the prompt."""
    sides: tuple[Counter, Counter] = (Counter(), Counter())
    for row in rows:
        prompt = tokenizer()(row["prompt"])["input_ids"]
        texts = [row["prompt"] + row[side] for side in ("chosen", "rejected")]
        both = [tokenizer()(t if row[s].endswith("<eos>") else t + "<eos>")["input_ids"]
                for t, s in zip(texts, ("chosen", "rejected"), strict=True)]  # fmt: skip
        border = min(shared(prompt, ids) for ids in both)
        if max_length is not None and mode == "keep_start" and border >= max_length:
            continue
        for ids, counts in zip(both, sides, strict=True):
            first = 0 if max_length is None or mode == "keep_start" else max(0, len(ids) - max_length)
            kept = range(first, len(ids) if max_length is None else min(len(ids), first + max_length))
            counts.update(ids[i] for i in kept if i >= border and i > first)  # nothing predicts the first token
    return sides
