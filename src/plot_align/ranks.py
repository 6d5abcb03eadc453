"""Which of several processes this is, where ``accelerate launch``, torchrun or ``--num_processes`` started more."""

from __future__ import annotations

import os
from typing import Any


def process_state() -> Any:
    """accelerate's ``PartialState``: ``num_processes``, ``process_index``, ``is_main_process``, ``device``, ...

    On a machine without accelerators ``PartialState()`` takes every process for the only one unless it is told that
    they run on the CPU; this tells it. The processes then talk over gloo.
    """
    import torch
    from accelerate import PartialState

    if PartialState._shared_state:  # a second call with other arguments than the first is an error there
        return PartialState()
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu)
