"""The data that measures are taken on: pairs, prompts and texts, by what a user types."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from plot_align.errors import InputError
from plot_align.preference.datasets import load_pairs
from plot_align.preference.dialogues import Malformed, convert, is_dialogue
from plot_align.preference.estimation import ScoredSequence, scored_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BENIGN = "benign"
Conversation = list[dict[str, str]]


def check_source(name: str, source: str, known: tuple[str, ...] = ()) -> None:
    """Checks that ``source`` exists if it looks like a file; the id of a data set on the Hub is taken on trust.

    Args:
        known: names that stand for data of our own.

    Raises:
        InputError: it does not.
    """
    if source in known or os.path.exists(source):
        return
    if source.count("/") > 1 or source.startswith((".", "/", "~")) or source.endswith((".jsonl", ".json", ".gz")):
        expected = " or ".join(("a file", "a data set of the Hub", *map(repr, known)))
        raise InputError(f"{name} is {source!r}, which does not exist; name {expected}")


def sample(data: Any, limit: int | None, seed: int) -> Any:
    """``limit`` rows drawn by ``seed``, the same for every model; all of them where there are no more."""
    if limit is None or len(data) <= limit:
        return data
    return data.shuffle(seed=seed).select(range(limit))


def load(source: str, *, split: str, data_dir: str | None = None, limit: int | None = None, seed: int = 0) -> Any:
    """Rows of a file or a data set, sampled.

    Raises:
        InputError: as :func:`plot_align.load_pairs`.
    """
    # A single file has no splits: what a suite says of the Hub's version does not hold for it.
    data = load_pairs(source, split="train" if os.path.isfile(source) else split, data_dir=data_dir)
    return _as_conversations(sample(data, limit, seed))


def _as_conversations(data: Any) -> Any:
    """Raw dialogues (HH-RLHF) as conversations, so that they reach a model through its chat template.

    The few rows that are no two dialogues with one beginning are left out; other data is returned as it is.
    """
    columns = set(data.column_names)
    is_pairs = {"chosen", "rejected"} <= columns and "prompt" not in columns
    if not is_pairs or not len(data) or not is_dialogue(data[0]["chosen"]):
        return data
    rows = []
    for row in data:
        with suppress(Malformed):
            rows.append(convert(row["chosen"], row["rejected"]))
    return Dataset.from_list(rows)


def scored(
    pairs: Any, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[ScoredSequence], list[ScoredSequence]]:
    """Chosen and rejected of every pair as sequences, in order; pairs with an empty side are left in, unscored."""
    both = list(scored_pairs(pairs, tokenizer, max_length=max_length))
    return [chosen for chosen, _ in both], [rejected for _, rejected in both]


def prompts(source: str, *, split: str, limit: int | None, seed: int) -> dict[str, Conversation]:
    """Conversations to be answered, each ending with a user's turn, by their ids.

    Args:
        source: ``benign`` (60 harmless requests of our own), or rows with a column ``prompt``: a text or a list of
            messages.

    Raises:
        InputError: another column, or a row that is neither.
    """
    if source == BENIGN:
        from plot_align.redteam.behaviors import default_benign

        rows = [(behavior.id, behavior.prompt) for behavior in default_benign()]
        return {name: [{"role": "user", "content": text}] for name, text in rows[:limit]}
    data = load(source, split=split, limit=limit, seed=seed)
    if "prompt" not in data.column_names:
        raise InputError(
            f"{source} has the columns {', '.join(data.column_names)}, expected one called prompt, with texts or "
            "lists of messages; rename it"
        )
    return {str(i): _conversation(prompt, i, source) for i, prompt in enumerate(data["prompt"])}


def _conversation(prompt: Any, row: int, source: str) -> Conversation:
    if isinstance(prompt, str) and prompt.strip():
        return [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and prompt and all(isinstance(m, dict) and m.get("role") for m in prompt):
        return [{"role": m["role"], "content": m["content"]} for m in prompt]
    raise InputError(
        f"row {row} of {source} has no text and no list of messages as its prompt; correct or remove the row"
    )


def texts(source: str, *, split: str, name: str | None, limit: int | None, seed: int) -> dict[str, str]:
    """Texts to be read, by their ids; blank ones are left out.

    Args:
        source: a ``.txt`` file (texts are separated by blank lines), or rows with a column ``text``.
        name: configuration of a data set on the Hub.

    Raises:
        InputError: another column, a file that cannot be read, or nothing to read.
    """
    if source.endswith(".txt"):
        try:
            with open(source, encoding="utf-8") as file:
                found = file.read().split("\n\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"texts file {source} cannot be read ({error}); name a text file in UTF-8") from None
    else:
        data = load_pairs(source, name=name, split="train" if os.path.isfile(source) else split)
        if "text" not in data.column_names:
            raise InputError(
                f"{source} has the columns {', '.join(data.column_names)}, expected one called text; rename it"
            )
        found = sample(data.filter(lambda row: bool((row["text"] or "").strip())), limit, seed)["text"]
    kept = [text.strip() for text in found if text.strip()][:limit]
    if not kept:
        raise InputError(f"{source} holds no text, expected at least one; name another file or split")
    return {str(i): text for i, text in enumerate(kept)}
