"""``plot-align doctor PAIRS``: exit codes, JSON, the record, and a page that is harmless whatever the data say."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest

import plot_align
from plot_align.cli.main import main
from plot_align.errors import InputError, RunError
from plot_align.records import read_record

EVIL = "<script>alert(1)</script>{{ 7*7 }}\u202e & <img src=https://example.com/x onerror=alert(2)>"


@pytest.fixture
def pairs(clean: list[dict[str, Any]], tmp_path: Path) -> Path:
    """The clean set with three equal pairs (a note), two near-identical ones and one that is none (a warning)."""
    for row in (5, 6, 7):
        clean[row]["rejected"] = clean[row]["chosen"]
    for row in (8, 9):
        clean[row]["prompt"] = EVIL
        clean[row]["rejected"] = clean[row]["chosen"].rsplit(" ", 1)[0] + f" {EVIL.split()[0]}"
    clean[11]["chosen"] = None
    return write(clean, tmp_path / "pairs.jsonl")


def write(rows: list[dict[str, Any]], path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_text_record_and_page(pairs, tiny_llama, tmp_path, capsys):
    record, page = tmp_path / "out" / "doctor.json", tmp_path / "out" / "doctor.html"
    arguments = ["--record", str(record), "--page", str(page)]
    assert main(["doctor", str(pairs), "--model", str(tiny_llama), *arguments]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("199 pairs of pairs.jsonl, read with ")
    assert re.search(r"(?m)^warning  1 of 200 rows are no pairs and were left out; the first is row", out)
    assert "warning  3 of 199 pairs (1.5 %) have two equal answers" in out
    assert "- Drop what is no pair (0.5 %), identical (1.5 %):" in out
    assert max(map(len, out.splitlines())) <= 80
    assert err.splitlines()[-2:] == [f"record: {record}", f"page: {page}"]

    found = read_record(record, "doctor")
    assert found["config"]["max_length"] == 1024
    assert found["config"]["data"] == "pairs.jsonl"
    assert {finding["check"] for finding in found["results"]["findings"]} == {"no-pair", "identical", "near-identical"}
    assert found["results"]["measures"]["identical"] == 3 / 199
    assert {"row": 8, "why": "nearly equal"} in found["results"]["worst"]
    assert "alert" not in record.read_text()  # no text of the data but words and tokens
    model = found["results"]["model"]
    assert model["rows"] == [row for row in range(200) if row != 11]  # fewer than the sample: all of them
    assert len(model["ches_normalised"]) == 199
    assert "The model on 199 of the pairs, drawn at random:" in out
    assert re.search(r"(?m)^  DPO +[+-][\d.e-]+ nats \([+-]", out)
    assert not list(record.parent.glob("*.partial*"))
    shown = Page(page.read_text(encoding="utf-8"))
    assert shown.tags.count("svg") == 3
    assert ("id", "model") in shown.attributes


def test_the_model_is_put_to_a_sample_that_streaming_does_not_change(pairs, tiny_llama, tmp_path):
    from plot_align import load_pairs

    found = plot_align.diagnose(pairs, tiny_llama, sample=20, progress=False)
    rows = found.model["rows"]
    assert len(rows) == len(set(rows)) == 20
    assert rows == sorted(rows)
    assert 11 not in rows
    data = load_pairs(pairs).to_iterable_dataset()
    again = plot_align.diagnose(data, tiny_llama, sample=20, batch_size=7, progress=False)
    assert again.model == found.model
    assert plot_align.diagnose(pairs, tiny_llama, sample=0, progress=False).model is None


def test_a_sample_is_uniform():
    """Of 6 pairs 2 are kept: each in a third of 3,000 draws, within four standard errors of a binomial."""
    from types import SimpleNamespace

    from plot_align.doctor.tallies import Sample

    counts = [0] * 6
    for seed in range(3000):
        sample = Sample(2, seed)
        for row in range(6):
            sample.add(SimpleNamespace(row=row))
        for pair in sample.pairs():
            counts[pair.row] += 1
    assert all(abs(count - 1000) < 4 * (3000 * (1 / 3) * (2 / 3)) ** 0.5 for count in counts)


class Page(html.parser.HTMLParser):
    """Tags, their attributes, the text, and the text outside of <details>."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = self.shown = ""
        self._inside = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._inside += tag == "details"

    def handle_endtag(self, tag: str) -> None:
        self._inside = max(0, self._inside - (tag == "details"))

    def handle_data(self, data: str) -> None:
        self.text += data
        if not self._inside:
            self.shown += data


