"""Small files that would fill the memory or the stack, and headers that lie: one sentence, at once."""

from __future__ import annotations

import gzip
import json
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from plot_align.errors import InputError
from plot_align.evaluation.fastchat import rating, read_answers
from plot_align.inference.resume import read_journal
from plot_align.io import json_or_none, parse_json, read_yaml
from plot_align.preference.datasets import load_pairs
from plot_align.preference.distribution import PreferenceDistribution
from plot_align.records import read_record
from plot_align.redteam.behaviors import read_behaviors
from plot_align.redteam.harmbench import read_completions, read_results, read_test_cases


def _laughs(levels: int = 9) -> str:
    rows = ["a0: &a0 [lol, lol]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(rows)


def _merges(levels: int = 12) -> str:
    rows = ["m0: &m0 {x: 1}"]
    rows += [f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}], x{i}: 1}}" for i in range(1, levels)]
    return "\n".join(rows)


YAML = {
    "a billion laughs": (_laughs(), "values, aliases"),
    "merged without end": (_merges(), "values, aliases"),
    "itself": ("a: &a [*a]", "values, aliases"),
    "deep": ("a: " + "[" * 200 + "]" * 200, "nested more than 64 levels"),
    "many": ("a: [" + "1, " * 20_001 + "]", "more than 20,000 values"),
    "deep mappings": ("".join("  " * i + "a:\n" for i in range(200)), "nested more than 64 levels"),
    "twice": ("alpha: 1\nalpha: 2\n", "line 2, has 'alpha' twice"),
    "twice within": ("a: {b: 1, b: 2}\n", "'b' twice"),
    "a number of 5,000 digits": ("a: " + "9" * 5000, "is not valid YAML"),
    "no such day": ("a: 2001-99-99", "is not valid YAML"),
    "a tag that runs code": ("a: !!python/object/apply:os.system [exit]", "is not valid YAML"),
    "a tag on another value": ("a: !!int x", "is not valid YAML"),
    "a tag of a word": ("a: !!bool x", "is not valid YAML"),
    "a tag of a date": ("a: !!timestamp x", "is not valid YAML"),
    "bytes": ("\x00\x01", "is not valid YAML"),
}


@pytest.mark.parametrize("name", YAML)
def test_yaml(tmp_path: Path, name: str) -> None:
    text, told = YAML[name]
    file = tmp_path / "x.yaml"
    file.write_text(text)
    began = time.process_time()
    with pytest.raises(InputError, match=told) as caught:
        read_yaml(str(file))
    assert time.process_time() - began < 5
    assert len(str(caught.value)) < 500


