"""Foreign text on one line: whatever comes, nothing in it is obeyed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plot_align.text import one_line


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
