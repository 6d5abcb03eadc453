"""Two processes measure what one does, each of them a part, and leave one journal."""

from __future__ import annotations

from pathlib import Path

import pytest
from doctor_worker import measured

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
