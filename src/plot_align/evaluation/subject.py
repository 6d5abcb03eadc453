"""The model that is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from plot_align.chat import require_template
from plot_align.evaluation.quantity import Quantity
from plot_align.redteam.victim import model_identity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OnItem = Callable[[int], None]


def _silent(description: str, total: int) -> OnItem:
    return lambda done: None


@dataclass
class Subject:
    """A causal language model with its chat template, and where its unfinished work lies.

    Args:
        model: on its device, in its dtype.
        tokenizer: with a chat template.
        name: as it stands in files and tables.
        source: hub id or folder it was loaded from.
        folder: of the files that a measure makes on its way and finds again (answers, judgements).
        seed: of sampling and resampling. batch_size: rows a pass.
        bar: called with a description and a total; returns what moves the bar by so many items.

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
    bar: Callable[[str, int], OnItem] = field(default=_silent, repr=False)

    def __post_init__(self) -> None:
        require_template(self.tokenizer)

    @cached_property
    def identity(self) -> dict[str, str]:
        """See :func:`plot_align.redteam.victim.model_identity`."""
        return model_identity(self.model, self.tokenizer)


@dataclass
class Found:
    """What a measure gives: its quantities, the first one its score, and whatever explains them.

    Args:
        quantities: name → :func:`plot_align.evaluation.quantity.of_items` or ``of_whole``.
        details: JSON-able, e.g. undecided answers and the first reason, tokens that an endpoint was asked for.
    """

    quantities: dict[str, Quantity]
    details: dict[str, Any] = field(default_factory=dict)


class Measure(Protocol):
    """What can be measured. Its options are its dataclass fields, JSON-able: the record keeps them."""

    def check(self) -> None:
        """Before any model is loaded: that the options are right, that files and packages are there.

        Raises:
            InputError: they are not.
        """

    def run(self, subject: Subject) -> Found:
        """Measure. What was finished before an interruption is not done again (``subject.folder``)."""
