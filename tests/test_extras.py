"""The core runs without what is optional, and what needs it says in one sentence how to install it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement

OPTIONAL = ("matplotlib", "lm_eval", "openai", "peft", "gguf", "judgezoo")


def python(code: str, *, without: tuple[str, ...] = OPTIONAL) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in a process that cannot import the packages in ``without``."""
    absent = f"import sys\nsys.modules.update(dict.fromkeys({without!r}))\n"
    return subprocess.run([sys.executable, "-c", absent + code], capture_output=True, text=True, timeout=240)


def command(*arguments: str, without: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    code = f"from plot_align.cli.main import main\nsys.exit(main({list(arguments)!r}))"
    return python(code, without=without)


@pytest.mark.parametrize(
    ("code", "more"),
    [
        ("import plot_align, plot_align.plot", ("jinja2",)),
        ("from plot_align.cli.main import main\nsys.exit(main(['estimate', '--help']))", ("jinja2",)),
        ("from plot_align.cli.main import main\nsys.exit(main(['dpo', '--help']))", ("jinja2",)),
        ("import plot_align.trl\nfrom plot_align import PlotLoss, attach, estimate", ()),  # TRL itself needs jinja2
    ],
)
def test_the_core_needs_nothing_optional(code: str, more: tuple[str, ...]) -> None:
    done = python(code, without=(*OPTIONAL, *more))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        (("report", "runs"), "matplotlib", "report"),
        (("report", "runs"), "jinja2", "report"),
        (("inspect", "p.safetensors", "--tokenizer", "t", "--figure", "f.png"), "matplotlib", "report"),
        (("redteam", "m", "--behaviors", "b.csv"), "matplotlib", "redteam"),
        (("redteam", "m", "--behaviors", "b.csv", "--judge", "strongreject"), "judgezoo", "judges"),
        (("demo", "--output", "demo"), "matplotlib", "demo"),
    ],
)
def test_a_command_says_which_extra_it_needs(
    arguments: tuple[str, ...], package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = command(*arguments, without=(package,))
    assert done.returncode == 2
    assert f"needs {package}" in done.stderr
    assert f'pip install "plot-align[{extra}]"' in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_each_extra_that_a_message_names_brings_the_package() -> None:
    """Every require_packages of the source against pyproject.toml."""
    root = Path(__file__).parents[1]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    calls = [
        call
        for file in (root / "src").rglob("*.py")
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "id", None) == "require_packages"
    ]
    assert len(calls) >= 7
    for call in calls:
        packages, extra = {arg.value for arg in call.args[1:]}, call.keywords[0].value.value
        assert packages <= _brought(extras, extra), ast.unparse(call)


def _brought(extras: dict[str, list[str]], extra: str) -> set[str]:
    """Import names of what an extra installs, other extras of ours included."""
    names = set()
    for line in extras[extra]:
        requirement = Requirement(line)
        if requirement.name == "plot-align":
            names |= {name for inner in requirement.extras for name in _brought(extras, inner)}
        names.add(requirement.name.lower().replace("-", "_"))
    return names
