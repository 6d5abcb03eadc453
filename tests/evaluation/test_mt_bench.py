"""MT-Bench end to end: a tiny model answers, a real HTTP server judges, and both misbehave on order."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from plot_align.errors import InputError, RunError
from plot_align.evaluation import fastchat, mt_bench
from plot_align.evaluation.fastchat import TEMPERATURES, read_answers, read_bench
from plot_align.evaluation.mt_bench import MTBench, answer_questions, judge_answers, scores
from plot_align.evaluation.subject import Subject
from plot_align.inference.endpoint import Endpoint
from plot_align.io import file_name
from plot_align.records import read_record, write_record

pytest.importorskip("openai")
KEY = "sk-very-secret-0123456789"
Script = Callable[[dict[str, Any]], "str | int"]


def digest(text: str) -> int:
    return hashlib.sha256(text.encode()).digest()[0]


def by_content(body: dict[str, Any]) -> str:
    """A rating of 1 to 10 that the prompt alone decides."""
    return f"Let me think. Rating: [[{digest(body['messages'][-1]['content']) % 10 + 1}]]"


@dataclass
class Server:
    """A judge: what it says to a request (a number is an HTTP status), and what it was asked."""

    script: Script = by_content
    hang: float = 0.0
    seen: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    busy: int = 0
    busiest: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def prompts(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.seen]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.0)
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.seen.append(body)
                state.keys.add(self.headers["Authorization"])
                state.busy += 1
                state.busiest = max(state.busiest, state.busy)
            time.sleep(state.hang)
            said = state.script(body)
            with state.lock:
                state.busy -= 1
            answer: dict[str, Any] = {"error": {"message": "no"}}
            if isinstance(said, str):
                answer = {"choices": [{"message": {"role": "assistant", "content": said}}]}
                answer["usage"] = {"prompt_tokens": 100, "completion_tokens": 10}
            content = json.dumps(answer).encode()
            try:
                self.send_response(said if isinstance(said, int) else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                pass  # the client has gone

        def log_message(self, *args: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    state.url = f"http://127.0.0.1:{httpd.server_address[1]}/v1"
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield state
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture(scope="module")
def loaded(tiny_base: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(tiny_base).eval(), AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture
def subject(loaded: tuple[Any, Any], tmp_path: Path) -> Subject:
    return Subject(*loaded, name="tiny", source="folder", folder=tmp_path / "tiny")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A benchmark of 26 questions: 2 of each category, 12 of writing, so that writing needs two blocks."""
    counts = {category: 12 if category == "writing" else 2 for category in TEMPERATURES}
    asked = [category for category, count in counts.items() for _ in range(count)]
    path = tmp_path / "bench"
    path.mkdir()
    rows = [
        {"question_id": 50 + i, "category": category, "turns": [f"what is {i} plus {i} ?", f"and {i} plus 1 ?"]}
        for i, category in enumerate(asked)
    ]
    slots = "{question_1} | {answer_1} | {question_2} | {answer_2}"
    templates = {
        "single-v1": "{question} | {answer}",
        "single-math-v1": "{question} | {ref_answer_1} | {answer}",
        "single-v1-multi-turn": slots,
        "single-math-v1-multi-turn": slots + " | {ref_answer_1} | {ref_answer_2}",
    }
    prompts = [
        {"name": name, "system_prompt": "Be fair.", "prompt_template": template, "output_format": "[[rating]]"}
        for name, template in templates.items()
    ]
    references = [
        {"question_id": row["question_id"], "choices": [{"index": 0, "turns": ["one", "two"]}]}
        for row in rows
        if row["category"] in fastchat.WITH_REFERENCE
    ]
    for name, content in (("question", rows), ("judge_prompts", prompts), ("reference_answer_gpt-4", references)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def measure(server: Server, folder: Path, **options: Any) -> MTBench:
    return MTBench(str(folder), server.url, "gpt-4", **{"max_new_tokens": 4, **options})


def rows(path: Path, *, timeless: bool = True) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("tstamp", "checksum") or not timeless} for row in found]