def test_yaml_that_is_no_bomb(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("shared: &s {a: 1, b: [1, 2]}\none: {<<: *s, c: 3}\ntwo: {<<: *s, a: 2}\nlist: [*s, *s]\n")
    content = read_yaml(str(file))
    assert content["two"] == {"a": 2, "b": [1, 2]}
    assert content["list"] == [content["shared"]] * 2


JSON = {
    "deep lists": "[" * 100_000 + "]" * 100_000,
    "deep and open": "[" * 100_000,
    "deep objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "just too deep": "[" * 65 + "]" * 65,
    "a number of 5,000 digits": "9" * 5000,
}


def refused(read: Callable[[Path], Any]) -> Callable[[Path], bool]:
    def check(path: Path) -> bool:
        with pytest.raises(InputError) as caught:
            read(path)
        return "\n" not in str(caught.value) and len(str(caught.value)) < 500

    return check


READERS: dict[str, Callable[[Path], bool]] = {
    "a record": refused(read_record),
    "test cases": refused(read_test_cases),
    "completions": refused(read_completions),
    "results": refused(read_results),
    "answers": refused(read_answers),
    "what may be damaged": lambda path: json_or_none(path) is None,
    "a journal": lambda path: read_journal(path) == {},
}


@pytest.mark.parametrize("bomb", JSON)
@pytest.mark.parametrize("reader", READERS)
def test_json(tmp_path: Path, reader: str, bomb: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(JSON[bomb])
    assert READERS[reader](file)


def test_json_up_to_the_limit() -> None:
    assert parse_json("[" * 64 + "]" * 64)
    with pytest.raises(ValueError, match="64 levels"):
        parse_json("[" * 65 + "]" * 65)


def test_a_journal_whose_number_is_none(tmp_path: Path) -> None:
    file = tmp_path / "x.partial"
    checksum = zlib.crc32(b"[3, [4]]")
    file.write_text(f'[[1], [2], 3]\n[{{}}, 1, 2]\n{{"a": 1, "b": 2, "c": 3}}\n[3, [4], {checksum}]\n')
    assert read_journal(file)[3] == [4]


def test_csv_with_a_field_that_is_not_closed(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text('Behavior,BehaviorID\n"' + "x" * 200_000)
    with pytest.raises(InputError, match="line 2 is not CSV") as caught:
        read_behaviors(file)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ["[[" + "1" * 100_000, "[" + "1" * 100_000, "[[1." + "1" * 100_000, "[[" * 50_000])
def test_a_rating_without_an_end_takes_no_time(text: str) -> None:
    began = time.process_time()
    assert rating(text) is None
    assert time.process_time() - began < 2


def test_a_rating_of_5000_digits() -> None:
    assert rating(f"[[{'0' * 5000}7]]") == 7
    assert rating(f"[[{'9' * 5000}]]") is None


# --- safetensors ----------------------------------------------------------------------------------------------------


def _preference(path: Path, **changed: Any) -> Path:
    """A sound file, with some of its header replaced."""
    counts = torch.tensor([1, 2, 3])
    provenance = {"tokenizer": {"fingerprint": "f", "size": 3}, "sources": [], "policy": {}}
    PreferenceDistribution(counts, counts.flip(0), provenance).save(path)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for name, entry in changed.items():
        header[name] = {**header.get(name, {}), **entry} if isinstance(entry, dict) else entry
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    return path


LIES = {
    "a shape of 2^60": {"chosen_counts": {"shape": [2**60]}},
    "two shapes that multiply to few": {"chosen_counts": {"shape": [2**62, 4]}},
    "a negative shape": {"chosen_counts": {"shape": [-3]}},
    "no entries": {"chosen_counts": {"shape": [0], "data_offsets": [0, 0]}},
    "offsets beyond the file": {"chosen_counts": {"data_offsets": [0, 2**40]}},
    "offsets that overlap": {"chosen_counts": {"data_offsets": [8, 32]}},
    "offsets backwards": {"chosen_counts": {"data_offsets": [24, 0]}},
    "floats": {"chosen_counts": {"dtype": "F64"}},
    "a type that there is not": {"chosen_counts": {"dtype": "X9"}},
    "a tensor more": {"extra": {"dtype": "I64", "shape": [0], "data_offsets": [48, 48]}},
    "no such shape": {"chosen_counts": {"shape": "three"}},
}


@pytest.mark.parametrize("lie", LIES)
def test_safetensors_headers_that_lie(tmp_path: Path, lie: str) -> None:
    with pytest.raises(InputError, match="preference") as caught:
        PreferenceDistribution.load(_preference(tmp_path / "p.safetensors", **LIES[lie]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**40, 2**63, 2**64 - 1])
def test_a_header_length_that_lies(tmp_path: Path, length: int) -> None:
    path = _preference(tmp_path / "p.safetensors")
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    with pytest.raises(InputError, match=r"truncated or damaged|no preference distribution"):
        PreferenceDistribution.load(path)


def test_a_provenance_that_is_a_bomb(tmp_path: Path) -> None:
    path = _preference(tmp_path / "p.safetensors", __metadata__={"provenance": "[" * 100_000})
    with pytest.raises(InputError, match="is damaged"):
        PreferenceDistribution.load(path)


def test_a_large_tensor_of_another_name_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    save_file({"weights": torch.zeros(1000)}, tmp_path / "p.safetensors")
    monkeypatch.setattr(torch.Tensor, "clone", lambda self: pytest.fail("it was read"))
    with pytest.raises(InputError, match="no preference distribution"):
        PreferenceDistribution.load(tmp_path / "p.safetensors")


def test_counts_whose_sum_would_overflow() -> None:
    """2^62 + 2^62 + 1 is negative in 64 bits, and so would be every frequency."""
    large, plain = torch.tensor([2**62, 2**62, 1]), torch.tensor([1, 2, 3])
    with pytest.raises(InputError, match="chosen_counts has more than"):
        PreferenceDistribution(large, plain, {})


def test_a_sound_file_still_loads(tmp_path: Path) -> None:
    assert PreferenceDistribution.load(_preference(tmp_path / "p.safetensors")).vocab_size == 3


# --- data sets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz", "pairs.json", "folder/pairs.jsonl"])
def test_a_data_file_that_is_a_bomb(tmp_path: Path, name: str) -> None:
    """Arrow's reader overflows the stack on it, which would end the process without a word."""
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    row = json.dumps({"prompt": "a", "chosen": '"[[[{{{' * 30, "rejected": "c"})
    bomb = '{"chosen": ' + "[" * 100_000 + "]" * 100_000 + "}"
    text = f"[{row},\n{bomb}]" if name.endswith(".json") else f"{row}\n{bomb}\n"
    file.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    with pytest.raises(InputError, match=r"line 2, is nested more than 64 levels") as caught:
        load_pairs(file.parent if "/" in name else file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("pairs.jsonl", "null", 1),
        ("pairs.jsonl.gz", "\n \tnull\n{row}", 2),
        ("pairs.jsonl", "{row}\n{row}\nnull\n{row}", 3),
        ("pairs.jsonl", "\ufeffnull{row}", 1),
        ("pairs.json", "null\r{row}", 1),
        ("folder/pairs.json", "{row}\nnull\n{row}", 2),
    ],
)
def test_a_row_that_is_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, line: int) -> None:
    """Arrow's reader, which must not see it, dies where it is the first row of a block."""
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    content = text.replace("{row}", json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"})).encode()
    file.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the reader saw it"))
    with pytest.raises(InputError, match=rf"line {line}, is null, expected an object with chosen and rejected"):
        load_pairs(file.parent if "/" in name else file)


def test_null_as_a_value_is_no_null_row(tmp_path: Path) -> None:
    file = tmp_path / "pairs.json"
    file.write_text('[\n{"prompt": "a",\n"chosen": "b", "rejected": "c", "note":\nnull}\n]\n')
    assert load_pairs(file)[0]["note"] is None


def test_brackets_in_texts_are_no_depth(tmp_path: Path) -> None:
    row = {"prompt": "[" * 200, "chosen": '\\"[{' * 200 + "\\", "rejected": "c"}
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(row) + "\n")
    assert load_pairs(file)[0] == row
