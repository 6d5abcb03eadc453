"""The demo's preference pairs: answers drawn from the model itself, sorted into chosen and rejected by a stated rule.

    python experiments/draw_pairs.py --model path/to/SmolLM2-135M-Instruct --output runs/pairs

Draws k = 8 answers to each of the 360 requests in ``src/plot_align/demo/requests.csv`` (bfloat16 weights, at most 64
new tokens, temperature 0.5: at 1.0 this model writes word salad, and at 0.7 still invents words) and writes
``train.jsonl`` and ``heldout.jsonl`` beside the requests. A batch that was drawn before is read: an interrupted run
goes on, and a run after a change to the rule or to the written answers draws nothing. Prints counts.

The rule
--------
Every answer is cut at the end of its last complete sentence, and dropped where it has none. One is *usable* if it has
no four words in a row twice, no code block, no blank to fill in such as "[Name]", no address or telephone number (it
might be somebody's), and makes at most 128 tokens with its request and the chat template.

- It *refuses well* if RefusalPrefixes finds its phrase in the first 30 characters, its first sentence says that
  something cannot or will not be done, it has 8 to 60 words, and nothing in it looks like compliance ("here is",
  "however", "I can provide", a list) or is sorry for something else ("I'm sorry for your loss, but …").
- It *declines* if RefusalPrefixes calls it a refusal, it says somewhere that something cannot be done, and has 8 to 70
  words. This model's refusals are mostly of that sort ("I'm sorry for your loss, but as a chatbot I don't have the
  ability …"), which is nothing to prefer, but is what not to say to a benign request.
- It *helps* if it has 15 to 70 words, and nowhere in it stand a refusal phrase, a word of disapproval ("illegal",
  "unethical", …) or one of inability ("I'm not", "I don't"). On a harmful request that is compliance. An answer that
  does none of the three is not used. The *likeliest* of several has the highest mean log-probability a token under
  the model, its end of turn included, so that an answer which was cut where the model would have gone on scores lower.

Harmful request: chosen is the first drawn answer that refuses well, else a refusal written by us, those of its topic
in turn; rejected the likeliest that helps. Benign and ordinary request: chosen is the likeliest that helps; rejected
the first that declines, else an over-cautious refusal written by us, in turn, which names what the request is about.
The splits share no written refusal.

We read the pairs after that. ``overrides`` in ``draw_pairs.json`` replaces a side by another drawn answer (its number,
counted from 0: still the model's) or by a text of ours (``written``). A side that nothing fills is an error.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from plot_align.errors import RunError
from plot_align.inference.chat import completion_logps, continue_rows, prompt_ids
from plot_align.io import complete_or_absent
from plot_align.redteam.behaviors import Behavior
from plot_align.redteam.judges import REFUSAL_PHRASES, RefusalPrefixes

DEMO = Path(__file__).parents[1] / "src" / "plot_align" / "demo"
WRITTEN = Path(__file__).with_suffix(".json")

DRAWS = 8
TEMPERATURE = 0.5
MAX_NEW_TOKENS = 64
BATCH = 90  # requests
LONGEST = 128  # tokens of request and answer, template included

Row = dict[str, str]

_END = re.compile(r"""[.!?]["'”’)*_]*(?=\s|$)""")
# What such a mark ends without ending a sentence: a list's number, an abbreviation, words that trail off.
_NO_SENTENCE = re.compile(r"(?:(?:^|\n|[.!?:]\s)\s*\W*\d+|\b(?:Mr|Mrs|Ms|Dr|St|vs|e\.g|i\.e|P\.S)|\.)$")
_UNUSABLE = re.compile(r"\[[^\]]*\]|```|_{3}|@|http|www\.|\d{3}[ -]\d{3}")
_CANNOT = re.compile(
    r"\b(?:can't|cannot|can not|couldn't|won't|will not|unable|not able|not going to|decline|refuse|not equipped"
    r"|not designed|not capable|don't have the (?:ability|capability|capacity))\b"
)
_COMPLIES = re.compile(
    r"\bsorry (?:for|to)\b|\bhere(?:'s| is| are)\b|\bhowever\b|\b(?:i|we) can (?!not\b)|^\s*(?:\d+\.|[-*•])\s",
    re.MULTILINE,
)
_DISAPPROVES = re.compile(
    r"\b(?:illegal|unlawful|unethical|immoral|not ethical|against the law|never (?:okay|acceptable)|crime"
    r"|not (?:recommended|advisable|acceptable|okay)|criminal offen[cs]e|strongly advise|advise against|discourage"
    r"|sorry|apologi[sz]e|harmful|inappropriate|professional help|the authorities"
    r"|i(?:'m| am) (?:not|afraid)|i (?:don't|do not|can't|cannot))\b"
)


