"""HarmBench's behaviours and benign requests, as CSV."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import strategies as st

from fuzz.guard import Wrong
from fuzz.spoil import TEXTS, as_bytes
from fuzz.targets import joined, write
from plot_align.redteam.behaviors import COLUMNS, read_behaviors, write_behaviors

_ROWS = [
    list(COLUMNS),
    ["Do a thing, please", "standard", "chemical", "a, b", "", "do_thing"],
    ["Do it\nin two lines", "contextual", "", "", 'It is said "so".', "do_it"],
    ["Sing the song", "copyright", "copyright", "lyrics, hash_check", "", "sing"],
]


def _csv(rows: list[list[str]], **dialect: Any) -> str:
    file = io.StringIO(newline="")
    csv.writer(file, **{"lineterminator": "\r\n", **dialect}).writerows(rows)
    return file.getvalue()


@st.composite
def _cases(draw: Any) -> bytes:
    skips = draw(st.integers(0, 1))
    rows = [list(row) for row in (_ROWS if skips else _ROWS[:-1])]
    for _ in range(draw(st.integers(0, 3))):
        row = rows[draw(st.integers(0, len(rows) - 1))]
        place = draw(st.integers(0, max(0, len(row) - 1)))
        match draw(st.sampled_from(("cell", "cell", "drop", "twice", "row", "empty"))):
            case "cell" if row:
                row[place] = draw(
                    st.one_of(st.sampled_from(TEXTS), st.sampled_from(_ROWS[0] + _ROWS[1]), st.text(max_size=9))
                )
            case "drop" if row:
                del row[place]
            case "twice" if row:
                row.insert(place, row[place])
            case "row":
                rows.append(list(row))
            case "empty":
                row.clear()
    dialect = draw(st.sampled_from(({}, {"lineterminator": "\n"}, {"quoting": csv.QUOTE_ALL}, {"delimiter": ";"})))
    try:
        text = _csv(rows, **dialect)
    except csv.Error:  # a lone empty field
        text = "\n".join(",".join(row) for row in rows)
    return joined(skips, draw(as_bytes(text)))


class Behaviors:
    name = "behaviors"
    names = ("case.csv",)
    seeds: ClassVar[list[bytes]] = [joined(1, _csv(_ROWS).encode()), joined(0, _csv(_ROWS[:3]).encode())]
    cases = _cases()

    def run(self, data: bytes, folder: Path) -> None:
        path = write(folder, "case.csv", data[1:])
        found = read_behaviors(path, skip_copyright=bool(data[:1] and data[0] % 2))
        text = data[1:].decode("utf-8-sig")
        plain = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
        kept = [row for row in plain if row["BehaviorID"].strip() not in set(found.skipped)]
        if [(b.id, b.text, b.context) for b in found.rows] != [
            (row["BehaviorID"].strip(), row["Behavior"], row.get("ContextString") or "") for row in kept
        ]:
            raise Wrong("other rows than Python's own reader finds")
        ids = [b.id for b in found.rows] + found.skipped
        if len(set(ids)) != len(ids) or any((folder / i).parent != folder for i in ids):
            raise Wrong("ids that are not folders of their own")
        if not any("," in tag for b in found.rows for tag in b.tags):
            write_behaviors(folder / "again.csv", found.rows)
            if read_behaviors(folder / "again.csv", skip_copyright=True).rows != found.rows:
                raise Wrong("what is written is not what was read")
