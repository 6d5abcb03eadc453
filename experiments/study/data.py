"""The study's pairs and requests. Those of other people are read from a folder and never copied into the project."""

from __future__ import annotations

import csv
import gzip
import json
import random
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset

from plot_align.demo import data as ours
from plot_align.preference.dialogues import Malformed, convert

MAX_LENGTH = 96  # tokens of prompt and answer; longer pairs are left out
HELD_OUT = 24  # pairs of either kind

Pair = dict[str, Any]


class Requests(NamedTuple):
    """What the models are asked: prompts by where they come from."""

    harmful: dict[str, list[str]]
    benign: dict[str, list[str]]


def human_pairs(folder: Path, tokenizer: Any) -> list[Pair]:
    """HH-RLHF's harmless pairs of one turn."""
    rows = []
    with gzip.open(folder / "hh_rlhf_harmless_2000.jsonl.gz", "rt") as lines:
        for line in lines:
            raw = json.loads(line)
            try:
                row = convert(raw["chosen"], raw["rejected"])
            except Malformed:
                continue
            if len(row["prompt"]) == 1:
                rows.append(row)
    return _short(rows, tokenizer)


def helpful_pairs(tokenizer: Any) -> list[Pair]:
    """Our pairs on harmless requests: the model's own good answer against a refusal or a spoilt one."""
    return _short([row for row in ours.pairs("train") if row["kind"] != "harmful"], tokenizer)


def recovery_rows(steps: int, seed: int) -> list[tuple[str, str, str]]:
    """``(request, beginning of the rejected answer, refusal)``: recovery data (Qi et al. 2024) of our pairs."""
    rows = [row for row in ours.pairs("train") if row["kind"] == "harmful"]
    draw = random.Random(seed)
    found = []
    for row in draw.choices(rows, k=steps):
        words = row["rejected"][0]["content"].split()
        begun = " ".join(words[: draw.randint(1, max(1, len(words) // 2))])
        found.append((row["prompt"][0]["content"], begun, row["chosen"][0]["content"]))
    return found


def split(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Training pairs and the held-out ones, the same for every arm and seed."""
    shuffled = random.Random(0).sample(pairs, len(pairs))
    return shuffled[HELD_OUT:], shuffled[:HELD_OUT]


def draw(kinds: list[list[Pair]], number: int, batch: int, seed: int, tokenizer: Any) -> list[Pair]:
    """``number`` training pairs, as many of each kind, in batches of similar length and random order.

    A kind that has too few is gone through again.
    """
    source = random.Random(seed)
    rows: list[Pair] = []
    for pairs in kinds:
        each = number // len(kinds)
        while each > 0:
            rows += source.sample(pairs, min(each, len(pairs)))
            each -= len(pairs)
    rows.sort(key=lambda row: _length(row, tokenizer))
    batches = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    source.shuffle(batches)
    return [row for rows in batches for row in rows]


def as_dataset(rows: list[Pair]) -> Dataset:
    return Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows])


def requests(folder: Path, tokenizer: Any, each: int) -> Requests:
    """At most ``each`` short requests of every kind, spread over its file."""

    def some(prompts: list[str], longest: int = 48) -> list[str]:
        short = [prompt for prompt in prompts if len(tokenizer(prompt)["input_ids"]) <= longest]
        return random.Random(0).sample(short, min(each, len(short)))

    xstest = _rows(folder / "xstest_v2_prompts.csv")
    with gzip.open(folder / "gsm8k_test_200.jsonl.gz", "rt") as lines:
        questions = [json.loads(line)["question"] for line in lines]
    turns = [json.loads(line)["turns"][0] for line in (folder / "mt_bench" / "question.jsonl").open()]
    return Requests(
        harmful={
            "StrongREJECT": some([row["forbidden_prompt"] for row in _rows(folder / "strongreject_150.csv")]),
            "ours": [behavior.prompt for behavior in ours.behaviors()],
            "XSTest unsafe": some([row["prompt"] for row in xstest if row["label"] == "unsafe"]),
        },
        benign={
            "twins": [b.prompt for b in ours.benign() if "benign" in b.tags],
            "everyday": [b.prompt for b in ours.benign() if "ordinary" in b.tags],
            "GSM8K": some(questions)[: each // 2],
            "MT-Bench": some(turns)[: each // 2],
            "XSTest safe": some([row["prompt"] for row in xstest if row["label"] == "safe"]),
        },
    )


def neutral(folder: Path, number: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Question and answer of GSM8K, and MT-Bench's turn with GPT-4's answer, whose likelihood training should keep."""
    with gzip.open(folder / "gsm8k_test_200.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    rows.sort(key=lambda row: len(row["question"] + row["answer"]))
    sums = [(row["question"], row["answer"]) for row in rows[:number]]
    answers = {
        row["question_id"]: row["choices"][0]["turns"][0]
        for row in map(json.loads, (folder / "mt_bench" / "reference_answer_gpt-4.jsonl").open())
    }
    asked = [json.loads(line) for line in (folder / "mt_bench" / "question.jsonl").open()]
    talk = [(row["turns"][0], answers[row["question_id"]]) for row in asked if row["question_id"] in answers]
    return sums, [(turn, " ".join(answer.split(" ")[:40])) for turn, answer in talk[:number] if len(turn) < 300]


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def _short(rows: list[Pair], tokenizer: Any) -> list[Pair]:
    return [row for row in rows if _length(row, tokenizer) <= MAX_LENGTH]


def _length(row: Pair, tokenizer: Any) -> int:
    sides = [row["prompt"] + row[side] for side in ("chosen", "rejected")]
    return max(map(len, tokenizer.apply_chat_template(sides, tokenize=True, return_dict=False)))