def test_the_page_escapes_and_hides_what_the_data_say(pairs, tiny_llama, tmp_path, capsys):
    path = tmp_path / "doctor.html"
    assert main(["doctor", str(pairs), "--tokenizer", str(tiny_llama), "--page", str(path)]) == 0
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "img", "iframe"} & set(page.tags)
    assert page.tags.count("link") == 1  # the empty icon
    assert not [value for name, value in page.attributes if name.startswith("on") or "example.com" in (value or "")]
    assert "http" not in re.sub(r"xmlns[^\"]*\"[^\"]*\"", "", "".join(value or "" for _, value in page.attributes))
    assert "alert(1)" in page.text
    assert "alert(2)" in page.text
    assert "alert(2)" not in page.shown
    assert "\u202e" not in text
    assert "{{" in page.text  # the template did not read it
    assert page.tags.count("svg") == 1
    assert "prefers-color-scheme: dark" in text
    assert "max-width: 40rem" in text
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {value[1:] for name, value in page.attributes if name == "href" and value and value.startswith("#")}
    assert {"main", "findings", "lengths", "preference", "pairs", "made"} <= targets <= set(ids)


def test_code_stands_in_code_and_all_else_is_escaped():
    pytest.importorskip("jinja2")
    from plot_align.doctor.page import _code

    assert _code("use `a: <b>` & `c`") == "use <code>a: &lt;b&gt;</code> &amp; <code>c</code>"
    assert [_code(text) for text in ("one ` alone", "`` none")] == ["one ` alone", "`` none"]


def test_in_a_browser_by_keyboard(pairs, tiny_llama, tmp_path, browser):
    """Light and dark, phone and desk: every stop of the Tab key in the order of the page and seen, details that Enter
    opens and closes, nothing serious for axe, no word on the console."""
    path = tmp_path / "doctor.html"
    assert main(["doctor", str(pairs), "--model", str(tiny_llama), "--page", str(path)]) == 0
    text = path.read_text(encoding="utf-8")
    assert "`" not in re.sub(r"(?s)<style>.*?</style>", "", text)
    for scheme, width in (("light", 1280), ("dark", 360)):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme,
                                      reduced_motion="reduce")  # fmt: skip
        page = context.new_page()
        said: list[str] = []
        page.on("console", lambda message, said=said: said.append(message.text))
        page.on("pageerror", lambda error, said=said: said.append(str(error)))
        page.goto(path.as_uri())
        stops = page.evaluate(
            "[...document.querySelectorAll('a, summary, [tabindex=\"0\"]')].filter(e => e.checkVisibility()).length"
        )
        seen = [_tabbed(page) for _ in range(stops)]
        assert stops > 10
        assert seen[0]["text"] == "Skip to the verdict"
        assert [stop for stop in seen if stop["outline"] != "solid" or not stop["inside"]] == []
        assert [stop["at"] for stop in seen] == sorted({stop["at"] for stop in seen})  # each once
        summary = page.locator("summary").first
        summary.focus()
        for state in (True, False):
            page.keyboard.press("Enter")
            assert page.evaluate("document.querySelector('details').open") is state
        page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
        assert _serious(page) == {}
        assert said == []
        context.close()


def _tabbed(page: Any) -> dict[str, Any]:
    """Where the next Tab leads: the place in the document, and whether the focus can be seen there."""
    page.keyboard.press("Tab")
    return page.evaluate(
        """() => {
            const one = document.activeElement, box = one.getBoundingClientRect();
            return {
                at: [...document.querySelectorAll('*')].indexOf(one), text: one.textContent,
                outline: getComputedStyle(one).outlineStyle,
                inside: box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth,
            };
        }"""
    )


def _serious(page: Any) -> dict[str, str]:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
    found = axe.Axe().run(page).response["violations"]
    return {v["id"]: v["nodes"][0]["html"][:200] for v in found if v["impact"] in ("serious", "critical")}


