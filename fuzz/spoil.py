"""Structure-aware input: a valid value, spoilt in a few places, written in ways that a file may have."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[Any], Any]

TEXTS = (
    "", " ", "\n", "\0", "\ud800", "\u202e", "\x1b[31m", "e\u0301", "\ufdfa", "\ufeff", "a\r\nb", "../up", "/",
    ".", "..", "nul",
    "x" * 5000, "-", "--", "=", "None", "null", "NaN", "1e999", "٧", "🙂",
    "'", '"', "{}", "{x}", "%s", "[/b]", "$float",
)  # fmt: skip
NUMBERS = (
    0, -1, 1, 2, 255, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 10**30, 10**400,
    0.0, -0.0, 0.1, 1e-320, 1e308, -1e308,
    math.nan, math.inf, -math.inf,
)  # fmt: skip


class Again(str):
    """A key that stands beside its equal in one mapping, as it may in a file."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


junk = st.one_of(
    st.sampled_from([None, True, False, [], {}, [[]], [None], {"": None}, {"$float": "NaN"}, {"$float": 1}, deep(50)]),
    st.sampled_from(TEXTS),
    st.sampled_from(NUMBERS),
    st.text(max_size=20),
    st.integers(),
    st.floats(),
    st.lists(st.integers(-3, 3), max_size=4),
).map(copy.deepcopy)  # a case may change what it drew


@st.composite
def spoilt(draw: Draw, seed: Any, most: int = 3, other: Any = junk) -> Any:
    """``seed`` with up to ``most`` changes."""
    value = copy.deepcopy(seed)
    for _ in range(draw(st.integers(0, most))):
        value = _change(draw, value, other)
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below ``value``."""
    found: list[tuple[Any, Any]] = []
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found += [(value, key), *_places(value[key])]
    return found


def _change(draw: Draw, value: Any, other: Any) -> Any:
    places = _places(value)
    if not places:
        return draw(other)
    container, key = places[draw(st.integers(0, len(places) - 1))]
    old = container[key]
    match draw(st.sampled_from(("replace", "replace", "drop", "twice", "wrap", "rename", "text", "nudge", "grow"))):
        case "replace":
            container[key] = draw(other)
        case "drop":
            del container[key]
        case "twice" if isinstance(container, dict):
            container[Again(key)] = draw(st.one_of(st.just(old), other))
        case "twice":
            container.insert(key, copy.deepcopy(old))
        case "wrap":
            container[key] = draw(st.sampled_from(([old], {"x": old}, [old, old])))
        case "rename" if isinstance(container, dict):
            del container[key]
            container[draw(st.one_of(st.sampled_from(TEXTS), st.text(max_size=8)))] = old
        case "text":
            container[key] = str(old)
        case "nudge" if isinstance(old, int | float):
            container[key] = draw(st.sampled_from((-old, old + 1, old * 1e9, old / 7 if abs(old) < 1e9 else 0)))
        case "grow" if isinstance(old, str):
            container[key] = old + draw(st.sampled_from(TEXTS))
        case "grow" if isinstance(old, list):
            container[key] = old * 50
    return value


@st.composite
def as_bytes(draw: Draw, text: str) -> bytes:
    """``text`` in UTF-8, sometimes with what other programs leave in files."""
    match draw(st.integers(0, 19)):
        case 0:
            return b"\xef\xbb\xbf" + text.encode(errors="surrogatepass")
        case 1:
            return text.replace("\n", "\r\n").encode(errors="surrogatepass")
        case 2:
            return text.encode("utf-16", "surrogatepass")
        case 3:
            content = text.encode(errors="surrogatepass")
            return content[: draw(st.integers(0, len(content)))]
        case 4:
            return text.encode(errors="surrogatepass") + draw(st.binary(max_size=8))
        case 5:
            return text.encode("latin-1", "replace")
        case 6:
            return text.replace("\n", "\r").encode(errors="surrogatepass")
    return text.encode(errors="surrogatepass")


@st.composite
def as_json(draw: Draw, value: Any, indent: int | None = None) -> bytes:
    return draw(as_bytes(json.dumps(value, ensure_ascii=draw(st.booleans()), indent=indent)))


@st.composite
def as_lines(draw: Draw, rows: Any) -> bytes:
    """JSON lines, where ``rows`` is still a list."""
    plain = draw(st.booleans())
    lines = [json.dumps(row, ensure_ascii=plain) for row in (rows if isinstance(rows, list) else [rows])]
    return draw(as_bytes("\n".join(lines) + draw(st.sampled_from(("\n", "", "\n\n")))))


@st.composite
def json_file(draw: Draw, seed: Any, most: int = 3) -> bytes:
    return draw(as_json(draw(spoilt(seed, most))))


@st.composite
def lines_file(draw: Draw, seed: Any, most: int = 3) -> bytes:
    return draw(as_lines(draw(spoilt(seed, most))))
