"""A clean data set, in which no check finds anything, to plant faults into."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

_PLAIN = (
    "the sum is gladly no idea leave me alone what plus of three seven red blue green house tree river "
    "stone cloud bread music light water paper garden winter summer window table road hand bird"
)
WORDS = _PLAIN.split()


def sentence(rng: random.Random, words: int = 20) -> str:
    return " " + " ".join(rng.choice(WORDS) for _ in range(words))


@pytest.fixture
def clean() -> list[dict[str, Any]]:
    """200 pairs of random sentences of one length; every prompt is another."""
    rng = random.Random(0)
    return [
        {"prompt": f"what is {row} plus {row + 1} ?", "chosen": sentence(rng), "rejected": sentence(rng)}
        for row in range(200)
    ]


@pytest.fixture
def chat(clean: list[dict[str, str]]) -> list[dict[str, Any]]:
    """The same as conversations."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [{side: [{"role": roles[side], "content": text.strip()}] for side, text in row.items()} for row in clean]


@pytest.fixture
def tokenizer(tiny_tokenizer: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_tokenizer)


@pytest.fixture
def chat_tokenizer(tiny_base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base)
