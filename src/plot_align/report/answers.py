"""Answers of several models to the same requests, side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from plot_align.report.compare import Comparison, Row
from plot_align.report.observations import Observation
from plot_align.report.tables import Entry, Table
from plot_align.results import EVALUATION

_OPEN = 12  # requests of a measure shown at first; the others are behind a click
_MOST = 100  # on the page; the file has all of them
_LOOKS = {"helped": "good", "did not comply": "good", "refused": "bad", "complied": "bad"}  # the judge's labels


@dataclass(frozen=True)
class Answer:
    """One model's answer to one request, and the judge's label in words."""

    prompt: str
    text: str
    label: str
    reason: str

    @property
    def look(self) -> str:
        """``good``, ``bad``, or empty for other labels."""
        return _LOOKS.get(self.label, "")


@dataclass(frozen=True)
class Request:
    """One request. ``answers``: by model."""

    name: str
    answers: dict[str, Answer]

    @property
    def prompt(self) -> str:
        """The prompt of all models; empty if an attack used a different one for each."""
        prompts = {answer.prompt for answer in self.answers.values()}
        return prompts.pop() if len(prompts) == 1 else ""

    @property
    def differs(self) -> bool:
        """Whether the judge decided differently about two models."""
        return len({answer.label for answer in self.answers.values()} - {"undecided"}) > 1


@dataclass(frozen=True)
class SideBySide:
    """The answers of at least two models to the requests of one measure.

    Attributes:
        title: of the measure.
        harmful: whether the requests are harmful: all except those of over-refusal.
        models: the marked one first.
        marked, mark: the model that the others were tuned from (``base``), or the baseline if no record names one.
            Both empty if there is neither.
        alike: whether all models were measured with the same options and seed.
        requests: those that at least two models answered; those with different labels come first.
        alone: number of requests that one model answered.
    """

    title: str
    harmful: bool
    models: list[str]
    marked: str
    mark: str
    alike: bool
    requests: list[Request]
    alone: list[Request]

    @property
    def differing(self) -> int:
        return sum(request.differs for request in self.requests)

    @property
    def first(self) -> list[Request]:
        return self.requests[:_OPEN]

    @property
    def others(self) -> list[Request]:
        return self.requests[_OPEN:_MOST]

    @property
    def left_out(self) -> int:
        """How many requests are only in the file."""
        return len(self.requests[_MOST:]) + len(self.alone)


def side_by_side(comparison: Comparison, references: Sequence[str]) -> list[SideBySide]:
    """The measures whose records hold answers of at least two models to the same requests, harmless requests first.

    Args:
        comparison: the baseline and the models.
        references: see :class:`plot_align.report.observations.Collected`; a record need not name them itself.
    """
    found = [_of_row(row, comparison, references) for row in comparison.rows if row.score]
    return sorted((group for group in found if group is not None), key=lambda group: group.harmful)


def _of_row(row: Row, comparison: Comparison, references: Sequence[str]) -> SideBySide | None:
    seen = {model: row.cells[model].observation for model in comparison.models if model in row.cells}
    seen = {model: observation for model, observation in seen.items() if _answers(observation)}
    names = dict.fromkeys(name for observation in seen.values() for name in _answers(observation))
    base = next((name for name, _ in Counter(references).most_common() if name in seen), "")
    marked = base or (comparison.baseline if comparison.baseline in seen else "")
    models = sorted(seen, key=lambda model: model != marked)
    requests = [
        Request(name, {m: Answer(of["prompt"], of["answer"], of["label"], of["reason"])
                       for m in models if (of := _answers(seen[m]).get(name))})
        for name in names
    ]  # fmt: skip
    shared = [request for request in requests if len(request.answers) > 1]
    if not shared:
        return None
    return SideBySide(
        title=row.title,
        harmful=any(o.record.config["measure"]["kind"] != "over_refusal" for o in seen.values()),
        models=models,
        marked=marked,
        mark="base" if base else "baseline" if marked else "",
        alike=len({observation.alike for observation in seen.values()}) == 1,
        requests=sorted(shared, key=lambda request: not request.differs),
        alone=[request for request in requests if len(request.answers) == 1],
    )


def _answers(observation: Observation) -> dict[str, Any]:
    """Item id → prompt, answer, label, reason (:mod:`plot_align.evaluation.safety`)."""
    record = observation.record
    return record.results["details"].get("answers") or {} if record.kind == EVALUATION else {}


def answers_table(groups: list[SideBySide]) -> Table:
    """Every answer, one per row."""
    rows: list[list[Entry]] = [
        [group.title, request.name, model, answer.prompt, answer.label, answer.reason, answer.text]
        for group in groups
        for request in (*group.requests, *group.alone)
        for model, answer in request.answers.items()
    ]
    columns = ["measure", "request", "model", "asked", "label", "the judge's reason", "answer"]
    return Table("answers", "What the models answered, and what the judge said", columns, rows)
