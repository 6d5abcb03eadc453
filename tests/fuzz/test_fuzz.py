"""What fuzzing found stays mended; a short run of every target; and the guard catches what it is for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fuzz.engines import by_structure, check_seeds
from fuzz.targets import NAMES, make

from fuzz import guard
from plot_align.errors import InputError

SHORT = {"rows": 15, "records": 25, "yaml": 25}  # cases; 60 of the others


@pytest.fixture(scope="module", params=NAMES)
def target(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


def test_valid_input_gives_a_right_result(target: Any, tmp_path: Path) -> None:
    check_seeds(target, tmp_path)


def test_a_short_run(target: Any, tmp_path: Path) -> None:
    cases = SHORT.get(target.name, 60)
    tally = by_structure(target, cases, tmp_path, seed=1)
    assert tally.findings == {}
    assert tally.cases == cases
    assert tally.right > 0


# Cases that were findings, by target, each with what it was.
FOUND: list[tuple[str, bytes, str]] = []


@pytest.mark.parametrize(("name", "data", "was"), FOUND, ids=lambda value: str(value)[:40])
def test_found_and_mended(name: str, data: bytes, was: str, tmp_path: Path) -> None:
    assert not isinstance(guard.run_case(make(name), data, tmp_path), guard.Finding), was


def case(run: Any, tmp_path: Path) -> bool | guard.Finding:
    target = SimpleNamespace(name="fake", names=("case.json",), run=lambda data, folder: run())
    return guard.run_case(target, b"", tmp_path)


def fails(error: BaseException) -> Any:
    def run() -> None:
        raise error

    return run


def test_the_guard_tells_a_result_from_a_clear_error(tmp_path: Path) -> None:
    assert case(lambda: None, tmp_path) is True
    assert case(fails(InputError("case.json holds no mapping; write one")), tmp_path) is False


@pytest.mark.parametrize(
    ("error", "key"),
    [
        (KeyError("x"), "KeyError"),
        (RecursionError(), "RecursionError"),
        (guard.Wrong("2 is not 3"), "Wrong"),
        (InputError("it is wrong"), "message names no place"),
    ],
)
def test_the_guard_finds_what_is_neither(error: BaseException, key: str, tmp_path: Path) -> None:
    found = case(fails(error), tmp_path)
    assert isinstance(found, guard.Finding)
    assert found.key.startswith(key)


@pytest.mark.parametrize(("message", "why"), [("case.json\n", "line"), ("case.json" + "x" * 800, "more than 800")])
def test_the_guard_refuses_messages_that_no_terminal_can_show(message: str, why: str) -> None:
    assert why in (guard.unclear(message, ("case.json",)) or "")
    assert guard.unclear(str(InputError(message)), ("case.json",)) is None  # an error of ours never has such a text


def test_the_guard_stops_what_runs_on_and_what_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "SECONDS", 0.05)
    monkeypatch.setattr(guard, "MIB", 64)

    def hang() -> None:
        while True:
            pass

    for run, key in ((hang, "Slow"), (lambda: bytearray(1 << 30), "MemoryError")):
        found = case(run, tmp_path)
        assert isinstance(found, guard.Finding)
        assert found.key.startswith(key)


def test_a_finding_is_made_as_short_as_it_gets(tmp_path: Path) -> None:
    def run(data: bytes, folder: Path) -> None:
        if b"[" in data and b"9" in data:
            raise KeyError("both")

    found = guard.minimise(SimpleNamespace(names=(), run=run), b"\x00 {1: [2, 3, 9999]}", tmp_path)
    assert sorted(found[1:]) == sorted(b"[9")
