"""The page: one file, harmless whatever it is told, and looked at in a browser."""

from __future__ import annotations

import html
import html.parser
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from plot_align.cli.main import main
from plot_align.records import read_record
from plot_align.report import figures
from plot_align.report.observations import collect
from plot_align.report.page import build, render, write
from plot_align.results import of_items, of_whole

EVIL = "<script>alert(1)</script>"
NAMES = [
    EVIL,
    "{{7*7}}",
    r"$\frac$",
    "$x$ _{",
    "\u202egnp.exe",
    "a\x00\x1b[31mb",
    "x" * 10_000,
    "\ud800",
    "_hidden",
    "&amp;<!--",
]


def report(path: Path, *arguments: str) -> tuple[int, str]:
    code = main(["report", str(path), "-o", str(path.parent / "page.html"), *arguments])
    page = path.parent / "page.html"
    return code, page.read_text(encoding="utf-8") if page.exists() else ""


class Tags(html.parser.HTMLParser):
    """Start tags with their attributes, and the text that is shown."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]


@pytest.fixture(scope="module")
def whole(all_kinds: Path, evaluation_in: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a record of every kind, and of two models with names that break pages."""
    folder = Path(shutil.copytree(all_kinds, tmp_path_factory.mktemp("whole") / "records"))
    for number, name in enumerate((EVIL, "y" * 10_000)):
        evaluation_in(folder, name, items={f"item {i}": 1.0 for i in range(60)}, path=f"evil-{number}.json")
        said = {"prompt": "?", "answer": "\n".join(NAMES), "label": "W" * 100, "reason": EVIL}
        evaluation_in(folder, name, "over_refusal", {"item 0": 1.0}, section="guards", name="refused",
                      kind="over_refusal", details={"answers": {"item 0": said}}, path=f"{number}.json")  # fmt: skip
    code, _ = report(folder, "--paper", "--baseline", "base", "--title", "A & B")
    assert code == 0
    return folder.parent / "page.html"


def test_everything_is_on_one_page_with_files_beside_it(whole: Path) -> None:
    page = whole.read_text(encoding="utf-8")
    tags = Tags(page)
    names = [tag for tag, _ in tags.tags]
    assert "script" not in names
    assert not {"iframe", "object", "embed", "form", "img"} & set(names)
    assert len(tags.ids) == len(set(tags.ids))
    addresses = [v for _, a in tags.tags for n, v in a.items() if n in ("href", "src", "xlink:href", "action")]
    assert all(value is not None and value.startswith(("#", "data:,")) for value in addresses)
    assert {value for value in addresses if value and value.startswith("#")} <= {f"#{i}" for i in tags.ids}
    assert "A &amp; B" in page
    assert "default-src 'none'" in page
    assert "The paper’s figure for training time is +2.67 %" in page
    for part in ("answers", "safety", "transport", "training", "alpha", "costs", "made"):
        assert f'<h2 id="{part}">' in page, part
    assert "filter.json" in page  # not shown, and said
    folder = whole.parent / "page_files"
    endings = {".png": b"\x89PNG", ".svg": b"<?xml", ".csv": b"", ".md": b"**"}
    files = [file for file in folder.iterdir() if file.name != ".plot-align-report"]
    assert {file.suffix for file in files} == set(endings)
    for file in files:
        assert file.read_bytes().startswith(endings[file.suffix])
    assert len(list(folder.glob("*.png"))) == len(list(folder.glob("*.svg"))) == page.count('<svg class="figure"')
    assert page.count("<title id=") == page.count('<svg class="figure"')


