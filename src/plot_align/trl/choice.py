"""Which backend brings the term to a trainer, and why, said before anything is built."""

from __future__ import annotations

import dataclasses
import importlib.metadata

from packaging.version import Version

from plot_align.errors import InputError
from plot_align.trl.backends import own_pass
from plot_align.trl.backends.fused import NEWEST_TRL
from plot_align.trl.batches import is_earlier_kto

_WHY = {
    "fused": "the term is taken inside TRL's fused head, so there is no second head pass",
    "chunked": "the term is taken inside SFT's chunked loss, so there is no second head pass",
    "logits": "its loss builds the logits anyway, and the term reads them",
}


def backend_for(kind: str) -> tuple[str, str]:
    """What :func:`plot_align.attach` takes for a trainer ``kind`` with the installed TRL and default options.

    Args:
        kind: one of :data:`plot_align.trl.batches.SUPPORTED`.

    Returns:
        ``fused``, ``chunked``, ``logits``, or ``none`` where ``attach`` would refuse; and the reason.
    """
    version = importlib.metadata.version("trl")
    try:
        own = own_pass(kind, _default_loss(kind))
    except InputError as error:
        return "none", str(error)
    if own == "fused" and Version(version).release[:2] > Version(NEWEST_TRL).release:
        return "none", (
            f"trl {version} is newer than the {NEWEST_TRL} that was tested; plot_backend='separate' works, at the "
            "cost of a second head pass"
        )
    if kind == "KTOTrainer" and _has_earlier_kto():
        return "none", f"the KTOTrainer of trl {version} has batches of another form; trl 1.8 or newer is needed"
    return own, _WHY[own]


def _default_loss(kind: str) -> str | None:
    """The ``loss_type`` that an ``SFTConfig`` has if nobody sets it."""
    if kind != "SFTTrainer":
        return None
    from trl import SFTConfig

    defaults = {field.name: field.default for field in dataclasses.fields(SFTConfig)}
    if defaults.get("loss_type", "nll") is None:  # filled in by __post_init__, where SFT has the loss in chunks
        from trl.trainer import sft_trainer

        return "chunked_nll" if hasattr(sft_trainer, "_chunked_cross_entropy_loss") else "nll"
    return str(defaults["loss_type"]) if "loss_type" in defaults else None


def _has_earlier_kto() -> bool:
    import trl

    trainer = getattr(trl, "KTOTrainer", None)  # some versions had moved it among the experiments
    return trainer is None or is_earlier_kto(trainer)
