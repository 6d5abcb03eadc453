"""Answers side by side: which are shown, in what order, and that nothing in them is obeyed."""

from __future__ import annotations

import csv
import html
import re
from pathlib import Path
from typing import Any

import pytest

from plot_align.cli.main import main
from plot_align.report.answers import Answer, SideBySide
from plot_align.report.observations import collect
from plot_align.report.page import build

HOSTILE = (
    "<script>alert(1)</script>\n\u202egnp.exe\n\x1b[31mred\n=HYPERLINK(1)\n{{7*7}} | \ud800 &amp;\n" + "w" * 10_000
)


def _entry(label: str = "helped", text: str = "Yes.", prompt: str = "May I?", reason: str = "") -> dict[str, str]:
    return {"prompt": prompt, "answer": text, "label": label, "reason": reason}


@pytest.fixture
def answered(evaluation: Any) -> Any:
    """Writes one model's answers, by item; the measure is over-refusal unless another kind is named."""

    def write(model: str, answers: dict[str, Any], kind: str = "over_refusal", **options: Any) -> Path:
        path: Path = evaluation(model, kind, dict.fromkeys(answers, 1.0), section="guards", kind=kind, name="refused",
                                title=kind, better="lower", details={"answers": answers}, **options)  # fmt: skip
        return path.parents[1]

    return write


def _groups(folder: Path, baseline: str | None = None) -> list[SideBySide]:
    return build(collect([folder]), baseline=baseline).answers


def _page(folder: Path) -> str:
    assert main(["report", str(folder), "-o", str(folder.parent / "page.html")]) == 0
    return (folder.parent / "page.html").read_text(encoding="utf-8")


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder.parent / "page_files" / "answers.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_where_labels_differ_comes_first_and_the_base_leads(answered: Any, evaluation: Any) -> None:
    """``d`` differs between two models only; ``c`` in nothing that was decided. Another measure names the base."""
    labels = {"dpo": "hhuh", "plot": "hrhh", "start": "hhhr"}
    words = {"h": "helped", "r": "refused", "u": "undecided"}
    for model, of in labels.items():
        answers = {name: _entry(words[x]) for name, x in zip("abcd", of, strict=True)}
        folder = answered(model, answers)
    evaluation("plot", "kl", section="guards", kind="kl", reference="start")
    (group,) = _groups(folder, baseline="dpo")
    assert [request.name for request in group.requests] == ["b", "d", "a", "c"]
    assert group.differing == 2
    assert group.models == ["start", "dpo", "plot"]
    assert (group.marked, group.mark) == ("start", "base")
    assert group.alike
    page = _page(folder)
    assert '<bdi>start</bdi></span> <span class="tag">base</span>' in page
    assert "4 requests. Labels differ on 2 of them, shown first." in page
    assert page.count("May I?</h4>") == 4


def test_without_a_reference_the_baseline_is_marked(answered: Any) -> None:
    for model in ("a", "b"):
        folder = answered(model, {"x": _entry()})
    (group,) = _groups(folder, baseline="b")
    assert (group.models, group.marked, group.mark) == (["b", "a"], "b", "baseline")
    assert "“base” is the model" not in _page(folder)


def test_one_model_alone_has_no_section(answered: Any, evaluation: Any) -> None:
    folder = answered("a", {"x": _entry(text="nobody else said so")})
    evaluation("b", "over_refusal", {"x": 1.0}, section="guards", kind="over_refusal", name="refused")
    answered("b", {"y": _entry()}, kind="attack_success")  # another measure
    page = _page(folder)
    assert 'href="#answers"' not in page
    assert "nobody else said so" not in page
    assert not (folder.parent / "page_files" / "answers.csv").exists()


def test_models_that_share_no_request_have_no_section(answered: Any) -> None:
    answered("a", {"x": _entry()})
    assert _groups(answered("b", {"y": _entry()})) == []


def test_requests_of_one_model_only_are_in_the_file_alone(answered: Any) -> None:
    answered("a", {"x": _entry(), "y": _entry(prompt="Only of a?")})
    answered("b", {"x": _entry(), "z": _entry(), "w": _entry()}, options={"limit": 3})
    folder = answered("c", {"x": _entry(), "w": _entry()})
    page = _page(folder)
    assert "2 requests are in page_files/answers.csv alone, 2 of them asked of one model only." in page
    assert "Only of a?" not in page
    assert page.count('<p class="absent">not asked</p>') == 1  # w, of a
    assert "The models were not measured alike" in page
    assert [(row["request"], row["model"]) for row in _rows(folder)] == [
        ("x", "a"), ("x", "b"), ("x", "c"), ("w", "b"), ("w", "c"), ("y", "a"), ("z", "b"),
    ]  # fmt: skip


def test_an_attack_on_each_model_shows_what_each_was_asked(answered: Any) -> None:
    for model in ("a", "b"):
        folder = answered(model, {"make_soap": _entry(prompt=f"Make soap !! {model}")}, kind="attack_success")
    page = _page(folder)
    assert '<h4 dir="auto">make_soap</h4>' in page
    assert all(f"Asked: Make soap !! {model}</p>" in page for model in ("a", "b"))


