"""Dimensions of real models, to be filled with random weights: a step takes as long whatever the weights say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from plot_align.bench.random_weights import random_model, word_tokenizer


@dataclass(frozen=True)
class Shape:
    """A model's dimensions and a micro-batch of it: ``rows`` sequences of ``length`` tokens.

    ``tied``: the LM head is the embedding matrix, as in Llama-3.2 up to 3B.
    """

    vocab: int
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    rows: int = 2
    length: int = 1024
    family: Literal["llama", "qwen2"] = "llama"
    tied: bool = False


# Of the config.json of each model.
SHAPES = {
    "tiny": Shape(1003, 32, 2, 64, 4, 2, 4, 24),
    "cpu-32k": Shape(32_000, 512, 4, 1408, 8, 8, 4, 128),
    "cpu-128k": Shape(128_256, 512, 4, 1408, 8, 8, 4, 128),
    "llama-3.2-1b": Shape(128_256, 2048, 16, 8192, 32, 8, tied=True),
    "llama-3.2-3b": Shape(128_256, 3072, 28, 8192, 24, 8, tied=True),
    "llama-3.1-8b": Shape(128_256, 4096, 32, 14336, 32, 8),
    "qwen2.5-0.5b": Shape(151_936, 896, 24, 4864, 14, 2, family="qwen2", tied=True),
    "qwen2.5-7b": Shape(152_064, 3584, 28, 18944, 28, 4, family="qwen2"),
}


def config_of(shape: Shape) -> Any:
    """The configuration of a model of this shape."""
    from transformers import AutoConfig

    return AutoConfig.for_model(
        shape.family,
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=max(2048, shape.length),
        tie_word_embeddings=shape.tied,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )


def random_weights(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and tokenizer of this shape."""
    return random_model(config_of(shape), device, dtype), word_tokenizer(shape.vocab)
