"""Ways to get the output distributions out of a training step. All code that touches TRL's internals is here.

``fused.py`` works inside TRL's own head pass, where that builds no logits; ``logits.py`` reads the logits where it
builds them; ``separate.py`` makes a second head pass. What a trainer has is asked of the installed TRL.
"""

from __future__ import annotations

from typing import Any, Literal

from plot_align.errors import InputError
from plot_align.head import causal_lm
from plot_align.trl.backends.base import HeadBackend
from plot_align.trl.backends.fused import FusedBackend
from plot_align.trl.backends.logits import LogitsBackend
from plot_align.trl.backends.separate import SeparateBackend
from plot_align.trl.batches import LOGITS_TRAINERS
from plot_align.trl.reference import reference_model
from plot_align.trl.term import PlotTerm

__all__ = ["FusedBackend", "HeadBackend", "LogitsBackend", "SeparateBackend", "make_backend", "own_pass"]

OwnPass = Literal["fused", "chunked", "logits"]


def own_pass(kind: str, loss_type: str | None = None) -> OwnPass:
    """Where the installed TRL's ``kind`` trainer has the outputs of its own head pass.

    ``fused``: in the fused head (TRL 1.15 and later). ``chunked``: in SFT's chunked loss (TRL 1.4 to 1.14, with
    ``loss_type="chunked_nll"``). ``logits``: in the logits that it builds.

    Raises:
        InputError: it has none of them.
    """
    from trl.trainer import utils

    if kind in LOGITS_TRAINERS:
        return "logits"
    if hasattr(utils, "add_fused_lm_head"):
        return "fused"
    if kind == "SFTTrainer" and loss_type == "chunked_nll":
        return "chunked"
    if kind in ("DPOTrainer", "SFTTrainer", "KTOTrainer"):
        return "logits"
    if kind == "PROTrainer":
        raise InputError("PRO trains through the fused head of trl 1.15 or newer: upgrade trl.")
    raise InputError(
        f"the {kind} of this TRL has no fused head, and PLOT does not read its logits, which it scales in place; "
        "expected trl 1.15 or newer: upgrade it, or set plot_backend='separate', which costs a second head pass."
    )


def make_backend(trainer: Any, kind: str, term: PlotTerm) -> HeadBackend:
    """The backend that ``term.config`` asks for, put on the trainer's models."""
    model = causal_lm(trainer.model)
    reference = reference_model(trainer) if term.config.needs_reference else None
    base = None if reference is None else causal_lm(reference)
    if term.config.ablations.plot_backend == "separate":
        return SeparateBackend(model, term, base, temperature=float(getattr(trainer, "temperature", 1.0) or 1.0))
    own = own_pass(kind, getattr(trainer.args, "loss_type", None))
    if own == "logits":
        return LogitsBackend(model, term, trainer.model, reference)
    autocast = trainer.accelerator.autocast
    return FusedBackend(model, term, base, autocast, called=trainer.model, chunked=own == "chunked")
