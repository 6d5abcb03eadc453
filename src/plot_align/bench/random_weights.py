"""A model with random weights: the time of a step does not depend on the weights."""

from __future__ import annotations

from typing import Any

import torch


def random_model(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A model of this configuration with random weights, made on ``device`` in ``dtype``."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def word_tokenizer(size: int) -> Any:
    """A tokenizer of ``size`` words; with one word per row of the head, no row is padding."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": 1, **{f"w{index}": index for index in range(2, size)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<pad>",
    )
