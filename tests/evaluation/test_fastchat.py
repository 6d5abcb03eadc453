"""FastChat's files: what is written reads as FastChat's own, what is malformed is named by its line."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plot_align.errors import InputError
from plot_align.evaluation import fastchat
from plot_align.evaluation.fastchat import Question, rating, read_answers, read_bench

PROMPTS = {
    "single-v1": "Q {question} A {answer}",
    "single-math-v1": "Q {question} R {ref_answer_1} A {answer}",
    "single-v1-multi-turn": "{question_1} {answer_1} {question_2} {answer_2}",
    "single-math-v1-multi-turn": "{ref_answer_1} {ref_answer_2} {question_1} {answer_1} {question_2} {answer_2}",
}


def lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def prompt(name: str, template: str) -> dict[str, Any]:
    return {"name": name, "system_prompt": "Judge.", "prompt_template": template, "output_format": "[[rating]]"}


def small_bench(folder: Path) -> Path:
    """Two questions, one of them with a reference."""
    lines(
        folder / "question.jsonl",
        [
            {"question_id": 1, "category": "writing", "turns": ["one {answer}", "two"]},
            {"question_id": 2, "category": "math", "turns": ["three", "four"], "reference": ["", "x"]},
        ],
    )
    lines(folder / "judge_prompts.jsonl", [prompt(*entry) for entry in PROMPTS.items()])
    lines(
        folder / "reference_answer_gpt-4.jsonl", [{"question_id": 2, "choices": [{"index": 0, "turns": ["r1", "r2"]}]}]
    )
    return folder


# ---------------------------------------------------------------------------------------------- ratings


def fastchats_score(judgment: str) -> Any:
    """The rule of run_judge_single: re.search of either pattern, then ast.literal_eval."""
    match = re.search(r"\[\[(\d+\.?\d*)\]\]", judgment) or re.search(r"\[(\d+\.?\d*)\]", judgment)
    return ast.literal_eval(match.groups()[0]) if match else -1


NUMBERS = st.integers(0, 12).map(str) | st.floats(0, 12).map(lambda x: f"{x:.2f}") | st.sampled_from(["5.", ".5", ""])
PIECES = st.sampled_from(["[", "]", "Rating: ", "/10"]) | st.builds("[{}]".format, NUMBERS)
JUDGMENTS = st.lists(PIECES | st.builds("[[{}]]".format, NUMBERS), max_size=4).map("".join)


@given(JUDGMENTS)
def test_ratings_are_fastchats_where_they_lie_between_1_and_10(text: str) -> None:
    expected = fastchats_score(text)
    found = rating(text)
    assert found == (expected if 1 <= expected <= 10 else None)
    assert found is None or type(found) is type(expected)


@given(st.text())
def test_any_judgement_has_a_rating_or_none(text: str) -> None:
    assert rating(text) is None or 1 <= rating(text) <= 10


@pytest.mark.parametrize(
    ("judgment", "expected"),
    [
        ("Rating: [[7]]", 7),
        ("Rating: [[7.5]]", 7.5),
        ("It is [3] in places, yet: [[8]]", 8),
        ("[[4]] or rather [[6]]", 4),
        ("Rating: [9]", 9),
        ("[[10]]", 10),
        ("[[1]]", 1),
        ("[[05]]", 5),  # on which FastChat's literal_eval stops
        ("[[0]]", None),
        ("[[11]]", None),
        ("[[95]] of [[100]]", None),
        ("[[8/10]]", None),
        ("[[eight]]", None),
        ("8", None),
        ("[[-3]]", None),
        (f"[[{'9' * 5000}]]", None),  # more digits than Python turns into an integer
        ("", None),
    ],
)
def test_ratings_by_hand(judgment: str, expected: float | None) -> None:
    assert rating(judgment) == expected


# ---------------------------------------------------------------------------------------------- the benchmark


def test_the_real_benchmark(real_data: Path) -> None:
    bench = read_bench(real_data / "mt_bench")
    assert [question.id for question in bench.questions] == list(range(81, 161))
    assert {q.category for q in bench.questions} == set(fastchat.TEMPERATURES)
    assert sorted(bench.references) == list(range(101, 131))
    answers = {question.id: ("A{answer}", "B{question_2!r}") for question in bench.questions}
    requests = bench.requests(answers)
    assert len(requests) == 160
    kinds = {(request.question, request.turn): request.prompt.name for request in requests}
    for number in range(81, 161):
        kind = "single-math-v1" if 101 <= number <= 130 else "single-v1"
        assert (kinds[number, 1], kinds[number, 2]) == (kind, f"{kind}-multi-turn")


@pytest.mark.parametrize("number", [81, 111, 125])
@pytest.mark.parametrize("turn", [1, 2])
def test_a_prompt_is_the_template_with_every_slot_replaced(real_data: Path, number: int, turn: int) -> None:
    """Against a replacement by hand of the template as it stands in the file."""
    folder = real_data / "mt_bench"
    raw = {row["name"]: row for row in map(json.loads, (folder / "judge_prompts.jsonl").open(encoding="utf-8"))}
    asked = {q["question_id"]: q for q in map(json.loads, (folder / "question.jsonl").open(encoding="utf-8"))}
    bench = read_bench(folder)
    request = next(
        r
        for r in bench.requests({q.id: ("first answer", "second answer") for q in bench.questions})
        if (r.question, r.turn) == (number, turn)
    )
    name = ("single-math-v1" if number > 100 else "single-v1") + ("-multi-turn" if turn == 2 else "")
    reference = bench.references.get(number, ("", ""))
    expected = raw[name]["prompt_template"]
    for slot, text in {
        "question": asked[number]["turns"][0],
        "question_1": asked[number]["turns"][0],
        "question_2": asked[number]["turns"][1],
        "answer": "first answer",
        "answer_1": "first answer",
        "answer_2": "second answer",
        "ref_answer_1": reference[0],
        "ref_answer_2": reference[1],
    }.items():
        expected = expected.replace(f"{{{slot}}}", text)
    assert request.text == expected
    assert request.messages == [
        {"role": "system", "content": raw[name]["system_prompt"]},
        {"role": "user", "content": expected},
    ]


@given(first=st.text(), second=st.text())
def test_braces_in_answers_stay_as_they_are(tmp_path_factory: pytest.TempPathFactory, first: str, second: str) -> None:
    bench = read_bench(small_bench(tmp_path_factory.getbasetemp() / "braces"))
    turn_1, turn_2 = bench.requests({1: (first, second), 2: (first, second)})[:2]
    assert turn_1.text == "Q one {answer} A " + first
    assert turn_2.text == f"one {{answer}} {first} two {second}"


def test_slots_in_an_answer_are_not_filled(tmp_path: Path) -> None:
    bench = read_bench(small_bench(tmp_path))
    nasty = "{question} {ref_answer_1} {{}} {0} {answer.__class__} }{"
    requests = bench.requests({1: ("a", "b"), 2: (nasty, nasty)})
    assert requests[2].text == f"Q three R r1 A {nasty}"
    assert requests[3].text == f"r1 r2 three {nasty} four {nasty}"


def test_half_an_emoji_can_be_sent(tmp_path: Path) -> None:
    bench = read_bench(small_bench(tmp_path), ["writing"])
    text = bench.requests({1: ("half \ud83d, whole \U0001f600", "")})[0].text
    assert text == "Q one {answer} A half \ufffd, whole \U0001f600"
    text.encode()


def test_an_empty_system_prompt_is_not_sent() -> None:
    request = fastchat.Request(1, 1, fastchat.Prompt("single-v1", "", ""), "rate this")
    assert request.messages == [{"role": "user", "content": "rate this"}]


def test_categories_leave_the_others_out_but_not_out_of_the_digest(tmp_path: Path) -> None:
    folder = small_bench(tmp_path)
    (folder / "reference_answer_gpt-4.jsonl").rename(folder / "away")
    bench = read_bench(folder, ["writing"])  # needs no reference
    assert [question.id for question in bench.questions] == [1]
    (folder / "away").rename(folder / "reference_answer_gpt-4.jsonl")
    assert bench.digest == read_bench(folder).digest


def test_references_lie_flat_or_in_fastchats_folder(tmp_path: Path) -> None:
    folder = small_bench(tmp_path)
    (folder / "reference_answer").mkdir()
    (folder / "reference_answer_gpt-4.jsonl").rename(folder / "reference_answer" / "gpt-4.jsonl")
    assert read_bench(folder).references == {2: ("r1", "r2")}


QUESTION = {"question_id": 1, "category": "writing", "turns": ["a", "b"]}


@pytest.mark.parametrize(
    ("file", "rows", "told"),
    [
        ("question.jsonl", [QUESTION, "{nonsense"], "line 2 is no valid JSON"),
        ("question.jsonl", [QUESTION, "[" * 100_000], "line 2 is no valid JSON"),
        ("question.jsonl", [QUESTION, "", [1]], "line 3 is .1., expected an object"),
        ("question.jsonl", [QUESTION, QUESTION], "line 2 is another question 1"),
        ("question.jsonl", [QUESTION | {"question_id": "1"}], "line 1: question_id is '1', expected a whole number"),
        ("question.jsonl", [QUESTION | {"question_id": True}], "line 1: question_id is True"),
        ("question.jsonl", [QUESTION | {"category": "maths"}], "line 1: category is 'maths', expected writing, "),
        ("question.jsonl", [QUESTION | {"category": ["math"]}], "line 1: category is "),
        ("question.jsonl", [QUESTION | {"turns": ["one"]}], "line 1: turns is .'one'., expected two texts"),
        ("question.jsonl", [QUESTION | {"turns": [1, 2]}], "line 1: turns is .1, 2., expected two texts"),
        ("question.jsonl", [QUESTION | {"turns": ["one", " "]}], "line 1 has an empty turn"),
        ("question.jsonl", [{"question_id": 1, "category": "math"}], "line 1: turns is missing"),
        ("question.jsonl", [], "is empty"),
        ("judge_prompts.jsonl", [prompt("single-v1", "{question")], "line 1: prompt_template has unmatched braces"),
        (
            "judge_prompts.jsonl",
            [prompt("single-v1", "{question}")],
            "line 1: .* has the slots .'question'., expected",
        ),
        ("judge_prompts.jsonl", [prompt("single-v1", "{question.x} {answer}")], "line 1: .* has the slots "),
        (
            "judge_prompts.jsonl",
            [prompt("single-v1", PROMPTS["single-v1"]) | {"output_format": "[[A]]"}],
            r"line 1: output_format is '\[\[A\]\]', expected \[\[rating\]\]",
        ),
        ("judge_prompts.jsonl", [{"name": "single-v1"}], "line 1: system_prompt is missing, expected text"),
        ("judge_prompts.jsonl", [{"name": ["single-v1"]}], "lack single-v1, single-math-v1, "),
        ("reference_answer_gpt-4.jsonl", [], "have none for question 2"),
        ("reference_answer_gpt-4.jsonl", [{"question_id": 2, "choices": []}], "line 1 has no choices"),
        ("reference_answer_gpt-4.jsonl", [{"question_id": 2, "choices": [{}]}], "line 1: turns is missing"),
    ],
)
def test_malformed_files_name_the_line(tmp_path: Path, file: str, rows: list[Any], told: str) -> None:
    lines(small_bench(tmp_path) / file, rows)
    with pytest.raises(InputError, match=told) as caught:
        read_bench(tmp_path)
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["question.jsonl", "judge_prompts.jsonl", "reference_answer_gpt-4.jsonl"])
def test_a_missing_file_is_named(tmp_path: Path, file: str) -> None:
    (small_bench(tmp_path) / file).unlink()
    with pytest.raises(InputError, match=r"cannot be read \(No such file or directory\)"):
        read_bench(tmp_path)


def test_a_file_of_another_encoding_and_a_category_without_questions(tmp_path: Path) -> None:
    folder = small_bench(tmp_path)
    with pytest.raises(InputError, match="no question of the category 'stem'"):
        read_bench(folder, ["math", "stem"])
    (folder / "question.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        read_bench(folder)


@given(st.text(max_size=60))
def test_any_question_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = small_bench(tmp_path_factory.getbasetemp() / "any")
    (folder / "question.jsonl").write_text(text, encoding="utf-8", errors="replace")
    with pytest.raises(InputError):
        read_bench(folder)


# ---------------------------------------------------------------------------------------------- answers, judgements


def test_answers_have_fastchats_fields(real_data: Path, tmp_path: Path) -> None:
    """As the answers that FastChat itself wrote: its reference answers."""
    with (real_data / "mt_bench" / "reference_answer_gpt-4.jsonl").open(encoding="utf-8") as file:
        theirs = json.loads(file.readline())
    ours = fastchat.answer_row("tiny", Question(7, "math", ("a", "b")), ("line\u2028end", "{\ud83d}"))
    assert list(ours) == list(theirs)
    assert [type(value) for value in ours.values()] == [type(value) for value in theirs.values()]
    assert len(ours["answer_id"]) == len(theirs["answer_id"])
    assert list(ours["choices"][0]) == list(theirs["choices"][0])
    path = tmp_path / "tiny.jsonl"
    fastchat.write_answers(path, {7: ours, 3: {**ours, "question_id": 3}})
    assert [json.loads(line)["question_id"] for line in path.read_text().splitlines()] == [3, 7]
    assert read_answers(path)[7] == ("line\u2028end", "{\ud83d}")
    path.write_text(json.dumps({**ours, "choices": [{"turns": ["line\u2028end", ""]}]}, ensure_ascii=False))
    assert read_answers(path)[7] == ("line\u2028end", "")


def test_the_last_answer_and_its_first_choice_count(tmp_path: Path) -> None:
    choices = [{"index": 0, "turns": ["a", "b"]}, {"index": 1, "turns": ["c", "d"]}]
    lines(tmp_path / "x.jsonl", [{"question_id": 1, "choices": choices[::-1]}, {"question_id": 1, "choices": choices}])
    assert read_answers(tmp_path / "x.jsonl") == {1: ("a", "b")}


def judgment(number: int, turn: int, text: str = "[[7]]") -> dict[str, Any]:
    request = fastchat.Request(number, turn, fastchat.Prompt("single-v1", "", ""), "prompt")
    return fastchat.judgment_row("tiny", "gpt-4", request, text)


def test_judgements_have_the_fields_of_play_a_match_single() -> None:
    row = json.loads(json.dumps(judgment(81, 2)))
    kinds = {
        "question_id": int,
        "model": str,
        "judge": list,
        "user_prompt": str,
        "judgment": str,
        "score": int,
        "turn": int,
        "tstamp": float,
    }
    assert {key: type(value) for key, value in row.items()} == kinds
    assert list(row) == list(kinds)
    assert row["judge"] == ["gpt-4", "single-v1"]
    assert row["score"] == 7
    assert [judgment(1, 1, text)["score"] for text in ("[[7.5]]", "[[95]]", "no idea")] == [7.5, -1, -1]


def test_an_altered_answer_or_rating_is_not_believed(tmp_path: Path) -> None:
    answers, judgments = tmp_path / "tiny.jsonl", tmp_path / "gpt-4_single.jsonl"
    fastchat.write_answers(answers, {1: fastchat.answer_row("tiny", Question(1, "math", ("a", "b")), ("six", "ten"))})
    fastchat.append_judgment(judgments, judgment(1, 1))
    fastchat.append_judgment(judgments, judgment(1, 2))
    fastchat.write_judgments(judgments, fastchat.read_judgments(judgments))
    for path, old, new, read in (
        (answers, "six", "sin", fastchat.read_answer_rows),
        (judgments, "[[7]]", "[[9]]", fastchat.read_judgments),
    ):
        text = path.read_text()
        assert read(path)
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(InputError, match=r"line 1 was altered after it was written; delete the line"):
            read(path)


def test_an_unfinished_last_line_is_left_out_and_a_broken_one_before_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gpt-4_single.jsonl"
    fastchat.append_judgment(path, judgment(1, 1))
    fastchat.append_judgment(path, judgment(1, 2))
    whole = path.read_text()
    second = whole.index("\n") + 1
    for cut in range(second, len(whole) - 1):
        path.write_text(whole[:cut])
        assert [row["turn"] for row in fastchat.read_judgments(path)] == [1]
    path.write_text(whole[:-1])  # only its end of line is missing
    assert [row["turn"] for row in fastchat.read_judgments(path)] == [1, 2]
    path.write_text(whole[: second - 5] + "\n" + whole[second:])
    with pytest.raises(InputError, match="line 1 is no valid JSON"):
        fastchat.read_judgments(path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"question_id": None}, "question_id is missing"),
        ({"turn": "1"}, "turn is '1'"),
        ({"judge": "gpt-4"}, "judge is 'gpt-4', expected two texts"),
        ({"user_prompt": 3}, "user_prompt is 3, expected text"),
        ({"judgment": None}, "judgment is missing"),
        ({"model": {}}, "model is "),
    ],
)
def test_malformed_judgements_name_the_line(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    lines(tmp_path / "x.jsonl", [judgment(1, 1), judgment(1, 2) | change])
    with pytest.raises(InputError, match=f"line 2: {told}"):
        fastchat.read_judgments(tmp_path / "x.jsonl")


def test_judgements_are_sorted_by_question_and_turn(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    fastchat.write_judgments(path, [judgment(2, 1), judgment(1, 2), judgment(1, 1)])
    assert [(row["question_id"], row["turn"]) for row in fastchat.read_judgments(path)] == [(1, 1), (1, 2), (2, 1)]
