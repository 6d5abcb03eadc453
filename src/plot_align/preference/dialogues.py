"""Convert the raw dialogues of Anthropic's HH-RLHF to conversations.

Each side of a row is a whole dialogue, ``\\n\\nHuman: …\\n\\nAssistant: …`` in turns. The sides differ only in the
last answer.
"""

from __future__ import annotations

import itertools
import re
from contextlib import suppress
from typing import Any

Turn = dict[str, str]
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


class Malformed(ValueError):
    """A row that cannot be converted; its message is the reason."""


def turns(dialogue: object) -> list[Turn]:
    """The turns of a raw dialogue, stripped.

    Raises:
        Malformed: no text; or a dialogue that does not begin with a human turn, alternate, and end with the
            assistant, or has an empty turn.
    """
    if not isinstance(dialogue, str):
        raise Malformed("is no text")
    before, *parts = _TURN.split(dialogue)
    found = [
        {"role": _ROLES[speaker], "content": text.strip()}
        for speaker, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    if before.strip() or not found or found[0]["role"] != "user":
        raise Malformed("does not begin with a human turn")
    if any(first["role"] == second["role"] for first, second in itertools.pairwise(found)):
        raise Malformed("turns do not alternate")
    if found[-1]["role"] != "assistant":
        raise Malformed("does not end with an answer")
    if not all(turn["content"] for turn in found):
        raise Malformed("an empty turn")
    return found


def is_dialogue(text: object) -> bool:
    """Whether ``text`` begins like a raw dialogue."""
    return isinstance(text, str) and text.lstrip().startswith("Human:")


def convert(chosen: object, rejected: object) -> dict[str, list[Turn]]:
    """Converts one raw row to a pair in TRL's conversational format with an explicit prompt.

    Raises:
        Malformed: as :func:`turns`; dialogues that differ before the last answer, or not at all.
    """
    *prompt, preferred = turns(chosen)
    *other_prompt, other = turns(rejected)
    if prompt != other_prompt:
        raise Malformed("the sides differ before the last answer")
    if preferred == other:
        raise Malformed("the answers are equal")
    return {"prompt": prompt, "chosen": [preferred], "rejected": [other]}


def as_conversations(data: Any) -> Any:
    """Pairs of raw dialogues as conversations, so that they reach a model through its chat template.

    Leaves out the few rows whose sides are not two dialogues with one beginning. Returns other data as it is.
    """
    from datasets import Dataset

    columns = set(data.column_names)
    is_pairs = {"chosen", "rejected"} <= columns and "prompt" not in columns
    if not is_pairs or not len(data) or not is_dialogue(data[0]["chosen"]):
        return data
    rows = []
    for row in data:
        with suppress(Malformed):
            rows.append(convert(row["chosen"], row["rejected"]))
    return Dataset.from_list(rows)
