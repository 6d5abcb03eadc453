"""What fuzzing found stays mended; a short run of every target; and the guard catches what it is for."""

from __future__ import annotations

import math
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fuzz import guard
from fuzz.engines import by_structure, check_seeds
from fuzz.targets import NAMES, make
from plot_align.errors import InputError
from plot_align.preference.distribution import PreferenceDistribution

ROOT = Path(__file__).resolve().parents[2]
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
FOUND: list[tuple[str, bytes, str]] = [
    ("yaml", b"\x02guards: {a: {kind: over_refusal, /: 8}}", "the error named no file"),
    ("yaml", b"\x02guards: {a: {kind: diversity, limit: -8}}", "the error named neither the file nor the measure"),
    ("yaml", b"\x03gcg: {steps: 0}", "the error named no file"),
    ("yaml", b"\x03gcg: {early_stop: .nan}", "a loss is never below NaN: the option did nothing"),
    ("yaml", b"\x00env: {A: \"\\0\"}", "ValueError: embedded null byte"),
    ("yaml", b"\x00geometry_seed: [1]", "taken, and a TypeError when the geometry was made"),
    ("yaml", b"\x00preference: 5", "taken, and a TypeError when it was opened"),
    ("yaml", b"\x00accelerator_config: [1]", "an AttributeError of transformers"),
    ("yaml", b"\x01alpha: 1" + b"0" * 400, "OverflowError: int too large to convert to float"),
    ("yaml", b"\x01loss_type: []", "taken as a loss without a name"),
    ("yaml", b"\x01seed: 0x" + b"f" * 5000, "ValueError: Exceeds the limit (4300 digits)"),
    ("yaml", b"\x01" + b"".join(b"%s: [%s]\n" % (n, b",".join(b"%d" % i for i in range(1, 100)))
                               for n in (b"slices", b"geometry_seed", b"reference_rows", b"steps")),
     "a list of a hundred million runs"),
    ("replies", b"\x02[[" + b"0" * 5000 + b"7]]", "ValueError: Exceeds the limit (4300 digits)"),
    ("replies", b"\x02[[" + b"9" * 19_000, "seconds of backtracking, quadratic in the digits"),
    ("replies", "\x00[[ye\u017f]]".encode(), "taken as the verdict no: the long s matches s without regard to case"),
    ("replies", b'\x03{"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": -1}}', "-1 tokens"),
    ("replies", b'\x03{"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": 1' + b"0" * 30 + b"}}",
     "10^30 tokens, and their cost"),
    ("rows", b'\x03{"chosen":"Human:","rejected":""}\n{"x":1}', "TypeError: expected string or bytes-like object"),
    ("rows", b'\x03{"chosen":"\\n\\nHuman:\xff","rejected":""}', "UnicodeDecodeError, where the rows were read"),
    ("rows", b'\x03{"prompt":"p","chosen":"a\xff","rejected":"b"}', "UnicodeDecodeError, where the rows were read"),
    ("rows", b'\x07{"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": "x", "score_rejected": 1}',
     "TypeError: '<' not supported between instances of 'str' and 'int'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "data", "was"), FOUND, ids=lambda value: str(value)[:40])
def test_found_and_mended(name: str, data: bytes, was: str, tmp_path: Path) -> None:
    assert not isinstance(guard.run_case(make(name), data, tmp_path), guard.Finding), was


@pytest.mark.parametrize(
    "provenance",
    [[], "x", {"sources": 1}, {"sources": [1]}, {"sources": [{"rows": "9"}]}, {"sources": [{"rows": -1}]},
     {"sources": [{}]}, {"tokenizer": []}, {"tokenizer": {"fingerprint": 5}}, {"x": math.nan}],
)  # fmt: skip
def test_a_provenance_of_another_form_is_damage(provenance: Any, tmp_path: Path) -> None:
    """With a digest that fits: they were AttributeErrors, TypeErrors and a ValueError of `inspect --json`."""
    from fuzz.targets.artefacts import _SEED, _file

    (tmp_path / "p.safetensors").write_bytes(_file(_SEED, provenance, {}))
    with pytest.raises(InputError, match=r"p\.safetensors is damaged"):
        PreferenceDistribution.load(tmp_path / "p.safetensors")


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


def limits() -> tuple[Any, ...]:
    """Those that this process is under."""
    kinds = ((signal.SIGPROF, signal.ITIMER_PROF), (signal.SIGALRM, signal.ITIMER_REAL))
    return resource.getrlimit(resource.RLIMIT_AS), [(signal.getsignal(a), signal.getitimer(b)) for a, b in kinds]


def test_an_alarm_at_the_last_moment_leaves_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, done = limits(), []
    setrlimit = resource.setrlimit

    def late(kind: int, values: tuple[int, int]) -> None:
        setrlimit(kind, values)
        if done:
            signal.raise_signal(signal.SIGPROF)

    monkeypatch.setattr(resource, "setrlimit", late)
    assert case(lambda: done.append(1), tmp_path) is True
    assert limits() == before


def test_nothing_ends_the_process_after_the_last_case() -> None:
    code = """
import time
from types import SimpleNamespace
from fuzz import guard

guard.STUCK = 0.1
target = SimpleNamespace(names=(), run=lambda data, folder: None)
guard.Tally().add(target, b"", None)
time.sleep(0.4)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_finding_is_made_as_short_as_it_gets(tmp_path: Path) -> None:
    def run(data: bytes, folder: Path) -> None:
        if b"[" in data and b"9" in data:
            raise KeyError("both")

    found = guard.minimise(SimpleNamespace(names=(), run=run), b"\x00 {1: [2, 3, 9999]}", tmp_path)
    assert sorted(found[1:]) == sorted(b"[9")
