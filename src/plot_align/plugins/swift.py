"""The term in ms-swift, for a file that ``--external_plugins`` names::

from plot_align.plugins.swift import use
use(alpha=0.1, preference="preference.safetensors")
"""

from __future__ import annotations

import sys
from typing import Any

import datasets
import numpy as np
from swift.dataset import LazyLLMDataset
from swift.rlhf_trainers import DPOTrainer
from swift.trainers import TrainerFactory

from plot_align.errors import InputError
from plot_align.plugins.block import PlotBlock, read_block
from plot_align.preference.estimation import estimate_tokenized
from plot_align.trl import attach


def use(**options: Any) -> None:
    """Makes ``swift rlhf --rlhf_type dpo`` train with the term.

    Args:
        **options: those of :class:`plot_align.PlotConfig`, and ``preference``, a file of ``plot-align estimate``;
            without it the training pairs are counted.

    Raises:
        InputError: wrong options, a preference that cannot be read, or a call from ``megatron rlhf``.
    """
    if "swift.megatron" in sys.modules:
        raise InputError(
            "the plug-in was read by swift's Megatron trainers, which split the head that PLOT needs whole; use "
            "`swift rlhf`, or leave the plug-in out"
        )
    PlotDPOTrainer.block = read_block(options, place="use()")
    TrainerFactory.TRAINER_MAPPING["dpo"] = f"{__name__}.{PlotDPOTrainer.__name__}"


class PlotDPOTrainer(DPOTrainer):
    """swift's DPO trainer with the term attached, by the options given to :func:`use`.

    Raises:
        InputError: batches in which a completion has no row of its own, or pairs that cannot be counted.
    """

    block: PlotBlock | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if self.block is None:
            raise InputError(
                "PlotDPOTrainer has no options; expected plot_align.plugins.swift.use() before it is made"
            )
        template = kwargs["template"]
        for name in ("packing", "padding_free"):
            if getattr(template, name, False):
                raise InputError(
                    f"{name} is on, with which swift joins all pairs in one row; PLOT expects a row for each "
                    f"completion: set {name} to false, or leave the plug-in out"
                )
        if template.sequence_parallel_size > 1:
            raise InputError(
                f"sequence_parallel_size is {template.sequence_parallel_size}, where no rank sees whole sequences; "
                "PLOT expects data parallelism alone: set it to 1, or leave the plug-in out"
            )
        super().__init__(*args, **kwargs)
        preference = self.block.preference
        if preference is None and isinstance(self.train_dataset, LazyLLMDataset):
            pairs, limit = _completions(self.train_dataset), template.max_length
            preference = estimate_tokenized(pairs, template.tokenizer, max_length=limit, progress=False)
        attach(self, preference, self.block.config)


def _completions(rows: LazyLLMDataset) -> datasets.Dataset:
    """The scored tokens of each pair, which swift tokenises when a row is asked for; −100 stands before them."""
    columns: dict[str, list[np.ndarray]] = {"chosen_labels": [], "rejected_labels": []}
    for index in range(len(rows)):
        row = rows[index]
        for name, sides in columns.items():
            labels = np.asarray(row[name], np.int32)  # (T,)
            sides.append(np.concatenate([[-100], labels[labels != -100]], dtype=np.int32))
    return datasets.Dataset.from_dict(columns)
