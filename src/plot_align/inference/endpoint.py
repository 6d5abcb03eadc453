"""An OpenAI-compatible chat endpoint, through the client of ``openai``; errors are one sentence.

The client retries temporary failures (time-outs, lost connections, 408, 409, 429, 5xx), but accepts any page with
status 200. Here a proxy's HTML page, JSON without choices, or an empty answer become a 502, which it retries.

No server is trusted: a response is bounded in time and size, it cannot redirect the question to another server, and no
message repeats the key.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit

from plot_align.errors import InputError, RunError, require_packages
from plot_align.io import parse_json
from plot_align.text import sendable

if TYPE_CHECKING:
    from openai import APIError, OpenAI

DEFAULT_KEY = "OPENAI_API_KEY"
NO_KEY = "none"  # sent to a local server that needs no key
_PASSING = {408, 409, 429}
LARGEST = 16 * 2**20  # bytes of a response
_WHOLE = 5  # times ``timeout`` in which a whole response must have come
_SECRET = 16  # characters of a key that no text holds by chance
_NONSENSE = "plot_align_nonsense"  # key in a response's extensions that holds what was wrong with it


class EndpointError(RunError):
    """An endpoint gave no usable answer: it refused, or it did not recover within all tries."""


@dataclass(frozen=True)
class Reply:
    """One answer; the token counts are the server's, 0 if it reports none."""

    text: str
    prompt_tokens: int
    completion_tokens: int


