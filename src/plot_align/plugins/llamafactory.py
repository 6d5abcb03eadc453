"""The term in LLaMA-Factory: its own training, with its DPO trainer built as it builds it and then attached to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plot_align.errors import InputError
from plot_align.plugins.block import PlotBlock, read_block
from plot_align.trl import artifacts
from plot_align.trl.attach import PlotHandle, attach


def train(options: dict[str, Any]) -> None:
    """What ``llamafactory-cli train`` does with a file of ``options``, which may have a block ``plot``.

    Raises:
        InputError: options of the term that are wrong, or a configuration that it does not work with.
    """
    from llamafactory.train.tuner import run_exp

    options = dict(options)
    block = read_block(options.pop("plot", None))
    if block is None:
        run_exp(options)
        return
    _check(options)
    with _attached(block) as handles:
        run_exp(options)
    for handle in handles:  # LLaMA-Factory writes the card anew at the end
        if handle.trainer.is_world_process_zero():
            card = Path(handle.trainer.args.output_dir) / "README.md"
            artifacts.extend_model_card(card, handle.config, handle.preference, "DPOTrainer")


def _check(options: dict[str, Any]) -> None:
    if options.get("stage") != "dpo":
        raise InputError(
            f"plot is set and stage is {options.get('stage')!r}, whose trainer PLOT cannot be attached to; expected "
            "stage: dpo, with any pref_loss: set it, or remove plot"
        )
    if os.environ.get("USE_MCA", "0").lower() in ("1", "true", "y"):
        raise InputError(
            "USE_MCA is set, so Megatron would train, which splits the head that PLOT needs whole; unset USE_MCA, or "
            "remove plot"
        )
    if os.environ.get("USE_RAY", "0").lower() in ("1", "true", "y"):
        raise InputError("USE_RAY is set, and Ray's workers would train without PLOT; unset USE_RAY, or remove plot")


@contextmanager
def _attached(block: PlotBlock) -> Iterator[list[PlotHandle]]:
    """Within this context LLaMA-Factory's DPO trainer gets the term when it is built; yields the handles."""
    from llamafactory.train.dpo import trainer as module  # run_dpo imports the class when it is called

    theirs, handles = module.CustomDPOTrainer, []

    def build(*args: Any, **kwargs: Any) -> Any:
        trainer = theirs(*args, **kwargs)
        if trainer.args.do_train:
            config = block.config
            if not trainer.finetuning_args.use_ref_model:  # orpo, simpo
                config = config.resolve_auto(reference_forward=False)
            handles.append(attach(trainer, block.preference, config))
        return trainer

    module.CustomDPOTrainer = build
    try:
        yield handles
    finally:
        module.CustomDPOTrainer = theirs
