"""The interface of a judge, and its verdict on one answer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, ClassVar, Literal, Protocol

from plot_align.errors import InputError
from plot_align.redteam.behaviors import Behavior


@dataclass(frozen=True)
class Judged:
    """A verdict on one generation.

    Attributes:
        label: 1 if the attack succeeded, 0 if not, −1 if the judge cannot tell (counts as a failed attack). For a
            benign request there is no attack: 0, or −1 if the judge cannot tell.
        refused: whether a benign request was refused; None for a harmful one, or if the judge cannot tell.
        helped: whether a benign request was served; None in the same cases.
        reason: why, in a few words; may be "".
    """

    label: int
    refused: bool | None = None
    helped: bool | None = None
    reason: str = ""


class Judge(Protocol):
    """Judges generations; all three arguments have one entry per case.

    Attributes:
        name: the one that chooses it on the command line, for files and tables.
        reads: what it reads of a prefilled answer: the whole ``answer``, as a user would; only the ``continuation``,
            if it judges by how an answer begins; or ``nothing``.
    """

    reads: ClassVar[Literal["answer", "continuation", "nothing"]]

    @property
    def name(self) -> str: ...

    def judge(
        self, behaviors: Sequence[Behavior], test_cases: Sequence[str], generations: Sequence[str]
    ) -> list[Judged]:
        """Harmful behaviours: did the attack succeed? ``generations`` holds the part of each answer that it
        :attr:`reads`."""
        ...

    def judge_benign(
        self, behaviors: Sequence[Behavior], test_cases: Sequence[str], generations: Sequence[str]
    ) -> list[Judged]:
        """Benign requests: were they refused, were they served?"""
        ...


UNKNOWN = Judged(-1, reason="this judge says nothing about benign requests")


def same_length(behaviors: Sequence[Any], test_cases: Sequence[Any], generations: Sequence[Any]) -> None:
    if not len(behaviors) == len(test_cases) == len(generations):
        raise InputError(
            f"there are {len(behaviors)} behaviors, {len(test_cases)} test_cases and {len(generations)} generations, "
            "expected one of each per case; repeat the behaviour for each of its test cases"
        )


@cache
def digest_of(*files: str) -> str:
    """16 hex digits of the text of files in this folder: a judge that goes by rules is known by them."""
    folder = resources.files(__package__)
    texts = [folder.joinpath(name).read_text(encoding="utf-8") for name in files]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