def test_the_verdict_is_printed(evaluation: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model, ones in (("base", 10), ("tuned", 40)):
        evaluation(model, items={str(i): float(i < ones) for i in range(60)})
    assert report(tmp_path / "records", "--baseline", "base")[0] == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == (
        "Ship tuned: it is significantly better than base in “GSM8K”, and significantly worse in none of those tested."
    )
    assert said[-1] == f"page: {tmp_path / 'page.html'}, its figures and tables: {tmp_path / 'page_files'}"


def test_the_same_records_give_the_same_page(evaluation: Any) -> None:
    path = evaluation("m")
    pages = [render(build(collect([path])), "files") for _ in range(2)]
    assert pages[0] == pages[1]


def test_figures_follow_the_colours_of_the_page(whole: Path) -> None:
    page = whole.read_text(encoding="utf-8")
    figures = re.findall(r'<svg class="figure".*?</svg>', page, re.DOTALL)
    assert figures
    for figure in figures:
        assert "currentColor" in figure
        assert not re.search(r"#[0-9a-f]{6}\b(?![\w-])", re.sub(r'(id|href|clip-path)="[^"]*"', "", figure)), (
            re.findall(r".{30}#[0-9a-f]{6}\b", figure)[:3]
        )


def test_sections_without_records_are_left_out(evaluation: Any) -> None:
    path = evaluation("m")
    _, page = report(path)
    for part in ("answers", "safety", "transport", "training", "alpha", "costs"):
        assert f'id="{part}"' not in page
    assert "No record measures harmlessness, helpfulness, humanity, reasoning, coding, stem." in page


def test_what_is_partial_is_shown_as_partial(all_kinds: Path, tmp_path: Path) -> None:
    assert main(["report", str(all_kinds), "-o", str(tmp_path / "page.html"), "--baseline", "base"]) == 0
    page = (tmp_path / "page.html").read_text()
    gaps = "unfinished; 5 of 24 ratings unreadable; 4 of 24 ratings failed"
    assert f'<span class="gaps">{gaps}</span>' in page
    assert "<span>Unfinished: mt_bench of tuned (4 judgements failed, the first: timed out).</span>" in page
    assert '<span class="gaps">1 verdict undecided; 1 request without a test case</span>' in page
    assert gaps in (tmp_path / "page_files" / "measures_by_model.md").read_text()
    told = [
        json.loads(html.unescape(text)) for text in re.findall(r"<pre[^>]*Details of[^>]*>(.*?)</pre>", page, re.S)
    ]
    (judged,) = all_kinds.rglob("mt_bench.json")
    details = read_record(judged)["results"]["details"]
    assert details["unparsable"]["where"] == [{"question_id": 81, "turn": 2}]
    assert {"unfinished": "4 judgements failed, the first: timed out", **details} in told
    assert told[-1]["tuned"]["undecided"]["benign requests"] == {"n": 2, "first": "no verdict"}
    assert "moved" not in str(told)  # a figure shows them


def test_a_baseline_that_nobody_asked_for_is_explained(evaluation: Any, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [evaluation("b", reference="a"), evaluation("a")]
    why = "The baseline is a, as none was named and 1 evaluation names it as the reference."
    assert why in report(paths[0].parents[1])[1]
    assert why in capsys.readouterr().out
    assert "none was named" not in report(paths[0].parents[1], "--baseline", "b")[1]


def test_the_papers_line_is_that_of_dpo(evaluation: Any) -> None:
    def page_of(*models: str, baseline: str) -> str:
        for model in models:
            evaluation(model, "gcg", section="harmlessness", name="asr", better="lower")
            evaluation(model, "calm", section="guards", name="refused", better="lower", title="Over-refusal")
        comparison = build(collect([folder]), baseline=baseline, paper=True).comparison
        found.append(figures.dpo_among(comparison))
        return report(folder, "--paper", "--baseline", baseline)[1]

    folder = evaluation("sft+plot").parents[1]
    found: list[str | None] = []
    line = "The paper’s line, up to half of the attack success of DPO, is not drawn"
    assert line in page_of("sft", "dpo-plot", baseline="sft")
    assert line not in page_of("my-DPO-8b", baseline="sft")
    page_of("dpo", baseline="sft")
    page_of(baseline="my-DPO-8b")
    assert found == [None, "my-DPO-8b", "dpo", "my-DPO-8b"]


def test_items_that_count_alike_are_said_to(evaluation: Any) -> None:
    for m, heavy in (("base", 1.0), ("m", 2.0)):
        weights = {f"item {i}": heavy if i else 1.0 for i in range(9)}
        nll = of_items("NLL", dict.fromkeys(weights, 2.0 + heavy), better="lower", weights=weights)
        path = evaluation(m, "nll", quantities={"nll": nll})
    assert ", items count alike</span>" in report(path.parents[1], "--baseline", "base")[1]


def test_intervals_on_the_page_end_where_values_do(evaluation: Any) -> None:
    wide = {**of_whole("distinct-2", 0.9, 60, better="higher", bounds=(0.0, 1.0)), "interval": [0.742, 1.062]}
    _, page = report(evaluation("m", quantities={"score": wide}))
    assert "74.2 to 100.0 %" in page
    assert "106.2" not in page


def test_long_names_have_a_line_of_a_legend_each() -> None:
    assert figures._legend_columns(["DPO", "DPO+PLOT", "SFT"]) == 3
    assert figures._legend_columns(["W" * 10_000, "DPO"]) == 1
    assert len(figures._name("W" * 10_000)) == 24
    assert len(figures._wrapped("W" * 10_000, 34).splitlines()) == 3


def test_strings_of_models_and_data_are_harmless(evaluation: Any, tmp_path: Path) -> None:
    moves = {
        "moved": [{"token": name, "change": 0.01 * (-1) ** i, "id": i} for i, name in enumerate(NAMES)],
        "flows": [{"from": name, "to": name, "mass": 0.1, "cost": 1.0} for name in NAMES],
    }
    for name in NAMES:
        evaluation(name, digest=name.encode("utf-8", "replace").hex()[:20], title=name,
                   path=f"{NAMES.index(name)}.json")  # fmt: skip
    evaluation(EVIL, "drift", kind="drift", section="guards", reference="{{7*7}}", path="drift.json",
               details=moves, digest=EVIL.encode().hex()[:20],
               quantities={"tv": of_items(EVIL, {EVIL: 1.0}, better=None)})  # fmt: skip
    code, page = report(tmp_path / "records", "--title", EVIL, "--baseline", "{{7*7}}")
    assert code == 0
    assert "script" not in [tag for tag, _ in Tags(page).tags]
    assert EVIL not in page
    assert ">49<" not in page
    assert "\u202e" not in page
    assert "\x1b" not in page
    assert "\x00" not in page
    assert "x" * 400 not in page
    for file in (tmp_path / "page_files").iterdir():
        text = file.read_bytes()
        if file.suffix == ".svg":
            assert b"<script" not in text
        if file.suffix in (".csv", ".md"):
            assert "\u202e".encode() not in text
            assert b"\x1b" not in text


def test_a_report_is_made_again_in_place_without_what_it_no_longer_has(all_kinds: Path, tmp_path: Path) -> None:
    folder = tmp_path / "page_files"
    assert main(["report", str(all_kinds), "-o", str(tmp_path / "page.html")]) == 0
    before = {file.name for file in folder.iterdir()}
    assert main(["report", str(all_kinds / "demo.json"), "-o", str(tmp_path / "page.html")]) == 0
    assert {file.name for file in folder.iterdir()} < before


@pytest.mark.parametrize("name", ["old.png", "thesis.tex", "tables.csv/", "measures.csv/"])
def test_a_file_that_no_report_wrote_is_never_touched(
    name: str, evaluation: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = evaluation("m")
    folder = path.parent / "page_files"
    for reports in (0, 1):  # a folder of the user's own, and one of a report that the user put a file into
        if reports:
            shutil.rmtree(folder)
            assert report(path)[0] == 0
            (folder / "measures.csv").unlink()
        mine = folder / name / "mine" if name.endswith("/") else folder / name
        mine.parent.mkdir(parents=True, exist_ok=True)
        mine.write_text("mine")
        before = {file.name for file in folder.iterdir()}
        capsys.readouterr()
        assert report(path)[0] == 2
        said = capsys.readouterr().err
        assert f"would take the place of {folder / name}, which no report wrote" in said
        assert said.count("\n") == 1
        assert mine.read_text() == "mine"
        assert {file.name for file in folder.iterdir()} == before


@pytest.mark.parametrize("damage", ["cut off", "altered", "emptied", "no text"])
def test_a_report_knows_its_files_where_their_list_is_damaged(
    damage: str, evaluation: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = evaluation("m")
    folder = path.parent / "page_files"
    assert report(path)[0] == 0
    whole = (folder / ".plot-align-report").read_bytes()
    damaged = {
        "cut off": whole[: len(whole) // 3], "altered": whole.replace(b"measures.csv", b"measures.cs\xff"),
        "emptied": b"", "no text": b"\xff" * 9,
    }  # fmt: skip
    assert damaged[damage] != whole
    (folder / ".plot-align-report").write_bytes(damaged[damage])
    (folder / "thesis.tex").write_text("mine")
    assert report(path)[0] == 2
    assert f"would take the place of {folder / 'thesis.tex'}, which no report wrote" in capsys.readouterr().err
    (folder / "thesis.tex").unlink()
    assert report(path)[0] == 0
    assert (folder / ".plot-align-report").read_bytes() == whole


def test_a_name_that_a_whole_list_does_not_have_is_not_the_reports(all_kinds: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["report", str(all_kinds / "demo.json"), "-o", str(page)]) == 0
    folder = tmp_path / "page_files"
    few = {file.name for file in folder.iterdir()}
    assert main(["report", str(all_kinds), "-o", str(tmp_path / "other.html")]) == 0
    mine = next(folder / f.name for f in (tmp_path / "other_files").iterdir() if f.name not in few)
    mine.write_text("mine")
    assert main(["report", str(all_kinds), "-o", str(page)]) == 2
    assert mine.read_text() == "mine"


def test_an_empty_folder_is_filled_and_a_file_in_its_place_is_not_replaced(
    evaluation: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = evaluation("m")
    folder = path.parent / "page_files"
    folder.mkdir()
    assert report(path)[0] == 0
    shutil.rmtree(folder)
    folder.write_text("mine")
    assert report(path)[0] == 2
    assert f"take the place of {folder}," in capsys.readouterr().err
    assert folder.read_text() == "mine"


def test_nothing_is_left_of_a_report_that_failed(evaluation: Any, monkeypatch: pytest.MonkeyPatch,
                                                  tmp_path: Path) -> None:  # fmt: skip
    content = build(collect([evaluation("m")]))
    monkeypatch.setattr("plot_align.report.page.as_csv", lambda table: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(content, tmp_path / "out" / "page.html")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "page.pdf"], "expected a name ending in .html"),
        (["--seed", "-1"], "--seed is -1"),
        (["--title", " "], "--title is empty"),
        (["--baseline", "nobody"], "--baseline is 'nobody', and the records measured m"),
        (["--base", "m"], "unknown option '--base'"),
    ],
)
def test_wrong_options_are_one_sentence(
    evaluation: Any, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = evaluation("m")
    code = main(["report", str(path), "-o", str(tmp_path / "p.html"), *arguments])
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "p.html").exists()


def test_bad_records_are_refused_or_said_to_be_left_out(
    evaluation: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation("good")
    bad = evaluation("bad")
    bad.write_text(bad.read_text()[:900])
    code, page = report(tmp_path / "records")
    assert (code, page) == (2, "")
    assert f"{bad} is not complete JSON" in capsys.readouterr().err
    code, page = report(tmp_path / "records", "--skip_bad")
    assert code == 0
    assert "Left out, because they are damaged" in page
    assert "gsm8k.json is not complete JSON" in page
    assert f"{bad} is not complete JSON" in capsys.readouterr().out


@pytest.mark.slow
def test_200_records_of_10_models_are_a_small_page(evaluation: Any, tmp_path: Path) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    for model in range(10):
        for measure in range(20):
            items = {str(i): float(x) for i, x in enumerate(rng.random(200) < 0.5)}
            evaluation(f"model {model}", f"measure {measure}", items, title=f"Measure {measure}",
                       details={"tasks": "x" * 5000}, path=f"{model}-{measure}.json")  # fmt: skip
    code, page = report(tmp_path / "records")
    assert code == 0
    assert len(page.encode()) < 5_000_000


# In a browser


def test_in_a_browser(browser: Any, whole: Path) -> None:
    """No word on the console, no request, no scrolling sideways, nothing serious for axe, in light and dark."""
    from axe_playwright_python.sync_playwright import Axe

    for scheme in ("light", "dark"):
        context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
        page = context.new_page()
        said: list[str] = []
        requests: list[str] = []
        page.on("console", lambda message, said=said: said.append(message.text))
        page.on("pageerror", lambda error, said=said: said.append(str(error)))
        page.on("dialog", lambda dialog, said=said: said.append("a dialog") or dialog.dismiss())
        page.on("request", lambda request, requests=requests: requests.append(request.url))
        page.goto(whole.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
        for width in (360, 1280):
            page.set_viewport_size({"width": width, "height": 800})
            overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert page.evaluate(overflow) <= 0, width
            wide = "[...document.querySelectorAll('.answers li')].filter(e => e.scrollWidth > e.clientWidth).length"
            assert page.evaluate(wide) == 0, width
        assert requests == [whole.as_uri()]
        found = Axe().run(page).response["violations"]
        serious = {v["id"]: v["nodes"][0]["html"][:200] for v in found if v["impact"] in ("serious", "critical")}
        assert serious == {}
        assert said == []
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the verdict"
        context.close()


def test_options_stand_on_the_page_as_json(evaluation: Any) -> None:
    path = evaluation("m", options={"limit": 7, "note": EVIL})
    _, page = report(path)
    text = re.search(r"<pre[^>]*>(.*?)</pre>", page, re.DOTALL)
    assert text is not None
    assert json.loads(html.unescape(text[1]))["measure"]["note"] == EVIL
