"""Which tokens an attack may use, and conversion between text and tokens for many suffixes at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Vocabulary:
    """Which tokens an attack may use.

    Attributes:
        anywhere: (V,) bool: tokens with text; no special tokens or padding rows, and by default printable ASCII only.
        first: (V,) bool: those that begin with a space, to separate the suffix from the behaviour.
    """

    anywhere: Tensor
    first: Tensor

    @classmethod
    def of(cls, model: Any, tokenizer: Any, *, non_ascii: bool = False) -> Vocabulary:
        """The tokens of ``tokenizer`` on the model's device; ``non_ascii`` allows any character."""
        rows = model.get_input_embeddings().weight.size(0)
        size = min(len(tokenizer), rows)
        texts = texts_in_context(tokenizer, torch.arange(size)[:, None])
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        anywhere = torch.zeros(rows, dtype=torch.bool)  # (V,)
        first = torch.zeros(rows, dtype=torch.bool)  # (V,)
        for token, text in enumerate(texts):
            written = bool(text.strip()) and "\ufffd" not in text
            if token in special or not written or not (non_ascii or (text.isascii() and text.isprintable())):
                continue
            anywhere[token] = True
            first[token] = text.startswith(" ")
        return cls(anywhere.to(model.device), first.to(model.device))


def texts_in_context(tokenizer: Any, rows: Tensor) -> list[str]:
    """Text of each row (B, L) when it follows other text: SentencePiece drops a leading space at the start."""
    anchor = tokenizer("a", add_special_tokens=False).input_ids
    prefix = len(tokenizer.decode(anchor))
    texts = tokenizer.batch_decode([anchor + row for row in rows.tolist()], clean_up_tokenization_spaces=False)
    return [text[prefix:] for text in texts]


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text; special tokens only if the text spells them."""
    if tokenizer.is_fast:
        return [
            row.ids for row in tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ]
    return tokenizer(list(texts), add_special_tokens=False).input_ids
