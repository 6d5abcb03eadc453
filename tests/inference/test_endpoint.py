"""The endpoint's client against a real HTTP server that misbehaves on order."""

from __future__ import annotations

import builtins
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from plot_align.errors import InputError
from plot_align.inference import endpoint as module
from plot_align.inference.endpoint import Endpoint, EndpointError, Reply

pytest.importorskip("openai")
KEY = "sk-very-secret-0123456789"
USER = [{"role": "user", "content": "hello"}]


@dataclass
class Server:
    """What comes back, in order (the last one again and again), and what was sent."""

    script: list[tuple[int, str, str]] = field(default_factory=list)
    hang: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    seen: list[tuple[dict[str, str], dict[str, Any]]] = field(default_factory=list)
    url: str = ""

    def next(self) -> tuple[int, str, str]:
        return self.script[min(len(self.seen), len(self.script)) - 1]


def fine(text: str = "hi there") -> tuple[int, str, str]:
    body = {"choices": [{"message": {"role": "assistant", "content": text}}]}
    return 200, "application/json", json.dumps(body | {"usage": {"prompt_tokens": 7, "completion_tokens": 3}})


def status(code: int, message: str = "no") -> tuple[int, str, str]:
    return code, "application/json", json.dumps({"error": {"message": message}})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.seen.append(({k.lower(): v for k, v in self.headers.items()}, body | {"path": self.path}))
            time.sleep(state.hang)
            code, kind, text = state.next()
            try:
                self.send_response(code)
                self.send_header("Content-Type", kind)
                for name, value in state.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())
            except OSError:
                pass  # the client has gone

        def log_message(self, *args: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{httpd.server_address[1]}/v1"
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield state
    httpd.shutdown()
    httpd.server_close()


class Naps(list[float]):
    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def ask(endpoint: Endpoint, **options: Any) -> Reply:
    return endpoint.chat(USER, temperature=0.5, max_tokens=9, **options)


def make(server: Server, **options: Any) -> tuple[Endpoint, Naps]:
    naps = Naps()
    return Endpoint(server.url, "tiny", sleep=naps, **options), naps


def test_a_fine_answer_with_what_was_asked(server: Server) -> None:
    server.script = [fine()]
    endpoint, naps = make(server)
    assert ask(endpoint, top_p=0.9, seed=4) == Reply("hi there", 7, 3)
    headers, body = server.seen[0]
    assert headers["authorization"] == f"Bearer {KEY}"
    assert body == {
        "path": "/v1/chat/completions",
        "model": "tiny",
        "messages": USER,
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 9,
        "seed": 4,
    }
    assert naps == []


def test_no_seed_is_sent_unasked(server: Server) -> None:
    server.script = [fine()]
    ask(make(server)[0])
    assert "seed" not in server.seen[0][1]


def test_usage_counts_every_try_and_the_tokens_of_answers(server: Server) -> None:
    server.script = [status(503), fine(), fine()]
    endpoint, _ = make(server)
    ask(endpoint)
    ask(endpoint)
    assert (endpoint.usage.requests, endpoint.usage.prompt_tokens, endpoint.usage.completion_tokens) == (3, 14, 6)


@pytest.mark.parametrize(
    "trouble",
    [
        status(500),
        status(502),
        status(408),
        status(409),
        status(429),
        (200, "text/html", "<html>back soon</html>"),
        (200, "application/json", "<html>back soon</html>"),
        (200, "application/json", '{"error": "overloaded"}'),
        (200, "application/json", '{"choices": []}'),
        (200, "application/json", '{"choices": [7]}'),
        (200, "application/json", '{"choices": {"a": 1}}'),
        (200, "application/json", "[]"),
        (200, "application/json", '{"choices": [{"message": {"content": null}}]}'),
        fine(""),
        fine(" \n"),
    ],
)
def test_what_passes_is_asked_again(server: Server, trouble: tuple[int, str, str]) -> None:
    """Two failures, then an answer: three requests, and two waits in [0.5, 1] and [1, 2] s."""
    server.script = [trouble, trouble, fine()]
    endpoint, naps = make(server)
    assert ask(endpoint).text == "hi there"
    assert len(server.seen) == 3
    assert len(naps) == 2
    assert 0.5 <= naps[0] <= 1.0 <= naps[1] <= 2.0


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        (status(500), "status 500"),
        ((200, "text/html", "<html>back soon</html>"), "'<html>back soon</html>' instead of JSON"),
        ((200, "application/json", '{"error": "overloaded"}'), "overloaded"),
        (fine(""), "an empty answer"),
    ],
)
def test_it_gives_up_with_one_sentence(server: Server, trouble: tuple[int, str, str], told: str) -> None:
    server.script = [trouble]
    endpoint, naps = make(server, retries=3)
    with pytest.raises(EndpointError) as caught:
        ask(endpoint)
    message = str(caught.value)
    assert message.startswith(f"tiny at {server.url} gave no usable answer in 4 tries")
    assert told in message
    assert "\n" not in message
    assert len(server.seen) == 4
    assert len(naps) == 3
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_no_retries_means_one_try(server: Server) -> None:
    server.script = [status(500)]
    with pytest.raises(EndpointError, match="in 1 try,"):
        ask(make(server, retries=0)[0])
    assert len(server.seen) == 1


