"""Makes foreign text (tokens, model names, answers) safe to print: no control characters, and a limited length."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping


def _any(character: str) -> bool:
    return True


def one_line(text: str, has_glyph: Callable[[str], bool] = _any, *, space: str = " ", longest: int = 80) -> str:
    """``text`` on one line, cut to length; control, direction and undrawable characters are escaped.

    Args:
        text: any text.
        has_glyph: whether a character can be drawn.
        space: replaces a space.
        longest: number of characters, including the ellipsis.
    """
    return _fitted(text, {" ": space}, has_glyph, longest)


def passage(text: str, *, longest: int = 600, lines: int = 20) -> str:
    """``text`` with its line breaks, stripped; otherwise escaped as in :func:`one_line`.

    Args:
        text: any text; a tab becomes four spaces.
        longest: number of characters. lines: number of lines. A cut ends in an ellipsis.
    """
    rows = text.strip().replace("\r\n", "\n").split("\n")
    kept = rows if len(rows) <= lines else [*rows[: lines - 1], "…"]
    return _fitted("\n".join(kept), {"\n": "\n", "\t": "    "}, _any, longest)


def _fitted(text: str, instead: Mapping[str, str], has_glyph: Callable[[str], bool], longest: int) -> str:
    """``text`` cut to length; ``instead`` replaces some characters, and unprintable ones are escaped."""
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
    """A token on one line: spaces as ␣, otherwise escaped as in :func:`one_line`.

    Args:
        text: any token.
        has_glyph: whether a character can be drawn.
    """
    return one_line(text, has_glyph, space="␣", longest=24)
