"""Numbers as read; tables as files that no program obeys."""

from __future__ import annotations

import csv
import io
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plot_align.report.tables import (
    Table,
    as_csv,
    as_markdown,
    difference_text,
    interval_of,
    interval_text,
    loss_text,
    number,
    p_text,
    value_text,
    with_interval,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (12.0, "12"),
        (1319, "1,319"),
        (-2.5, "−2.500"),
        (0.12341, "0.1234"),
        (123.456, "123.5"),
        (1e-5, "1.00e-05"),
        (2.5e7, "25,000,000"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (math.nan, "–"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


def test_shares_are_per_cent_and_others_as_fine_as_their_interval() -> None:
    share = {"value": 0.7134, "interval": [0.65, 0.771], "bounds": [0.0, 1.0]}
    assert (value_text(share), interval_text(share)) == ("71.3 %", "65.0 to 77.1 %")
    nats = {"value": 2.34567, "interval": [2.2678, 2.4089], "bounds": None}  # half its width 0.07: 3 decimals
    assert (value_text(nats), interval_text(nats)) == ("2.346", "2.268 to 2.409")
    points = {"value": 6.0, "interval": [4.8, 7.2], "bounds": [1.0, 10.0]}
    assert (value_text(points), interval_text(points)) == ("6.0", "4.8 to 7.2")
    assert interval_text({"value": 1.0, "bounds": None}) == ""
    assert interval_text({"value": 1.0, "interval": [-math.inf, math.inf], "bounds": None}) == "−∞ to ∞"


def test_intervals_end_where_values_do() -> None:
    share = {"value": 0.9, "interval": [0.742, 1.062], "bounds": [0.0, 1.0]}
    assert interval_of(share) == (0.742, 1.0)
    assert with_interval(share) == "90.0 % (74.2 to 100.0 %)"
    assert interval_of({"value": 0.1, "interval": [-0.2, 0.4], "bounds": [0.0, 1.0]}) == (0.0, 0.4)
    assert interval_of({"value": 0.1, "interval": [-0.2, 0.4], "bounds": None}) == (-0.2, 0.4)
    assert interval_of({"value": 0.1, "bounds": [0.0, 1.0]}) is None
    assert with_interval({"value": 7.0, "bounds": None}) == "7"


def test_losses_are_amounts() -> None:
    fall = {"value": -0.117, "interval": [-0.2, -0.03]}
    assert loss_text(fall, {"better": "higher", "bounds": [0.0, 1.0]}) == "11.7 points (3.0 to 20.0)"
    rise = {"value": 0.5, "interval": [0.25, 0.75]}
    assert loss_text(rise, {"better": "lower", "bounds": None, "unit": "nats a token"}) == (
        "0.50 nats a token (0.25 to 0.75)"
    )
    assert loss_text(rise, {"better": "lower", "bounds": [1.0, 10.0], "unit": None}) == "0.50 (0.25 to 0.75)"


def test_differences_have_signs() -> None:
    share, nats = {"bounds": [0.0, 1.0]}, {"bounds": None}
    assert difference_text({"value": 0.052, "interval": [0.0, 0.1]}, share) == "+5.2 points"
    assert difference_text({"value": -0.052, "interval": [-0.1, 0.0]}, share) == "−5.2 points"
    assert difference_text({"value": -0.0001, "interval": [-0.1, 0.1]}, share) == "0.0 points"
    assert difference_text({"value": -0.0158, "interval": [-0.02, -0.01]}, nats) == "−0.0158"


def test_p() -> None:
    assert [p_text(p).replace("\u00a0", " ") for p in (0.0002, 0.0421, 0.25, 1.0)] == [
        "p < 0.001", "p = 0.042", "p = 0.25", "p = 1.00"
    ]  # fmt: skip


TRICKS = ["=1+1", "+cmd", "-2", "@SUM(A1)", "\t=1", " =1", "a\rb", 'a"b', "a,b", "\u202eabc", "\x1b[31m", "x" * 20_000]


def test_csv_is_read_back_and_holds_no_formula() -> None:
    table = Table("t", "c", ["text", "number"], [[trick, -1.5] for trick in TRICKS])
    rows = list(csv.reader(io.StringIO(as_csv(table))))
    assert len(rows) == len(TRICKS) + 1
    for _, number_ in rows[1:]:
        assert float(number_) == -1.5  # a number is none
    for text, _ in rows[1:]:
        assert not text.lstrip().startswith(("=", "+", "-", "@"))
        assert text.isprintable()
        assert len(text) <= 10_001
    assert rows[1][0] == "'=1+1"


def test_csv_keeps_every_digit() -> None:
    (_, row) = csv.reader(io.StringIO(as_csv(Table("t", "c", ["a", "b"], [[0.1 + 0.2, None]]))))
    assert (float(row[0]), row[1]) == (0.1 + 0.2, "")


@given(st.lists(st.text(max_size=30), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_markdown_has_the_cells_it_should(texts: list[str]) -> None:
    markdown = as_markdown(Table("t", "caption", ["name", "n"], [[text, 1] for text in texts]))
    lines = markdown.splitlines()
    assert len(lines) == 4 + len(texts)
    for line in lines[2:]:
        bars = [i for i, c in enumerate(line) if c == "|" and (i == 0 or not _escaped(line, i))]
        assert len(bars) == 3


def _escaped(line: str, at: int) -> bool:
    slashes = 0
    while at - slashes - 1 >= 0 and line[at - slashes - 1] == "\\":
        slashes += 1
    return slashes % 2 == 1


def test_markdown_is_not_obeyed() -> None:
    markdown = as_markdown(Table("t", "c", ["`a`"], [["<script>x</script>"], ["a|b"], ["[x](y)"], ["&lt;"]]))
    assert "<" not in markdown
    assert r"\`a\`" in markdown
    assert r"a\|b" in markdown
    assert r"\[x\]\(y\)" in markdown
    assert "&amp;lt;" in markdown


def test_files_have_plain_spaces_where_the_page_keeps_words_together() -> None:
    table = Table("t", "caption", ("p",), [(p_text(0.01),)])
    assert "p = 0.010" in as_markdown(table)
    assert "p = 0.010" in as_csv(table)
