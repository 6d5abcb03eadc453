"""Models that write prompts for Zero-Shot and SFS: a local one, or one behind an endpoint."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from plot_align.errors import InputError
from plot_align.inference.chat import Start, continue_each, prompt_ids, require_template
from plot_align.inference.endpoint import Endpoint
from plot_align.inference.identity import model_identity
from plot_align.redteam.behaviors import Behavior

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ATTEMPTS = 3  # for one text, until it is not empty


class Attacker(Protocol):
    """Writes one text per instruction; the same call gives the same texts if the model allows it."""

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> object:
        """What decides its texts, as JSON, so that prompts of two attackers are never mixed."""

    def write(
        self, instructions: Sequence[str], *, temperature: float, top_p: float, max_new_tokens: int, seed: int
    ) -> list[str]: ...


@dataclass(frozen=True)
class LocalAttacker:
    """A causal language model with a chat template; each instruction is one user turn.

    Args:
        model, tokenizer: on their device. name: for file names.
        batch_size: instructions per pass; like the device, it can change the texts.

    Raises:
        InputError: the tokenizer has no chat template, or ``batch_size`` is below one.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    batch_size: int = 64
    _tokens: list[int] = field(default_factory=list, init=False, repr=False, compare=False)  # of each call

    def __post_init__(self) -> None:
        require_template(self.tokenizer)
        if self.batch_size < 1:
            raise InputError(f"batch_size is {self.batch_size}, but must be at least 1: pass a positive number.")

    @cached_property
    def identity(self) -> dict[str, str]:
        """Everything that decides the texts."""
        return {"name": self.name, **model_identity(self.model, self.tokenizer)}

    def write(
        self, instructions: Sequence[str], *, temperature: float, top_p: float, max_new_tokens: int, seed: int
    ) -> list[str]:
        """One sampled text per instruction, in their order; ``temperature`` 0 decodes greedily.

        Raises:
            InputError: ``max_new_tokens`` is below one.
        """
        found = next(
            continue_each(
                self.model,
                self.tokenizer,
                [[Start(row) for row in (prompt_ids(self.tokenizer, instructions) if instructions else [])]],
                max_new_tokens=max_new_tokens,
                batch_size=self.batch_size,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
            )
        )
        self._tokens.append(sum(continuation.tokens for continuation in found))
        return [continuation.text for continuation in found]

    @property
    def tokens(self) -> int:
        """Read and written so far."""
        return sum(self._tokens)


@dataclass(frozen=True)
class EndpointAttacker:
    """A model behind an endpoint.

    Args:
        endpoint: where it runs.
        workers: concurrent requests.

    Raises:
        InputError: ``workers`` is below one.
    """

    endpoint: Endpoint
    workers: int = 8

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise InputError(f"workers is {self.workers}, but must be at least 1: pass a positive number.")

    @property
    def name(self) -> str:
        return self.endpoint.model

    @property
    def identity(self) -> str:
        """Model and address, without secrets."""
        return self.endpoint.label

    @property
    def tokens(self) -> int:
        """Read and written so far, as the server counts; 0 where it does not."""
        return self.endpoint.usage.prompt_tokens + self.endpoint.usage.completion_tokens

    def write(
        self, instructions: Sequence[str], *, temperature: float, top_p: float, max_new_tokens: int, seed: int
    ) -> list[str]:
        """One sampled text per instruction, in order, each with its own seed.

        Raises:
            EndpointError: the endpoint refused, or did not recover.
        """

        def ask(numbered: tuple[int, str]) -> str:
            number, instruction = numbered
            return self.endpoint.chat(
                [{"role": "user", "content": instruction}],
                temperature=temperature,
                top_p=top_p,
                max_tokens=max_new_tokens,
                seed=_small_seed(seed, number),
            ).text

        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(ask, enumerate(instructions)))  # the first failure cancels the requests not yet sent


def _small_seed(seed: int, number: int) -> int:
    """A 31-bit seed, which every server takes. Two copies of one instruction get different seeds."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4], "big") >> 1


# ---------------------------------------------------------------------------------------------- texts


_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "`": "`"}
_THOUGHTS = re.compile(r"\s*<think>.*?(</think>|\Z)", re.DOTALL)
_LABEL = re.compile(r"(\d{1,2}[.)]\s+|(\*\*)?(test |new )?(prompt|request)( ?\d+)?(:\*\*|(\*\*)?:)\s*)", re.IGNORECASE)


def clean(text: str) -> str:
    """The prompt within an attacker's reply: without thoughts, a leading "1." or "Prompt:", or quotes around it."""
    text = _THOUGHTS.sub("", text, count=1) if _THOUGHTS.match(text) else text
    text = text.encode("utf-8", "replace").decode()  # half an emoji, which no tokenizer reads
    while True:
        before = text
        text = text.strip()
        if label := _LABEL.match(text):
            text = text[label.end() :]
        if _quoted(text):
            text = text[1:-1]
        if text == before:
            return text


def _quoted(text: str) -> bool:
    """Whether one pair of quotes surrounds the whole text, unlike ``"a" and "b"``."""
    if len(text) < 2 or _QUOTES.get(text[0]) != text[-1]:
        return False
    inner = re.sub(r"(?<=\w)['’](?=\w)", "", text[1:-1])  # apostrophes are not quotes
    return text[0] not in inner and text[-1] not in inner


def with_context(behavior: Behavior, text: str) -> str:
    """``text`` as a test case of a behaviour: after its context, if it has one."""
    return replace(behavior, text=text).prompt


def fill(template: str, slots: Mapping[str, str]) -> str:
    """``template`` with each ``{name}`` of ``slots`` replaced; other braces stay as they are."""
    return re.sub(r"\{(" + "|".join(slots) + r")\}", lambda match: slots[match.group(1)], template)


def require_slots(argument: str, template: str, *names: str) -> None:
    """Raise InputError if a template lacks a slot."""
    for name in names:
        if f"{{{name}}}" not in template:
            raise InputError(
                f"{argument} is {template!r}, but must hold {{{name}}}, which is replaced: add {{{name}}} to it."
            )


@dataclass(frozen=True)
class Sampling:
    """How an attacker writes: temperature, nucleus, longest text in tokens.

    Raises:
        InputError: one of them is out of range.
    """

    temperature: float
    top_p: float
    max_new_tokens: int

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InputError(f"temperature is {self.temperature}, but must not be negative: pass 0 (greedy) or more.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}, but must be above 0 and at most 1: pass 1 for all tokens.")
        if self.max_new_tokens < 1:
            raise InputError(
                f"max_new_tokens is {self.max_new_tokens}, but must be at least 1: pass a positive number."
            )


def written(attacker: Attacker, instruction: str, count: int, sampling: Sampling, seeds: Sequence[int]) -> list[str]:
    """Up to ``count`` cleaned texts for one instruction; an empty text is requested again with the next seed.

    Args:
        seeds: one for each attempt.

    Returns:
        Texts that are not empty, in order; fewer than ``count`` if the attacker stayed silent in every attempt.

    Raises:
        EndpointError: from an endpoint.
    """
    texts: list[str] = [""] * count
    for seed in seeds:
        empty = [i for i, text in enumerate(texts) if not text]
        if not empty:
            break
        found = attacker.write(
            [instruction] * len(empty),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_new_tokens=sampling.max_new_tokens,
            seed=seed,
        )
        for i, text in zip(empty, found, strict=True):
            texts[i] = clean(text)
    return [text for text in texts if text]
