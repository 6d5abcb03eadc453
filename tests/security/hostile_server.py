"""A server on this machine that misbehaves on order; it is bounded, and ends with its test."""

from __future__ import annotations

import contextlib
import gzip
import json
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

MOST = 64 * 2**20  # bytes of the largest body


@dataclass
class Asked:
    """One request: its first line, headers in small letters, body."""

    line: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Server:
    """``script``: what comes back, in order, the last again and again; each is called with the request and a function
    that sends bytes. ``sent``: bytes of the longest answer."""

    script: list[Answer] = field(default_factory=list)
    seen: list[Asked] = field(default_factory=list)
    url: str = ""
    sent: int = 0
    over: threading.Event = field(default_factory=threading.Event)


Answer = Callable[[Server, Asked, Callable[[bytes], Any]], None]


def reply(status: int, body: bytes | str = b"", *, length: int | None = None, **headers: str) -> Answer:
    """A plain answer; ``length``: what it says of its length."""

    def send(server: Server, asked: Asked, write: Callable[[bytes], Any]) -> None:
        content = body.encode() if isinstance(body, str) else body
        lines = {"content_length": str(len(content) if length is None else length), **headers}
        write(_head(status, lines) + content)

    return send


def chat(text: str, **more: Any) -> Answer:
    """What a chat endpoint answers."""
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    found = {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage, **more}
    return reply(200, json.dumps(found), content_type="application/json")


def silence(server: Server, asked: Asked, write: Callable[[bytes], Any]) -> None:
    """No byte."""
    server.over.wait(60)


def closed(server: Server, asked: Asked, write: Callable[[bytes], Any]) -> None:
    """The connection ends without an answer."""


def drip(server: Server, asked: Asked, write: Callable[[bytes], Any]) -> None:
    """A byte now and then, for ever."""
    write(_head(200, {"content_type": "application/json"}))
    while not server.over.wait(0.05):
        write(b" ")


def flood(server: Server, asked: Asked, write: Callable[[bytes], Any]) -> None:
    """A body that does not end."""
    write(_head(200, {"content_type": "application/json"}))
    piece, sent = b" " * 2**16, 0
    while not server.over.is_set() and sent < MOST:
        write(piece)
        sent += len(piece)
        server.sent = max(server.sent, sent)


def zip_bomb(server: Server, asked: Asked, write: Callable[[bytes], Any]) -> None:
    """64 MiB in as many KiB."""
    reply(200, gzip.compress(b" " * MOST, 9), content_encoding="gzip", content_type="application/json")(
        server, asked, write
    )


def redirect(to: str, status: int = 307) -> Answer:
    return reply(status, b"", location=to)


def _head(status: int, headers: dict[str, str]) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} Told\r\nConnection: close\r\n{lines}\r\n".encode()


@contextmanager
def hostile_server(*script: Answer) -> Iterator[Server]:
    """The server, listening on this machine alone."""
    state = Server(list(script))

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            line = self.rfile.readline().decode("latin-1").strip()
            headers: dict[str, str] = {}
            while (row := self.rfile.readline().strip()) != b"":
                name, _, value = row.decode("latin-1").partition(":")
                headers[name.lower()] = value.strip()
            body = self.rfile.read(int(headers.get("content-length", 0)))
            state.seen.append(Asked(line, headers, body))
            answer = state.script[min(len(state.seen), len(state.script)) - 1]
            with contextlib.suppress(OSError):  # the client has gone
                answer(state, state.seen[-1], self.wfile.write)

    class Listener(socketserver.ThreadingTCPServer):
        allow_reuse_address = daemon_threads = True

    listener = Listener(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{listener.server_address[1]}"
    threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield state
    finally:
        state.over.set()
        listener.shutdown()
        listener.server_close()
