"""The errors this package raises, each with one sentence that a user can act on.

A message names the argument, what came, what was expected and what to do. The command line prints it without a
traceback (``--debug`` shows one).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.util import find_spec

_LONGEST = 800  # characters of a message


class PlotAlignError(Exception):
    """Base class of the errors that this package raises; ``exit_code`` is the exit code of the command.

    Its text is one line that a terminal can show, whatever the names and values are that it quotes: other characters
    are escaped, and of a long one the middle is left out.
    """

    exit_code = 1

    def __str__(self) -> str:
        return legible(super().__str__())


class InputError(PlotAlignError, ValueError):
    """The input is wrong: an argument, a file, a data set, a version (exit code 2)."""

    exit_code = 2


class RunError(PlotAlignError, RuntimeError):
    """The input is valid, but the run failed, e.g. with NaN logits (exit code 1)."""


def legible(message: str) -> str:
    """``message`` on one printable line of at most 800 characters; its beginning and end are kept."""
    if len(message) > _LONGEST:
        message = f"{message[: _LONGEST // 2]} … {message[3 - _LONGEST // 2 :]}"
    if message.isprintable():
        return message
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)


def first_line(error: BaseException) -> str:
    """The first line of another library's error message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".;") if lines else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the machine or of an accelerator ran out; torch says so with errors of several types."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "t allocate memory" in text


def require_packages(what: str, *packages: str, extra: str) -> None:
    """Refuses a feature whose optional packages are not installed.

    Args:
        what: the feature, the subject of the message. packages: names to import. extra: the extra of plot-align that
            installs them.

    Raises:
        InputError: one of the packages is not installed.
    """
    for package in packages:
        if find_spec(package) is None:
            raise InputError(f'{what} needs {package}, which is not installed; pip install "plot-align[{extra}]"')


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """The end of an error about an unknown ``name``: the nearest of ``known``, or else ``otherwise``."""
    plain = {entry.lstrip("-").replace("-", "_"): entry for entry in sorted(known)}
    wanted = name.lstrip("-").replace("-", "_")
    near = difflib.get_close_matches(wanted, plain, n=1) or [entry for entry in plain if entry.startswith(wanted)]
    return f"did you mean {plain[near[0]]!r}?" if wanted and near else otherwise
