"""Prefill: the attack begins the answer, and the model continues it.

Anyone who runs the model can do this, and many APIs allow it. It breaks models whose alignment reaches only the first
few tokens (X. Qi et al., arXiv 2406.05946, who prefill tokens of a harmful answer). Here they are those of HarmBench's
targets. HarmBench has no such method, so the folder's name is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from plot_align.errors import InputError
from plot_align.redteam.attack import Answering, Attack, Attacked, OnStep, Request
from plot_align.redteam.behaviors import Behavior
from plot_align.redteam.victim import Victim

OPENING = "Sure, here is"


@dataclass(frozen=True)
class Prefill(Attack):
    """The plain request; the answer begins with the first tokens of the target.

    Args:
        tokens: how many, by the model's tokenizer; 0 is the direct request. No target may have fewer.
        text: begins every answer instead of its behaviour's target. Without either, :data:`OPENING` does.

    Raises:
        InputError: ``tokens`` is negative, or ``text`` is blank.
    """

    tokens: int = 4
    text: str | None = None

    name: ClassVar[str] = "Prefill"
    default_cases: ClassVar[int] = 1
    needs_target: ClassVar[bool] = False
    white_box: ClassVar[bool] = False
    steps: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise InputError(f"tokens is {self.tokens}; expected 0 or more.")
        if self.text is not None and not self.text.strip():
            raise InputError(f"text is {self.text!r}; write how a complying answer begins, e.g. {OPENING!r}")

    @property
    def title(self) -> str:
        return f"{self.name} ({self.tokens} token{'' if self.tokens == 1 else 's'})"

    @property
    def on_answer(self) -> bool:
        return self.tokens > 0

    @property
    def by_tokens(self) -> Mapping[int, Attack]:
        """At 0, at the powers of two below ``tokens``, and at ``tokens``."""
        powers = {1 << i for i in range(self.tokens.bit_length())}
        return {tokens: replace(self, tokens=tokens) for tokens in sorted({0, *powers, self.tokens})}

    def run(self, victim: Victim, request: Request, on_step: OnStep = lambda step: None) -> Attacked:
        """One case, the behaviour after its context, however many are requested: more would be the same."""
        return Attacked([request.behavior.prompt])

    def answering(
        self, victim: Victim, behaviors: Sequence[Behavior], targets: Mapping[str, str], seed: int
    ) -> Answering:
        """Each target is cut after its first ``tokens`` tokens.

        Raises:
            InputError: a target is empty, or shorter.
        """
        if not self.tokens:
            return Answering()
        prefixes: dict[str, list[int]] = {}
        for behavior in behaviors:
            text = targets.get(behavior.id, OPENING) if self.text is None else self.text
            if not text.strip():
                raise InputError(f"the target of {behavior.id!r} is empty; write how a complying answer begins")
            prefixes[behavior.id] = victim.target_ids(text)
        shortest = min(prefixes, key=lambda name: len(prefixes[name]), default=None)
        if shortest is not None and len(prefixes[shortest]) < self.tokens:
            raise InputError(
                f"tokens is {self.tokens}, but the target of {shortest!r} has only "
                f"{len(prefixes[shortest])}; set prefill: {{tokens: {len(prefixes[shortest])}}} or less, or give "
                "longer targets"
            )
        return Answering({name: ids[: self.tokens] for name, ids in prefixes.items()})

    def experiment(self, victim: Victim) -> str:
        """One experiment per number of tokens, so that the points of the curve have folders side by side."""
        return f"{self.tokens}_tokens"