def test_json_and_exit_codes(pairs, clean, tiny_llama, tmp_path, capsys):
    base = ["doctor", str(pairs), "--model", str(tiny_llama)]
    assert main([*base, "--json", "--fail_on", "error"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pairs"] == 199
    assert {finding["severity"] for finding in found["findings"]} == {"warning", "note"}
    assert main([*base, "--fail_on", "warning"]) == 3
    good = write(clean[20:], tmp_path / "good.jsonl")
    assert main(["doctor", str(good), "--tokenizer", str(tiny_llama), "--fail_on", "warning"]) == 0
    assert "no check found anything" in capsys.readouterr().out


def test_fail_on_reads_the_verdict(clean, tiny_llama, tmp_path, monkeypatch, capsys):
    """A rule of a model warns where no check of the data does."""
    from plot_align.doctor import diagnosis

    monkeypatch.setattr(diagnosis, "ruled", lambda model: {"ches_mean": 1.0, "ches_mean_low": 0.5})
    arguments = ["doctor", str(write(clean[20:], tmp_path / "good.jsonl")), "--model", str(tiny_llama)]
    assert main([*arguments, "--fail_on", "warning"]) == 3
    out = capsys.readouterr().out
    assert "no check found anything" in out
    assert "- The answers of a pair look alike to the model" in out
    assert main([*arguments, "--fail_on", "error"]) == 0
    assert main(arguments) == 0


@pytest.fixture
def short(tiny_llama, tmp_path) -> Path:
    """A GPT-2 of 64 learned positions: reading past them is an error of an index."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama, model_max_length=64)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    return tmp_path / "short"


def test_pairs_longer_than_the_models_context(clean, short, tmp_path, capsys):
    clean[3]["chosen"] *= 9
    path = write(clean, tmp_path / "long.jsonl")
    lengths = [len(row["chosen"]) for row in clean]
    assert max(lengths) > 5 * sorted(lengths)[-2]
    assert main(["doctor", str(path), "--model", str(short), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["pairs"] > 100
    (said,) = [advice["sentence"] for advice in found["verdict"] if advice["rule"] == "truncation"]
    assert "set `max_length: 64`, at which all this was measured" in said
    assert main(["doctor", str(path), "--tokenizer", str(short), "--max_length", "64", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert found["measures"]["truncated"] == alone["measures"]["truncated"] > 0.05
    (said,) = [advice["sentence"] for advice in alone["verdict"] if advice["rule"] == "truncation"]
    assert "would hold 99 % of them, but the model holds only 64 tokens" in said


def test_what_was_found_in_the_data_outlives_the_model(pairs, tiny_llama, tmp_path, monkeypatch, capsys):
    from plot_align.doctor import diagnosis

    def fails(*_: Any, **__: Any) -> None:
        raise RunError("the device is out of memory at the gradients")

    monkeypatch.setattr(diagnosis, "measure", fails)
    record = tmp_path / "doctor.json"
    assert main(["doctor", str(pairs), "--model", str(tiny_llama), "--record", str(record)]) == 1
    out, err = capsys.readouterr()
    assert "warning  3 of 199 pairs (1.5 %) have two equal answers" in out
    assert "- Drop what is no pair (0.5 %)" in out
    assert "out of memory at the gradients" in err
    assert not record.exists()
    with pytest.raises(RunError):
        plot_align.diagnose(pairs, tiny_llama, progress=False)


def test_a_model_with_another_tokenizer(chat_pairs_file, tiny_llama, chat_template, tmp_path, capsys):
    """A base model has no chat template; a tokenizer beside it brings one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = chat_template.replace("<|end|>", "<eos>")
    tokenizer.save_pretrained(tmp_path / "chat")
    arguments = ["doctor", str(chat_pairs_file), "--model", str(tiny_llama)]
    assert main(arguments) == 2
    assert "chat template" in capsys.readouterr().err
    assert main([*arguments, "--tokenizer", str(tmp_path / "chat"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokenizer"] == "chat"
    assert found["model"]["pairs"] == 24
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.config.name_or_path = ""
    for given in (tokenizer, tmp_path / "chat"):
        again = plot_align.diagnose(chat_pairs_file, model, tokenizer=given, progress=False)
        assert again.model["ches"] == found["model"]["ches"]
    with pytest.raises(InputError, match="pass the tokenizer"):
        plot_align.diagnose(chat_pairs_file, model, progress=False)
    with pytest.raises(InputError, match="there is another one in tokenizer"):
        plot_align.diagnose(chat_pairs_file, tokenizer, tokenizer=tokenizer, progress=False)


def test_the_page_shows_a_ches_of_zero():
    """Equal answers have it; a pair without one, of an answer that was cut away, is left out."""
    pytest.importorskip("jinja2")
    from plot_align.doctor.page import _model

    found = {"rows": [7, 8, 9], "ches_normalised": [0.0, None, -1.0], "forecast": {}, "pairs": 2, "accuracy": None}
    shown = _model({**found, "on_policy": {"chosen_below": None, "chosen_above": None}})
    assert shown["rows"] == ["7", "9"]
    assert sum(row[2] for row in shown["ches"].table.rows) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["PAIRS"], "neither --model nor --tokenizer is given, expected the model to tune"),
        (["PAIRS", "--model", "TINY", "--tokenizer", "no/tokenizer"], "no tokenizer could be loaded from"),
        (["PAIRS", "--model", "TINY", "--sample", "-1"], "sample is -1"),
        (["--strict"], "--strict is for a data set, and PAIRS is missing"),
        (["--model", "m"], "--model is for a data set"),
        (["PAIRS", "--model", "TINY", "--strict"], "data row 11: 'chosen' is missing"),
        (["PAIRS", "--model", "TINY", "--record", "a.txt"], "expected a name ending in .json"),
        (["PAIRS", "--model", "TINY", "--page", "a.pdf"], "expected a name ending in .html"),
        (["PAIRS", "--model", "TINY", "--overlap", "no.txt"], "--overlap no.txt cannot be read"),
        (["PAIRS", "--model", "TINY", "--max_length", "0"], "max_length is 0"),
        (["PAIRS", "--model", "TINY", "--split", "test"], "has no splits"),
    ],
)
def test_mistakes_are_one_sentence(arguments, said, pairs, tiny_llama, capsys):
    known = {"PAIRS": str(pairs), "TINY": str(tiny_llama)}
    assert main(["doctor", *(known.get(argument, argument) for argument in arguments)]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len([line for line in err.splitlines() if line.startswith("plot-align: ")]) == 1


def test_in_python_a_model_will_do(clean, tiny_llama, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    path = write(clean[20:], tmp_path / "good.jsonl")
    assert plot_align.diagnose(path, model, progress=False).examination.findings == []
