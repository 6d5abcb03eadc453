"""Load a model and its tokenizer from a hub id or a folder: weights as safetensors alone, no code of the model's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from plot_align.errors import InputError, first_line
from plot_align.parallel import everywhere, own_device


def check_dtype(name: str) -> None:
    """Check the value of an option ``--dtype``.

    Raises:
        InputError: it is neither auto nor a floating-point dtype of torch.
    """
    import torch

    dtype = getattr(torch, name, None)
    if name != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(f"--dtype is {name!r}, expected auto, float32, bfloat16 or float16")


def load_tokenizer(name: str, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The tokenizer of a hub id or a folder.

    Raises:
        InputError: there is none, or it needs code of its own and ``trust_remote_code`` is off.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, revision=revision or "main")
    except Exception as error:  # tokenizers raises the plain class for a damaged file
        raise InputError(
            f"no tokenizer could be loaded from {name!r} ({first_line(error)}); name a hub id or a folder holding one"
        ) from error


def refuse_pickles(source: str | os.PathLike[str]) -> None:
    """Refuse a folder whose weights are a pickle: reading one can run code.

    For the weights of a model ``use_safetensors=True`` does the same, also on the Hub; for those of an adapter or of a
    Trainer's checkpoint nothing does.

    Raises:
        InputError: there are weights as ``.bin`` or ``.pt``, and none as safetensors.
    """
    folder = Path(source)
    for name in ("pytorch_model", "adapter_model"):
        pickles = [file.name for ending in ("bin", "pt") for file in sorted(folder.glob(f"{name}*.{ending}"))]
        kind = "adapter_model" if name == "adapter_model" else "model"
        if pickles and not list(folder.glob(f"{kind}*.safetensors")):
            raise InputError(
                f"{folder} has its weights in {pickles[0]}, a pickle, which can run code when it is read; expected "
                "safetensors: save it anew with save_pretrained on a machine where you trust it"
            )


def load_model(
    name: str, *, device: str | None = None, dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """Model, on its device, and tokenizer of a hub id or a folder. Each of several processes loads its own.

    Args:
        device: None takes an accelerator where there is one.
        dtype: as torch calls it, or ``"auto"`` for the checkpoint's.

    Raises:
        InputError: they cannot be loaded, or weights are missing in the checkpoint.
    """
    return everywhere(lambda: _load(name, device, dtype, trust_remote_code))


def _load(name: str, device: str | None, dtype: str, trust_remote_code: bool) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    refuse_pickles(name)
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
        missing = sorted(found["missing_keys"])
        if missing and not getattr(model, "_hf_peft_config_loaded", False):  # of an adapter it tells other things
            raise InputError(
                f"{name!r} has no weights for {missing[0]} and {len(missing) - 1} others, which would be random; get "
                "the whole checkpoint"
            )
        return model.to(own_device(device)), tokenizer
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError, SafetensorError) as error:
        raise InputError(
            f"no model could be loaded from {name!r} ({first_line(error)}); name a hub id or a folder, and a device "
            "that this machine has"
        ) from error
