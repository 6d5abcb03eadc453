"""Makes foreign text (tokens, model names, answers, errors) safe to print: no control characters, no markup."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>()#|~!$])")


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
            part = _escaped(character)
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


def printable(text: str) -> str:
    """``text`` for a terminal: all of it, with control, direction and half characters escaped.

    Line breaks, tabs and spaces of any width stay. An escape sequence could otherwise retitle the terminal, write to
    its clipboard, or draw over what was printed before.
    """
    if text.isprintable():
        return text
    return "".join(
        character
        if character in "\n\t" or character.isprintable() or unicodedata.category(character) == "Zs"
        else _escaped(character)
        for character in text
    )


def _escaped(character: str) -> str:
    return json.dumps(character)[1:-1] if ord(character) > 0x7F else repr(character)[1:-1]


def sendable(text: str) -> str:
    """Replace half an emoji, which JSON can hold escaped but a request cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def markdown(text: str, *, longest: int = 200) -> str:
    """``text`` on one line of Markdown, also within a table: no markup, link, image or HTML of its own.

    Args:
        text: any text. longest: number of characters, as in :func:`one_line`.
    """
    plain = one_line(text.replace("\u00a0", " "), longest=longest)
    return _MARKDOWN.sub(r"\\\1", plain.replace("&", "&amp;")).replace("\\<", "&lt;")


def terminal(file: TextIO | None = None, *, quiet: bool = False) -> Console:
    """A rich console for foreign text: no markup, no emoji codes, and :func:`printable` whatever is rendered.

    Args:
        file: None for standard output. quiet: print nothing.
    """
    from rich.console import Console
    from rich.segment import Segment

    class Plain(Console):
        def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
            for text, style, control in super().render(renderable, options):
                yield Segment(text if control else printable(text), style, control)

    return Plain(file=file, quiet=quiet, highlight=False, markup=False, emoji=False)
