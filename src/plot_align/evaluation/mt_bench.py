"""MT-Bench: two-turn answers to open questions, each turn rated from 1 to 10 by a judge behind an endpoint.

Files are FastChat's (:mod:`plot_align.evaluation.fastchat`), so answers and judgements can be exchanged with it.
"""

from __future__ import annotations

import hashlib
import math
import os
import statistics
import threading
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from plot_align.errors import InputError, RunError, did_you_mean, require_packages
from plot_align.evaluation import fastchat
from plot_align.evaluation.fastchat import TEMPERATURES, Bench, Question, Request, Turns
from plot_align.evaluation.subject import Found, OnItem, Subject
from plot_align.inference.chat import continue_rows
from plot_align.inference.endpoint import Endpoint, EndpointError
from plot_align.io import file_name, match_or_write
from plot_align.parallel import each, on_main
from plot_align.results import Quantity, of_items

BLOCK = 10  # questions answered together; fixed, because sampling draws for a whole batch
_EXCERPT = 400  # characters of a judgement kept in the details

Place = tuple[int, int]  # question id, turn


@dataclass
class MTBench:
    """MT-Bench as a measure. Several in one suite use the same answers and judgements below ``subject.folder``.

    The score is the mean over questions of the mean of their two turns' ratings. A turn without a rating is left out
    of its question's mean, and a question without any is left out of the score. FastChat takes the mean of all
    ratings: the same number if every turn has one. Requests, tokens and cost in the details are those of this run
    only.

    Args:
        folder: with FastChat's ``question.jsonl``, ``judge_prompts.jsonl`` and reference answers.
        judge_url: an OpenAI-compatible endpoint, up to and without ``/chat/completions``. judge_model: its model.
        categories: of the questions; None for all. limit: how many questions, from the first on.
        max_new_tokens: of an answer's turn.
        judge_key: the environment variable that holds the endpoint's key. judge_max_tokens: of a judgement.
        judge_timeout: seconds until a request counts as failed; a judge thinks before it rates.
        concurrency: requests to the judge at a time.
        prices: per million prompt tokens and per million completion tokens, to compute the cost.
    """

    kind: ClassVar[str] = "mt_bench"

    folder: str | os.PathLike[str]
    judge_url: str = field(repr=False)  # it may hold a password
    judge_model: str
    categories: tuple[str, ...] | None = None
    limit: int | None = None
    max_new_tokens: int = 1024
    judge_key: str = "OPENAI_API_KEY"
    judge_max_tokens: int = 2048
    judge_timeout: float = 300.0
    concurrency: int = 8
    prices: tuple[float, float] | None = None

    def options(self) -> dict[str, Any]:
        """The options for the record: the judge's address without its password."""
        return {**asdict(self), "judge_url": self._endpoint().label}

    def check(self) -> None:
        """See :class:`plot_align.evaluation.subject.Measure`."""
        for name in ("max_new_tokens", "judge_max_tokens", "concurrency"):
            _require_positive(name, getattr(self, name))
        if self.limit is not None:
            _require_positive("limit", self.limit)
        if self.categories is not None:
            _require_categories(self.categories)
        if self.prices is not None and not _are_prices(self.prices):
            raise InputError(
                f"prices is {self.prices!r}, expected two numbers, per million prompt tokens and per million "
                "completion tokens; pass both"
            )
        self._endpoint()
        require_packages("the judge of MT-Bench", "openai", extra="eval")
        fastchat.read_bench(self.folder, self.categories)

    def run(self, subject: Subject) -> Found:
        """Answer and judge what is missing, and average.

        Raises:
            InputError: the files of an earlier run were made with other options, or the folder's files are malformed.
            RunError: the judge gave no judgement at all.
        """
        bench = fastchat.read_bench(self.folder, self.categories)
        endpoint = self._endpoint()
        folder = subject.folder / "mt_bench"
        if self.limit is not None:  # samples depend on the block they are drawn in
            bench = replace(bench, questions=bench.questions[: self.limit])
            folder = subject.folder / f"mt_bench-first-{self.limit}"
        answers = answer_questions(
            subject,
            bench,
            folder / "model_answer" / f"{file_name(subject.name)}.jsonl",
            max_new_tokens=self.max_new_tokens,
            on_item=subject.bar("MT-Bench answers", len(bench.questions)),
        )
        judge = partial(
            judge_answers,
            bench,
            answers,
            endpoint,
            folder / "model_judgment" / f"{file_name(self.judge_model)}_single.jsonl",
            model=subject.name,
            max_tokens=self.judge_max_tokens,
            concurrency=self.concurrency,
            on_item=subject.bar("MT-Bench judge", 2 * len(bench.questions)),
        )
        judged, usage = on_main(lambda: (judge(), asdict(endpoint.usage)))
        prompts = sorted({request.prompt.name for request in bench.requests(answers)})
        details = {"judge": endpoint.label, "prompts": prompts, **judged.details(), "usage": usage}
        if self.prices is not None:
            tokens = (usage["prompt_tokens"], usage["completion_tokens"])
            details["cost"] = sum(price * count / 1e6 for price, count in zip(self.prices, tokens, strict=True))
        return Found(scores(bench, judged, seed=subject.seed), details, judged.unfinished)

    def _endpoint(self) -> Endpoint:
        return Endpoint(self.judge_url, self.judge_model, key_variable=self.judge_key, timeout=self.judge_timeout)


