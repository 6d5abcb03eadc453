"""Files are complete or absent and known again, a folder has one writer, and one that cannot be written is refused."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from plot_align import io
from plot_align.errors import InputError
from plot_align.io import (
    check_seal,
    claimed,
    complete_or_absent,
    match_or_write,
    require_writable,
    seal_of,
    write_sealed_json,
)
from processes import bounded


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


def test_a_folder_has_one_writer_and_a_file_too(tmp_path: Path) -> None:
    """Another process holds them; once it is killed, nobody does. What it left unfinished goes, and no trace stays."""
    program = """if True:
        import sys
        from pathlib import Path
        from plot_align.io import claimed, complete_or_absent
        folder = Path(sys.argv[1])
        with claimed(folder / "run"), claimed(folder, "kept.jsonl"):
            with complete_or_absent(folder / "run" / "a" / "record.json"), complete_or_absent(folder / "kept.jsonl"):
                print("held", flush=True)
                sys.stdin.read()
    """
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other, bounded(other):
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        for folder, name in ((tmp_path / "run", None), (tmp_path, "kept.jsonl")):
            with pytest.raises(InputError, match=r"(run|kept\.jsonl) is in use by another plot-align process; wait"):
                claimed(folder, name).__enter__()
        with claimed(tmp_path, "other.jsonl"):  # another file in that folder is free
            pass
        other.kill()
    assert len(list(tmp_path.rglob(".part.*"))) == 2
    (tmp_path / ".part.1.other.jsonl").touch()  # somebody else's
    with claimed(tmp_path / "run"), claimed(tmp_path, "kept.jsonl"):
        assert [path.name for path in tmp_path.rglob(".part.*")] == [".part.1.other.jsonl"]
    assert not list(tmp_path.rglob("*.lock"))


def test_a_claim_waits_for_what_is_ending(tmp_path: Path) -> None:
    """Processes that a killed run started end after it, and its next call comes at once."""
    program = """if True:
        import sys, time
        from pathlib import Path
        from plot_align.io import claimed
        with claimed(Path(sys.argv[1])):
            print("held", flush=True)
            time.sleep(0.5)
    """
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other, bounded(other):
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with claimed(tmp_path):
            pass


def test_a_claim_leaves_unfinished_files_of_others(tmp_path: Path) -> None:
    """Of a name that begins alike, and of a run in a subfolder."""
    (tmp_path / ".part.1.kept.v1.jsonl").touch()
    (tmp_path / ".part.1.kept.v2.jsonl").touch()
    for ending in ("json", "jsonl.gz", "record.json", "scores.jsonl.gz"):
        (tmp_path / f".part.1.kept.v2.{ending}").touch()
    with claimed(tmp_path, "kept.v2.jsonl"):
        assert [path.name for path in tmp_path.glob(".part.*")] == [".part.1.kept.v1.jsonl"]
    (tmp_path / ".part.1.kept.v1.record.json").touch()
    with claimed(tmp_path, "kept.v1.jsonl.gz"):
        assert not list(tmp_path.glob(".part.*"))
    (tmp_path / "sub").mkdir()
    with claimed(tmp_path / "sub"):
        (tmp_path / "sub" / ".part.1.x.json").touch()
        with claimed(tmp_path):
            assert [path.name for path in tmp_path.rglob(".part.*")] == [".part.1.x.json"]


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".plot-align.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(InputError), claimed(tmp_path / "out"):
        pass
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_claim_that_wrote_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with claimed(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/b cannot be written"):
        claimed(tmp_path / "file" / "b").__enter__()


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "free some space, and run the same again"),
        (errno.ENOENT, "its folder was removed meanwhile"),
        (errno.EROFS, "name a folder you may write to"),
    ],
)
def test_what_to_do_depends_on_what_hinders(
    code: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(io.os, "replace", refuse)
    with pytest.raises(InputError, match=advice):
        io.write_json(tmp_path / "a.json", 1)
    assert list(tmp_path.iterdir()) == []


def test_a_sealed_file_is_known_again(tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    check_seal(path.with_name("foreign.json"))  # from elsewhere
    for value in (1, 2, 3, 3):
        write_sealed_json(path, {"label": value})
        check_seal(path)
    assert len(json.loads(seal_of(path).read_text())) == 1  # written again, it is the same
    path.write_text(path.read_text().replace("3", "4"))
    with pytest.raises(InputError, match=r"answers.json is not as it was written, .* delete both to make it again"):
        check_seal(path)
    write_sealed_json(path, {"label": 5})
    check_seal(path)
    seal_of(path).write_text("[")
    with pytest.raises(InputError, match=r"answers\.json is not as it was written"):
        check_seal(path)


def test_what_differs_is_said_with_both_values(tmp_path: Path) -> None:
    record, made = tmp_path / "options.json", tmp_path / "cases"
    attack = {"name": "GCG", "steps": 4001, "texts": ["x" * 99], "rate": None}
    content = {"attack": attack, "victim": None, "seed": 0}
    match_or_write(record, content, made)
    match_or_write(record, content, made)  # the same
    for change, said in (
        ({"seed": 1}, "another seed (0 there, 1 now); choose"),
        ({"attack": {**attack, "steps": 4000}}, "another attack.steps (4001 there, 4000 now); choose"),
        ({"attack": {**attack, "texts": ["y"]}, "victim": "é"}, 'attack.texts and victim (none there, "é" now)'),
        ({"attack": {"name": "PEZ", "steps": 1}}, "(4001 there, 1 now) and attack.texts; choose another output, or"),
        ({"seed": 1, "victim": 1, "attack": {"name": "", "steps": 0}}, "0 now) and attack.texts and 2 more;"),
    ):  # fmt: skip
        with pytest.raises(InputError) as caught:
            match_or_write(record, content | change, made)
        assert str(caught.value).startswith(f"{made} was made with another ")
        assert said in str(caught.value)
        assert str(caught.value).endswith(f"delete {made} to make it again")


@pytest.mark.parametrize("damage", [lambda text: text.replace("4001", "4000"), lambda text: text[:20]])
def test_damage_is_no_other_option(damage: Callable[[str], str], tmp_path: Path) -> None:
    """And costs the small file, not what it is of."""
    record, made = tmp_path / "options.json", tmp_path / "cases"
    match_or_write(record, {"attack": {"steps": 4001}}, made)
    record.write_text(damage(record.read_text()))
    for steps in (4001, 4000):
        with pytest.raises(InputError) as caught:
            match_or_write(record, {"attack": {"steps": steps}}, made)
        assert str(caught.value) == (
            f"{record} is damaged and no longer says what made {made}; delete {record}, if nothing else has changed "
            f"since, or {made} to make it again"
        )
    record.unlink()
    for _ in range(2):
        match_or_write(record, {"attack": {"steps": 4001}}, made)


def test_a_run_killed_between_seal_and_file_leaves_neither_in_doubt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "answers.json"
    write_sealed_json(path, 1)
    real, calls = os.replace, []

    def second_fails(*paths: Path) -> None:
        calls.append(paths)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*paths)

    monkeypatch.setattr(io.os, "replace", second_fails)
    with pytest.raises(KeyboardInterrupt):
        write_sealed_json(path, 2)
    assert json.loads(path.read_text()) == 1
    check_seal(path)
