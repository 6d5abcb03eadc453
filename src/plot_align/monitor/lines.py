"""The lines that a healthy run does not cross, and what is said where one is."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from plot_align.errors import InputError, did_you_mean
from plot_align.monitor.forwards import Sums

ENOUGH = 32  # answers over which a fall is averaged, so that one odd pair is no fall
MOST_LOGS = 4  # or so many logs, where each reads one micro-batch


@dataclass(frozen=True)
class Lines:
    """What is too much. ``None`` draws no line.

    Args:
        chosen_fall: nats a token that the chosen answers have lost against the reference. At 0.2 their perplexity is
            e^0.2 = 1.22 times what it was. The complaint of trl#800; Razin et al. 2024 (arXiv 2410.08847) tie it to
            over-refusal and to answers nobody wanted.
        rejected_fall: nats a token that the rejected answers have lost. What is taken from an unlikely token goes to
            the token that was likeliest anyway (Ren & Sutherland 2024, arXiv 2407.10490), not to the chosen answers.
        benign_refusals: share of the harmless requests that are refused. Of XSTest's safe prompts Llama 2, its example
            of exaggerated safety, refuses 38 %, and GPT-4 next to none (Röttger et al. 2024, arXiv 2308.01263).
        repetition: share of an answer's 4-grams that repeat earlier ones, averaged over answers. People's texts lie
            below 0.01, greedy decoding of a plain language model at 0.44 (Welleck et al. 2020, arXiv 1908.04319).

    Raises:
        InputError: a line that is not a positive number.
    """

    chosen_fall: float | None = 0.2
    rejected_fall: float | None = 0.5
    benign_refusals: float | None = 0.25
    repetition: float | None = 0.2

    def __post_init__(self) -> None:
        for name in NAMES:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} is {value}, expected a positive number, or None for no line; correct it")


NAMES = tuple(field.name for field in fields(Lines))
REMEDIES = {
    "chosen_fall": "lower the learning rate, raise beta, or add an SFT term (loss_type: [sigmoid, sft])",
    "rejected_fall": "lower the learning rate or raise beta",
    "benign_refusals": "mix in pairs in which help is preferred to a refusal, or stop earlier",
    "repetition": "lower the learning rate, raise beta, or go back to a checkpoint before this step",
}


def require_names(stop_on: Sequence[str]) -> tuple[str, ...]:
    """``stop_on``, checked.

    Raises:
        InputError: a name of no line.
    """
    for name in stop_on:
        if name not in NAMES:
            near = did_you_mean(name, NAMES, f"expected {', '.join(NAMES)}")
            raise InputError(f"stop_on has {name!r}; {near}")
    return tuple(stop_on)


class Fall:
    """How far the answers of one side have fallen, over the latest answers."""

    def __init__(self, side: Literal["chosen", "rejected"]) -> None:
        self.side = side
        self._latest: deque[Sums] = deque(maxlen=MOST_LOGS)

    def add(self, sums: Sums) -> float | None:
        """Nats a token that they have lost; None before there are enough."""
        if self._sum("tokens", [sums]) == 0:
            return None
        self._latest.append(sums)
        while self._sum("answers") - self._sum("answers", [self._latest[0]]) >= ENOUGH:
            self._latest.popleft()
        if self._sum("answers") < ENOUGH and len(self._latest) < MOST_LOGS:
            return None
        return -sum(getattr(x, self.side) for x in self._latest) / self._sum("tokens")

    def _sum(self, what: str, of: Iterable[Sums] | None = None) -> float:
        return sum(getattr(x, f"{self.side}_{what}") for x in (self._latest if of is None else of))
