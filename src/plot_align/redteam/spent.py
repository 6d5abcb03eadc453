"""What an attack costs: tokens through the model under attack, an attacker's tokens, seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, dataclass, field
from typing import TYPE_CHECKING, Any

from plot_align.errors import InputError

if TYPE_CHECKING:
    from plot_align.redteam.attackers import Attacker
    from plot_align.redteam.victim import Victim


@dataclass(frozen=True)
class Spent:
    """A cost.

    Attributes:
        forward_tokens: tokens that the model under attack computed: what a cache of keys and values spared is not
            among them, nor is padding, which depends on what shares a batch.
        backward_tokens: those of them that a gradient was taken through.
        attacker_tokens: read and written by the model that writes the prompts.
        seconds: of wall time; of a batch of answers, each has an equal share. Two runs of the same are equal without.
    """

    forward_tokens: float = 0
    backward_tokens: float = 0
    attacker_tokens: float = 0
    seconds: float = field(default=0.0, compare=False)

    @property
    def tokens(self) -> float:
        """The budget's unit: a backward pass, which reaches the embeddings and no weight, costs about as much as its
        forward pass."""
        return self.forward_tokens + self.backward_tokens

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Spent) -> Spent:
        return Spent(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, factor: float) -> Spent:
        return Spent(*(factor * a for a in astuple(self)))

    def shares(self, count: int) -> list[Spent]:
        """``count`` equal shares, for cases that are made side by side."""
        return [self if count == 1 else Spent(*(a / count for a in astuple(self)))] * count

    @staticmethod
    def mean(costs: Iterable[Spent]) -> Spent:
        """Of one cost or more."""
        found = list(costs)
        return sum(found, Spent()).shares(len(found))[0]

    @property
    def plain(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Spent:
        return cls(**content)


@dataclass(frozen=True)
class Limit:
    """What a test case may cost. Whatever was begun is finished: the cost can exceed the limit by one step.

    Args:
        forward_tokens: :attr:`Spent.tokens`. seconds: of wall time; what they suffice for depends on the machine.

    Raises:
        InputError: one of them is not a finite number above 0.
    """

    forward_tokens: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"max_{name} is {value}, expected a finite number above 0; leave it out for no limit")

    def reached(self, spent: Spent) -> bool:
        return (self.forward_tokens is not None and spent.tokens >= self.forward_tokens) or (
            self.seconds is not None and spent.seconds >= self.seconds
        )


class Meter:
    """What was spent since it was made."""

    def __init__(self, victim: Victim, attacker: Attacker | None = None) -> None:
        self._victim, self._attacker = victim, attacker
        self._start = self._now()

    def read(self) -> Spent:
        return self._now() - self._start

    def _now(self) -> Spent:
        writes = getattr(self._attacker, "tokens", 0)
        return Spent(self._victim.forward_tokens, self._victim.backward_tokens, writes, time.perf_counter())
