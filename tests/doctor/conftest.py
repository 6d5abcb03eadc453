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


@pytest.fixture
def calling(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same prompts, answered by a call alone: one of four functions, with numbers drawn at random."""
    rng = random.Random(1)
    names = ["add", "multiply", "divide", "compare"]

    def call() -> list[dict[str, Any]]:
        function = {"name": rng.choice(names), "arguments": {name: rng.randint(10, 99) for name in "ab"}}
        made = {"id": f"call_{rng.random()}", "type": "function", "function": function}
        return [{"role": "assistant", "content": None, "tool_calls": [made]}]

    tools = [{"type": "function", "function": {"name": name, "description": f"To {name}."}} for name in names]
    return [{"prompt": row["prompt"], "chosen": call(), "rejected": call(), "tools": tools} for row in chat]


@pytest.fixture
def calling_tokenizer(chat_tokenizer: Any) -> Any:
    """Its template writes reasoning, content and calls."""
    writes = (
        "(message['reasoning'] or '') + (message['content'] or '') + '<|end|>' -}}"
        "{%- for call in message['tool_calls'] or [] -%}"
        "{{- call['function'] | tojson + '<|end|>' -}}"
        "{%- endfor -%}{{- ''"
    )
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace("message['content'] + '<|end|>'", writes)
    return chat_tokenizer
