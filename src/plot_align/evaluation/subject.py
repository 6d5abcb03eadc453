"""The model to measure, and the interface of a measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from plot_align.errors import InputError
from plot_align.inference.chat import continue_rows, require_template
from plot_align.inference.identity import model_identity
from plot_align.preference.distribution import vocabulary_fingerprint
from plot_align.results import Quantity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OnItem = Callable[[int], None]


def _silent(description: str, total: int) -> OnItem:
    return lambda done: None


@dataclass
class Subject:
    """A causal language model with its chat template, and a folder for unfinished work.

    Args:
        model: on its device, in its dtype.
        tokenizer: with a chat template.
        name: for files and tables.
        source: hub id or folder it was loaded from.
        folder: for intermediate files that a later run reuses (answers, judgements).
        seed: of sampling and resampling. batch_size: rows a pass.
        reference: the model it was tuned from; None if not given.
        bar: called with a description and a total; returns a function that advances the bar by some items.

    ``memory`` caches what several measures need of a model (answers, scores of pairs).

    Raises:
        InputError: the tokenizer has no chat template.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: str
    folder: Path
    seed: int = 0
    batch_size: int = 16
    reference: Subject | None = None
    bar: Callable[[str, int], OnItem] = field(default=_silent, repr=False)
    memory: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        require_template(self.tokenizer)

    @cached_property
    def identity(self) -> dict[str, str]:
        """See :func:`plot_align.inference.identity.model_identity`."""
        return model_identity(self.model, self.tokenizer)

    def rows(self, conversations: Sequence[Sequence[dict[str, str]]]) -> list[list[int]]:
        """Token ids of conversations that end with a user's turn, up to where the answer begins."""
        return self.tokenizer.apply_chat_template(
            [list(messages) for messages in conversations],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )

    def answers(
        self, conversations: Sequence[Sequence[dict[str, str]]], description: str, max_new_tokens: int
    ) -> list[str]:
        """Greedy answers to conversations that end with a user's turn, under a bar called ``description``.

        Cached, so that several measures can use the same answers.
        """
        rows = self.rows(conversations)
        key = ("answers", tuple(map(tuple, rows)), max_new_tokens)
        if key not in self.memory:
            self.memory[key] = continue_rows(
                self.model,
                self.tokenizer,
                rows,
                max_new_tokens=max_new_tokens,
                batch_size=self.batch_size,
                advance=self.bar(description, len(rows)),
            )
        return list(self.memory[key])

    def require_reference(self, measure: str) -> Subject:
        """The reference, checked.

        Raises:
            InputError: it was not given, or has another vocabulary.
        """
        if self.reference is None:
            raise InputError(f"{measure} compares with the model before tuning; name it with --reference")
        if vocabulary_fingerprint(self.tokenizer) != vocabulary_fingerprint(self.reference.tokenizer):
            raise InputError(
                f"{self.name} and its reference {self.reference.name} have different vocabularies, so {measure} has "
                "nothing to compare; name the model it was tuned from"
            )
        return self.reference


def require_count(name: str, value: int | None, *, least: int = 1) -> None:
    """Check that an option is a whole number of ``least`` or more, or None.

    Raises:
        InputError: it is not.
    """
    if value is not None and value < least:
        raise InputError(f"{name} is {value}, expected {least} or more; correct it")


@dataclass
class Found:
    """What a measure returns: its quantities, of which the first is its score, and details that explain them.

    Args:
        quantities: name → :func:`plot_align.results.of_items` or ``of_whole``.
        details: JSON-able, e.g. undecided answers and the first reason, or tokens used at an endpoint.
        unfinished: why the next run should continue it (a judge that failed on some answers); None if complete.
    """

    quantities: dict[str, Quantity]
    details: dict[str, Any] = field(default_factory=dict)
    unfinished: str | None = None


class Measure(Protocol):
    """A measure. Its options are its dataclass fields; they must be JSON-able for the record."""

    def check(self) -> None:
        """Check options, files and packages before any model is loaded.

        Raises:
            InputError: one of them is wrong or missing.
        """

    def run(self, subject: Subject) -> Found:
        """Measure. Work finished before an interruption is reused (``subject.folder``)."""
