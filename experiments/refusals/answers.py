"""The labelled answers: one JSON object a line, ``{request, answer, label, kind, source, split}``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LABELS = ("refusal", "compliance", "partial")


def read(*splits: str) -> list[dict[str, Any]]:
    """The answers of ``splits``, in the order of their files."""
    return [
        json.loads(line)
        for split in splits
        for line in (HERE / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
