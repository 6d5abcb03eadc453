"""What a user types as data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from plot_align.errors import InputError
from plot_align.evaluation import data


def _write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_raw_dialogues_become_conversations(tmp_path: Path) -> None:
    """Three turns of prompt and an answer; the second row's sides differ in the prompt and is left out."""
    before = "\n\nHuman: hello\n\nAssistant: hi\n\nHuman: what is two plus two?"
    source = _write(tmp_path / "hh.jsonl", [
        {"chosen": before + "\n\nAssistant: four", "rejected": before + "\n\nAssistant: no idea"},
        {"chosen": before + "\n\nAssistant: four", "rejected": "\n\nHuman: other\n\nAssistant: x"},
    ])  # fmt: skip
    found = data.load(source, split="test")
    assert found.to_list() == [
        {
            "prompt": [
                {"role": "user", "content": "hello"},
                {"role": "assistant", "content": "hi"},
                {"role": "user", "content": "what is two plus two?"},
            ],
            "chosen": [{"role": "assistant", "content": "four"}],
            "rejected": [{"role": "assistant", "content": "no idea"}],
        }
    ]


def test_real_dialogues_become_conversations(real_data: Path) -> None:
    found = data.load(str(real_data / "hh_rlhf_harmless_2000.jsonl.gz"), split="test", limit=200)
    assert found.column_names == ["prompt", "chosen", "rejected"]
    assert 190 <= len(found) <= 200
    assert all(row["prompt"][-1]["role"] == "user" for row in found)


def test_pairs_of_other_shapes_stay_as_they_are(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    assert data.load(_write(tmp_path / "pairs.jsonl", rows), split="test").to_list() == rows


def test_prompts_are_texts_or_messages(tmp_path: Path) -> None:
    user = {"role": "user", "content": "hi"}
    found = data.prompts(_write(tmp_path / "p.jsonl", [{"prompt": "hi"}]), split="train", limit=None, seed=0)
    assert found == {"0": [user]}
    found = data.prompts(_write(tmp_path / "m.jsonl", [{"prompt": [user]}]), split="train", limit=None, seed=0)
    assert found == {"0": [user]}
    assert len(data.prompts("benign", split="train", limit=7, seed=0)) == 7


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "x"}, "has the columns question, expected one called prompt"),
        ({"prompt": "  "}, "row 0 of .* has no text"),
        ({"prompt": []}, "row 0 of .* has no text"),
    ],
)
def test_prompts_that_are_none(tmp_path: Path, row: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        data.prompts(_write(tmp_path / "p.jsonl", [row]), split="train", limit=None, seed=0)


def test_texts_by_blank_lines_or_by_column(tmp_path: Path) -> None:
    plain = tmp_path / "t.txt"
    plain.write_text("one\ntwo\n\n \n\nthree\n", encoding="utf-8")
    assert data.texts(str(plain), split="test", name=None, limit=None, seed=0) == {"0": "one\ntwo", "1": "three"}
    rows = _write(tmp_path / "t.jsonl", [{"text": "a"}, {"text": " "}, {"text": "b"}])
    assert data.texts(rows, split="test", name=None, limit=None, seed=0) == {"0": "a", "1": "b"}
    assert len(data.texts(rows, split="test", name=None, limit=1, seed=0)) == 1
    for content, message in (({"body": "a"}, "expected one called text"), ({"text": " "}, "holds no text")):
        with pytest.raises(InputError, match=message):
            data.texts(_write(tmp_path / "x.jsonl", [content]), split="test", name=None, limit=None, seed=0)
    with pytest.raises(InputError, match="cannot be read"):
        data.texts(str(tmp_path / "none.txt"), split="test", name=None, limit=None, seed=0)


def test_a_missing_file_is_said_before_a_model_is_loaded(tmp_path: Path) -> None:
    data.check_source("prompts", "benign", ("benign",))
    data.check_source("pairs", "some/dataset")
    for known, expected in (((), "name a file or a data set of the Hub$"), (("benign",), "Hub or 'benign'$")):
        with pytest.raises(InputError, match=rf"pairs is '\./gone', which does not exist; .*{expected}"):
            data.check_source("pairs", "./gone", known)


def test_a_sample_is_the_same_for_every_model(tmp_path: Path) -> None:
    source = _write(tmp_path / "p.jsonl", [{"prompt": str(i), "chosen": "a", "rejected": "b"} for i in range(50)])
    first = data.load(source, split="test", limit=5, seed=3)
    assert first.to_list() == data.load(source, split="test", limit=5, seed=3).to_list()
    assert first.to_list() != data.load(source, split="test", limit=5, seed=4).to_list()