@dataclass
class Usage:
    """Use of an endpoint so far; ``requests`` counts every try, the tokens only those with an answer."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class Endpoint:
    """An OpenAI-compatible chat endpoint, e.g. ``http://localhost:8000/v1`` of a local server. Thread-safe.

    Args:
        base_url: up to and without ``/chat/completions``.
        model: the model's name as the server knows it.
        key_variable: the environment variable that holds the key. The key comes only from there and is never written
            or shown. If the default variable is unset or empty, ``"none"`` is sent: many local servers need no key,
            and the others answer 401.
        timeout: seconds without a sign of life until a request counts as failed. A whole response has five times as
            long, however it drips.
        retries: how often the client tries again. Its waits double from 0.5 s up to 8 s; it respects a ``Retry-After``
            of up to two minutes.

    Raises:
        InputError: an argument is out of range, the key cannot be sent, ``key_variable`` is not set
            (:func:`check_key_variable`), or the package ``openai`` is missing (on first use).
    """

    base_url: str = field(repr=False)  # it may hold a password
    model: str
    key_variable: str = DEFAULT_KEY
    timeout: float = 60.0
    retries: int = 8  # 40 s of waiting
    usage: Usage = field(default_factory=Usage, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        if not _is_address(self.base_url):
            raise InputError(
                "base_url is no address such as 'http://localhost:8000/v1': pass it with http:// or https:// "
                "(what came is not shown, as it may hold a password)."
            )
        if not self.model:
            raise InputError("model is empty: pass the name by which the server knows the model.")
        if not self.timeout > 0:
            raise InputError(f"timeout is {self.timeout}, but must be above zero seconds: pass a longer one.")
        if self.retries < 0:
            raise InputError(f"retries is {self.retries}, but cannot be negative: pass 0 or more.")
        check_key_variable(self.key_variable)
        key = self._key()
        if not (key.isascii() and key.isprintable()):  # the client would quote it in an error
            raise InputError(
                f"the environment variable {self.key_variable} holds no key: a character in it cannot be sent. Set it "
                "again, without quotes and line breaks."
            )

    @property
    def label(self) -> str:
        """Model and address for messages, without user, password and query."""
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
            seed: of the sampling; some servers ignore it.

        Raises:
            EndpointError: the server refuses (401, 403, 404 and other errors of the request: at once), or every try
                failed.
            InputError: the package ``openai`` is missing.
        """
        options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
        if seed is not None:
            options["seed"] = seed  # otherwise not sent: some servers do not know it
        with self._lock:
            client = self._client
        import openai

        try:
            # The raw body: parsing is done here.
            body = client.chat.completions.with_raw_response.create(
                model=self.model,
                messages=[{name: sendable(text) for name, text in message.items()} for message in messages],
                **options,
            ).content
        except openai.APITimeoutError as error:
            raise self._given_up(error, f"no answer within {self.timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise self._given_up(error, f"a failed connection ({error.__cause__ or error})") from None
        except openai.APIStatusError as error:
            if error.status_code in _PASSING or error.status_code >= 500:
                what = error.response.extensions.get(_NONSENSE, f"status {error.status_code}")
                raise self._given_up(error, what) from None
            raise EndpointError(self._refusal(error.status_code, error.message)) from None
        reply = _read(body)
        if len(self._key()) >= _SECRET:
            reply = replace(reply, text=reply.text.replace(self._key(), "…"))
        with self._lock:
            self.usage.prompt_tokens += reply.prompt_tokens
            self.usage.completion_tokens += reply.completion_tokens
        return reply

    @cached_property
    def _client(self) -> OpenAI:
        require_packages("an endpoint", "openai", extra="redteam")
        from openai import DefaultHttpxClient, OpenAI

        parts = urlsplit(self.base_url)
        user, at, address = parts.netloc.rpartition("@")
        name, _, password = user.partition(":")
        return OpenAI(
            base_url=parts._replace(netloc=address).geturl(),  # what the client logs has no password
            api_key=self._key(),
            timeout=self.timeout,
            max_retries=self.retries,
            default_headers={"Accept-Encoding": "identity"},  # a few compressed bytes can be gigabytes
            http_client=DefaultHttpxClient(
                auth=(unquote(name), unquote(password)) if at else None,
                follow_redirects=False,  # the question would go to another server
                event_hooks={"request": [self._count_request], "response": [self._check]},
            ),
        )

    def _count_request(self, _: object) -> None:
        with self._lock:
            self.usage.requests += 1

    def _check(self, response: Any) -> None:
        """Read a response within its bounds; one without an answer becomes a bad gateway, which the client retries."""
        response.stream = _bounded(response, _WHOLE * self.timeout)
        response.headers.pop("content-encoding", None)
        response.encoding = "utf-8"
        response.read()
        if response.is_success:
            try:
                _read(response.content, self._redacted(response.text))
            except ValueError as problem:
                response.status_code, response.extensions[_NONSENSE] = 502, str(problem)

    def _given_up(self, error: APIError, what: str) -> EndpointError:
        tries = 1 + int(error.request.headers.get("x-stainless-retry-count", self.retries))
        return EndpointError(
            f"{self.label} gave no usable answer in {tries} {'try' if tries == 1 else 'tries'}, the last was "
            f"{self._redacted(what)}; check the server, then run the same again"
        )

    def _key(self) -> str:
        return os.environ.get(self.key_variable, "").strip() or NO_KEY

    def _redacted(self, text: str) -> str:
        """``text`` on one line, shortened, and without key and password, which some servers send back."""
        parts = urlsplit(self.base_url)
        in_query = [value for _, value in parse_qsl(parts.query) if len(value) >= _SECRET]
        for secret in (self._key(), parts.password or parts.username, *in_query):
            for form in {secret, unquote(secret)} if secret and secret != NO_KEY else ():
                text = text.replace(form, "…")
        return " ".join(text.split())[:300]

    def _refusal(self, status: int, message: str) -> str:
        advice = {
            401: f"put a valid key into the environment variable {self.key_variable}",
            403: f"use a key with access to this model in the environment variable {self.key_variable}",
            404: "check base_url (it mostly ends in /v1) and model",
        }.get(status, "change what the server complains of" if status >= 400 else "name the address it redirects to")
        return f"{self.label} refused with status {status} ({self._redacted(message)}); {advice}"


def check_key_variable(name: str) -> None:
    """Check that ``name`` is an environment variable that is set; the default one need not be.

    Only such a name may be shown or written: another one may be the key itself, typed where the name belongs.

    Raises:
        InputError: it is not; the message does not quote it.
    """
    hidden = "what came is not shown, as it may be the key itself"
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise InputError(
            f"the name of the key's environment variable has other characters than letters, digits and _ ({hidden}): "
            "put the key into a variable, and pass the name of that."
        )
    if name != DEFAULT_KEY and not os.environ.get(name, "").strip():
        raise InputError(
            f"the environment variable that should hold the key is not set ({hidden}): put the key into a variable, "
            "and pass the name of that; leave the option out for a server that needs no key."
        )


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is not a number
        return False


def _bounded(response: Any, seconds: float) -> Any:
    """The stream of a response; a time-out where it takes longer than ``seconds``, an error where it is too large."""
    httpx: Any = sys.modules[type(response).__module__.partition(".")[0]]  # or httpx2, of later versions of openai
    base: Any = httpx.SyncByteStream
    stream, until = response.stream, time.monotonic() + seconds

    class Bounded(base):
        def __iter__(self) -> Iterator[bytes]:
            size = 0
            for piece in stream:
                size += len(piece)
                if size > LARGEST:
                    raise httpx.ReadError(f"more than {LARGEST:,} bytes came", request=response.request)
                if time.monotonic() > until:
                    raise httpx.ReadTimeout("the response is too slow", request=response.request)
                yield piece

        def close(self) -> None:
            stream.close()

    return Bounded()


def _read(body: bytes, shown: str = "") -> Reply:
    """The answer in a response's body. Raises ValueError if there is none; ``shown``: the body for that message."""
    try:
        found = parse_json(body.decode(errors="replace"))
    except ValueError:
        raise ValueError(f"status 200 with {shown[:40]!r} instead of JSON") from None
    choices = found.get("choices") if isinstance(found, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise ValueError(f"status 200 with JSON without choices ({shown[:100]})")
    text = message.get("content")
    if not isinstance(text, str) or not text.strip():
        raise ValueError("status 200 with an empty answer")
    usage = found.get("usage")
    return Reply(text, _count(usage, "prompt_tokens"), _count(usage, "completion_tokens"))


def _count(usage: object, name: str) -> int:
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if type(count) is int and 0 <= count < 2**40 else 0  # what no request can have is no count