def answers_of(subject: Subject) -> Path:
    return subject.folder / "mt_bench" / "model_answer" / "tiny.jsonl"


def judgments_of(subject: Subject) -> Path:
    return subject.folder / "mt_bench" / "model_judgment" / "gpt-4_single.jsonl"


# ---------------------------------------------------------------------------------------------- the real 80 questions


def test_the_real_benchmark_end_to_end(server: Server, subject: Subject, real_data: Path, tmp_path: Path) -> None:
    bars: dict[str, list[int]] = {}

    def bar(description: str, total: int) -> Callable[[int], None]:
        return bars.setdefault(description, [total]).append

    subject.bar = bar
    mtb = measure(server, real_data / "mt_bench", prices=(30.0, 60.0))
    mtb.check()
    found = mtb.run(subject)
    answers, judgments = rows(answers_of(subject), timeless=False), rows(judgments_of(subject), timeless=False)
    assert {name: (total, sum(done)) for name, (total, *done) in bars.items()} == {
        "MT-Bench answers": (80, 80),
        "MT-Bench judge": (160, 160),
    }

    # FastChat's formats, and each turn of each question asked about once.
    theirs = json.loads((real_data / "mt_bench" / "reference_answer_gpt-4.jsonl").open(encoding="utf-8").readline())
    for row in answers:
        ours = {key: type(value) for key, value in row.items() if key != "checksum"}
        assert ours == {key: type(value) for key, value in theirs.items()}
        assert row["model_id"] == "tiny"
        assert len(row["choices"][0]["turns"]) == 2
    assert [row["question_id"] for row in answers] == list(range(81, 161))
    assert len({row["answer_id"] for row in answers}) == 80
    assert [(row["question_id"], row["turn"]) for row in judgments] == [(n, t) for n in range(81, 161) for t in (1, 2)]
    assert Counter(server.prompts()) == Counter(row["user_prompt"] for row in judgments)
    assert len(server.seen) == 160
    assert server.keys == {f"Bearer {KEY}"}
    for body in server.seen:
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("gpt-4", 0.0, 2048)
        assert [message["role"] for message in body["messages"]] == ["system", "user"]

    # The numbers, recomputed from what the server must have said.
    said = {(r["question_id"], r["turn"]): digest(r["user_prompt"]) % 10 + 1 for r in judgments}
    assert [row["score"] for row in judgments] == [said[row["question_id"], row["turn"]] for row in judgments]
    score = found.quantities["score"]
    assert next(iter(found.quantities)) == "score"
    assert score["value"] == pytest.approx(statistics.fmean(said.values()))
    assert score["items"]["81"] == (said[81, 1] + said[81, 2]) / 2
    assert (score["n"], score["bounds"], score["better"], score["title"]) == (80, [1.0, 10.0], "higher", "MT-Bench")
    for turn in (1, 2):
        assert found.quantities[f"turn {turn}"]["value"] == pytest.approx(
            statistics.fmean(value for (_, t), value in said.items() if t == turn)
        )
    math_score = found.quantities["math"]
    assert math_score["value"] == pytest.approx(
        statistics.fmean(value for (number, _), value in said.items() if 111 <= number <= 120)
    )
    assert set(found.quantities) == {"score", "turn 1", "turn 2", *TEMPERATURES}
    assert found.details["judge"] == f"gpt-4 at {server.url}"
    assert found.details["prompts"] == sorted({row["judge"][1] for row in judgments})
    assert found.details["usage"] == {"requests": 160, "prompt_tokens": 16_000, "completion_tokens": 1_600}
    assert found.details["cost"] == pytest.approx(160 * (100 * 30 + 10 * 60) / 1e6)

    # A record holds it, without the key.
    path = write_record(
        tmp_path / "record.json",
        "evaluation",
        {"quantities": found.quantities, "details": found.details},
        config={"measure": {"name": "mt-bench", "kind": mtb.kind, **mtb.options()}},
    )
    assert KEY not in path.read_text()
    assert read_record(path)["results"]["quantities"]["score"] == score

    # And once more: nothing is asked again, of the model or of the judge.
    before = [answers_of(subject).read_bytes(), judgments_of(subject).read_bytes()]
    bars.clear()
    again = measure(server, real_data / "mt_bench", categories=("math", "stem")).run(subject)
    assert len(server.seen) == 160
    assert [answers_of(subject).read_bytes(), judgments_of(subject).read_bytes()] == before
    assert [(total, sum(done)) for total, *done in bars.values()] == [(20, 20), (40, 40)]
    assert again.quantities["math"] == math_score
    assert again.quantities["score"]["title"] == "MT-Bench math, stem"
    assert set(again.quantities) == {"score", "turn 1", "turn 2", "math", "stem"}
    assert (again.details["judgments"], again.details["asked"]) == (40, 0)
    assert "cost" not in again.details


