"""Names of models, behaviours and measures become files inside the output folder, and no two become one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from plot_align.cli.parser import named_models
from plot_align.errors import InputError
from plot_align.evaluation.suite import Given, read_suite
from plot_align.io import complete_or_absent, file_name, require_distinct, write_json
from plot_align.redteam.behaviors import read_behaviors
from plot_align.redteam.harmbench import Layout

CLIMBING = [
    "../../x", "/etc/x", "..", ".", "a/../../x", "..\\..\\x", "C:\\x", "\\\\server\\x", "~/x", "a/b", ".hidden",
]  # fmt: skip
ODD = [
    "CON", "nul.json", "com1", "a" * 300,
    "ü" * 150, "x\x00y", "x\ny", "x ", "x.", "a:b", "a*?", "\u00e9", "e\u0301", "𝕏", "",
]  # fmt: skip


@pytest.mark.parametrize("text", [*CLIMBING, *ODD])
def test_a_name_is_one_file_in_its_folder(tmp_path: Path, text: str) -> None:
    for ending in (".json", ".results.json", ".json.old"):
        path = tmp_path / "inner" / f"{file_name(text)}{ending}"
        write_json(path, 1)
        assert path.parent.resolve() == (tmp_path / "inner").resolve()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["inner"]


@pytest.mark.parametrize("text", ["Llama-3.1-8B", "DPO+PLOT α=1", "a_b", "gpt-4", "chlorine_gas", "模型", "x" * 200])
def test_a_plain_name_stays(text: str) -> None:
    """So that files can be exchanged with HarmBench and FastChat."""
    assert file_name(text) == text


@settings(deadline=None)
@given(st.text(), st.text())
@example("a/b", "a_b")
@example("a/b", "a\\b")
@example("\u00e9", "e\u0301")
@example("a/b", file_name("a/b"))
@example("x" * 300, "x" * 301)
def test_two_texts_are_two_files_on_any_system(one: str, other: str) -> None:
    """Also where letters have no case, for names that ``require_distinct`` lets pass, and accents have one form."""
    import unicodedata

    names = [unicodedata.normalize("NFD", file_name(text)).casefold() for text in (one, other)]
    try:
        require_distinct((one, other), "the names")
    except InputError:
        return
    if one != other and one.casefold() != other.casefold():
        folded = [unicodedata.normalize("NFD", text.casefold()) for text in (one, other)]
        assert names[0] != names[1] or folded[0] == folded[1]


@settings(deadline=None)
@given(st.text())
def test_no_name_can_leave_its_folder_or_be_too_long(text: str) -> None:
    name = file_name(text)
    assert os.path.basename(name) == name
    assert name not in ("", ".", "..")
    assert not set(name) & set('<>:"/\\|?*\0')
    assert name.isprintable()
    assert len(name.encode()) <= 200


def test_layout_of_hostile_names(tmp_path: Path) -> None:
    for text in (*CLIMBING, *ODD):
        layout = Layout(tmp_path, "GCG", text)
        for path in (layout.test_cases, layout.behavior_folder(text), layout.completions(text), layout.results(text)):
            assert path.resolve().is_relative_to(tmp_path.resolve() / "GCG")
            assert len(path.relative_to(tmp_path).parts) >= 4


def test_models_that_differ_in_case_only_are_refused() -> None:
    with pytest.raises(InputError, match="'DPO' and 'dpo' differ in case only"):
        named_models(["DPO=a", "dpo=b"])


def test_behaviours_that_differ_in_case_only_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "behaviors.csv"
    file.write_text("Behavior,BehaviorID\nhow?,mill\nhow else?,Mill\n")
    with pytest.raises(InputError, match="'mill' and 'Mill' differ in case only"):
        read_behaviors(file)


def test_measures_that_differ_in_case_only_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "suite.yaml"
    file.write_text("guards:\n  Texts: {kind: diversity}\n  texts: {kind: diversity}\n")
    with pytest.raises(InputError, match="'Texts' and 'texts' differ in case only"):
        read_suite(str(file), Given())


def test_a_link_in_the_output_folder_is_replaced_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    link = tmp_path / "out.json"
    link.symlink_to(precious)
    with complete_or_absent(link) as temporary:
        temporary.write_text("ours")
    assert precious.read_text() == "mine"
    assert link.read_text() == "ours"
    assert not link.is_symlink()


def test_nothing_is_appended_through_a_link(tmp_path: Path) -> None:
    """A journal, a judgement and a log are written in place; a folder of a stranger may hold links."""
    from plot_align.evaluation.fastchat import append_judgment
    from plot_align.inference.resume import resumed
    from plot_align.sweep.workers import CommandWorker

    precious = tmp_path / "precious"
    link = tmp_path / "link"
    for target in (precious, tmp_path / "not yet there"):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        precious.write_text("mine")
        with pytest.raises(OSError, match="symbolic links"):
            append_judgment(link, {"score": 1})
        with pytest.raises(InputError, match="symbolic links"):
            list(resumed(lambda batch: [batch], [1], link))
        with pytest.raises(OSError, match="symbolic links"):
            CommandWorker(None).run(["true"], link)
        assert precious.read_text() == "mine"
        assert not (tmp_path / "not yet there").exists()
