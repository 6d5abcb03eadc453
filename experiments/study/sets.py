"""Preference sets on which forecast and training are compared: human pairs, our own, worked sums, and spoilt ones."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plot_align.demo import data as ours
from study import data
from study.data import Pair

SUMS = 400  # worked sums, the shortest ones


def human(folder: Path, tokenizer: Any) -> list[list[Pair]]:
    return [data.human_pairs(folder, tokenizer)]


def reversed_human(folder: Path, tokenizer: Any) -> list[list[Pair]]:
    """The labels are wrong."""
    return [[_pair(row["prompt"], row["rejected"], row["chosen"]) for row in human(folder, tokenizer)[0]]]


def longer(folder: Path, tokenizer: Any) -> list[list[Pair]]:
    """The longer answer is preferred, whatever people preferred."""

    def words(side: Any) -> int:
        return len(side[0]["content"].split())

    rows = human(folder, tokenizer)[0]
    sides = [(row["prompt"], *sorted((row["chosen"], row["rejected"]), key=words, reverse=True)) for row in rows]
    return [[_pair(*row) for row in sides if words(row[1]) > words(row[2])]]


def helpful(folder: Path, tokenizer: Any) -> list[list[Pair]]:
    return [data.helpful_pairs(tokenizer)]


def refusals(folder: Path, tokenizer: Any) -> list[list[Pair]]:
    return [[dict(row) for row in ours.pairs("train") if row["kind"] == "harmful"]]


def mixed(folder: Path, tokenizer: Any) -> list[list[Pair]]:
    return human(folder, tokenizer) + helpful(folder, tokenizer)


def other_solutions(folder: Path, tokenizer: Any) -> list[list[Pair]]:
    """A worked sum against the solution of another one."""
    sums = _sums(folder)
    shuffled = random.Random(0).sample(sums, len(sums))
    place = {question: i for i, (question, _) in enumerate(shuffled)}
    others = [shuffled[(place[question] + 1) % len(sums)][1] for question, _ in sums]
    return [[_worded(q, answer, other) for (q, answer), other in zip(sums, others, strict=True)]]


def other_numbers(folder: Path, tokenizer: Any) -> list[list[Pair]]:
    """A worked sum against the same with one more at its end: the sides are almost the same."""
    return [[_worded(q, answer, re.sub(r"[\d,]*\d(?=\D*$)", _one_more, answer)) for q, answer in _sums(folder)]]


SETS: dict[str, Callable[[Path, Any], list[list[Pair]]]] = {
    "HH-RLHF": human,
    "HH-RLHF, reversed": reversed_human,
    "HH-RLHF, the longer": longer,
    "ours, helpful": helpful,
    "ours, refusals": refusals,
    "HH-RLHF and helpful": mixed,
    "GSM8K, another's solution": other_solutions,
    "GSM8K, another number": other_numbers,
}


def training_pairs(kinds: list[list[Pair]], number: int, batch: int, seed: int, tokenizer: Any) -> list[Pair]:
    """:func:`study.data.draw`; a kind with too few pairs is drawn from more than once."""
    need = number // len(kinds)
    return data.draw([pairs * -(-need // len(pairs)) for pairs in kinds], number, batch, seed, tokenizer)


def _sums(folder: Path) -> list[tuple[str, str]]:
    """Question and solution, without GSM8K's marks for a calculator."""
    with gzip.open(folder / "gsm8k_train.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    rows.sort(key=lambda row: len(row["question"] + row["answer"]))
    return [(row["question"], re.sub(r"<<.*?>>", "", row["answer"]).replace("#### ", "= ")) for row in rows[:SUMS]]


def _one_more(number: re.Match[str]) -> str:
    return str(int(number[0].replace(",", "")) + 1)


def _worded(question: str, chosen: str, rejected: str) -> Pair:
    asked = [{"role": "user", "content": question}]
    return _pair(asked, *([{"role": "assistant", "content": text}] for text in (chosen, rejected)))


def _pair(prompt: Any, chosen: Any, rejected: Any) -> Pair:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
