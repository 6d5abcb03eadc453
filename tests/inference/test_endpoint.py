"""The endpoint's client against a real HTTP server that misbehaves on order."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from plot_align.errors import InputError
from plot_align.inference.endpoint import Endpoint, EndpointError, Reply

pytest.importorskip("openai")
SLEEP = time.sleep  # the server's own, which no test replaces
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
            SLEEP(state.hang)
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


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The client's waits, which take no time."""
    found: list[float] = []
    monkeypatch.setattr("openai._base_client.time.sleep", found.append)
    return found


def ask(endpoint: Endpoint, **options: Any) -> Reply:
    return endpoint.chat(USER, temperature=0.5, max_tokens=9, **options)


@pytest.fixture
def make(server: Server, naps: list[float]) -> Callable[..., Endpoint]:
    return lambda **options: Endpoint(server.url, "tiny", **options)


def test_a_fine_answer_with_what_was_asked(server: Server, make: Callable[..., Endpoint], naps: list[float]) -> None:
    server.script = [fine()]
    assert ask(make(), top_p=0.9, seed=4) == Reply("hi there", 7, 3)
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


def test_no_seed_is_sent_unasked(server: Server, make: Callable[..., Endpoint]) -> None:
    server.script = [fine()]
    ask(make())
    assert "seed" not in server.seen[0][1]


def test_usage_counts_every_try_and_the_tokens_of_answers(server: Server, make: Callable[..., Endpoint]) -> None:
    server.script = [status(503), fine(), fine()]
    endpoint = make()
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
def test_what_passes_is_asked_again(
    server: Server, make: Callable[..., Endpoint], naps: list[float], trouble: tuple[int, str, str]
) -> None:
    """Two failures, then an answer: three requests, and two waits between them."""
    server.script = [trouble, trouble, fine()]
    assert ask(make()).text == "hi there"
    assert len(server.seen) == 3
    assert len(naps) == 2
    assert 0 < naps[0] < naps[1]


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        (status(500), "status 500"),
        ((200, "text/html", "<html>back soon</html>"), "'<html>back soon</html>' instead of JSON"),
        ((200, "application/json", '{"error": "overloaded"}'), "overloaded"),
        (fine(""), "an empty answer"),
    ],
)
def test_it_gives_up_with_one_sentence(
    server: Server, make: Callable[..., Endpoint], naps: list[float], trouble: tuple[int, str, str], told: str
) -> None:
    server.script = [trouble]
    with pytest.raises(EndpointError) as caught:
        ask(make(retries=3))
    message = str(caught.value)
    assert message.startswith(f"tiny at {server.url} gave no usable answer in 4 tries")
    assert told in message
    assert message.endswith("; check the server, then run the same again")
    assert "\n" not in message
    assert len(server.seen) == 4
    assert len(naps) == 3
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_no_retries_means_one_try(server: Server, make: Callable[..., Endpoint]) -> None:
    server.script = [status(500)]
    with pytest.raises(EndpointError, match="in 1 try,"):
        ask(make(retries=0))
    assert len(server.seen) == 1


def test_a_silent_server_times_out(server: Server, make: Callable[..., Endpoint], naps: list[float]) -> None:
    server.script, server.hang = [fine()], 0.6
    with pytest.raises(EndpointError, match=r"in 2 tries, the last was no answer within 0\.1 s"):
        ask(make(timeout=0.1, retries=1))
    assert len(naps) == 1


def test_a_lost_connection_is_tried_again(naps: list[float]) -> None:
    with pytest.raises(EndpointError, match="in 3 tries, the last was a failed connection"):
        ask(Endpoint("http://127.0.0.1:9/v1", "tiny", retries=2))
    assert len(naps) == 2


@pytest.mark.parametrize(
    ("code", "advice"), [(401, "OTHER_KEY"), (403, "OTHER_KEY"), (404, "base_url"), (400, "server")]
)
def test_a_refusal_is_final_and_does_not_repeat_the_key(
    server: Server,
    make: Callable[..., Endpoint],
    naps: list[float],
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    advice: str,
) -> None:
    monkeypatch.setenv("OTHER_KEY", KEY)
    server.script = [status(code, f"bad key\n{KEY}")]
    with pytest.raises(EndpointError) as caught:
        ask(make(key_variable="OTHER_KEY"))
    message = str(caught.value)
    assert f"refused with status {code}" in message
    assert advice in message
    assert "bad key" in message
    assert KEY not in message
    assert "\n" not in message
    assert len(server.seen) == 1
    assert naps == []


def test_a_key_in_nonsense_is_not_repeated(server: Server, make: Callable[..., Endpoint]) -> None:
    server.script = [(200, "application/json", json.dumps({"you sent": KEY}))]
    endpoint = make(retries=0)
    with pytest.raises(EndpointError, match="you sent") as caught:
        ask(endpoint)
    assert KEY not in str(caught.value)
    assert KEY not in repr(endpoint)


def test_without_a_key_a_dummy_is_sent(
    server: Server, make: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "")
    server.script = [fine()]
    ask(make())
    assert server.seen[0][0]["authorization"] == "Bearer none"


def test_another_variable_must_be_set(make: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, " "):
        monkeypatch.delenv("OTHER_KEY", raising=False)
        if value is not None:
            monkeypatch.setenv("OTHER_KEY", value)
        with pytest.raises(InputError, match="should hold the key is not set") as caught:
            make(key_variable="OTHER_KEY")
        assert "OTHER_KEY" not in str(caught.value)
    with pytest.raises(InputError, match="other characters than letters, digits and _"):
        make(key_variable="OTHER_KEY\n")


@pytest.mark.parametrize("trouble", [status(429), (200, "text/html", "<html>back soon</html>")])
def test_retry_after_is_heeded(
    server: Server, make: Callable[..., Endpoint], naps: list[float], trouble: tuple[int, str, str]
) -> None:
    server.script, server.headers = [trouble, fine()], {"Retry-After": "20"}
    ask(make())
    assert naps == [20]


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
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"openai.*plot-align\[redteam\]"):
        ask(Endpoint("http://localhost/v1", "m"))
