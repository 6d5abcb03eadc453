"""Two processes measure what one does, each of them a part, and leave one journal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from doctor_worker import examined, measured

import processes
from plot_align.inference.resume import read_journal

pytestmark = [pytest.mark.xdist_group("doctor ranks"), pytest.mark.slow]


def test_two_processes_measure_what_one_does(
    tiny_llama: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    alone = measured(str(tiny_llama), str(pairs_file), str(tmp_path / "one"))
    both = processes.run(measured, str(tiny_llama), str(pairs_file), str(tmp_path / "two"), ranks=2)
    assert both == [alone, alone]
    assert alone[1] == 2 * 2 + 2 + 3 + 24
    one, two = (next(tmp_path.glob(f"{name}.*")) for name in ("one", "two"))
    assert read_journal(one) == read_journal(two)
    assert sorted(read_journal(one)) == list(range(2 + 12))


def test_two_processes_find_what_one_does(
    clean: list[dict[str, Any]], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faults in rows of several batches, each found across them; an odd number of batches; a line that is no JSON."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    clean[130] = clean[7]
    clean[190]["chosen"], clean[190]["rejected"] = clean[30]["rejected"], clean[30]["chosen"]
    clean[190]["prompt"] = clean[30]["prompt"]
    lines = [json.dumps(row) for row in clean]
    lines[65:65] = ["{rubbish"]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(lines))
    alone = examined(str(tiny_llama), str(path))
    assert {finding["check"]: finding["rows"] for finding in alone["findings"]} == {
        "no-pair": [65], "duplicate": [131], "contradictory": [191],
    }  # fmt: skip
    assert processes.run(examined, str(tiny_llama), str(path), ranks=2) == [alone, alone]
