"""The head of a Hugging Face model: the causal language model itself, and how its forward changes the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plot_align.head.fused import HeadSpec


def causal_lm(model: Any) -> Any:
    """The causal language model itself, without a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def head_spec(model: Any, temperature: float = 1.0) -> HeadSpec:
    """The scale and soft cap of the model's own forward, read from its configuration as TRL reads them."""
    config = model.config.get_text_config()
    scale = None
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None) if scale is None else scale
    divisor = getattr(config, "logits_scaling", None)
    if scale is None and divisor is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    return HeadSpec(
        temperature=temperature,
        softcap=getattr(config, "final_logit_softcapping", None),
        logit_scale=1.0 if scale is None else scale,
    )


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, spec: HeadSpec) -> Tensor:
    """``softcap(logit_scale · (hidden @ weight.T + bias)) / temperature``: (N, H) → (N, V), in float32 at least."""
    z = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))  # (N, V)
    if bias is not None:
        z = z + bias
    z = z * spec.logit_scale
    if spec.softcap is not None:
        z = spec.softcap * torch.tanh(z / spec.softcap)
    return z / spec.temperature
