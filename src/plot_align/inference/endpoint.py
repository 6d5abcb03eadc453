"""A client of any OpenAI-compatible chat endpoint that waits out what passes, and gives up with one sentence.

Beside what every client retries (time-outs, lost connections, 408, 409, 429, 5xx), this one retries nonsense: an HTML
page with status 200 from a proxy, JSON without choices, an empty answer.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from plot_align.errors import InputError, RunError

if TYPE_CHECKING:
    from openai import OpenAI

NO_KEY = "none"  # what a local server that asks for no key is sent
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds
_PASSING = {408, 409, 429}


class EndpointError(RunError):
    """An endpoint gave no usable answer: it refused, or it did not recover within all tries."""


@dataclass(frozen=True)
class Reply:
    """One answer; the token counts are the server's own, 0 where it tells none."""

    text: str
    prompt_tokens: int
    completion_tokens: int


@dataclass
class Usage:
    """What an endpoint was asked over its life; ``requests`` counts every try, tokens only those of answers."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Passing(Exception):
    """What went wrong may be right the next time.

    Args:
        what: came back, as it stands in a sentence. wait: seconds the server asked to wait; None where it did not.
    """

    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.wait = wait


@dataclass
class Endpoint:
    """An OpenAI-compatible chat endpoint, e.g. ``http://localhost:8000/v1`` of a local server. Threads may share it.

    Args:
        base_url: up to and without ``/chat/completions``.
        model: the model's name as the server knows it.
        key_variable: the environment variable that holds the key. The key comes from there only, and is neither
            written anywhere nor part of a message. Where the variable is unset or empty, ``"none"`` is sent: many
            local servers need no key, and the others answer 401.
        timeout: seconds without a sign of life until a request counts as failed.
        retries: how often a failed request is tried again; the waits double from 1 s up to 60 s, with jitter, and a
            longer ``Retry-After`` of up to 60 s is heeded.
        sleep: waits; for tests.

    Raises:
        InputError: an argument is out of range, or the package ``openai`` is missing (on first use).
    """

    base_url: str = field(repr=False)  # it may hold a password
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    retries: int = 5
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)
    usage: Usage = field(default_factory=Usage, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        if not _is_address(self.base_url):
            raise InputError(
                "base_url is no address such as 'http://localhost:8000/v1': pass it with http:// or https:// "
                "(what came is not shown, as it may hold a password)."
            )
        if not self.model:
            raise InputError("model is empty, but an endpoint is asked for a model by name: pass the server's name.")
        if not self.timeout > 0:
            raise InputError(f"timeout is {self.timeout}, but must be above zero seconds: pass a longer one.")
        if self.retries < 0:
            raise InputError(f"retries is {self.retries}, but cannot be negative: pass 0 or more.")

    @property
    def label(self) -> str:
        """Model and address as they stand in messages: without user, password and query."""
        parts = urlsplit(self.base_url)
        address = (parts.hostname or "") + (f":{parts.port}" if parts.port else "")
        return f"{self.model} at {parts.scheme}://{address}{parts.path}"

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        temperature: float,
        top_p: float = 1.0,
        max_tokens: int,
        seed: int | None = None,
    ) -> Reply:
        """The endpoint's answer to a conversation.

        Args:
            messages: ``{"role": …, "content": …}`` each.
            temperature, top_p: of the sampling. max_tokens: the answer's longest length.
            seed: of the sampling; not every server heeds it.

        Raises:
            EndpointError: the server refuses (401, 403, 404 and other errors of the request: at once), or every try
                failed.
            InputError: the package ``openai`` is missing.
        """
        options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
        if seed is not None:
            options["seed"] = seed  # not sent otherwise: some servers do not know it
        tries, number = self.retries + 1, 0
        while True:
            number += 1
            try:
                return self._try(messages, options)
            except _Passing as problem:
                if number == tries:
                    raise EndpointError(
                        f"{self.label} gave no usable answer in {tries} {'try' if tries == 1 else 'tries'}, the last "
                        f"was {self._redacted(str(problem))}; check the server, or raise retries or timeout"
                    ) from None
                self.sleep(_wait(number, problem.wait))

    def _try(self, messages: Sequence[Mapping[str, str]], options: Mapping[str, Any]) -> Reply:
        """One request. Raises _Passing or EndpointError."""
        with self._lock:
            client = self._client
            self.usage.requests += 1
        import openai

        try:
            # The raw body, because the client takes any page and any JSON with status 200 for an answer.
            body = client.chat.completions.with_raw_response.create(
                model=self.model,
                messages=list(messages),
                **options,
            ).text
        except openai.APITimeoutError:
            raise _Passing(f"no answer within {self.timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise _Passing(f"a failed connection ({error.__cause__ or error})") from None
        except openai.APIStatusError as error:
            if error.status_code in _PASSING or error.status_code >= 500:
                raise _Passing(f"status {error.status_code}", _retry_after(error.response.headers)) from None
            raise EndpointError(self._refusal(error.status_code, error.message)) from None
        reply = _read(body)
        with self._lock:
            self.usage.prompt_tokens += reply.prompt_tokens
            self.usage.completion_tokens += reply.completion_tokens
        return reply

    @cached_property
    def _client(self) -> OpenAI:
        try:
            from openai import OpenAI
        except ImportError:
            raise InputError(
                'an endpoint is asked with the package openai, which is not installed; pip install "plot-align[api]"'
            ) from None
        return OpenAI(base_url=self.base_url, api_key=self._key(), timeout=self.timeout, max_retries=0)

    def _key(self) -> str:
        return os.environ.get(self.key_variable) or NO_KEY

    def _redacted(self, text: str) -> str:
        """On one line, cut short, and without the key, which some servers send back."""
        key = self._key()
        text = " ".join(text.split())
        return (text if key == NO_KEY else text.replace(key, "…"))[:300]

    def _refusal(self, status: int, message: str) -> str:
        advice = {
            401: f"put a valid key into the environment variable {self.key_variable}",
            403: f"use a key with access to this model in the environment variable {self.key_variable}",
            404: "check base_url (it mostly ends in /v1) and model",
        }.get(status, "change what the server complains of")
        return f"{self.label} refused with status {status} ({self._redacted(message)}); {advice}"


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port that is no number
        return False


def _read(body: str) -> Reply:
    """The answer in a response's body. Raises _Passing where there is none."""
    try:
        found = json.loads(body)
    except ValueError:
        start = " ".join(body.split())[:40]
        raise _Passing(f"status 200 with {start!r} instead of JSON") from None
    choices = found.get("choices") if isinstance(found, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise _Passing(f"status 200 with JSON without choices ({body[:100]})")
    text = message.get("content")
    if not isinstance(text, str) or not text.strip():
        raise _Passing("status 200 with an empty answer")
    usage = found.get("usage")
    return Reply(text, _count(usage, "prompt_tokens"), _count(usage, "completion_tokens"))


def _count(usage: object, name: str) -> int:
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) else 0


def _retry_after(headers: Mapping[str, str]) -> float | None:
    try:
        return float(headers.get("retry-after", ""))
    except ValueError:
        return None  # absent, or a date, which is rare


def _wait(number: int, asked: float | None) -> float:
    """Seconds until the next try: doubling, and jittered so that many clients do not come back all at once."""
    backoff = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (number - 1)) * random.uniform(0.5, 1.0)
    return backoff if asked is None else min(LONGEST_WAIT, max(backoff, asked))