def test_a_silent_server_times_out(server: Server) -> None:
    server.script, server.hang = [fine()], 0.6
    endpoint, naps = make(server, timeout=0.1, retries=1)
    with pytest.raises(EndpointError, match=r"in 2 tries, the last was no answer within 0\.1 s"):
        ask(endpoint)
    assert len(naps) == 1


def test_a_lost_connection_is_tried_again() -> None:
    naps = Naps()
    with pytest.raises(EndpointError, match="in 3 tries, the last was a failed connection"):
        ask(Endpoint("http://127.0.0.1:9/v1", "tiny", retries=2, sleep=naps))
    assert len(naps) == 2


@pytest.mark.parametrize(
    ("code", "advice"), [(401, "OTHER_KEY"), (403, "OTHER_KEY"), (404, "base_url"), (400, "server")]
)
def test_a_refusal_is_final_and_does_not_repeat_the_key(
    server: Server, monkeypatch: pytest.MonkeyPatch, code: int, advice: str
) -> None:
    monkeypatch.setenv("OTHER_KEY", KEY)
    server.script = [status(code, f"bad key\n{KEY}")]
    endpoint, naps = make(server, key_variable="OTHER_KEY")
    with pytest.raises(EndpointError) as caught:
        ask(endpoint)
    message = str(caught.value)
    assert f"refused with status {code}" in message
    assert advice in message
    assert "bad key" in message
    assert KEY not in message
    assert "\n" not in message
    assert len(server.seen) == 1
    assert naps == []


def test_a_key_in_nonsense_is_not_repeated(server: Server) -> None:
    server.script = [(200, "application/json", json.dumps({"you sent": KEY}))]
    endpoint, _ = make(server, retries=0)
    with pytest.raises(EndpointError, match="you sent") as caught:
        ask(endpoint)
    assert KEY not in str(caught.value)
    assert KEY not in repr(endpoint)


def test_without_a_key_a_dummy_is_sent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "")
    server.script = [fine()]
    ask(make(server)[0])
    assert server.seen[0][0]["authorization"] == "Bearer none"


@pytest.mark.parametrize(("asked", "low", "high"), [("20", 20, 20), ("900", 60, 60), ("0", 0.5, 1), ("soon", 0.5, 1)])
def test_retry_after_is_heeded_up_to_a_minute(server: Server, asked: str, low: float, high: float) -> None:
    server.script, server.headers = [status(429), fine()], {"Retry-After": asked}
    endpoint, naps = make(server)
    ask(endpoint)
    assert low <= naps[0] <= high


def test_waits_do_not_grow_beyond_a_minute() -> None:
    assert all(30 <= module._wait(50, None) <= 60 for _ in range(20))


def test_a_password_in_the_address_is_not_shown() -> None:
    endpoint = Endpoint("https://me:hunter2@example.org:8443/v1?token=abc", "m")
    assert endpoint.label == "m at https://example.org:8443/v1"
    assert "hunter2" not in repr(endpoint)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"base_url": "localhost:8000"}, "base_url"),
        ({"base_url": "http://"}, "base_url"),
        ({"base_url": "http://host:port/v1"}, "base_url"),
        ({"model": ""}, "model"),
        ({"timeout": 0}, "timeout"),
        ({"retries": -1}, "retries"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=f"^{named} is "):
        Endpoint(**({"base_url": "http://localhost/v1", "model": "m"} | options))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.split(".")[0] == "openai":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r'pip install "plot-align\[api\]"'):
        ask(Endpoint("http://localhost/v1", "m"))
