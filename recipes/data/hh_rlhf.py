"""HH-RLHF as conversational preference pairs.

    python recipes/data/hh_rlhf.py Anthropic/hh-rlhf --output runs/data/hh/train.jsonl --sft runs/data/hh/sft.jsonl
    python recipes/data/hh_rlhf.py Anthropic/hh-rlhf --split test --output runs/data/hh/test.jsonl

Each side of a raw row is a whole dialogue, ``\n\nHuman: …\n\nAssistant: …`` by turns; the two differ in the last
answer. Rows that are not so are dropped and counted by their reason. Prints no text of the data set.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from pathlib import Path

from pairs import Turn, count, pair, write

from plot_align.errors import PlotAlignError
from plot_align.reading import load_pairs

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


class Malformed(ValueError):
    """Why a row is dropped."""


def turns(dialogue: str) -> list[Turn]:
    """The turns of a raw dialogue, stripped.

    Raises:
        Malformed: it does not begin with a human turn, does not alternate, does not end with the assistant, or a
            turn is empty.
    """
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


def convert(chosen: str, rejected: str) -> dict[str, list[Turn]]:
    """One raw row as a pair.

    Raises:
        Malformed: as :func:`turns`, or the two dialogues differ before the last answer, or not at all.
    """
    *prompt, preferred = turns(chosen)
    *other_prompt, other = turns(rejected)
    if prompt != other_prompt:
        raise Malformed("the sides differ before the last answer")
    if preferred == other:
        raise Malformed("the answers are equal")
    return pair(prompt, preferred["content"], other["content"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="hub id, or a local .jsonl, .json, .csv, .parquet file, also .gz")
    parser.add_argument("--split", default="train", help="of a hub data set (%(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="the pairs, .jsonl")
    parser.add_argument("--sft", type=Path, help="prompt and chosen answer alone, .jsonl")
    options = parser.parse_args(arguments)
    rows, dropped = [], []
    try:
        for row in load_pairs(options.source, split=options.split):
            try:
                rows.append(convert(row["chosen"], row["rejected"]))
            except Malformed as reason:
                dropped.append(str(reason))
        write(rows, count(dropped), options.output, options.sft)
    except PlotAlignError as error:
        print(f"hh_rlhf.py: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
