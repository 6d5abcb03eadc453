"""What goes wrong, in one sentence a user can act on.

Every message says which argument, what came, what was expected and what to do. The command line prints it
without a traceback (``--debug`` shows one).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.util import find_spec


class PlotAlignError(Exception):
    """Base class of every error this package raises on purpose; ``exit_code`` is what the command returns."""

    exit_code = 1


class InputError(PlotAlignError, ValueError):
    """The input is wrong: an argument, a file, a data set, a version (exit code 2)."""

    exit_code = 2


class RunError(PlotAlignError, RuntimeError):
    """The input was right and the run failed all the same, e.g. NaN logits (exit code 1)."""


def first_line(error: BaseException) -> str:
    """The message of a foreign exception, shortened to one line for the user."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".;") if lines else type(error).__name__


def require_packages(what: str, *packages: str, extra: str) -> None:
    """Refuse early what needs optional packages.

    Args:
        what: needs them, as it stands in a sentence. packages: as they are imported. extra: of plot-align that brings
            them.

    Raises:
        InputError: one of them is not installed.
    """
    for package in packages:
        if find_spec(package) is None:
            raise InputError(f'{what} needs {package}, which is not installed; pip install "plot-align[{extra}]"')


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """How an error about an unknown ``name`` ends: with the nearest of ``known``, else with ``otherwise``."""
    plain = {entry.lstrip("-").replace("-", "_"): entry for entry in sorted(known)}
    wanted = name.lstrip("-").replace("-", "_")
    near = difflib.get_close_matches(wanted, plain, n=1) or [entry for entry in plain if entry.startswith(wanted)]
    return f"did you mean {plain[near[0]]!r}?" if wanted and near else otherwise
