"""HarmBench's folder layout and JSON files, so that test cases, completions and results can be exchanged with it."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plot_align.errors import InputError
from plot_align.io import check_seal, file_name, write_sealed_json
from plot_align.redteam.behaviors import read_json_object

TestCases = dict[str, list[str]]
Rows = dict[str, list[dict[str, Any]]]
_FOLDERS = {"SFS": "FewShot"}  # HarmBench's name for it in files
LABELS = (1, 0, -1)  # the attack succeeded, failed, or was undecided


@dataclass(frozen=True)
class Layout:
    """Paths of the files of one method and one experiment below ``base``."""

    base: Path
    method: str
    experiment: str

    @property
    def of_method(self) -> Path:
        """The folder of all experiments of the method."""
        return self.base / _FOLDERS.get(self.method, self.method)

    @property
    def folder(self) -> Path:
        return self.of_method / file_name(self.experiment)

    @property
    def test_cases(self) -> Path:
        return self.folder / "test_cases" / "test_cases.json"

    def behavior_folder(self, behavior: str) -> Path:
        """One behaviour's test cases and log, until all are merged."""
        return self.folder / "test_cases" / "test_cases_individual_behaviors" / file_name(behavior)

    def completions(self, model: str) -> Path:
        return self.folder / "completions" / f"{file_name(model)}.json"

    def results(self, model: str, judge: str | None = None) -> Path:
        """The main judge's results are where HarmBench looks for them, another judge's in a folder beside it."""
        return self.folder / (f"results-{judge}" if judge else "results") / f"{file_name(model)}.json"


def merge_test_cases(layout: Layout, behaviors: Iterable[str]) -> TestCases:
    """Merge the test cases of all behaviours into ``test_cases.json``; behaviours without any are left out.

    Raises:
        InputError: a file is damaged, or does not hold its own behaviour alone.
    """
    merged: TestCases = {}
    for behavior in behaviors:
        path = layout.behavior_folder(behavior) / "test_cases.json"
        if path.exists():
            found = read_test_cases(path)
            if list(found) != [behavior]:
                raise InputError(
                    f"test cases {path} hold {', '.join(map(repr, found)) or 'nothing'}, expected {behavior!r} alone; "
                    "delete the file to make them again"
                )
            merged.update(found)
    write_sealed_json(layout.test_cases, merged)
    return merged


def read_test_cases(path: str | os.PathLike[str]) -> TestCases:
    """``{BehaviorID: [test case, …]}``.

    Raises:
        InputError: the file cannot be read, is damaged, or is of another shape.
    """
    return _read(path, "test cases", "[str, …]", lambda case: isinstance(case, str))


def read_completions(path: str | os.PathLike[str]) -> Rows:
    """``{BehaviorID: [{"test_case": str, "generation": str}, …]}``; other keys are kept.

    Raises:
        InputError: as :func:`read_test_cases`.
    """
    return _read(path, "completions", '[{"test_case": str, "generation": str}, …]', _is_completion)


def read_results(path: str | os.PathLike[str]) -> Rows:
    """Like completions, each with a ``"label"`` of 1, 0 or −1.

    Raises:
        InputError: as :func:`read_test_cases`.
    """
    return _read(
        path,
        "results",
        '[{"test_case": str, "generation": str, "label": 1, 0 or -1}, …]',
        lambda row: _is_completion(row) and type(row.get("label")) is int and row["label"] in LABELS,
    )


def _is_completion(row: Any) -> bool:
    return isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("test_case", "generation"))


def _read(path: str | os.PathLike[str], what: str, shape: str, fits: Callable[[Any], bool]) -> dict[str, Any]:
    check_seal(Path(path))
    content = read_json_object(path, what, shape)
    for behavior, rows in content.items():
        if not isinstance(rows, list) or not all(map(fits, rows)):
            raise InputError(f"{what} {path}: the entry of {behavior!r} is not of the form {shape}; correct it")
    return content


def success_by_behavior(results: Mapping[str, list[dict[str, Any]]], *, any_answer: bool = False) -> dict[str, float]:
    """Success rate of each behaviour: the proportion of its test cases with label 1. −1 counts as failed, and so does
    a behaviour without test cases.

    Source: HarmBench (Mazeika et al., arXiv 2402.04249), whose attack success rate is the mean of these.

    Args:
        any_answer: 1 if any answer has label 1, else 0; not HarmBench's rate.
    """
    combined = max if any_answer else statistics.fmean
    return {
        behavior: float(combined([row["label"] == 1 for row in rows])) if rows else 0.0
        for behavior, rows in results.items()
    }


def attack_success_rate(results: Mapping[str, list[dict[str, Any]]]) -> float:
    """Mean over behaviours of :func:`success_by_behavior`: each counts equally, however many test cases it has.

    NaN if there are no behaviours.
    """
    return statistics.fmean(success_by_behavior(results).values()) if results else math.nan
