"""The demonstration: tune one real model with DPO, DPO+SFT and DPO+PLOT on our own pairs, and compare on one page.

Other rooms import the names below and nothing else; they are loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plot_align.demo.data import behaviors, benign

__all__ = ["behaviors", "benign"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from plot_align.demo import data

    return getattr(data, name)
