"""What a user gets before any work is done: names, import time, versions, the make targets."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import plot_align
from plot_align import redteam

ROOT = Path(__file__).resolve().parent.parent


def _run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout.strip()


@pytest.mark.parametrize(
    "module", ["plot_align", "plot_align.cli.main", "plot_align.cli.redteam", "plot_align.cli.evaluate"]
)
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    heavy = "{'torch', 'transformers', 'trl', 'datasets', 'matplotlib', 'numpy', 'rich'}"
    assert _run(f"import {module}, sys; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_importing_the_package_is_faster_than_importing_torch() -> None:
    def seconds(module: str) -> float:
        return float(_run(f"import time; s = time.perf_counter(); import {module}; print(time.perf_counter() - s)"))

    assert min(seconds("plot_align") for _ in range(3)) < seconds("torch")


def test_the_package_runs_as_the_command() -> None:
    command = [sys.executable, "-m", "plot_align", "--version"]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout
    assert said == f"plot-align {plot_align.__version__}\n"


def test_every_public_name_is_there() -> None:
    for name in plot_align.__all__:
        value = getattr(plot_align, name)
        if callable(value):
            assert value.__name__ == name
            assert value.__module__.startswith("plot_align.")
    assert set(plot_align.__all__) <= set(dir(plot_align))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        plot_align.nothing  # noqa: B018


def test_every_name_of_the_red_team_is_there() -> None:
    for name in redteam.__all__:
        assert getattr(redteam, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        redteam.nothing  # noqa: B018


def test_one_version_everywhere() -> None:
    assert metadata.version("plot-align") == plot_align.__version__
    assert f"\nversion: {plot_align.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    version = re.escape(plot_align.__version__)
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"(?m)^The first version, {version}\.$|^## \[{version}\] - ", changelog)


def test_every_dependency_has_a_tested_version_within_its_bounds() -> None:
    constraints = {}
    for row in (ROOT / "constraints.txt").read_text().splitlines():
        if row and not row.startswith("#"):
            pin = Requirement(row)
            constraints[pin.name.lower()] = str(pin.specifier).removeprefix("==")
    declared = [Requirement(entry) for entry in metadata.requires("plot-align") or []]
    assert len(declared) > 10
    for requirement in declared:
        if requirement.name != "plot-align":
            assert requirement.specifier.contains(constraints[requirement.name.lower()]), requirement


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["demo"], r"bin/plot-align demo *$"),
        (["demo", "QUICK=1"], r"bin/plot-align demo --quick$"),
        (["demo", "QUICK=0"], r"bin/plot-align demo *$"),
        (["test"], r"^OMP_NUM_THREADS=1 .*-m pytest -n 2 .*--max-worker-restart 0 .*-m \"not slow\"$"),
        (["test-slow"], r"^OMP_NUM_THREADS=1 .*-m pytest -n 2 .*--max-worker-restart 0 .*-m slow$"),
        (["check"], r"bin/mypy$"),
        (["docs"], r"bin/mkdocs build --strict$"),
        (["dist"], r"bin/python -m twine check --strict dist/\*$"),
    ],
)
def test_make_targets(arguments: list[str], expected: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    shown = subprocess.run(
        ["make", "-n", *arguments], cwd=ROOT, env=environment, check=True, capture_output=True, text=True, timeout=60
    ).stdout.strip()
    assert re.search(expected, shown.splitlines()[-1])


def test_ci_runs_the_checks_and_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)
    assert "\nmake check test test-slow compat\n" in script.read_text()
