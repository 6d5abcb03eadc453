"""Which of several processes this is, where ``accelerate launch``, torchrun or ``--num_processes`` started more."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

_PATIENCE = timedelta(days=30)


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


def be_patient() -> None:
    """Let processes wait for each other for a month; by default one that is half an hour behind ends the run."""
    from torch.distributed import distributed_c10d

    distributed_c10d._set_pg_timeout(_PATIENCE)
