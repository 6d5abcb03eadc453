"""What both scripts write: preference pairs as conversations, and their chosen side alone for SFT."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from plot_align.errors import InputError
from plot_align.io import complete_or_absent
from plot_align.preference.dialogues import Turn


def pair(prompt: list[Turn], chosen: str, rejected: str) -> dict[str, list[Turn]]:
    """One row in TRL's conversational format with an explicit prompt."""
    return {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def write(rows: list[dict[str, list[Turn]]], dropped: Mapping[str, int], output: Path, sft: Path | None) -> None:
    """Write the pairs to ``output`` and, where asked for, prompt and completion to ``sft``; say what was dropped.

    Raises:
        InputError: no row is left.
    """
    reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(dropped.items())) or "none"
    if not rows:
        raise InputError(f"no pair is left to write to {output} (dropped: {reasons}); check the data")
    _lines(rows, output)
    if sft is not None:  # before the second file is there the command is not done, and a script runs it again
        _lines(({"prompt": row["prompt"], "completion": row["chosen"]} for row in rows), sft)
    print(f"{output}: {len(rows):,} pairs; dropped: {reasons}")


def count(reasons: Iterable[str]) -> Mapping[str, int]:
    return Counter(reasons)


def _lines(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    with complete_or_absent(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