def test_many_requests_are_behind_a_click_and_very_many_in_the_file(answered: Any) -> None:
    for model in ("a", "b"):
        folder = answered(model, {str(i): _entry(prompt=f"Number {i}?") for i in range(103)})
    page = _page(folder)
    start, end = page.index('<h2 id="answers">'), page.index("3 requests are in page_files/answers.csv alone.")
    shown, hidden = page[start:end].split("<details><summary>88 more requests")
    assert re.findall(r"Number (\d+)", shown) == [str(i) for i in range(12)]
    assert re.findall(r"Number (\d+)", hidden) == [str(i) for i in range(12, 100)]
    assert len(_rows(folder)) == 206


def test_harmful_ones_are_closed_as_a_whole_and_after_the_others(answered: Any) -> None:
    for model in ("a", "b"):
        answered(model, {"x": _entry("complied", prompt="Harmful?")}, kind="attack_success")
        folder = answered(model, {"x": _entry()})
    page = _page(folder)
    section = page[page.index('<h2 id="answers">') : page.index('<h2 id="made">')]
    before, closed = section.split("<details>", 1)
    assert "May I?" in before
    assert "Harmful?" not in before
    assert "collapsed until you open them" in before
    assert "Harmful?" in closed.split("</details>")[0]


def test_an_answer_is_cut_on_the_page_and_not_in_the_file(answered: Any) -> None:
    long = "First.\n\n\tThen.\n" + "more " * 400
    for model in ("a", "b"):
        folder = answered(model, {"x": _entry(text=long), "y": _entry(text="  ")})
    page = _page(folder)
    said = re.findall(r'<p class="said" dir="auto">(.*?)</p>', page, re.DOTALL)
    assert said[0].startswith("First.\n\n    Then.\nmore more")
    assert said[0].endswith("…")
    assert len(said[0]) == 600
    assert said[2] == "(empty answer)"
    assert _rows(folder)[0]["answer"] == r"First.\n\n\tThen.\n" + "more " * 400


def test_answers_are_harmless_and_printed_once(answered: Any) -> None:
    for model in ("a", "b"):
        folder = answered(model, {HOSTILE: _entry(HOSTILE, HOSTILE, f"{HOSTILE[:90]}{model}", HOSTILE)})
    page = _page(folder)
    assert "<script" not in page
    files = [(folder.parent / "page_files" / f"answers.{ending}").read_bytes() for ending in ("csv", "md")]
    for text in (page.encode(), *files):
        assert "\u202e".encode() not in text
        assert b"\x1b" not in text
    assert r"\u202egnp.exe" + "\n" in html.unescape(page)
    assert ">49 |" not in page
    assert "w" * 600 not in page
    assert b"<script" not in files[1]
    assert _rows(folder)[0]["answer"].startswith("<script>")
    assert "details of" not in page.lower()  # nothing else was found
    # As the table of any report: no cell of a spreadsheet is a formula.
    for model in ("a", "b"):
        answered(model, {"x": _entry(text="=1+1")})
    _page(folder)
    assert _rows(folder)[0]["answer"] == "'=1+1"


def test_the_newest_answers_are_shown(answered: Any) -> None:
    answered("a", {"x": _entry()})
    answered("b", {"x": _entry(text="older")}, path="b-1.json")
    folder = answered("b", {"x": _entry(text="newer")}, path="b-2.json")
    page = _page(folder)
    assert "newer" in page
    assert "older</p>" not in page


@pytest.mark.parametrize(
    ("label", "look"),
    [
        ("refused", "bad"),
        ("helped", "good"),
        ("complied", "bad"),
        ("did not comply", "good"),
        ("undecided", ""),
        ("neither", ""),
        ("foreign", ""),
    ],
)
def test_a_label_looks_as_it_is(label: str, look: str) -> None:
    assert Answer("", "", label, "").look == look


def test_in_a_browser_columns_are_beside_or_below_each_other(browser: Any, all_kinds: Path, tmp_path: Path) -> None:
    """On a phone one answer is under the other; the closed ones open by the keyboard."""
    output = tmp_path / "page.html"
    assert main(["report", str(all_kinds), "-o", str(output)]) == 0
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(output.as_uri())
    section = page.locator("section[aria-labelledby=answers]")
    first, second = (section.locator(".request").first.locator("li").nth(i) for i in (0, 1))
    for width, beside in ((1280, True), (390, False)):
        page.set_viewport_size({"width": width, "height": 900})
        left, right = first.bounding_box(), second.bounding_box()
        assert (left["x"] + left["width"] <= right["x"]) == beside
        assert (left["y"] + left["height"] <= right["y"]) != beside
    assert first.locator("bdi").inner_text() == "base"
    harmful = section.locator("summary", has_text="Show the answers")
    complied = section.get_by_text("This is complied.").first
    assert not complied.is_visible()
    harmful.focus()
    page.keyboard.press("Enter")
    assert complied.is_visible()
    page.close()
