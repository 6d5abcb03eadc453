"""What a tuned model is measured on: the seven sub-preferences, and what must not get worse.

Other rooms import the names below and nothing else. They are loaded on first use, so that ``--help`` needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plot_align.evaluation.fluency import repetition

__all__ = ["repetition"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from plot_align.evaluation import fluency

    return getattr(fluency, name)
