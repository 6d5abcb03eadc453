"""What every attack takes and returns; each attack is one module, and none knows how it is scheduled or judged."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch

from plot_align.errors import InputError
from plot_align.redteam.behaviors import Behavior
from plot_align.redteam.victim import Victim

OnStep = Callable[[int], None]


@dataclass(frozen=True)
class Request:
    """One behaviour to attack.

    Attributes:
        behavior: what is asked for.
        target: how a complying answer begins; "" where the attack needs none.
        cases: how many test cases to make.
        seed: decides everything random, together with the behaviour's id (:meth:`generator`).
        snapshots: update steps after which the best test cases so far are kept, for the curve; ascending.
    """

    behavior: Behavior
    target: str = ""
    cases: int = 1
    seed: int = 0
    snapshots: tuple[int, ...] = ()

    def numeric_seed(self, *names: object) -> int:
        """A seed of 63 bits of this request and of ``names``; the same whatever ran before it."""
        text = "/".join(map(str, (self.seed, self.behavior.id, *names)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def generator(self, device: torch.device | str, *names: object) -> torch.Generator:
        return torch.Generator(device).manual_seed(self.numeric_seed(*names))


@dataclass(frozen=True)
class Attacked:
    """What an attack made of a request.

    Attributes:
        cases: the test cases: whole user turns, context included.
        losses: mean cross-entropy of the target's tokens in nats for each case, as the attack saw it; empty where it
            optimises nothing.
        trace: the same after every update step, best so far, mean over the cases; index 0 is before the first step.
        snapshots: update step → the cases as they were then.
        failed: why there are no cases (an endpoint that stayed silent); None where all went well.
    """

    cases: list[str]
    losses: list[float] = field(default_factory=list)
    trace: list[float] = field(default_factory=list)
    snapshots: dict[int, list[str]] = field(default_factory=dict)
    failed: str | None = None


def require_counts(attack: object, *names: str) -> None:
    """Each of the attack's options ``names`` is 1 or more.

    Raises:
        InputError: one is less.
    """
    for name in names:
        value = getattr(attack, name)
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; expected 1 or more.")


class Attack(Protocol):
    """An attack with its options; a frozen dataclass.

    Attributes:
        name: HarmBench's name of the method, also the name of its folder.
        default_cases: test cases per behaviour, as in HarmBench.
        needs_target: whether :attr:`Request.target` must be there.
        white_box: whether its cases are made for one model (else they can be made once and replayed).
        steps: update steps; 0 where there are none.
    """

    name: ClassVar[str]
    default_cases: ClassVar[int]
    needs_target: ClassVar[bool]
    white_box: ClassVar[bool]

    @property
    def steps(self) -> int: ...

    def run(self, victim: Victim, request: Request, on_step: OnStep = lambda step: None) -> Attacked: ...
