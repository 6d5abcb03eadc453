"""Files are complete or absent, and a folder that cannot be written is refused before the work."""

from __future__ import annotations

from pathlib import Path

import pytest

from plot_align.errors import InputError
from plot_align.io import complete_or_absent, require_writable


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text("old")

    def write() -> None:
        with complete_or_absent(path) as temporary:
            temporary.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_writable_folder_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    require_writable(tmp_path / "kept" / "a" / "b")
    require_writable(tmp_path / "kept")
    assert list(tmp_path.rglob("*")) == [tmp_path / "kept"]


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(InputError, match="a/b cannot be written"):
        require_writable(tmp_path / "a" / "b")
