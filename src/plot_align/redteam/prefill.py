"""Prefill: the answer is begun for the model, which only has to go on.

Anyone running the model can do this, and many APIs allow it. A model that is aligned in the first few tokens of
its answers only is not aligned any more then: X. Qi et al., arXiv 2406.05946, who begin with tokens of a harmful
answer; here they are those of HarmBench's targets. HarmBench has no such method, so the folder's name is ours.
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
    """The plain request, its answer begun with the first tokens of the target.

    Args:
        tokens: how many, as the model's tokenizer counts; 0 is the direct request. No target may have fewer: a rate
            would be of another number of tokens than it says.
        text: begins every answer in place of its behaviour's target. Where there is neither: :data:`OPENING`.

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
    def by_tokens(self) -> Mapping[int, Attack]:
        """At 0, at the powers of two below ``tokens``, and at ``tokens``."""
        powers = {1 << i for i in range(self.tokens.bit_length())}
        return {tokens: replace(self, tokens=tokens) for tokens in sorted({0, *powers, self.tokens})}

    def run(self, victim: Victim, request: Request, on_step: OnStep = lambda step: None) -> Attacked:
        """The behaviour, its context first; one case, whatever is asked for, as more would be the same."""
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
                f"tokens is {self.tokens}, but the answer to {shortest!r} is to begin with a text of "
                f"{len(prefixes[shortest])}; set prefill: {{tokens: {len(prefixes[shortest])}}} or less, or give "
                "longer targets"
            )
        return Answering({name: ids[: self.tokens] for name, ids in prefixes.items()})

    def experiment(self, victim: Victim) -> str:
        """One for each number of tokens, so that the points of the curve lie side by side."""
        return f"{self.tokens}_tokens"
