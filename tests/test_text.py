"""Foreign text: whatever comes, nothing in it is obeyed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plot_align.text import one_line, passage


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a model", "a model"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("a\x00\x1b[31m", r"a\x00\x1b[31m"),
        ("a\nb\u2028c", r"a\nb\u2028c"),
        ("\ud800", r"\ud800"),
        ("x" * 80, "x" * 80),
        ("x" * 81, "x" * 79 + "…"),
        ("x" * 78 + "\n\n", "x" * 78 + "…"),  # an escape is shown whole or not at all
    ],
)
def test_one_line(text: str, shown: str) -> None:
    assert one_line(text) == shown


@given(st.text(alphabet=st.characters(), max_size=60), st.integers(2, 40))
@settings(max_examples=200, deadline=None)
def test_any_text_is_one_printable_line_that_can_be_written(text: str, longest: int) -> None:
    shown = one_line(text, longest=longest)
    assert shown.isprintable()
    assert len(shown) <= longest
    shown.encode("utf-8")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\n one\r\n\n\ttwo \n", "one\n\n    two"),
        ("a\rb\u2028c\u202ed\x1b[2J", r"a\rb\u2028c\u202ed\x1b[2J"),
        ("x" * 12, "x" * 12),
        ("x" * 13, "x" * 11 + "…"),
        ("1\n2\n3", "1\n2\n3"),
        ("1\n2\n3\n4", "1\n2\n…"),
        (" \n\t", ""),
    ],
)
def test_a_passage_keeps_its_lines(text: str, shown: str) -> None:
    assert passage(text, longest=12 if text.startswith("x") else 60, lines=3) == shown


@given(st.text(alphabet=st.characters() | st.just("\n"), max_size=60), st.integers(2, 40), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_any_passage_is_printable_lines_that_fit(text: str, longest: int, lines: int) -> None:
    shown = passage(text, longest=longest, lines=lines)
    assert all(line.isprintable() for line in shown.split("\n"))
    assert len(shown) <= longest
    assert shown.count("\n") < lines
    shown.encode("utf-8")
