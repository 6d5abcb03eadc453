"""Two ways to make cases: hypothesis spoils valid ones by structure, atheris changes bytes by the code they reach."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fuzz.guard import Tally, minimise

ENGINES = ("hypothesis", "atheris")


def by_structure(target: Any, cases: int, folder: Path, seed: int) -> Tally:
    """Cases drawn by hypothesis, the same ones for the same seed."""
    import hypothesis
    from hypothesis import HealthCheck, Phase, given, settings

    tally = Tally()

    @hypothesis.seed(seed)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(target.cases)
    def one(data: bytes) -> None:
        if tally.cases < cases:
            tally.add(target, data, folder)

    one()
    return tally


def by_coverage(name: str, cases: int, folder: Path, seed: int) -> dict[str, Any]:
    """Cases of atheris, in a process of its own: libFuzzer ends the one it runs in."""
    output = folder / "atheris.json"
    command = [sys.executable, "-m", "fuzz.atheris_worker", name, str(cases), str(seed), str(output)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if not output.exists():
        raise SystemExit(f"atheris ended early on {name}:\n{done.stderr[-3000:]}")
    return json.loads(output.read_text())


def run(name: str, engine: str, cases: int, seed: int) -> dict[str, Any]:
    """All cases of one target by one engine, as a JSON-able entry."""
    from fuzz.targets import make

    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory()) as temporary:
        folder = Path(temporary)
        start = time.monotonic()
        if engine == "atheris":
            return {**by_coverage(name, cases, folder, seed), "seconds": time.monotonic() - start}
        target = make(name)
        check_seeds(target, folder)
        start = time.monotonic()
        tally = by_structure(target, cases, folder, seed)
        return {**entry(target, tally, folder), "seconds": time.monotonic() - start}


def memory() -> str | None:
    """A folder in memory, where there is one: cases are files, and every written one is flushed to its disk."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def check_seeds(target: Any, folder: Path) -> None:
    """Refuses a target whose valid cases are not right: it would find nothing but errors."""
    for data in target.seeds:
        target.run(data, folder)  # without limits: the first one imports libraries
        tally = Tally()
        tally.add(target, data, folder)
        if not tally.right:
            raise SystemExit(f"{target.name}: a valid case is refused: {data[:200]!r} {tally.findings}")


def entry(target: Any, tally: Tally, folder: Path) -> dict[str, Any]:
    return {
        "cases": tally.cases,
        "right": tally.right,
        "refused": tally.refused,
        "failed": tally.failed,
        "peak_mib": peak_mib(),
        "findings": [
            {"key": key, "said": finding.said, "case": minimise(target, data, folder).hex()}
            for key, (finding, data) in tally.findings.items()
        ],
    }


def peak_mib() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
