"""HH-RLHF as conversational preference pairs.

    python recipes/data/hh_rlhf.py Anthropic/hh-rlhf --output runs/data/hh/train.jsonl --sft runs/data/hh/sft.jsonl
    python recipes/data/hh_rlhf.py Anthropic/hh-rlhf --split test --output runs/data/hh/test.jsonl

Rows that are no two dialogues with one beginning are dropped and counted by their reason. Prints no text of the data.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pairs import count, write

from plot_align.errors import PlotAlignError
from plot_align.preference.datasets import load_pairs
from plot_align.preference.dialogues import Malformed, convert


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
