"""What the processes of test_doctor_ranks.py measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from plot_align.doctor import diagnose
from plot_align.doctor.forecast import Step
from plot_align.doctor.model import measure
from plot_align.parallel import in_step
from plot_align.preference.datasets import load_pairs
from plot_align.preference.estimation import scored_pairs


def measured(folder: str, data: str, partial: str) -> tuple[dict[str, Any], int]:
    """The measures, and how often the bar of this process moved."""
    torch.set_num_threads(1)
    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    pairs = list(scored_pairs(load_pairs(data), tokenizer))
    moved: list[int] = []
    step = Step(pairs=2, batches=2, answers=2)
    with in_step():
        found = measure(
            model, tokenizer, pairs, step=step, answered=3, batch_size=4, partial=Path(partial),
            bar=lambda *_: moved.append,
        )  # fmt: skip
    return found.to_dict(), sum(moved)


def examined(folder: str, data: str) -> dict[str, Any]:
    """What the checks of the data find, in batches of 20 rows."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with in_step():
        return {**diagnose(data, tokenizer, batch_size=20, progress=False).to_dict(), "seconds": 0}
