"""A tokenizer of 300 ids with a chat template, without a network."""

from __future__ import annotations

from functools import cache
from typing import Any

TEMPLATE = (
    "{%- for message in messages -%}{{- '<|' + message['role'] + '|>' + message['content'] + '<eos>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


@cache
def tokenizer() -> Any:
    """Byte-level BPE, trained on one sentence."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(
        ["what is one plus two ? the sum is three , gladly . no idea , leave me alone ."], trainer
    )
    found = PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=512, pad_token="<pad>", eos_token="<eos>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    found.chat_template = TEMPLATE
    return found
