"""Pages of the report and of the doctor whose every text is hostile, in a browser: text stays text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from plot_align.cli.main import main

MARKUP = (
    "\"'><script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)>"
    "<svg onload=alert(1)><a href=javascript:alert(1)>x</a><style>@import 'http://evil.example/y'</style>"
    "--></style></title></svg>]]>{{7*7}}{%x%}\u202e\u2066\u2028\x1b]0;x\x07\x9b31m\x00"
)
_DATA = {"base", "tuned", "GCG", "Prefill", "BestOfN", "a", "b", "c", "d"}  # keys that are names of models and data
_FIXED = ("section", "better", "kind", "created", "$float", "task")  # whose values are of a fixed set


def hostile(value: Any, key: str = "") -> Any:
    """``value`` with the markup before every text and every name of data in it."""
    if isinstance(value, dict):
        return {_name(name): hostile(entry, name) for name, entry in value.items()}
    if isinstance(value, list):
        return [hostile(entry, key) for entry in value]
    return MARKUP + value if isinstance(value, str) and key not in _FIXED else value


def _name(key: str) -> str:
    return MARKUP + key if key in _DATA or key.startswith("item ") else key


@pytest.fixture(scope="module")
def hostile_report(all_kinds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    records = Path(shutil.copytree(all_kinds, folder / "records"))
    for file in records.rglob("*.json"):
        record = json.loads(file.read_text())
        del record["digest"]  # made by a stranger
        parts = ("config", "results", "versions", "hardware", "commit")
        file.write_text(json.dumps({**record, **{part: hostile(record[part]) for part in parts}}))
    page = folder / "page.html"
    assert main(["report", str(records), "-o", str(page), "--title", MARKUP, "--baseline", f"{MARKUP}base"]) == 0
    return page


@pytest.fixture(scope="module")
def hostile_doctor(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from datasets import Dataset

    from plot_align.doctor import diagnose
    from plot_align.doctor.page import write

    rows = [
        {"prompt": f"{MARKUP}{i}", "chosen": f" {MARKUP} {i} yes", "rejected": f" I cannot {MARKUP} {i}"}
        for i in range(30)
    ]
    data = Dataset.from_list(rows)
    data.info.download_checksums = {MARKUP: {}}
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    tokenizer.name_or_path = MARKUP
    return write(diagnose(data, tokenizer, progress=False), tmp_path_factory.mktemp("doctor") / "page.html")


def visited(browser: Any, file: Path) -> tuple[list[str], list[str], Any]:
    """What a file says on its own (dialogs, the console), what it requests, and what stands on it."""
    context = browser.new_context()
    page = context.new_page()
    said: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("dialog", lambda dialog: said.append("a dialog") or dialog.dismiss())
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
    page.wait_for_timeout(200)
    found = page.evaluate(
        """() => ({
            tags: [...new Set([...document.querySelectorAll('*')].map(e => e.tagName.toLowerCase()))],
            handlers: [...document.querySelectorAll('*')].flatMap(e => [...e.attributes])
                .filter(a => /^on/i.test(a.name) ||
                    (/^(xlink:)?href$|^src$|^action$/i.test(a.name) && !/^(#|data:,$)/.test(a.value)))
                .map(a => a.name + '=' + a.value),
            text: document.documentElement.textContent
        })"""
    )
    context.close()
    return said, requests, found


@pytest.mark.parametrize("policy", [True, False])
@pytest.mark.parametrize("name", ["hostile_report", "hostile_doctor"])
def test_hostile_texts_are_text(
    browser: Any, request: pytest.FixtureRequest, tmp_path: Path, name: str, policy: bool
) -> None:
    """Also without the page's content-security policy, which would hide what got through."""
    whole: Path = request.getfixturevalue(name)
    html = whole.read_text(encoding="utf-8")
    assert "default-src 'none'" in html
    page = tmp_path / "page.html"
    page.write_text(html if policy else html.replace("Content-Security-Policy", "X-None"), encoding="utf-8")
    said, requests, found = visited(browser, page)
    assert said == []
    assert requests == [page.as_uri()]
    assert not {"script", "img", "iframe", "form", "object", "embed", "base"} & set(found["tags"])
    assert found["handlers"] == []
    assert html.count("<style") == 1
    assert "alert(1)" in found["text"]  # it is there, as text
    assert "{{7*7}}" in found["text"]
    unwanted = [c for c in found["text"] if not c.isprintable() and c not in "\n\t\u00a0\u202f\u2009"]
    assert unwanted == []


def test_the_figures_beside_the_page_are_drawings_alone(browser: Any, hostile_report: Path) -> None:
    files = sorted((hostile_report.parent / "page_files").glob("*.svg"))
    assert files
    for file in files:
        said, requests, found = visited(browser, file)
        assert (said, requests) == ([], [file.as_uri()]), file.name
        assert "script" not in found["tags"]


def test_tables_beside_the_page_have_no_formula_and_no_markup(hostile_report: Path) -> None:
    import csv

    for file in sorted((hostile_report.parent / "page_files").glob("*.csv")):
        for row in csv.reader(file.open(encoding="utf-8", newline="")):
            assert not [cell for cell in row if cell.startswith(("=", "@", "\t"))], file.name
    for file in sorted((hostile_report.parent / "page_files").glob("*.md")):
        text = file.read_text(encoding="utf-8")
        assert "<img" not in text
        assert "<script" not in text
        assert "\x1b" not in text
