"""What inspection shows: which tokens, their numbers, readable labels, tables and figures."""

from __future__ import annotations

import io
import json
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from plot_align.errors import InputError
from plot_align.preference.distribution import PreferenceDistribution, vocabulary_fingerprint
from plot_align.preference.inspection import inspect, readable, render, token_text, write_figure


class Tokenizer:
    """One token for each string; a byte-level or SentencePiece tokenizer as far as inspection can tell."""

    def __init__(self, tokens: list[str], decoded: dict[str, str] | None = None) -> None:
        self.tokens, self.decoded = tokens, decoded or {}

    def get_vocab(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    def convert_ids_to_tokens(self, index: int) -> str | None:
        return self.tokens[index] if index < len(self.tokens) else None

    def decode(self, ids: list[int], **_: Any) -> str:
        return self.decoded.get(self.tokens[ids[0]], self.tokens[ids[0]])


STRANGE = ["a", " $x$", "[/b]", "\n\t", "<b>&", "\x1b[31m", "日本", "$", "\\$", "%", "_^{", "x" * 60]
TOKENIZER = Tokenizer(STRANGE)


def preference(chosen: list[int], rejected: list[int], tokenizer: Any = TOKENIZER) -> PreferenceDistribution:
    provenance = {
        "tokenizer": {"fingerprint": vocabulary_fingerprint(tokenizer), "size": len(chosen)},
        "policy": {},
        "sources": [{"id": "data $set$", "rows": 7, "tokenizer": "t"}],
    }
    return PreferenceDistribution(torch.tensor(chosen), torch.tensor(rejected), provenance)


#                    a   $x$ [/b] \n\t <b>& esc 日本  $  \$  %  _^{  xxx
ONE = preference([20, 12, 9, 8, 7, 6, 1, 0, 2, 5, 5, 0], [5, 4, 3, 2, 1, 0, 9, 8, 7, 20, 5, 0])


def test_the_extremes_in_order() -> None:
    found = inspect(ONE, TOKENIZER, n=3)
    # ΣQ⁺ = 75, ΣQ⁻ = 64; d·4800 = 64·Q⁺ − 75·Q⁻ = 905, 468, 351, 362, 373, 384, −611, −600, −397, −1180, −55, 0.
    assert [token.id for token in found.preferred] == [0, 1, 5]
    assert [token.id for token in found.rejected] == [9, 6, 7]
    assert (found.chosen_tokens, found.rejected_tokens, found.rows) == (75, 64, 7)
    assert (found.vocab_size, found.seen, found.preferred_ids, found.rejected_ids) == (12, 11, 6, 5)
    assert found.distance == pytest.approx((905 + 468 + 351 + 362 + 373 + 384) / 4800, rel=1e-12)
    first = found.preferred[0]
    assert (first.chosen, first.rejected, first.text) == (20, 5, "a")
    assert first.difference == pytest.approx(905 / 4800, rel=1e-12)
    half = stats.norm.ppf(0.975) * (20 / 75 * 55 / 75 / 75 + 5 / 64 * 59 / 64 / 64) ** 0.5
    assert (first.low, first.high) == pytest.approx((905 / 4800 - half, 905 / 4800 + half), rel=1e-12)
    chi2 = stats.chi2_contingency([[20, 55], [5, 59]], correction=False).statistic
    assert first.z == pytest.approx(chi2**0.5, rel=1e-9)


def test_only_tokens_with_a_preference_are_shown() -> None:
    found = inspect(ONE, TOKENIZER, n=100)
    assert len(found.preferred) == 6
    assert len(found.rejected) == 5
    assert all(token.difference > 0 and token.z > 0 for token in found.preferred)
    assert all(token.difference < 0 and token.z < 0 for token in found.rejected)


def test_to_dict_is_json() -> None:
    found = json.loads(json.dumps(inspect(ONE, TOKENIZER, n=2).to_dict()))
    assert found["preferred"][0]["text"] == "a"
    assert found["rejected"][0]["id"] == 9
    assert found["sources"] == ONE.sources


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="n is 0"):
        inspect(ONE, TOKENIZER, n=0)
    with pytest.raises(InputError, match="estimate it again with the tokenizer"):
        inspect(ONE, Tokenizer([*STRANGE[:-1], "y"]))
    same = preference([2] * 12, [1] * 12)
    with pytest.raises(InputError, match="no target exists"):
        inspect(same, TOKENIZER)
    found = inspect(ONE, TOKENIZER)
    for name in ("figure.gif", "figure"):
        with pytest.raises(InputError, match=r"ending in \.png, \.svg, \.pdf"):
            write_figure(found, tmp_path / name)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_figure(found, tmp_path / "file" / "figure.png")


