"""Read and write FastChat's files of MT-Bench: questions, judge prompts, reference answers, answers, judgements.

All are JSON lines. A folder of the benchmark holds ``question.jsonl``, ``judge_prompts.jsonl`` and the references in
``reference_answer/gpt-4.jsonl`` (or ``reference_answer_gpt-4.jsonl``); a run writes ``model_answer/{model}.jsonl`` and
``model_judgment/{judge}_single.jsonl``.

Source: L. Zheng et al., "Judging LLM-as-a-judge with MT-Bench and Chatbot Arena" (arXiv 2306.05685) and
``fastchat/llm_judge`` of github.com/lm-sys/FastChat.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import string
import time
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plot_align.errors import InputError
from plot_align.io import complete_or_absent, fits, no_link, parse_json
from plot_align.text import sendable

TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "reasoning": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "extraction": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}  # of the answers, by category
WITH_REFERENCE = ("math", "reasoning", "coding")  # judged with a reference answer
WORST, BEST = 1, 10
UNPARSABLE = -1  # the score of a judgement without a rating
_CHECKSUM = "checksum"  # the field of the rows that we write
_SLOTS = {
    "single-v1": {"question", "answer"},
    "single-math-v1": {"question", "answer", "ref_answer_1"},
    "single-v1-multi-turn": {"question_1", "question_2", "answer_1", "answer_2"},
    "single-math-v1-multi-turn": {"question_1", "question_2", "answer_1", "answer_2", "ref_answer_1", "ref_answer_2"},
}  # judge prompt → exactly the slots that its template must have
_RATINGS = (re.compile(r"\[\[(\d+(?:\.\d*)?)\]\]"), re.compile(r"\[(\d+(?:\.\d*)?)\]"))  # linear in a run of digits

Turns = tuple[str, str]
Row = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """Two user turns; the category decides the temperature of the answer and how it is judged."""

    id: int
    category: str
    turns: Turns


@dataclass(frozen=True)
class Prompt:
    """A judge prompt; ``template`` has slots in braces."""

    name: str
    system: str
    template: str


@dataclass(frozen=True)
class Request:
    """What a judge is sent about one turn of one answer; ``text`` is the whole user prompt."""

    question: int
    turn: int
    prompt: Prompt
    text: str

    @property
    def messages(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.prompt.system}] if self.prompt.system else []
        return [*system, {"role": "user", "content": self.text}]


@dataclass(frozen=True)
class Bench:
    """The questions of the chosen categories, and what judging their answers needs.

    Args:
        questions: in the order of the file. prompts: by name.
        references: question id → reference answers, for the categories that need them.
        digest: of every question of the file, whatever its category.
    """

    questions: tuple[Question, ...]
    prompts: Mapping[str, Prompt]
    references: Mapping[int, Turns]
    digest: str

    def requests(self, answers: Mapping[int, Turns]) -> list[Request]:
        """The requests to a judge about the answers (question id → both turns): each question's turn 1, then turn 2.

        Raises:
            InputError: a question has no answer.
        """
        missing = [question.id for question in self.questions if question.id not in answers]
        if missing:
            raise InputError(
                f"answers: {len(missing)} of {len(self.questions)} questions have none, the first is question "
                f"{missing[0]}; answer them all, or narrow categories"
            )
        return [self._request(question, turn, answers[question.id]) for question in self.questions for turn in (1, 2)]

    def _request(self, question: Question, turn: int, answers: Turns) -> Request:
        if turn == 1:
            texts = {"question": question.turns[0], "answer": answers[0]}
        else:
            texts = {"question_1": question.turns[0], "question_2": question.turns[1]}
            texts |= {"answer_1": answers[0], "answer_2": answers[1]}
        kind = "single-v1"
        if question.category in WITH_REFERENCE:
            kind = "single-math-v1"
            texts |= dict(zip(("ref_answer_1", "ref_answer_2"), self.references[question.id], strict=True))
        prompt = self.prompts[kind if turn == 1 else f"{kind}-multi-turn"]
        # In one pass, so that braces in the inserted texts stay as they are.
        return Request(question.id, turn, prompt, prompt.template.format(**{k: sendable(t) for k, t in texts.items()}))


def rating(judgment: str) -> int | float | None:
    """The score in a judge's words: the first ``[[7]]``, else the first ``[7]``; None if there is none.

    FastChat does the same, but averages in numbers outside 1 to 10. Here they are no score: ``[[95]]`` shows that the
    judge misunderstood the scale.
    """
    found = next(filter(None, (pattern.search(judgment) for pattern in _RATINGS)), None)
    if found is None or not WORST <= (score := float(found[1])) <= BEST:
        return None
    return score if "." in found[1] else int(score)  # int(found[1]) refuses thousands of zeros before the digit


# ---------------------------------------------------------------------------------------------- the benchmark, read


def read_bench(folder: str | os.PathLike[str], categories: Collection[str] | None = None) -> Bench:
    """Read the benchmark from FastChat's files.

    Args:
        folder: with ``question.jsonl``, ``judge_prompts.jsonl`` and, if a category needs them, the references.
        categories: of the questions; None for all.

    Raises:
        InputError: a file is missing or malformed (its line is named), a category has no question, or a question that
            needs a reference answer has none.
    """
    folder = Path(folder)
    everything = _read_questions(folder / "question.jsonl")
    questions = tuple(q for q in everything if categories is None or q.category in categories)
    for category in categories or ():
        if category not in {question.category for question in questions}:
            raise InputError(
                f"{folder / 'question.jsonl'} has no question of the category {category!r}; leave that one out, or "
                "name another folder"
            )
    content = json.dumps([[q.id, q.category, q.turns] for q in everything])
    needing = [question.id for question in questions if question.category in WITH_REFERENCE]
    return Bench(
        questions,
        _read_prompts(folder / "judge_prompts.jsonl"),
        _read_references(folder, needing) if needing else {},
        hashlib.sha256(content.encode()).hexdigest()[:16],
    )


def _read_questions(path: Path) -> list[Question]:
    questions: dict[int, Question] = {}
    for place, row in _rows(path, "questions"):
        number = _field(row, "question_id", place, int)
        if number in questions:
            raise InputError(f"{place} is another question {number}; give each question an id of its own")
        category = _field(row, "category", place, str, TEMPERATURES)
        turns = _two(row, "turns", place)
        if not all(turn.strip() for turn in turns):
            raise InputError(f"{place} has an empty turn, expected two questions; correct it")
        questions[number] = Question(number, category, turns)
    if not questions:
        raise InputError(f"questions {path} is empty, expected a question a line; check the file")
    return list(questions.values())


def _read_prompts(path: Path) -> dict[str, Prompt]:
    prompts: dict[str, Prompt] = {}
    for place, row in _rows(path, "judge prompts"):
        name = row.get("name")
        if not isinstance(name, str) or name not in _SLOTS:
            continue  # of pairwise judging
        prompt = Prompt(name, _field(row, "system_prompt", place, str), _field(row, "prompt_template", place, str))
        try:
            slots = {slot for _, slot, _, _ in string.Formatter().parse(prompt.template) if slot is not None}
        except ValueError as error:
            raise InputError(
                f"{place}: prompt_template has unmatched braces ({error}); double those of text"
            ) from None
        if slots != _SLOTS[name]:
            raise InputError(
                f"{place}: prompt_template of {name} has the slots {sorted(slots)}, expected {sorted(_SLOTS[name])}; "
                "write each in braces where its text goes"
            )
        _field(row, "output_format", place, str, ("[[rating]]",))
        prompts[name] = prompt
    missing = [name for name in _SLOTS if name not in prompts]
    if missing:
        raise InputError(f"judge prompts {path} lack {', '.join(missing)}; take FastChat's judge_prompts.jsonl")
    return prompts


def _read_references(folder: Path, needing: Iterable[int]) -> dict[int, Turns]:
    nested, flat = folder / "reference_answer" / "gpt-4.jsonl", folder / "reference_answer_gpt-4.jsonl"
    path = flat if flat.exists() and not nested.exists() else nested
    found = read_answers(path)
    missing = [number for number in needing if number not in found]
    if missing:
        raise InputError(
            f"reference answers {path} have none for question {missing[0]} ({len(missing)} are missing), expected one "
            f"for every question of {', '.join(WITH_REFERENCE)}; add them"
        )
    return {number: found[number] for number in needing}


# ---------------------------------------------------------------------------------------------- answers


def read_answers(path: str | os.PathLike[str]) -> dict[int, Turns]:
    """Read question id → both turns of its first choice, which is judged. The last answer to a question counts.

    Raises:
        InputError: the file is missing or malformed; the line is named.
    """
    return {number: tuple(row["choices"][0]["turns"]) for number, row in read_answer_rows(Path(path)).items()}


def read_answer_rows(path: Path) -> dict[int, Row]:
    """Like :func:`read_answers`, with the whole row of each question."""
    found: dict[int, Row] = {}
    for place, row in _rows(path, "answers"):
        if not fits(row.get("choices"), list[dict]) or not row["choices"]:
            raise InputError(f"{place} has no choices, expected [{{'index': 0, 'turns': [str, str]}}]; correct it")
        _two(row["choices"][0], "turns", place)
        found[_field(row, "question_id", place, int)] = row
    return found


def answer_row(model: str, question: Question, turns: Turns) -> Row:
    """An answer as FastChat writes it. Its id is a digest of the answer."""
    content = json.dumps([model, question.id, turns])
    return {
        "question_id": question.id,
        "answer_id": hashlib.sha256(content.encode()).hexdigest()[:22],
        "model_id": model,
        "choices": [{"index": 0, "turns": list(turns)}],
        "tstamp": time.time(),
    }


def write_answers(path: Path, rows: Mapping[int, Row]) -> None:
    """Write answers sorted by question id, like FastChat; the file is complete or absent."""
    _write(path, [rows[number] for number in sorted(rows)])


# ---------------------------------------------------------------------------------------------- judgements


def judgment_row(model: str, judge: str, request: Request, judgment: str) -> Row:
    """A judgement as FastChat writes it."""
    score = rating(judgment)
    return {
        "question_id": request.question,
        "model": model,
        "judge": [judge, request.prompt.name],
        "user_prompt": request.text,
        "judgment": judgment,
        "score": UNPARSABLE if score is None else score,
        "turn": request.turn,
        "tstamp": time.time(),
    }


def read_judgments(path: Path) -> list[Row]:
    """Read the rows of a judgement file, without an unfinished last line, which an interruption may leave.

    Raises:
        InputError: the file is malformed; the line is named.
    """
    found = []
    for place, row in _rows(path, "judgements", torn=True):
        for key, kind in {"question_id": int, "turn": int, "model": str, "user_prompt": str, "judgment": str}.items():
            _field(row, key, place, kind)
        _two(row, "judge", place)
        found.append(row)
    return found


def write_judgments(path: Path, rows: Iterable[Row]) -> None:
    """Write judgements sorted by question and turn; the file is complete or absent."""
    _write(path, sorted(rows, key=lambda row: (row["question_id"], row["turn"], row["model"])))


def append_judgment(path: Path, row: Row) -> None:
    """Append, and flush to disk before returning: a judgement may cost money."""
    with open(path, "a", encoding="utf-8", opener=no_link) as file:
        file.write(_line(row))
        file.flush()
        os.fsync(file.fileno())


# ---------------------------------------------------------------------------------------------- lines and fields


def _write(path: Path, rows: Iterable[Row]) -> None:
    with complete_or_absent(path) as temporary:
        temporary.write_text("".join(map(_line, rows)), encoding="utf-8")


def _line(row: Row) -> str:
    """A row of ours: with a checksum, by which one that was altered is known. FastChat passes over it."""
    return json.dumps({**row, _CHECKSUM: _checksum(row)}) + "\n"


def _checksum(row: Row) -> int:
    return zlib.crc32(json.dumps(row).encode())


def _rows(path: Path, what: str, *, torn: bool = False) -> Iterator[tuple[str, Row]]:
    """(file and line, row) of each line; ``torn``: a last line without its end may be cut off."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{what} {path} are not UTF-8 text; save the file as UTF-8") from None
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read ({error.strerror}); check the path") from None
    lines = text.split("\n")  # not splitlines: a string may hold other line ends
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{what} {path}: line {number}"
        try:
            row = parse_json(line)
        except ValueError as error:
            if torn and number == len(lines):
                return
            raise InputError(f"{place} is no valid JSON ({error}); correct it") from None
        if not isinstance(row, dict):
            raise InputError(f"{place} is {_shown(row)}, expected an object; correct it")
        checksum = row.pop(_CHECKSUM, None)  # missing from a file of FastChat's own
        if checksum is not None and checksum != _checksum(row):
            raise InputError(f"{place} was altered after it was written; delete the line, and it is made again")
        yield place, row


def _field(row: Row, key: str, place: str, kind: type, known: Collection[str] = ()) -> Any:
    value = row.get(key)
    if not fits(value, kind) or (known and value not in known):
        expected = ", ".join(known) or {int: "a whole number", str: "text"}[kind]
        raise InputError(f"{place}: {key} is {_shown(value)}, expected {expected}; correct it")
    return value


def _two(row: Row, key: str, place: str) -> Turns:
    value: Any = row.get(key)
    if not fits(value, list[str]) or len(value) != 2:
        raise InputError(f"{place}: {key} is {_shown(value)}, expected two texts; correct it")
    return value[0], value[1]


def _shown(value: Any) -> str:
    return "missing" if value is None else repr(value) if len(repr(value)) < 60 else f"a {type(value).__name__}"
