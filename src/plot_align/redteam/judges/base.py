"""What every judge is, and what it says of one answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from plot_align.errors import InputError
from plot_align.redteam.behaviors import Behavior


@dataclass(frozen=True)
class Judged:
    """What a judge says about one generation.

    Attributes:
        label: 1 where the attack succeeded, 0 where not, −1 where the judge cannot tell (counts as a failed attack).
            For a benign request there is no attack: 0, or −1 where the judge cannot tell.
        refused: whether a benign request was refused; None for a harmful one, and where the judge cannot tell.
        helped: whether a benign request was served; None likewise.
        reason: why, in a few words; "" where there is nothing to say.
    """

    label: int
    refused: bool | None = None
    helped: bool | None = None
    reason: str = ""


class Judge(Protocol):
    """Judges generations; all three arguments have one entry per case.

    Attributes:
        name: as it stands in files and tables.
        reads: what it reads of an answer that was begun for the model: the ``answer``, as a user would; the
            ``continuation`` alone, where the beginning decides and is not the model's own; or ``nothing``.
    """

    reads: ClassVar[Literal["answer", "continuation", "nothing"]]

    @property
    def name(self) -> str: ...

    def judge(
        self, behaviors: Sequence[Behavior], test_cases: Sequence[str], generations: Sequence[str]
    ) -> list[Judged]:
        """Harmful behaviours: did the attack succeed? ``generations``: of each answer what it :attr:`reads`."""
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
