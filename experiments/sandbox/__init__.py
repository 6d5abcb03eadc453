"""The offline world: a small language with programmatic truth, its tokenizer, base model and judges.

The whole pipeline runs here in minutes on two cores, without a network and without a model from elsewhere, by the same
code as for a real model, and every claim can be checked against a program. It is a test bench: its numbers say whether
something works and which way it points, and are never results on real models.

The harmful requests are abstract, and compliance with them is a string of empty words ("wait until night").
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from plot_align.errors import InputError
from sandbox.base import BaseConfig, build_base, default_cache_dir, train_tokenizer
from sandbox.evaluate import evaluate_model
from sandbox.judges import Verdict, judge
from sandbox.language import CATEGORIES, TWIN, examples

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset

__all__ = [
    "CATEGORIES",
    "TWIN",
    "BaseConfig",
    "Verdict",
    "build_base",
    "default_cache_dir",
    "evaluate_model",
    "examples",
    "judge",
    "pairs",
    "train_tokenizer",
]

TRAIN_PAIRS = 200  # per category
HELD_OUT_PAIRS = 60  # per category


def pairs(
    split: str = "train",
    categories: Sequence[str] | None = None,
    seed: int = 0,
    *,
    per_category: int | None = None,
) -> Dataset:
    """Preference pairs in TRL's conversational format with an explicit prompt.

    Args:
        split: "train" or "heldout"; no item (sum, request, fact, ...) is in both, in whatever words it is asked.
        categories: some of :data:`CATEGORIES`; all seven by default.
        seed: decides the split, the prompts and the answers. Not the base model's seed: the base knows every prompt.
        per_category: pairs per category; by default 200 to train on and 60 held out.

    Returns:
        A ``datasets.Dataset`` (about 1,400 rows to train on) with the columns prompt, chosen, rejected (lists of
        messages) and category, ordered by category (a trainer shuffles).

    Raises:
        InputError: unknown split or category, no category, a negative count.
    """
    from datasets import Dataset

    wanted = CATEGORIES if categories is None else tuple(categories)
    if not wanted or not set(wanted) <= set(CATEGORIES):
        raise InputError(
            f"categories is {list(wanted)!r}, but must name some of {', '.join(CATEGORIES)}: correct or leave it out."
        )
    count = per_category if per_category is not None else TRAIN_PAIRS if split == "train" else HELD_OUT_PAIRS
    rows = [
        {
            "prompt": [{"role": "user", "content": x.prompt}],
            "chosen": [{"role": "assistant", "content": x.chosen}],
            "rejected": [{"role": "assistant", "content": x.rejected}],
            "category": category,
        }
        for category in wanted
        for x in examples(category, split, count, seed)
    ]
    return Dataset.from_list(rows)
