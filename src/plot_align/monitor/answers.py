"""Greedy answers to a few harmless and harmful requests, judged, and their texts in the logger's table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from plot_align.demo import behaviors, benign
from plot_align.errors import InputError
from plot_align.evaluation import repetition
from plot_align.inference.chat import generate
from plot_align.io import parse_json
from plot_align.redteam import Behavior, make_judge, read_labelled
from plot_align.text import markdown, one_line

Kind = Literal["benign", "harmful"]
TABLE = "monitor/answers"


@dataclass(frozen=True)
class Request:
    """What the model is asked."""

    kind: Kind
    prompt: str


@dataclass(frozen=True)
class Answer:
    """One greedy answer, and what is seen of it.

    Attributes:
        step: optimiser steps before it.
        refused: it is a refusal, by the project's own judge. An empty answer refuses nothing.
        tokens: of its text. repetition: share of its 4-grams that repeat earlier ones.
    """

    step: int
    kind: Kind
    prompt: str
    answer: str
    refused: bool
    tokens: int
    repetition: float


def default_requests(each: int = 12) -> list[Request]:
    """``each`` of our 40 held-out harmful requests, spread over their topics, and as many harmless twins of them."""
    found = []
    kinds: tuple[tuple[Kind, list[Behavior]], ...] = (
        ("benign", [b for b in benign() if "benign" in b.tags]),
        ("harmful", behaviors()),
    )
    for kind, asked in kinds:
        found += [Request(kind, behavior.prompt) for behavior in asked[:: len(asked) // each][:each]]
    return found


def read_requests(path: str | Path) -> list[Request]:
    """Requests of a file: a JSON object a line, ``{"prompt": "…", "kind": "benign"}`` or ``"harmful"``; or the CSV of
    a benchmark that says which are harmful (:func:`plot_align.redteam.read_labelled`).

    Raises:
        InputError: the file cannot be read or has no request, or a line is none; the message names it.
    """
    if Path(path).suffix.lower() == ".csv":
        return [Request("harmful" if harmful else "benign", b.prompt) for b, harmful in read_labelled(path)]
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"requests file {path} cannot be read ({error}); name a .jsonl file in UTF-8") from None
    found = [_request(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InputError(f"{path} holds no request, expected one a line; write some, or leave the file out")
    return found


def _request(line: str, where: str) -> Request:
    try:
        row = parse_json(line)
    except ValueError:
        row = None
    prompt, kind = (row.get("prompt"), row.get("kind")) if isinstance(row, dict) else (None, None)
    if not isinstance(prompt, str) or not prompt.strip() or (kind != "benign" and kind != "harmful"):
        raise InputError(
            f"{where}: {one_line(line, longest=60)} came, expected "
            '{"prompt": "a text", "kind": "benign"} or "harmful"; correct or remove the line'
        )
    return Request(kind, prompt)


def answered(model: Any, tokenizer: Any, requests: Sequence[Request], step: int, max_new_tokens: int) -> list[Answer]:
    """The model's greedy answers through its chat template, judged by :class:`~plot_align.redteam.RefusalJudge`.

    Raises:
        InputError: the tokenizer has no chat template.
    """
    texts = generate(model, tokenizer, [x.prompt for x in requests], max_new_tokens=max_new_tokens, batch_size=64)
    asked = [Behavior(str(i), x.prompt) for i, x in enumerate(requests)]
    verdicts = make_judge("refusal").judge_benign(asked, [x.prompt for x in requests], texts)
    return [
        Answer(
            step, x.kind, x.prompt, text, bool(verdict.refused),
            len(tokenizer(text, add_special_tokens=False)["input_ids"]), repetition(text.split()),
        )
        for x, text, verdict in zip(requests, texts, verdicts, strict=True)
    ]  # fmt: skip


def metrics_of(answers: Sequence[Answer]) -> dict[str, float]:
    """Rates and means over one step's answers."""
    found = {
        f"monitor/refuses_{kind}": [float(x.refused) for x in answers if x.kind == kind] for kind in get_args(Kind)
    }
    found["monitor/answer_tokens"] = [float(x.tokens) for x in answers]
    found["monitor/repetition"] = [x.repetition for x in answers]
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def to_loggers(trainer: Any, answers: Sequence[Answer]) -> None:
    """All texts so far, in a table of each logger that has tables, as TRL logs its completions; the last step's in
    TensorBoard. Call it on the main process."""
    import pandas

    frame = pandas.DataFrame([asdict(answer) for answer in answers])
    report_to = trainer.args.report_to or []
    if "wandb" in report_to:
        import wandb

        if wandb.run is not None:
            wandb.log({TABLE: wandb.Table(dataframe=frame)})
    if "trackio" in report_to:
        import trackio

        trackio.log({TABLE: trackio.Table(dataframe=frame)})
    if "comet_ml" in report_to:
        from trl.trainer.utils import log_table_to_comet_experiment

        log_table_to_comet_experiment(name="monitor_answers.csv", table=frame)
    for callback in trainer.callback_handler.callbacks:
        writer = getattr(callback, "tb_writer", None)
        if writer is not None:
            step = answers[-1].step
            writer.add_text(TABLE, _markdown([x for x in answers if x.step == step]), step)
            writer.flush()


def _markdown(answers: Sequence[Answer]) -> str:
    rows = [
        f"| {x.kind} | {'refused' if x.refused else ''} | {markdown(x.prompt, longest=500)} "
        f"| {markdown(x.answer, longest=500)} |"
        for x in answers
    ]
    return "\n".join(["| kind | | request | answer |", "|---|---|---|---|", *rows])