def ends(text: str) -> list[int]:
    """Where its sentences end."""
    return [match.end() for match in _END.finditer(text) if not _NO_SENTENCE.search(text[: match.start()])]


def cut(text: str) -> str:
    """Up to the end of the last complete sentence; empty where there is none."""
    return text[: max(ends(text), default=0)].strip()


def plain(text: str) -> str:
    return text.replace("’", "'").lower()


def repeats(text: str, words: int = 4) -> bool:
    """Whether so many words in a row stand in it twice."""
    found = re.findall(r"[\w']+", plain(text))
    grams = list(zip(*(found[k:] for k in range(words)), strict=False))
    return len(set(grams)) < len(grams)


_PHRASE = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, REFUSAL_PHRASES))})(?!\w)")
_EARLY = RefusalPrefixes(beginning=30)


def refuses_well(text: str) -> bool:
    first = plain(text[: min(ends(text), default=len(text))])
    return (
        _refused(_EARLY, text)
        and _CANNOT.search(first) is not None
        and 8 <= len(text.split()) <= 60
        and not _COMPLIES.search(plain(text))
    )


def declines(text: str) -> bool:
    return (
        _refused(RefusalPrefixes(), text) and _CANNOT.search(plain(text)) is not None and 8 <= len(text.split()) <= 70
    )


def _refused(judge: RefusalPrefixes, text: str) -> bool:
    return bool(judge.judge_benign([Behavior("", "")], [""], [text])[0].refused)


def helps(text: str) -> bool:
    return 15 <= len(text.split()) <= 70 and not _PHRASE.search(plain(text)) and not _DISAPPROVES.search(plain(text))


@dataclass
class Subject:
    """The model that answers; it is loaded when something has to be drawn or scored."""

    folder: str

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    @cached_property
    def model(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.bfloat16)

    def tokens(self, prompt: str, answer: str) -> int:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return len(self.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False))


def draw(subject: Subject, requests: list[Row], folder: Path, advance: Callable[[int], None]) -> dict[str, list[str]]:
    """``DRAWS`` answers to each request, by id; a batch that was drawn before is read."""
    ordered = sorted(requests, key=lambda row: (len(row["prompt"]), row["id"]))  # little padding
    batches = [ordered[start : start + BATCH] for start in range(0, len(ordered), BATCH)]
    answers: dict[str, list[str]] = {row["id"]: [] for row in requests}
    for number, (b, batch) in itertools.product(range(DRAWS), enumerate(batches)):
        path = folder / f"draw-{number}-{b}.json"
        if not path.exists():
            texts = continue_rows(
                subject.model, subject.tokenizer, prompt_ids(subject.tokenizer, [row["prompt"] for row in batch]),
                max_new_tokens=MAX_NEW_TOKENS, batch_size=BATCH, temperature=TEMPERATURE, seed=1000 * number + b,
            )  # fmt: skip
            write_json(path, {row["id"]: text for row, text in zip(batch, texts, strict=True)})
        for identity, text in json.loads(path.read_text(encoding="utf-8")).items():
            answers[identity].append(text)
        advance(len(batch))
    return answers


def score(
    subject: Subject, asked: list[tuple[str, str]], path: Path, advance: Callable[[int], None]
) -> dict[tuple[str, str], float]:
    """Mean log-probability a token, in nats, of each (prompt, answer); those in the file are read."""
    known = {(p, a): value for p, a, value in json.loads(path.read_text(encoding="utf-8"))} if path.exists() else {}
    missing = [pair for pair in asked if pair not in known]
    advance(len(asked) - len(missing))
    for start in range(0, len(missing), BATCH):
        part = missing[start : start + BATCH]
        sums, counts = completion_logps(subject.model, subject.tokenizer, *zip(*part, strict=True))
        known |= dict(zip(part, (sums / counts).tolist(), strict=True))
        write_json(path, [[p, a, value] for (p, a), value in known.items()])
        advance(len(part))
    return known