# --- labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (" the", "␣the"),
        ("\n\n", r"\n\n"),
        ("\t", r"\t"),
        ("\x1b[0m", r"\x1b[0m"),
        ("\u200b", r"\u200b"),
        ("日", "日"),
        ("\U0001f600", "\U0001f600"),
        ("$x$", "$x$"),
        ("", ""),
        ("x" * 24, "x" * 24),
        ("x" * 25, "x" * 23 + "…"),
        ("\n" * 13, r"\n" * 11 + "…"),
    ],
)
def test_labels(text: str, label: str) -> None:
    assert readable(text) == label


def test_labels_without_glyphs() -> None:
    assert readable("a日\U0001f600", str.isascii) == r"a\u65e5\ud83d\ude00"


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_label_is_one_short_printable_line(text: str) -> None:
    label = readable(text)
    assert label.isprintable()
    assert " " not in label
    assert len(label) <= 24


def test_token_text(tiny_tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    vocabulary = tokenizer.get_vocab()
    assert token_text(tokenizer, vocabulary["Ġ"]) == " "
    assert token_text(tokenizer, vocabulary["<eos>"]) == "<eos>"
    assert token_text(tokenizer, vocabulary["æ"]) == "æ"  # a byte that is no character of its own: its raw form
    assert token_text(tokenizer, 10**6) == "<no token 1000000>"
    pieces = Tokenizer(["▁the", "the"], {"▁the": "the"})  # SentencePiece decodes a leading space away
    assert [token_text(pieces, index) for index in range(2)] == [" the", "the"]


# --- table and figure -----------------------------------------------------------------------------------------------


def test_tables() -> None:
    stream = io.StringIO()
    Console(file=stream, width=120, force_terminal=True, color_system=None).print(render(inspect(ONE, TOKENIZER, n=8)))
    shown = stream.getvalue()
    assert "data $set$: 7 rows, 75 chosen and 64 rejected tokens" in shown
    assert "[/b]" in shown  # not taken for markup
    assert "\x1b[31m" not in shown  # a token cannot colour the terminal
    (row,) = [line.split() for line in shown.splitlines() if line.startswith("a ")]
    assert row == ["a", "0", "20", "5", "+18.854", "+6.880", "to", "+30.829", "+2.9"]


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_figures(kind: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    found = inspect(ONE, TOKENIZER, n=8)
    path = write_figure(found, tmp_path / "new" / f"figure.{kind}")
    first = path.read_bytes()
    assert first == write_figure(found, path).read_bytes()  # no date inside
    assert os.listdir(path.parent) == [f"figure.{kind}"]
    assert not [warning for warning in recwarn if "lyph" in str(warning.message)]  # nothing drawn as an empty box
    if kind == "png":
        image = matplotlib.image.imread(path)
        assert image.shape[0] > 300
        assert image.shape[1] > 1000
        blue, orange = (0, 0x72 / 255, 0xB2 / 255), (0xD5 / 255, 0x5E / 255, 0)
        for colour, share in ((blue, 0.01), (orange, 0.01)):
            assert np.isclose(image[..., :3], colour, atol=0.02).all(-1).mean() > share
    elif kind == "svg":
        text = "".join(ElementTree.parse(path).getroot().itertext())
        assert "<script" not in first.decode()
        assert text  # well-formed: <b>& is escaped


def test_a_dollar_is_no_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With mathtext on, "$x$" would lose its dollars; the labels are drawn as they are."""
    from matplotlib import mathtext

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a label was parsed as a formula")

    monkeypatch.setattr(mathtext.MathTextParser, "parse", refuse)
    write_figure(inspect(ONE, TOKENIZER), tmp_path / "figure.png")


def test_one_token_on_a_side(tmp_path: Path) -> None:
    two = Tokenizer(["a", "b", "c"])
    found = inspect(preference([9, 1, 1], [1, 5, 5], two), two)
    assert len(found.preferred) == 1
    assert write_figure(found, tmp_path / "figure.png").stat().st_size > 0
