"""Load a model and its tokenizer from a hub id or a folder."""

from __future__ import annotations

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
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"no tokenizer could be loaded from {name!r} ({first_line(error)}); name a hub id or a folder holding one"
        ) from error


def load_model(
    name: str, *, device: str | None = None, dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """Model, on its device, and tokenizer of a hub id or a folder. Each of several processes loads its own.

    Args:
        device: None takes an accelerator where there is one.
        dtype: as torch calls it, or ``"auto"`` for the checkpoint's.

    Raises:
        InputError: they cannot be loaded.
    """
    return everywhere(lambda: _load(name, device, dtype, trust_remote_code))


def _load(name: str, device: str | None, dtype: str, trust_remote_code: bool) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code)
        return model.to(own_device(device)), tokenizer
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError) as error:
        raise InputError(
            f"no model could be loaded from {name!r} ({first_line(error)}); name a hub id or a folder, and a device "
            "that this machine has"
        ) from error
