"""Digests of what decides a model's answers; stored beside them, so that they are never taken for another model's."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def model_identity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Everything but the question that decides an answer: weights and settings, tokenizer, chat template, dtype.

    Weights are identified by a digest of every parameter's shape and a sample of it, and of the configurations, not by
    name: folders may have the same name.
    """
    digest = hashlib.sha256()
    for config in (model.config, model.generation_config):
        settings = {} if config is None else config.to_dict()
        # Its path, and the version that saved it, change no answer.
        plain = {k: v for k, v in settings.items() if k not in ("_name_or_path", "transformers_version")}
        digest.update(json.dumps(plain, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 4096)].float().cpu()  # (≤ 8192,)
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return {
        "model": digest.hexdigest()[:16],
        "tokenizer": hashlib.sha256(_tokenization(tokenizer).encode()).hexdigest()[:16],
        "template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16],
        "dtype": str(model.dtype),
    }


def _tokenization(tokenizer: PreTrainedTokenizerBase) -> str:
    """How text becomes tokens, without padding and truncation, which every call sets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = {"vocabulary": tokenizer.get_vocab()} if backend is None else json.loads(backend.to_str())
    return json.dumps({k: v for k, v in whole.items() if k not in ("padding", "truncation")}, sort_keys=True)
