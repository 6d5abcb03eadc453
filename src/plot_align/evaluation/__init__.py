"""What a tuned model is measured on: the seven sub-preferences, and what must not get worse.

Other rooms import the names below and nothing else. They are loaded on first use, so that ``--help`` needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from plot_align.lazy import lazy

if TYPE_CHECKING:
    from plot_align.evaluation.fluency import repetition

__all__ = ["repetition"]

__getattr__ = lazy(__name__, {"fluency": "repetition"})