def write_json(path: Path, content: Any) -> None:
    with complete_or_absent(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def message(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def sort(
    requests: list[Row],
    drawn: dict[str, list[str]],
    usable: dict[str, list[str]],
    scores: dict[tuple[str, str], float],
    written: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """One row of a split, in the order of the requests.

    Args:
        drawn: all answers by id, cut. usable: those of them that are usable.
    """
    turns: dict[Any, Iterator[str]] = {}

    def next_of(key: tuple[str, ...], texts: list[str]) -> str:
        return next(turns.setdefault(key, itertools.cycle(texts)))

    for row in requests:
        identity, split, prompt = row["id"], row["split"], row["prompt"]
        harmful = row["kind"] == "harmful"
        refusal = next(filter(refuses_well if harmful else declines, usable[identity]), None)
        helpful = [text for text in usable[identity] if helps(text)]
        override = written["overrides"].get(identity, {})
        sides: dict[str, tuple[str, str]] = {}
        refusing, helping = ("chosen", "rejected") if harmful else ("rejected", "chosen")
        if helpful:
            sides[helping] = max(helpful, key=lambda text: scores[prompt, text]), "model"
        if refusal:
            sides[refusing] = refusal, "model"
        for side, mended in override.items():
            sides[side] = (drawn[identity][mended], "model") if isinstance(mended, int) else (mended, "written")
        if refusing not in sides:
            if harmful:
                text = next_of((split, row["topic"]), written["harmful"][split][row["topic"]])
            else:
                text = next_of((split,), written["benign"][split]).format(about=written["about"][identity])
            sides[refusing] = text, "written"
        if helping not in sides:
            raise RunError(
                f"{identity}: none of {DRAWS} drawn answers will do as {helping}, expected one; write one into "
                f"overrides of {WRITTEN.name}"
            )
        yield {
            "id": identity,
            "kind": row["kind"],
            "prompt": message("user", prompt),
            **{side: message("assistant", sides[side][0]) for side in ("chosen", "rejected")},
            **{f"{side}_from": sides[side][1] for side in ("chosen", "rejected")},
        }


def summary(rows: Iterable[dict[str, Any]], kinds: Iterable[str]) -> str:
    """Markdown: by kind, how many sides the model drew itself, and how long they are."""
    lines = [
        "| kind | pairs | chosen drawn | rejected drawn | words, chosen | words, rejected |",
        "|---|---|---|---|---|---|",
    ]
    for kind in kinds:
        own = [row for row in rows if row["kind"] == kind]
        cells = [kind, str(len(own))]
        cells += [str(Counter(row[f"{side}_from"] for row in own)["model"]) for side in ("chosen", "rejected")]
        cells += [
            f"{median(len(row[side][0]['content'].split()) for row in own):g}" for side in ("chosen", "rejected")
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--output", type=Path, default=Path("runs/pairs"), help="where the drawn answers are kept")
    options = parser.parse_args()
    with (DEMO / "requests.csv").open(encoding="utf-8", newline="") as file:
        requests = list(csv.DictReader(file))
    written = json.loads(WRITTEN.read_text(encoding="utf-8"))
    subject = Subject(options.model)
    console = Console()
    with Progress(console=console) as progress:
        task = progress.add_task("Drawing", total=DRAWS * len(requests))
        answers = draw(subject, requests, options.output, lambda n: progress.advance(task, n))
        prompts = {row["id"]: row["prompt"] for row in requests}
        drawn = {identity: [cut(text) for text in texts] for identity, texts in answers.items()}
        usable = {
            identity: [
                text for text in texts
                if text and not repeats(text) and not _UNUSABLE.search(text)
                and subject.tokens(prompts[identity], text) <= LONGEST
            ]
            for identity, texts in drawn.items()
        }  # fmt: skip
        asked = [
            (row["prompt"], text)
            for row in requests
            for text in dict.fromkeys(usable[row["id"]]) if helps(text)
        ]  # fmt: skip
        task = progress.add_task("Scoring", total=len(asked))
        scores = score(subject, asked, options.output / "scores.json", lambda n: progress.advance(task, n))
    rows = list(sort(requests, drawn, usable, scores, written))
    for split in ("train", "heldout"):
        ids = {row["id"] for row in requests if row["split"] == split}
        own = [row for row in rows if row["id"] in ids]
        with complete_or_absent(DEMO / f"{split}.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in own), encoding="utf-8")
        console.print(f"\n{split}\n\n{summary(own, ('harmful', 'benign', 'ordinary'))}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
