"""Links between the documents lead somewhere, and the log's index names every entry."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def anchors(page: Path) -> set[str]:
    """Those that GitHub gives the headings."""
    titles = re.findall(r"(?m)^#+ (.*)$", page.read_text())
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_log_s_index_names_every_entry():
    index = (ROOT / "docs" / "LOG.md").read_text()
    for page in (ROOT / "docs" / "log").glob("*.md"):
        for title in re.findall(r"(?m)^## (.*)$", page.read_text()):
            assert f"[{title}](log/{page.name}#" in index


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/mathematics.md"])
def test_named_files_are_there(page):
    text = re.sub(r"(?s)```.*?```", "", (ROOT / page).read_text())
    for name in re.findall(r"`([\w/.]+\.(?:py|md|toml|txt)|tests/\w+/)`", text):
        if not name.endswith(("NAME.py", "hellinger.py")):
            assert any((ROOT / folder / name).exists() for folder in (".", "src", "src/plot_align")), name


def test_the_worked_example_works(monkeypatch):
    """The code blocks of CONTRIBUTING.md: the class, and the tests on it."""
    blocks = re.findall(r"(?s)```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text())
    made = next(block for block in blocks if "class Hellinger" in block)
    tests = next(block for block in blocks if "def test_by_hand" in block)
    names: dict = {}
    exec(made, names)
    monkeypatch.setattr("plot_align.transport.make_divergence", lambda name, target: names["Hellinger"](target))
    exec(tests, names)
    for name in ("test_by_hand", "test_equals_one_minus_the_overlap", "test_gradcheck"):
        names[name]()


def test_the_quick_start_trains(tiny_llama, pairs_file, tmp_path, monkeypatch):
    """The Python of docs/frameworks/trl.md, on a tiny model, one step of each trainer."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "frameworks" / "trl.md").read_text()
    small = ', max_steps=1, bf16=False, use_cpu=True, report_to="none")'
    code = "".join(re.findall(r"(?s)```python\n(.*?)```", page))
    code = code.replace("Qwen/Qwen3-0.6B", str(tiny_llama)).replace("pairs.jsonl", str(pairs_file))
    code, count = re.subn(r'(?<=output_dir="runs/(?:dpo|sft)-plot")\)', small, code)
    assert count == 2
    names: dict = {}
    exec(code, names)
    assert (tmp_path / "runs" / "dpo-plot" / "plot_align.json").exists()
    assert names["trainer"].state.global_step == 1
    assert (tmp_path / "preference.safetensors").exists()
