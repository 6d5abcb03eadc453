"""Foreign text (tokens, names of models, answers) with nothing in it that a screen would obey."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping


def _any(character: str) -> bool:
    return True


def one_line(text: str, has_glyph: Callable[[str], bool] = _any, *, space: str = " ", longest: int = 80) -> str:
    """``text`` with control characters, marks of direction and what cannot be drawn as escapes, cut to fit.

    Args:
        text: any text.
        has_glyph: whether a character can be drawn.
        space: what stands for a space.
        longest: characters, the ellipsis of a cut included.
    """
    return _fitted(text, {" ": space}, has_glyph, longest)


def passage(text: str, *, longest: int = 600, lines: int = 20) -> str:
    """``text`` with its line breaks, the rest as :func:`one_line` has it, without the white space around it.

    Args:
        text: any text; a tab stands for four spaces.
        longest: characters. lines: what is cut at either ends in an ellipsis.
    """
    rows = text.strip().replace("\r\n", "\n").split("\n")
    kept = rows if len(rows) <= lines else [*rows[: lines - 1], "…"]
    return _fitted("\n".join(kept), {"\n": "\n", "\t": "    "}, _any, longest)


def _fitted(text: str, instead: Mapping[str, str], has_glyph: Callable[[str], bool], longest: int) -> str:
    """``text`` cut to fit, what is not printable as escapes unless ``instead`` says what stands for it."""
    shown, length = [], 0
    for character in text:
        if character in instead:
            part = instead[character]
        elif character.isprintable() and has_glyph(character):
            part = character
        else:
            part = json.dumps(character)[1:-1] if ord(character) > 0x7F else repr(character)[1:-1]
        shown.append(part)
        length += len(part)
        if length > longest:
            break
    else:
        return "".join(shown)
    while length > longest - 1:
        length -= len(shown.pop())
    return "".join(shown) + "…"


def readable(text: str, has_glyph: Callable[[str], bool] = _any) -> str:
    """A token on one line: spaces as ␣, the rest as :func:`one_line` has it.

    Args:
        text: any token.
        has_glyph: whether a character can be drawn.
    """
    return one_line(text, has_glyph, space="␣", longest=24)
