"""Preference distributions: the safetensors file, its metadata, what `inspect` makes of it."""

from __future__ import annotations

import hashlib
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save

from fuzz.guard import Wrong
from fuzz.spoil import spoilt
from fuzz.targets import joined, write
from fuzz.tiny import tokenizer
from plot_align.preference.distribution import FORMAT, PreferenceDistribution, vocabulary_fingerprint
from plot_align.preference.inspection import inspect, render

_ROWS = 300
_COUNTS = (0, 1, 2, 7, 2**20, 2**40, 2**53 + 1, 2**61, 2**62, 2**63 - 1, -1)


def _provenance() -> dict[str, Any]:
    return {
        "tokenizer": {"fingerprint": vocabulary_fingerprint(tokenizer()), "size": _ROWS},
        "policy": {"template": None, "eos": "appended where missing", "eos_token": "<eos>", "max_length": 64,
                   "truncation_mode": "keep_start"},
        "sources": [
            {"id": "pairs", "split": "train", "revision": None, "sha256": "0" * 64, "fingerprint": "f",
             "tokenizer": "tiny", "rows": 9, "dropped_rows": 0, "tokens": {"chosen": 8, "rejected": 9},
             "versions": {"trl": "1.16"}}
        ],
    }  # fmt: skip


def _file(counts: dict[str, torch.Tensor], provenance: Any, metadata: dict[str, str], header: Any = None) -> bytes:
    """As PreferenceDistribution.save writes it, with a digest that fits whatever the provenance is."""
    text = json.dumps(provenance, sort_keys=True)
    digest = hashlib.sha256(json.dumps(json.loads(text), sort_keys=True).encode())
    for tensor in counts.values():
        digest.update(tensor.numpy().tobytes())
    return save(counts, {"format": FORMAT, "schema": "1", "digest": digest.hexdigest(), "provenance": text} | metadata)


def _plain(chosen: dict[int, int], rejected: dict[int, int]) -> dict[str, torch.Tensor]:
    sides = {}
    for name, of in (("chosen_counts", chosen), ("rejected_counts", rejected)):
        sides[name] = torch.zeros(_ROWS, dtype=torch.int64)
        for index, count in of.items():
            sides[name][index] = count
    return sides


_SEED = _plain({5: 3, 9: 4, 299: 1}, {5: 1, 7: 6, 11: 2})


@st.composite
def _cases(draw: Any) -> bytes:
    counts = {name: tensor.clone() for name, tensor in _SEED.items()}
    provenance, metadata = _provenance(), {}
    kinds = ("counts", "counts", "shape", "provenance", "provenance", "metadata", "bytes")
    spoil = draw(st.lists(st.sampled_from(kinds), max_size=2))
    if "counts" in spoil:
        for _ in range(draw(st.integers(1, 3))):
            name = draw(st.sampled_from(sorted(counts)))
            counts[name][draw(st.integers(0, _ROWS - 1))] = draw(st.sampled_from(_COUNTS))
    if "shape" in spoil:
        name = draw(st.sampled_from(sorted(counts)))
        match draw(st.integers(0, 5)):
            case 0:
                counts["rejected_counts"] = counts["chosen_counts"].clone()
            case 1:
                types = (torch.int32, torch.float32, torch.float16, torch.uint8, torch.bool)
                counts[name] = counts[name].to(draw(st.sampled_from(types)))
            case 2:
                counts[name] = torch.zeros(draw(st.integers(0, 3)), dtype=torch.int64)
            case 3:
                counts[draw(st.sampled_from(("more", name)))] = torch.zeros(2, 3, dtype=torch.int64)
            case 4:
                del counts[name]
            case 5:
                counts[name].zero_()
    if "provenance" in spoil:
        provenance = draw(spoilt(provenance, 2))
    if "metadata" in spoil:
        wrong = ({"schema": "2"}, {"schema": "x\ny"}, {"format": "x"}, {"digest": ""}, {"provenance": "["})
        metadata = draw(st.sampled_from(wrong))
    content = _file(counts, provenance, metadata)
    if "bytes" in spoil:
        at = draw(st.integers(0, min(len(content) - 1, 2000)))
        match draw(st.integers(0, 2)):
            case 0:
                content = content[:at]
            case 1:
                content = content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
            case 2:
                size = draw(st.sampled_from((0, 1, 2**31, 2**63, 2**64 - 1)))
                content = size.to_bytes(8, "little") + content[8:]
    return joined(0, content)


class Artefacts:
    name = "artefacts"
    names = ("case.safetensors", "preference distribution", "tokenizer is", "merge")
    cases = _cases()

    def __init__(self) -> None:
        self.seeds = [joined(0, _file(_SEED, _provenance(), {}))]

    def run(self, data: bytes, folder: Path) -> None:
        found = PreferenceDistribution.load(write(folder, "case.safetensors", data[1:]))
        repr(found)
        if PreferenceDistribution.load(found.save(folder / "again.safetensors")) != found:
            raise Wrong("it does not read back")
        chosen, rejected = found.chosen_counts.tolist(), found.rejected_counts.tolist()
        seen = inspect(found, tokenizer(), n=5)
        from rich.console import Console

        with Console(
            file=(folder / "out").open("w", encoding="utf-8", errors="backslashreplace"), width=100
        ).file as file:
            Console(file=file, width=100).print(render(seen))
        json.dumps(seen.to_dict(), allow_nan=False)
        if (seen.chosen_tokens, seen.rejected_tokens) != (sum(chosen), sum(rejected)):
            raise Wrong(
                f"{seen.chosen_tokens} and {seen.rejected_tokens} tokens, not {sum(chosen)} and {sum(rejected)}"
            )
        for token in (*seen.preferred, *seen.rejected):
            exact = Fraction(chosen[token.id], sum(chosen)) - Fraction(rejected[token.id], sum(rejected))
            if abs(token.difference - exact) > 1e-12 or not token.low <= token.difference <= token.high:
                raise Wrong(f"d of token {token.id} is {token.difference}, not {float(exact)}")
        for transform in ("relu", "shift", "softmax", "chosen"):
            target = found.target(transform)
            if not bool((target >= 0).all()) or abs(float(target.sum()) - 1) > 1e-9:
                raise Wrong(f"the {transform} target is no distribution")
        if sum(chosen) + sum(rejected) < 2**62 and found.merge(found).chosen_counts.tolist() != [
            2 * n for n in chosen
        ]:
            raise Wrong("merged with itself it has other counts")
