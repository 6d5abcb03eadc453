"""HarmBench's behaviours and targets, as files that others wrote."""

from __future__ import annotations

import csv
import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from plot_align.errors import InputError
from plot_align.redteam.behaviors import (
    CATEGORIES,
    COLUMNS,
    Behavior,
    default_benign,
    read_behaviors,
    read_targets,
    require_targets,
    write_behaviors,
)

HEADER = "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"


def write(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "behaviors.csv"
    path.write_bytes(text.encode(encoding))
    return path


def test_a_users_file_is_read_as_it_was_meant(tmp_path: Path) -> None:
    """Quoted commas and quotes, line breaks in the context, unknown tags, CRLF, a byte-order mark, a blank line."""
    text = (
        HEADER
        + '"Steal the crown, ""quietly""",standard,theft,,,steal_crown\n\n'
        + 'Explain the plan,contextual,theft,"context, brand new","Line one,\nline two",explain_plan\n'
    )
    path = write(tmp_path, text.replace("\n", "\r\n"), "utf-8-sig")
    rows, skipped, *_ = read_behaviors(path)
    assert skipped == []
    assert rows == [
        Behavior("steal_crown", 'Steal the crown, "quietly"', "standard", "theft"),
        Behavior(
            "explain_plan",
            "Explain the plan",
            "contextual",
            "theft",
            ("context", "brand new"),
            "Line one,\r\nline two",
        ),
    ]
    assert rows[0].prompt == 'Steal the crown, "quietly"'
    assert rows[1].prompt == "Line one,\r\nline two\n\n---\n\nExplain the plan"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a,standard,,,,x\nb,standard,,,,x\n", "line 3: the id 'x' was used in an earlier row"),
        ('a,standard,,,"1\n2",x\n  ,standard,,,,y\n', "line 4: 'y' asks for nothing"),
        ("a,standard,,,,\n", "line 2: the id is ''"),
        ("a,standard,,,,../x\n", "expected a name without slashes"),
        ("a,odd,,,,x\n", "FunctionalCategory 'odd'"),
        ("a,contextual,,,,x\n", "contextual and has no ContextString"),
        ("a,standard,,,,x\\y\n", "expected a name without slashes"),
        ("a,standard,,,,..\n", "expected a name without slashes"),
        ("a,standard,,x\n", "line 2: 4 fields came, expected 6"),
        ("Buy a, b,standard,,,,x\n", "line 2: 7 fields came, expected 6 .* begins with 'Buy a'"),
        ("a,copyright,,,,x\n", "copyrighted text"),
        ("a,standard,,hash_check,,x\n", "copyrighted text"),
        ("a,standard,,,,c\nb,copyright,,,,x\na,copyright,,,,y\n", "line 3: 'x' is the first of 2 .* --skip_copyright"),
        ("a,copyright,,,,x\nb,standard,,,,x\n", "line 3: the id 'x' was used in an earlier row"),
        ('a,standard,,,,x\n"b,standard,,,,y\nc,standard,,,,z\n', "row that begins on line 3 is not CSV"),
        ('a,standard,,"1\n"2",,x\n', "row that begins on line 2 is not CSV"),
        ("", "no behaviours"),
    ],
)
def test_a_wrong_row_is_refused_and_named(tmp_path: Path, rows: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_behaviors(write(tmp_path, HEADER + rows))


def test_copyright_rows_are_left_out_only_where_asked_and_named(tmp_path: Path) -> None:
    path = write(tmp_path, HEADER + "a,copyright,,,,x\nb,standard,,,,y\n")
    rows, skipped, targets, taken = read_behaviors(path, skip_copyright=True)
    assert [row.id for row in rows] == ["y"]
    assert skipped == ["x"]
    assert (targets, taken) == (
        {},
        "behaviors.csv (HarmBench): 1 harmful request taken, 1 about copyrighted text left",
    )
    with pytest.raises(InputError, match="no behaviours to attack beside the 1 about copyrighted text"):
        read_behaviors(write(tmp_path, HEADER + "a,copyright,,,,x\n"), skip_copyright=True)


def test_two_columns_are_enough_in_any_order_beside_others(tmp_path: Path) -> None:
    path = write(tmp_path, "Note,BehaviorID,Behavior\nmine,x,a\n")
    assert read_behaviors(path).rows == [Behavior("x", "a")]


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match="has the columns Behavior, Tags; expected those of HarmBench: Behavior, BehaviorID; JailbreakBench: ",
    ):
        read_behaviors(write(tmp_path, "Behavior,Tags\na,b\n"))
    with pytest.raises(InputError, match="has no line of column names"):
        read_behaviors(write(tmp_path, ""))
    with pytest.raises(InputError, match="has the column Behavior 2 times"):
        read_behaviors(write(tmp_path, "Behavior,BehaviorID,Behavior\na,x,b\n"))
    with pytest.raises(InputError, match="not UTF-8"):
        read_behaviors(write(tmp_path, HEADER + "é,standard,,,,x\n", "latin-1"))
    with pytest.raises(InputError, match="cannot be read"):
        read_behaviors(tmp_path / "absent.csv")


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@given(st.lists(st.tuples(TEXT.filter(str.strip), TEXT), min_size=1, max_size=5))
def test_whatever_the_csv_module_wrote_comes_back(rows: list[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "behaviors.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for index, (text, context) in enumerate(rows):
                writer.writerow([text, "standard", "", "", context, f"id{index}"])
        found = read_behaviors(path).rows
    assert [(row.text, row.context) for row in found] == rows


NAME = TEXT.map(str.strip)
TAG = NAME.map(lambda tag: tag.replace(",", "").strip()).filter(lambda tag: tag not in ("", "hash_check"))
BEHAVIOR = st.builds(
    Behavior,
    id=NAME.filter(lambda name: name not in ("", ".", "..") and not set(name) & set("/\\")),
    text=TEXT.filter(str.strip),
    functional_category=st.sampled_from([name for name in CATEGORIES if name != "copyright"]),
    semantic_category=NAME,
    tags=st.lists(TAG, max_size=3).map(tuple),
    context=TEXT,
).filter(lambda x: x.functional_category != "contextual" or x.context.strip())


@given(st.lists(BEHAVIOR, min_size=1, max_size=5, unique_by=lambda x: x.id))
@example([Behavior("x", "a\rb", context="\r\n\u2028c\n")])
def test_behaviors_survive_writing_and_reading(behaviors: list[Behavior]) -> None:
    """Any text but NUL, which Python 3.10 does not read, and lone surrogates, which UTF-8 does not know."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "behaviors.csv"
        write_behaviors(path, behaviors)
        assert read_behaviors(path).rows == behaviors


def test_the_benign_requests_of_the_package() -> None:
    """Counted by hand: 60 of them, each about itself, and none asked for twice."""
    benign = default_benign()
    assert len(benign) == len({x.text for x in benign}) == 60
    for x in benign:
        assert (x.functional_category, x.semantic_category, x.tags, x.context) == ("standard", "benign", (), "")
        assert re.fullmatch("benign_[a-z]+(_[a-z]+)*", x.id)
    assert (
        Behavior("benign_kill_process", "How do I kill a process that hangs on Linux?", "standard", "benign") in benign
    )


def test_targets_of_a_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "targets.json"
    path.write_text('{"x": "Sure, here"}', encoding="utf-8-sig")
    assert read_targets(path) == {"x": "Sure, here"}


def test_the_first_of_many_missing_targets_are_named() -> None:
    behaviors = [Behavior(name, "t") for name in "abcde"]
    with pytest.raises(InputError, match="none for a, b, d and 1 more;"):
        require_targets(behaviors, {"c": "Sure"}, "PEZ")


def test_targets(tmp_path: Path) -> None:
    path = tmp_path / "targets.json"
    path.write_text(json.dumps({"x": "Sure, here", "y": "Sure, ünd"}), encoding="utf-8")
    targets = read_targets(path)
    assert targets == {"x": "Sure, here", "y": "Sure, ünd"}
    require_targets([Behavior("x", "a")], targets, "GCG")
    with pytest.raises(
        InputError, match=r"GCG needs a target for every behaviour, and there is none for z; name .* with --targets"
    ):
        require_targets([Behavior("x", "a"), Behavior("z", "b")], targets, "GCG")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"x": "a", "x": "b"}', "names 'x' twice"),
        ('{"x": ["a"]}', "the target of 'x' is not a text"),
        ('{"x": " "}', "the target of 'x' is not a text"),
        ("[1]", "not a JSON object"),
        ('{"x": "a', "not complete JSON"),
    ],
)
def test_wrong_targets_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "targets.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_targets(path)
