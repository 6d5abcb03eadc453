"""What PLOT would do, from the data: the preferred and rejected tokens, and how much of them is no content."""

from __future__ import annotations

import re
from typing import Any

import torch

from plot_align.errors import InputError
from plot_align.preference.counting import Counts
from plot_align.preference.distribution import PreferenceDistribution, vocabulary_fingerprint
from plot_align.preference.inspection import inspect, token_text
from plot_align.records import NORMAL_95

KINDS = ("length", "format", "refusal", "content")
_REFUSAL = re.compile(
    r"sorry|apolog(y|ize|ise|ies)?|cannot|can['’]t|won['’]t|unable|refuse|decline|illegal|unethical|inappropriate|"
    r"uncomfortable|unsafe|harmful"
)
_SHOWN = 12  # tokens of each side


def kind(tokenizer: Any, token: int) -> str:
    """``length``: ends a text; ``format``: no letter or digit; ``refusal``: a word of refusals; else ``content``."""
    if token == tokenizer.eos_token_id:
        return "length"
    text = token_text(tokenizer, token).strip().lower()
    if token in tokenizer.all_special_ids or not any(map(str.isalnum, text)):
        return "format"
    return "refusal" if _REFUSAL.fullmatch(text) else "content"


def preference_of(counts: Counts, tokenizer: Any, source: str) -> dict[str, Any] | None:
    """The preference of what was counted, as ``plot-align estimate`` would count it; None where the sides are alike.

    Returns:
        ``preferred`` and ``rejected``: the strongest tokens, as :class:`TokenPreference`'s fields and ``kind``;
        ``distance``: total variation; ``certain``: the share of Σ|d| on tokens whose d is more than 1.96 standard
        errors from zero; ``mass``: how that share is divided among :data:`KINDS`, summing to 1.
    """
    preference = PreferenceDistribution(
        torch.from_numpy(counts.chosen),
        torch.from_numpy(counts.rejected),
        {
            "tokenizer": {"fingerprint": vocabulary_fingerprint(tokenizer), "size": counts.size},
            "sources": [{"id": source, "rows": counts.rows}],
        },
    )
    try:
        found = inspect(preference, tokenizer, n=_SHOWN)
    except InputError:  # d = 0 everywhere, or nothing scored on a side
        return None
    size = preference.difference().abs()  # (V,)
    clear = preference.confidence().abs() >= NORMAL_95  # (V,)
    mass = dict.fromkeys(KINDS, 0.0)
    for token in clear.nonzero().squeeze(-1).tolist():
        mass[kind(tokenizer, token)] += float(size[token])
    total = sum(mass.values())
    content = found.to_dict()
    return {
        **{
            side: [{**token, "kind": kind(tokenizer, token["id"])} for token in content[side]]
            for side in ("preferred", "rejected")
        },
        "distance": found.distance,
        "certain": total / float(size.sum()),
        "mass": {name: value / total if total else 0.0 for name, value in mass.items()},
    }
