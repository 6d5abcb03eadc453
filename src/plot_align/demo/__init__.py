"""The demonstration: tune one real model with DPO, DPO+SFT and DPO+PLOT on our own pairs, and compare on one page.

Other rooms import the names below and nothing else; they are loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from plot_align.lazy import lazy

if TYPE_CHECKING:
    from plot_align.demo.data import behaviors, benign

__all__ = ["behaviors", "benign"]

__getattr__ = lazy(__name__, {"data": "behaviors benign"})
