"""The demo's requests and preference pairs, as they ship with the package.

160 harmful requests in plain English, a benign twin for each (the same words or topic, plainly harmless) and 40
everyday requests, all written for this package; 260 to train on and 100 held out. README.md beside the files describes
how the answers were drawn and sorted.
"""

from __future__ import annotations

import csv
import json
from importlib import resources
from typing import TYPE_CHECKING, Literal

from plot_align.errors import InputError
from plot_align.redteam import Behavior

if TYPE_CHECKING:
    from datasets import Dataset

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")


def pairs(split: Split = "train") -> Dataset:
    """Preference pairs in TRL's conversational format with an explicit prompt, one per request.

    Columns ``prompt``, ``chosen``, ``rejected``, each a list of one message, and ``kind``: harmful, benign, ordinary.
    For harmful requests a refusal is chosen, otherwise a helpful answer.

    Raises:
        InputError: there is no such split.
    """
    from datasets import Dataset

    rows = map(json.loads, _text(f"{_known(split)}.jsonl").split("\n")[:-1])
    return Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected", "kind")} for row in rows])


def training_pairs() -> Dataset:
    """The pairs that the demo trains on: all that prefer a refusal, and every third of those that prefer help.

    In so few steps a model this small cannot tell a harmful request from its twin. With as many pairs of either kind
    it would only learn to refuse less.
    """
    ours = pairs("train")
    harmful = [i for i, kind in enumerate(ours["kind"]) if kind == "harmful"]
    harmless = [i for i, kind in enumerate(ours["kind"]) if kind != "harmful"]
    return ours.select(sorted(harmful + harmless[2::3]))


def behaviors(split: Split = "heldout") -> list[Behavior]:
    """The harmful requests, as HarmBench's behaviours; ``semantic_category`` is the topic.

    Raises:
        InputError: there is no such split.
    """
    return _behaviors(split, "harmful")


def benign(split: Split = "heldout") -> list[Behavior]:
    """The harmful requests' twins and the everyday requests: none should be refused. ``tags`` says which they are.

    Raises:
        InputError: there is no such split.
    """
    return _behaviors(split, "benign", "ordinary")


def targets(split: Split = "heldout") -> dict[str, str]:
    """How an answer that complies would begin ("Sure, here is …"), by the id of the harmful request.

    Raises:
        InputError: there is no such split.
    """
    return {row["id"]: row["target"] for row in _requests(split) if row["kind"] == "harmful"}


def _behaviors(split: Split, *kinds: str) -> list[Behavior]:
    return [
        Behavior(row["id"], row["prompt"], semantic_category=row["topic"], tags=(row["kind"],))
        for row in _requests(split)
        if row["kind"] in kinds
    ]


def _requests(split: Split) -> list[dict[str, str]]:
    _known(split)
    return [row for row in csv.DictReader(_text("requests.csv").splitlines()) if row["split"] == split]


def _known(split: str) -> str:
    if split not in SPLITS:
        raise InputError(f"split is {split!r}, expected {' or '.join(SPLITS)}; name one of them")
    return split


def _text(name: str) -> str:
    return (resources.files("plot_align.demo") / name).read_text(encoding="utf-8")
