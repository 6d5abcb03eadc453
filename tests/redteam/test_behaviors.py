"""HarmBench's behaviours and targets, as files that others wrote."""

from __future__ import annotations

import csv
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plot_align.errors import InputError
from plot_align.redteam.behaviors import COLUMNS, Behavior, read_behaviors, read_targets, require_targets

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
    rows, skipped = read_behaviors(path)
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
        ("a,standard,,,,x\nb,standard,,,,x\n", "line 3: BehaviorID 'x' stands in an earlier row"),
        ('a,standard,,,"1\n2",x\n  ,standard,,,,y\n', "line 4: 'y' has an empty Behavior"),
        ("a,standard,,,,\n", "line 2: BehaviorID is ''"),
        ("a,standard,,,,../x\n", "expected a name without slashes"),
        ("a,odd,,,,x\n", "FunctionalCategory 'odd'"),
        ("a,contextual,,,,x\n", "contextual and has no ContextString"),
        ("a,standard,,x\n", "line 2: 4 fields came, expected 6"),
        ("a,copyright,,,,x\n", "copyrighted text"),
        ("a,standard,,hash_check,,x\n", "copyrighted text"),
        ('"a,standard,,,,x\n', "close every double quote"),
        ("", "no behaviours"),
    ],
)
def test_a_wrong_row_is_refused_and_named(tmp_path: Path, rows: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_behaviors(write(tmp_path, HEADER + rows))


def test_copyright_rows_are_left_out_only_where_asked_and_named(tmp_path: Path) -> None:
    path = write(tmp_path, HEADER + "a,copyright,,,,x\nb,standard,,,,y\n")
    rows, skipped = read_behaviors(path, skip_copyright=True)
    assert [row.id for row in rows] == ["y"]
    assert skipped == ["x"]


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no column BehaviorID"):
        read_behaviors(write(tmp_path, "Behavior,Tags\na,b\n"))
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


def test_targets(tmp_path: Path) -> None:
    path = tmp_path / "targets.json"
    path.write_text(json.dumps({"x": "Sure, here", "y": "Sure, ünd"}), encoding="utf-8")
    targets = read_targets(path)
    assert targets == {"x": "Sure, here", "y": "Sure, ünd"}
    require_targets([Behavior("x", "a")], targets, "GCG")
    with pytest.raises(InputError, match="GCG needs a target for every behaviour, and there is none for z"):
        require_targets([Behavior("x", "a"), Behavior("z", "b")], targets, "GCG")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"x": "a", "x": "b"}', "names 'x' twice"),
        ('{"x": ["a"]}', "that of 'x' is not a text"),
        ('{"x": " "}', "that of 'x' is not a text"),
        ("[1]", "not a JSON object"),
        ('{"x": "a', "not complete JSON"),
    ],
)
def test_wrong_targets_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "targets.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_targets(path)
