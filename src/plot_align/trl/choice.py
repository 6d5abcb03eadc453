"""Which backend brings the term to a trainer, and why, said before anything is built."""

from __future__ import annotations

import importlib.metadata

from plot_align.trl.backends import TESTED_TRL
from plot_align.trl.batches import LOGITS_TRAINERS


def backend_for(kind: str) -> tuple[str, str]:
    """What :func:`plot_align.attach` takes for a trainer ``kind`` with the installed TRL and default options.

    Args:
        kind: one of :data:`plot_align.trl.batches.SUPPORTED`.

    Returns:
        ``fused``, ``logits``, or ``none`` where ``attach`` would refuse; and the reason.
    """
    if kind in LOGITS_TRAINERS:
        return "logits", "its loss builds the logits anyway, and the term reads them"
    version = importlib.metadata.version("trl")
    if not version.startswith(f"{TESTED_TRL}."):
        return "none", (
            f"trl {version} is not the {TESTED_TRL} that was tested; plot_backend='separate' works, at the cost of a "
            "second head pass"
        )
    return "fused", "the term is taken inside TRL's fused head, so there is no second head pass"
