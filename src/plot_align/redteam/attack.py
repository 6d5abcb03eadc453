"""What every attack takes and returns. Each attack is one module and does not know how it is scheduled or judged."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from plot_align.errors import InputError
from plot_align.redteam.behaviors import Behavior
from plot_align.redteam.spent import Limit, Spent
from plot_align.redteam.victim import Victim

OnStep = Callable[[int], None]


def numeric_seed(*names: object) -> int:
    """A 63-bit seed derived from ``names`` alone."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, names)).encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Request:
    """One behaviour to attack.

    Attributes:
        behavior: what the attack wants the model to do.
        target: how a complying answer begins; "" where the attack needs none.
        cases: how many test cases to make.
        seed: decides everything random, together with the behaviour's id (:meth:`generator`).
        snapshots: update steps after which the best test cases so far are kept, for the curve; ascending.
        limit: of what a test case may cost; an attack with steps begins none once it is reached.
    """

    behavior: Behavior
    target: str = ""
    cases: int = 1
    seed: int = 0
    snapshots: tuple[int, ...] = ()
    limit: Limit = field(default_factory=Limit)

    def numeric_seed(self, *names: object) -> int:
        """:func:`numeric_seed` of this request and ``names``."""
        return numeric_seed(self.seed, self.behavior.id, *names)

    def generator(self, device: torch.device | str, *names: object) -> torch.Generator:
        return torch.Generator(device).manual_seed(self.numeric_seed(*names))


@dataclass(frozen=True)
class Attacked:
    """What an attack made of a request.

    Attributes:
        cases: the test cases: whole user turns, context included.
        losses: mean cross-entropy of the target's tokens in nats for each case, as the attack saw it; empty if it
            optimises nothing.
        trace: the same after every update step, best so far, mean over the cases; index 0 is before the first step.
        snapshots: update step → the cases as they were then; none of a step that a limit left out.
        failed: why there are no cases (an endpoint that stayed silent); None if all went well.
        spent: what each case cost, up to its being there; an attack without steps may leave it out.
        spent_by_step: update step → the same, for the cases as they were then.
    """

    cases: list[str]
    losses: list[float] = field(default_factory=list)
    trace: list[float] = field(default_factory=list)
    snapshots: dict[int, list[str]] = field(default_factory=dict)
    failed: str | None = None
    spent: list[Spent] = field(default_factory=list)
    spent_by_step: dict[int, list[Spent]] = field(default_factory=dict)


def require_counts(attack: object, *names: str) -> None:
    """Check that each of the attack's options ``names`` is 1 or more.

    Raises:
        InputError: one is less.
    """
    for name in names:
        value = getattr(attack, name)
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; expected 1 or more.")


@dataclass(frozen=True)
class Answering:
    """How the model under attack answers test cases: greedily and from the beginning, unless an attack says otherwise.

    Attributes:
        prefixes: BehaviorID → token ids with which the answers to its test cases begin.
        samples: answers to each test case.
        temperature: of the sampling; 0 decodes greedily.
        seed: of the sampling.
    """

    prefixes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    samples: int = 1
    temperature: float = 0.0
    seed: int = 0

    @property
    def identity(self) -> dict[str, Any]:
        """What all completions of one file must have in common, though they do not say it."""
        return {"temperature": self.temperature, "seed": self.seed} if self.temperature > 0 else {}

    def seed_of(self, behavior: str, answer: int) -> int | None:
        """The seed of one answer, independent of what else is sampled; None for greedy decoding."""
        return numeric_seed(self.seed, behavior, "sample", answer) if self.temperature > 0 else None


class Attack(Protocol):
    """An attack with its options; a frozen dataclass.

    Attributes:
        name: HarmBench's name of the method, also the name of its folder.
        default_cases: test cases per behaviour, as in HarmBench.
        needs_target: whether :attr:`Request.target` must be set.
        white_box: whether its cases are made for one model (else they can be made once and replayed).
        any_answer: whether one successful answer breaks a behaviour; otherwise the rate over its answers counts, as in
            HarmBench.
        steps: update steps; 0 if there are none.
    """

    name: ClassVar[str]
    default_cases: ClassVar[int]
    needs_target: ClassVar[bool]
    white_box: ClassVar[bool]
    any_answer: ClassVar[bool] = False

    @property
    def steps(self) -> int: ...

    @property
    def title(self) -> str:
        """The name as shown in tables, with what the rate is of if the name alone does not say it."""
        return self.name

    @property
    def on_answer(self) -> bool:
        """Whether it changes how the model answers, and not what it is asked."""
        return False

    @property
    def by_tokens(self) -> Mapping[int, Attack]:
        """For the curve: number of given answer tokens → the same attack with that many, itself included."""
        return {}

    @property
    def identity(self) -> dict[str, Any]:
        """The options that decide its files, as JSON; a model that writes its prompts appears by its own identity."""
        return {name: getattr(value, "identity", value) for name, value in vars(self).items()}

    def run(self, victim: Victim, request: Request, on_step: OnStep = lambda step: None) -> Attacked: ...

    def answering(
        self, victim: Victim, behaviors: Sequence[Behavior], targets: Mapping[str, str], seed: int
    ) -> Answering:
        """How ``victim`` answers the test cases."""
        return Answering()

    def experiment(self, victim: Victim) -> str:
        """HarmBench's name of the experiment: the model under attack for white-box cases, else the model that wrote
        them."""
        if self.white_box:
            return victim.name
        return Path(str(getattr(getattr(self, "attacker", None), "name", "default"))).name