# ---------------------------------------------------------------------------------------------- answers


def test_answers_are_sampled_as_fastchat_does(
    subject: Subject, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each category at its temperature, the second turn after the model's own first answer."""
    calls: list[dict[str, Any]] = []

    def spoken(model: Any, tokenizer: Any, prompts: list[list[int]], **options: Any) -> list[str]:
        calls.append({"prompts": [tokenizer.decode(ids) for ids in prompts], **options})
        return [f"  answer {len(calls)} of {i}\n" for i in range(len(prompts))]

    monkeypatch.setattr(mt_bench, "continue_rows", spoken)
    bench = read_bench(folder)
    answers = answer_questions(subject, bench, tmp_path / "a" / "tiny.jsonl", max_new_tokens=7)
    blocks = [("writing", 10), ("writing", 2)] + [(name, 2) for name in list(TEMPERATURES)[1:]]
    assert [(call["temperature"], len(call["prompts"])) for call in calls] == [
        (TEMPERATURES[name], size) for name, size in blocks for _ in (1, 2)
    ]
    assert {(call["max_new_tokens"], call["batch_size"]) for call in calls} == {(7, 16)}
    assert len({call["seed"] for call in calls}) == len(calls)
    first, second = calls[0]["prompts"][3], calls[1]["prompts"][3]
    tokenizer = subject.tokenizer
    conversation = [
        {"role": "user", "content": "what is 3 plus 3 ?"},
        {"role": "assistant", "content": "answer 1 of 3"},
        {"role": "user", "content": "and 3 plus 1 ?"},
    ]

    def templated(turns: list[dict[str, str]]) -> str:
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
        return tokenizer.decode(ids)

    assert first == templated(conversation[:1])
    assert second == templated(conversation)
    assert answers[53] == ("answer 1 of 3", "answer 2 of 3")


def test_an_interruption_changes_no_answer(
    subject: Subject, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = read_bench(folder)
    whole, parts = tmp_path / "whole" / "tiny.jsonl", tmp_path / "parts" / "tiny.jsonl"
    answer_questions(subject, bench, whole, max_new_tokens=4)
    real, calls = mt_bench.continue_rows, 0

    def interrupted(*args: Any, **options: Any) -> list[str]:
        nonlocal calls
        calls += 1
        if calls == 8:  # the second turn of the fourth block
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(mt_bench, "continue_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answer_questions(subject, bench, parts, max_new_tokens=4)
    assert len(read_answers(parts)) == 14  # three blocks
    answer_questions(subject, read_bench(folder, ["humanities"]), parts, max_new_tokens=4)
    answer_questions(subject, bench, parts, max_new_tokens=4)
    assert calls == 8 + 2 + 2 * 5  # of nine blocks three stood, and then a fourth
    assert rows(parts) == rows(whole)


def test_the_seed_decides_what_is_sampled_and_nothing_else(subject: Subject, folder: Path, tmp_path: Path) -> None:
    bench = read_bench(folder)
    first = answer_questions(subject, bench, tmp_path / "a" / "tiny.jsonl", max_new_tokens=8)
    subject.seed = 1
    second = answer_questions(subject, bench, tmp_path / "b" / "tiny.jsonl", max_new_tokens=8)
    greedy = {q.id for q in bench.questions if TEMPERATURES[q.category] == 0}
    assert {number: first[number] for number in greedy} == {number: second[number] for number in greedy}
    assert first != second


@pytest.mark.parametrize("what", ["max_new_tokens", "seed", "questions", "model"])
def test_answers_made_otherwise_are_refused(subject: Subject, folder: Path, tmp_path: Path, what: str) -> None:
    path = tmp_path / "tiny.jsonl"
    options = {"max_new_tokens": 2}
    answer_questions(subject, read_bench(folder, ["math"]), path, **options)
    if what == "max_new_tokens":
        options = {"max_new_tokens": 3}
    elif what == "seed":
        subject.seed = 5
    elif what == "model":
        subject.__dict__["identity"] = subject.identity | {"model": "another"}
    else:
        text = (folder / "question.jsonl").read_text()
        (folder / "question.jsonl").write_text(text.replace("what is 0 plus 0 ?", "what is 0 ?"))  # of writing
    with pytest.raises(InputError, match=rf"was made with another {what}\b.*; choose another output, or delete"):
        answer_questions(subject, read_bench(folder, ["math"]), path, **options)
    path.unlink()  # as the message says
    answer_questions(subject, read_bench(folder, ["math"]), path, **options)


def test_answers_of_unknown_origin_are_refused(subject: Subject, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.jsonl"
    answer_questions(subject, read_bench(folder, ["math"]), path, max_new_tokens=2)
    path.with_suffix(".made_by.json").unlink()
    with pytest.raises(InputError, match="nothing beside it says which model gave them"):
        answer_questions(subject, read_bench(folder, ["math"]), path, max_new_tokens=2)


# ---------------------------------------------------------------------------------------------- the judge


@pytest.fixture
def judged_by(server: Server, folder: Path, tmp_path: Path) -> Callable[..., mt_bench.Judged]:
    """Judges answers that no model gave; options as those of judge_answers and Endpoint."""

    def judge(
        path: Path = tmp_path / "j" / "gpt-4_single.jsonl", *, timeout: float = 60.0, **options: Any
    ) -> mt_bench.Judged:
        bench = read_bench(folder, options.pop("categories", None))
        answers = {q.id: (f"first of {q.id}", f"second of {q.id}") for q in bench.questions}
        answers |= options.pop("answers", {})
        endpoint = Endpoint(server.url, "gpt-4", timeout=timeout, retries=2)
        return judge_answers(bench, answers, endpoint, path, **{"model": "some", **options})

    return judge


def test_answers_that_fastchat_wrote_are_judged(server: Server, real_data: Path, tmp_path: Path) -> None:
    """Its reference answers are answers of GPT-4."""
    folder = real_data / "mt_bench"
    bench = read_bench(folder, ["reasoning", "math", "coding"])
    answers = read_answers(folder / "reference_answer_gpt-4.jsonl")
    judged = judge_answers(bench, answers, Endpoint(server.url, "m"), tmp_path / "m_single.jsonl", model="gpt-4")
    assert len(judged.judgments) == 60
    assert scores(bench, judged)["score"]["n"] == 30


def test_a_question_without_an_answer_is_named(server: Server, folder: Path, tmp_path: Path) -> None:
    bench = read_bench(folder)
    answers = {question.id: ("a", "b") for question in bench.questions[1:]}
    with pytest.raises(InputError, match="1 of 26 questions have none, the first is question 50"):
        judge_answers(bench, answers, Endpoint(server.url, "m"), tmp_path / "m_single.jsonl", model="x")
    assert not server.seen


def test_a_server_that_stumbles_is_asked_again(server: Server, judged_by: Callable[..., mt_bench.Judged]) -> None:
    """Every prompt fails once with status 500."""
    asked: set[str] = set()

    def stumbling(body: dict[str, Any]) -> str | int:
        prompt = body["messages"][-1]["content"]
        with server.lock:
            new = prompt not in asked
            asked.add(prompt)
        return 500 if new else by_content(body)

    server.script = stumbling
    judged = judged_by()
    assert len(judged.ratings) == 52
    assert not judged.failed
    assert len(server.seen) == 104


def test_what_fails_is_counted_and_asked_for_by_the_next_run(
    server: Server, folder: Path, judged_by: Callable[..., mt_bench.Judged], tmp_path: Path
) -> None:
    server.script = lambda body: 400 if "first of 52" in body["messages"][-1]["content"] else by_content(body)
    path = tmp_path / "j" / "gpt-4_single.jsonl"
    details = judged_by(path).details()
    assert details["failed"]["n"] == 2
    assert details["failed"]["where"] == [{"question_id": 52, "turn": 1}, {"question_id": 52, "turn": 2}]
    assert "refused with status 400" in details["failed"]["first"]
    assert (details["judgments"], details["asked"], details["unparsable"]["n"]) == (50, 50, 0)
    assert "52" not in scores(read_bench(folder), judged_by(path))["score"]["items"]
    server.seen.clear()
    server.script = by_content
    assert judged_by(path).details()["asked"] == 2
    assert len(server.seen) == 2
    fresh = tmp_path / "fresh" / "gpt-4_single.jsonl"
    judged_by(fresh)
    assert rows(path) == rows(fresh)


@pytest.mark.parametrize("trouble", [401, 503])
def test_a_dead_server_is_one_sentence_and_soon_over(
    server: Server, judged_by: Callable[..., mt_bench.Judged], tmp_path: Path, trouble: int
) -> None:
    server.script = lambda body: trouble
    with pytest.raises(
        RunError, match=rf"none of \d+ judgements came, the first failed as gpt-4 at .*{trouble}"
    ) as caught:
        judged_by(concurrency=2)
    assert KEY not in str(caught.value)
    assert len(server.seen) <= 3 * (4 + 2 + 1)  # of 52: twice the threads, those under way, and the one that counts
    assert not (tmp_path / "j" / "gpt-4_single.jsonl").exists()
    server.script, server.url = by_content, server.url.replace("127.0.0.1", "localhost")  # the address was wrong
    assert len(judged_by().ratings) == 52


def test_a_slow_server_times_out(server: Server, judged_by: Callable[..., mt_bench.Judged]) -> None:
    server.hang = 0.3
    with pytest.raises(RunError, match=r"no answer within 0\.05 s"):
        judged_by(categories=["math"], timeout=0.05)
    server.hang = 0.0
    assert len(judged_by(categories=["math"]).ratings) == 4


def test_a_rambling_judge_is_counted_and_shown(
    server: Server, folder: Path, judged_by: Callable[..., mt_bench.Judged], tmp_path: Path
) -> None:
    says = {
        "first of 50": "I would rather not. " * 50,
        "second of 50": "[[4]] or [[6]]",
        "first of 51": "Rating: [[11]]",
        "second of 51": "Rating: [[8]]",
        "second of 52": "It is a [7]",
    }

    def rambling(body: dict[str, Any]) -> str:
        found = [text for end, text in says.items() if body["messages"][-1]["content"].endswith(end)]
        return found[0] if found else "[[2]]"

    server.script = rambling
    judged = judged_by(categories=["writing"])
    unparsable = judged.details()["unparsable"]
    assert (unparsable["n"], unparsable["where"]) == (
        2,
        [{"question_id": 50, "turn": 1}, {"question_id": 51, "turn": 1}],
    )
    assert unparsable["first"] == ("I would rather not. " * 50)[:400]
    found = scores(read_bench(folder, ["writing"]), judged)
    assert found["score"]["items"] == {
        "50": 4.0,
        "51": 8.0,
        "52": 4.5,
        **{str(number): 2.0 for number in range(53, 62)},
    }
    assert found["turn 1"]["n"] == 10
    assert found["turn 2"]["n"] == 12
    assert set(found) == {"score", "turn 1", "turn 2"}
    kept = [row["score"] for row in rows(tmp_path / "j" / "gpt-4_single.jsonl")[:6]]
    assert kept == [-1, 4, -1, 8, 2, 7]
    server.seen.clear()
    judged_by(categories=["writing"])  # at temperature 0 it would say the same again
    assert not server.seen


def test_a_judge_that_never_rates_gives_no_number(
    server: Server, folder: Path, judged_by: Callable[..., mt_bench.Judged]
) -> None:
    server.script = lambda body: "hm"
    judged = judged_by(categories=["math"])
    score = scores(read_bench(folder, ["math"]), judged)["score"]
    assert math.isnan(score["value"])
    assert (score["n"], score["interval"]) == (0, [1.0, 10.0])
    assert judged.details()["unparsable"]["n"] == 4


def test_an_interruption_loses_no_judgement_and_none_is_asked_for_twice(
    server: Server, judged_by: Callable[..., mt_bench.Judged], tmp_path: Path
) -> None:
    path, fresh = tmp_path / "j" / "gpt-4_single.jsonl", tmp_path / "fresh" / "gpt-4_single.jsonl"
    done = 0

    def stop(more: int) -> None:
        nonlocal done
        done += more
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judged_by(path, concurrency=3, on_item=stop)
    kept = rows(path)
    assert 20 <= len(kept) == len(server.seen) < 52
    judged_by(path)
    assert len(server.seen) == 52
    assert max(Counter(server.prompts()).values()) == 1
    judged_by(fresh, concurrency=1)
    assert rows(path) == rows(fresh)


def test_a_torn_line_costs_one_judgement(
    server: Server, judged_by: Callable[..., mt_bench.Judged], tmp_path: Path
) -> None:
    path = tmp_path / "j" / "gpt-4_single.jsonl"
    judged_by(path)
    before = rows(path)
    path.write_bytes(path.read_bytes()[:-40])  # killed while it wrote the last line
    server.seen.clear()
    while_asked: list[str] = []

    def looking(body: dict[str, Any]) -> str:
        while_asked.append(path.read_text())
        return by_content(body)

    server.script = looking
    judged_by(path)
    assert len(server.seen) == 1
    assert while_asked[0].endswith("}\n")  # the torn line is gone before the next is appended: killed again, no harm
    assert rows(path) == before


def test_each_judgement_is_on_disk_before_the_next_is_asked_for(
    server: Server, judged_by: Callable[..., mt_bench.Judged], tmp_path: Path
) -> None:
    path = tmp_path / "j" / "gpt-4_single.jsonl"
    on_disk: list[int] = []

    def looking(body: dict[str, Any]) -> str:
        on_disk.append(len(path.read_text().splitlines()) if path.exists() else 0)
        return by_content(body)

    server.script = looking
    judged_by(path, concurrency=1, categories=["math", "stem"])
    assert on_disk == list(range(8))


def test_a_changed_answer_is_judged_again_and_nothing_else_is_touched(
    server: Server, judged_by: Callable[..., mt_bench.Judged], tmp_path: Path
) -> None:
    path = tmp_path / "j" / "gpt-4_single.jsonl"
    judged_by(path)
    judged_by(path, model="another")
    before = rows(path)
    server.seen.clear()
    judged_by(path, answers={53: ("new", "newer"), 54: ("first of 54", "changed")}, categories=["writing"])
    assert len(server.seen) == 3  # both turns of 53; of 54 only the second sees the change
    after = rows(path)
    assert len(after) == 104
    changed = [row for row in after if row not in before]
    assert sorted((row["question_id"], row["turn"]) for row in changed) == [(53, 1), (53, 2), (54, 2)]
    assert {row["model"] for row in changed} == {"some"}


@pytest.mark.parametrize("what", ["judge", "max_tokens", "system_prompts"])
def test_judgements_made_otherwise_are_refused(
    server: Server, folder: Path, judged_by: Callable[..., mt_bench.Judged], what: str
) -> None:
    judged_by(categories=["math"])
    options: dict[str, Any] = {}
    if what == "judge":
        server.url = server.url.replace("127.0.0.1", "localhost")
    elif what == "max_tokens":
        options = {"max_tokens": 9}
    else:
        text = (folder / "judge_prompts.jsonl").read_text()
        (folder / "judge_prompts.jsonl").write_text(text.replace("Be fair.", "Be kind."))
    with pytest.raises(InputError, match=rf"was made with another {what}\b"):
        judged_by(categories=["math"], **options)


def test_judges_are_asked_at_once_but_not_too_many(server: Server, judged_by: Callable[..., mt_bench.Judged]) -> None:
    server.hang = 0.02
    judged_by(concurrency=4)
    assert 2 <= server.busiest <= 4


def test_an_error_of_ours_stops_the_judging(
    server: Server, judged_by: Callable[..., mt_bench.Judged], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is not counted as a judgement that failed."""

    def full(path: Path, row: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fastchat, "append_judgment", full)
    with pytest.raises(OSError, match="No space left"):
        judged_by(concurrency=1)
    assert len(server.seen) <= 3


# ---------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"judge_max_tokens": -1}, "judge_max_tokens is -1"),
        ({"concurrency": 2.5}, r"concurrency is 2\.5"),
        ({"judge_timeout": 0}, "timeout is 0"),
        ({"judge_url": "localhost"}, "base_url is no address"),
        ({"judge_model": ""}, "model is empty"),
        ({"categories": ()}, r"categories is \(\), expected a list of writing, "),
        ({"categories": "math"}, "categories is 'math', expected a list"),
        ({"categories": ("maths",)}, "categories has 'maths', .*did you mean 'math'"),
        ({"prices": (1.0,)}, r"prices is \(1\.0,\), expected two numbers"),
        ({"prices": (1.0, -2.0)}, "prices is "),
        ({"prices": (1.0, math.nan)}, "prices is "),
        ({"prices": "ab"}, "prices is 'ab'"),
        ({"folder": "nowhere"}, r"nowhere.question\.jsonl cannot be read"),
    ],
)
def test_wrong_options_are_named_before_any_model_is_loaded(folder: Path, options: dict[str, Any], told: str) -> None:
    given: dict[str, Any] = {"folder": folder, "judge_url": "http://localhost/v1", "judge_model": "gpt-4"} | options
    with pytest.raises(InputError, match=told) as caught:
        MTBench(**given).check()
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"openai.*plot-align\[eval\]"):
        MTBench(folder, "http://localhost/v1", "gpt-4").check()


def test_what_a_record_keeps_holds_no_password(folder: Path) -> None:
    mtb = MTBench(str(folder), "https://me:hunter2@example.org/v1?token=abc", "gpt-4", categories=("math",))
    options = json.loads(json.dumps(mtb.options()))
    assert options["judge_url"] == "gpt-4 at https://example.org/v1"
    assert options["categories"] == ["math"]
    assert "hunter2" not in repr(mtb) + json.dumps(options)


def test_a_judge_named_like_a_folder_has_one_file(server: Server, subject: Subject, folder: Path) -> None:
    MTBench(folder, server.url, "../org/model", categories=("math",), max_new_tokens=2).run(subject)
    (path,) = (subject.folder / "mt_bench" / "model_judgment").glob("*.jsonl")
    assert path.name == f"{file_name('../org/model')}_single.jsonl"
    assert rows(path)[0]["judge"] == ["../org/model", "single-math-v1"]
