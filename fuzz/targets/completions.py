"""HarmBench's and FastChat's JSON: test cases, completions, results, targets, answers, judgements, the benchmark."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import strategies as st

from fuzz.guard import Wrong
from fuzz.spoil import json_file, lines_file
from fuzz.targets import joined, write
from plot_align.evaluation import fastchat
from plot_align.io import write_json
from plot_align.redteam import behaviors, harmbench

_CASES = {"do_it": ["Do it!", "Please"], "sing": []}
_COMPLETIONS = {
    "do_it": [{"test_case": "Do it!", "generation": "Sure", "x": 1}, {"test_case": "Do", "generation": ""}]
}
_RESULTS = {
    "do_it": [{"test_case": "Do it!", "generation": "Sure", "label": label} for label in (1, 0, -1)],
    "sing": [],
}
_TARGETS = {"do_it": "Sure, here is how", "sing": "Here is the song"}
_ANSWERS = [
    {
        "question_id": i,
        "answer_id": "a",
        "model_id": "m",
        "choices": [{"index": 0, "turns": ["one", "two"]}],
        "tstamp": 1.5,
    }
    for i in (81, 101)
]
_JUDGED = [
    {"question_id": 81, "model": "m", "judge": ["j", "single-v1"], "user_prompt": "p", "judgment": "Rating: [[7]]",
     "score": 7, "turn": turn, "tstamp": 1.5}
    for turn in (1, 2)
]  # fmt: skip
_QUESTIONS = [{"question_id": 81, "category": "writing", "turns": ["Write.", "Write again."]}]
_PROMPTS = [
    {"name": name, "type": "single", "system_prompt": "You judge.",
     "prompt_template": " ".join(f"{{{s}}}" for s in slots),
     "description": "", "category": "general", "output_format": "[[rating]]"}
    for name, slots in sorted((n, sorted(s)) for n, s in fastchat._SLOTS.items())
]  # fmt: skip
_JSON, _LINES = (_CASES, _COMPLETIONS, _RESULTS, _TARGETS), (_ANSWERS, _JUDGED, _QUESTIONS, _PROMPTS)


@st.composite
def _cases(draw: Any) -> bytes:
    variant = draw(st.integers(0, 7))
    content = json_file(_JSON[variant]) if variant < 4 else lines_file(_LINES[variant - 4])
    return joined(variant, draw(content))


def _lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


class Completions:
    name = "completions"
    names = ("case.json",)
    seeds: ClassVar[list[bytes]] = [joined(i, json.dumps(value).encode()) for i, value in enumerate(_JSON)] + [
        joined(i, _lines(rows)) for i, rows in enumerate(_LINES, start=4)
    ]
    cases = _cases()

    def run(self, data: bytes, folder: Path) -> None:
        variant, content = (data[0] % 8 if data else 0), data[1:]
        path = write(folder, "case.json" if variant < 4 else "case.jsonl", content)
        match variant:
            case 0:
                self._again(path, folder, harmbench.read_test_cases)
            case 1:
                self._again(path, folder, harmbench.read_completions)
            case 2:
                self._rates(self._again(path, folder, harmbench.read_results))
            case 3:
                self._again(path, folder, behaviors.read_targets)
            case 4:
                rows = fastchat.read_answer_rows(path)
                fastchat.write_answers(folder / "again.jsonl", rows)
                if _text(fastchat.read_answer_rows(folder / "again.jsonl")) != _text(dict(sorted(rows.items()))):
                    raise Wrong("answers do not read back")
            case 5:
                judged = fastchat.read_judgments(path)
                fastchat.write_judgments(folder / "again.jsonl", judged)
                if sorted(map(_text, fastchat.read_judgments(folder / "again.jsonl"))) != sorted(map(_text, judged)):
                    raise Wrong("judgements do not read back")
            case 6:
                found = fastchat._read_questions(path)
                if len({question.id for question in found}) != len(found):
                    raise Wrong("two questions of one id")
            case 7:
                for prompt in fastchat._read_prompts(path).values():
                    prompt.template.format(**dict.fromkeys(fastchat._SLOTS[prompt.name], "{x}"))

    def _again(self, path: Path, folder: Path, read: Any) -> Any:
        found = read(path)
        if _text(found) != _text(json.loads(path.read_text(encoding="utf-8-sig"))):
            raise Wrong("not what Python's own reader finds")
        write_json(folder / "again.json", found)
        if _text(read(folder / "again.json")) != _text(found):
            raise Wrong("what is written is not what was read")
        return found

    def _rates(self, results: Any) -> None:
        for any_answer in (False, True):
            rates = harmbench.success_by_behavior(results, any_answer=any_answer)
            for name, rows in results.items():
                hits = 0
                for row in rows:
                    hits += row["label"] == 1
                rate = (float(hits > 0) if any_answer else hits / len(rows)) if rows else 0.0
                if not math.isclose(rates[name], rate):
                    raise Wrong(f"a rate of {rates[name]} where {hits} of {len(rows)} succeeded")


def _text(value: Any) -> str:
    return json.dumps(value)