def _require_positive(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise InputError(f"{name} is {value!r}, expected a whole number, 1 or more; pass a positive number")


def _require_categories(categories: Any) -> None:
    if isinstance(categories, str) or not isinstance(categories, Iterable) or not categories:
        raise InputError(
            f"categories is {categories!r}, expected a list of {', '.join(TEMPERATURES)}; name at least one"
        )
    for category in categories:
        if category not in TEMPERATURES:
            advice = did_you_mean(str(category), TEMPERATURES, f"expected one of {', '.join(TEMPERATURES)}")
            raise InputError(f"categories has {category!r}, which MT-Bench has not; {advice}")


def _are_prices(prices: Any) -> bool:
    try:
        return len(prices) == 2 and all(price >= 0 and math.isfinite(price) for price in prices)
    except TypeError:
        return False


# ---------------------------------------------------------------------------------------------- answers


def answer_questions(
    subject: Subject,
    bench: Bench,
    path: Path,
    *,
    max_new_tokens: int = 1024,
    on_item: OnItem = lambda done: None,
) -> dict[int, Turns]:
    """The model's answers, reusing those in ``path``; question id → both turns.

    Each category has FastChat's temperature. Ten questions of one category form a block with its own seed, and blocks
    are divided among processes. Each block is on disk before the next, so neither an interruption nor other categories
    change an answer. (The batch size may change a sampled one.)

    Raises:
        InputError: ``path`` holds answers of other weights, another chat template, dtype, length, seed or questions,
            or does not say which model gave them.
    """
    made_by = {"max_new_tokens": max_new_tokens, "seed": subject.seed, "questions": bench.digest}

    def earlier() -> dict[int, fastchat.Row]:
        record = _made_by(path)
        if path.exists() and not record.exists():
            raise InputError(
                f"{path} holds answers, and nothing beside it says which model gave them; move the file away "
                "(judge_answers judges answers of any origin)"
            )
        match_or_write(record, {**subject.identity, **made_by}, path)
        return fastchat.read_answer_rows(path) if path.exists() else {}

    rows = on_main(earlier)
    blocks = _blocks(bench.questions)
    wanted = [block for block in blocks if not all(question.id in rows for question in block)]
    answer = partial(_answer, subject.model, subject.tokenizer, subject.seed, subject.batch_size, max_new_tokens)
    answered = each(answer, wanted)
    for block in blocks:
        if block in wanted:
            for question, turns in zip(block, next(answered), strict=True):
                rows[question.id] = fastchat.answer_row(subject.name, question, turns)
            on_main(partial(fastchat.write_answers, path, rows))
        on_item(len(block))
    answers = on_main(partial(fastchat.read_answers, path))
    return {question.id: answers[question.id] for question in bench.questions}


def _blocks(questions: Iterable[Question]) -> list[list[Question]]:
    """Questions answered together: up to ten of one category, in the order of the file."""
    by_category: dict[str, list[Question]] = {}
    for question in questions:
        by_category.setdefault(question.category, []).append(question)
    return [group[i : i + BLOCK] for group in by_category.values() for i in range(0, len(group), BLOCK)]


def _answer(
    model: Any, tokenizer: Any, seed: int, batch_size: int, max_new_tokens: int, block: list[Question]
) -> list[Turns]:
    """Both turns; the second sees the first answer."""
    conversations: list[list[dict[str, str]]] = [[] for _ in block]
    for turn in (0, 1):
        for conversation, question in zip(conversations, block, strict=True):
            conversation.append({"role": "user", "content": question.turns[turn]})
        answers = continue_rows(
            model,
            tokenizer,
            tokenizer.apply_chat_template(conversations, add_generation_prompt=True, tokenize=True, return_dict=False),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            temperature=TEMPERATURES[block[0].category],
            seed=_seed(seed, block[0].id, turn),
        )
        for conversation, answer in zip(conversations, answers, strict=True):
            conversation.append({"role": "assistant", "content": answer.strip()})  # as FastChat strips it
    return [(conversation[1]["content"], conversation[3]["content"]) for conversation in conversations]


def _seed(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "big") >> 1


# ---------------------------------------------------------------------------------------------- judgements


@dataclass
class Judged:
    """A judge's verdicts on the answers.

    Args:
        judgments: (question id, turn) → its words. failed: (question id, turn) → why there are none.
        asked: judgements that this run got; the others were in the file.
    """

    judgments: dict[Place, str] = field(default_factory=dict)
    failed: dict[Place, str] = field(default_factory=dict)
    asked: int = 0

    @property
    def ratings(self) -> dict[Place, float]:
        """(question id, turn) → rating, for judgements that have one."""
        found = ((place, fastchat.rating(text)) for place, text in self.judgments.items())
        return {place: float(score) for place, score in found if score is not None}

    @property
    def unfinished(self) -> str | None:
        """How many requests failed, and the first reason; None if none did."""
        if not self.failed:
            return None
        return f"{len(self.failed)} judgements failed, the first: {self.failed[min(self.failed)]}"

    def details(self) -> dict[str, Any]:
        """Counts, and what the means leave out: judgements without a rating, and failed requests."""
        rated = self.ratings
        unparsable = {place: text for place, text in self.judgments.items() if place not in rated}
        return {
            "judgments": len(self.judgments),
            "asked": self.asked,
            "unparsable": _left_out(unparsable),
            "failed": _left_out(self.failed),
        }


def _left_out(places: Mapping[Place, str]) -> dict[str, Any]:
    ordered = sorted(places)
    return {
        "n": len(places),
        "where": [{"question_id": question, "turn": turn} for question, turn in ordered],
        "first": places[ordered[0]][:_EXCERPT] if ordered else None,
    }


def judge_answers(
    bench: Bench,
    answers: Mapping[int, Turns],
    endpoint: Endpoint,
    path: str | os.PathLike[str],
    *,
    model: str,
    max_tokens: int = 2048,
    concurrency: int = 8,
    on_item: OnItem = lambda done: None,
) -> Judged:
    """Have both turns of every answer rated, reusing the judgements in ``path``.

    A judgement is reused only if its request is unchanged. Each is on disk before its thread sends the next request.
    The next run repeats failed requests.

    Args:
        bench: :func:`plot_align.evaluation.fastchat.read_bench`. answers: question id → both turns, of any origin,
            e.g. :func:`plot_align.evaluation.fastchat.read_answers` of a file that FastChat wrote.
        path: the judgement file; other models', questions' and judges' rows in it are kept.
        model: the name of the model that answered, for the file.
        max_tokens: of a judgement. concurrency: requests at a time.
        on_item: called with the number of newly finished judgements.

    Raises:
        InputError: a question has no answer, or ``path`` is malformed or holds judgements of another endpoint, length
            or system prompts.
        RunError: the judge gave no judgement at all.
    """
    path = Path(path)
    requests = bench.requests(answers)
    systems = {name: prompt.system for name, prompt in bench.prompts.items()}
    match_or_write(
        _made_by(path), {"judge": endpoint.label, "max_tokens": max_tokens, "system_prompts": systems}, path
    )
    known, others = _known(path, requests, model=model, judge=endpoint.model)
    judged = Judged({place: row["judgment"] for place, row in known.items()})
    wanted = [request for request in requests if (request.question, request.turn) not in known]
    on_item(len(known))
    if wanted and path.exists():
        fastchat.write_judgments(path, [*others, *known.values()])  # whole lines only, for others to follow
    lock = threading.Lock()

    def ask(request: Request) -> None:
        place = (request.question, request.turn)
        try:
            reply = endpoint.chat(request.messages, temperature=0.0, max_tokens=max_tokens)
        except EndpointError as error:
            with lock:
                judged.failed[place] = str(error)
            return
        row = fastchat.judgment_row(model, endpoint.model, request, reply.text)
        with lock:
            fastchat.append_judgment(path, row)
            known[place] = row
            judged.judgments[place] = reply.text
            judged.asked += 1

    pool = ThreadPoolExecutor(concurrency)
    try:
        for future in as_completed([pool.submit(ask, request) for request in wanted]):
            future.result()
            on_item(1)
            # Do not wait for a dead server a hundred times.
            if not judged.judgments and len(judged.failed) >= min(2 * concurrency, len(wanted)):
                raise RunError(
                    f"MT-Bench: none of {len(judged.failed)} judgements came, the first failed as "
                    f"{next(iter(judged.failed.values()))}"
                )
    finally:
        pool.shutdown(cancel_futures=True)
        if known:
            fastchat.write_judgments(path, [*others, *known.values()])
    return judged


def _known(
    path: Path, requests: Iterable[Request], *, model: str, judge: str
) -> tuple[dict[Place, fastchat.Row], list[fastchat.Row]]:
    """The rows of ``path`` that answer a request, and those that have nothing to do with this run.

    This judge's judgements of another answer to the same turn are dropped.
    """
    wanted = {(request.question, request.turn): request for request in requests}
    known: dict[Place, fastchat.Row] = {}
    others: list[fastchat.Row] = []
    for row in fastchat.read_judgments(path) if path.exists() else []:
        place = (row["question_id"], row["turn"])
        request = wanted.get(place)
        if request is None or row["model"] != model or row["judge"][0] != judge:
            others.append(row)
        elif row["judge"][1] == request.prompt.name and row["user_prompt"] == request.text:
            known[place] = row
    return known, others


def _made_by(path: Path) -> Path:
    """The file that says what made ``path``. FastChat reads .jsonl files only."""
    record = path.with_suffix(".made_by.json")
    if not path.exists():
        record.unlink(missing_ok=True)
    return record


# ---------------------------------------------------------------------------------------------- the numbers


def scores(bench: Bench, judged: Judged, *, seed: int = 0) -> dict[str, Quantity]:
    """``score``, ``turn 1``, ``turn 2`` and, where there are several, each category by its name.

    An item is a question; its value is the mean of the ratings of its turns.
    """
    ratings = judged.ratings
    categories = tuple(dict.fromkeys(question.category for question in bench.questions))
    title = "MT-Bench" if len(categories) == len(TEMPERATURES) else f"MT-Bench {', '.join(categories)}"

    def mean(title: str, turns: tuple[int, ...], wanted: Collection[str] = categories) -> Quantity:
        items = {}
        for question in bench.questions:
            found = [ratings[question.id, turn] for turn in turns if (question.id, turn) in ratings]
            if found and question.category in wanted:
                items[str(question.id)] = statistics.fmean(found)
        bounds = (float(fastchat.WORST), float(fastchat.BEST))
        return of_items(title, items, better="higher", bounds=bounds, seed=seed)

    quantities = {"score": mean(title, (1, 2))}
    quantities |= {f"turn {turn}": mean(f"{title}, turn {turn}", (turn,)) for turn in (1, 2)}
    if len(categories) > 1:
        for category in categories:
            quantities[category] = mean(f"MT-Bench {category}", (1, 2), (category,))
    return quantities
