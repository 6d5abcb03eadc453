"""One page from many records: what was measured, which differences are sure, and how each number was made.

Other wings import the names below and nothing else; what draws and lays out a page is loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from plot_align.lazy import lazy

if TYPE_CHECKING:
    from plot_align.report.figures import SERIES, Picture, drawing, picture
    from plot_align.report.observations import collect
    from plot_align.report.page import environment, style_sheet
    from plot_align.report.runs import attack_curves
    from plot_align.report.tables import Table

__all__ = [
    "SERIES",
    "Picture",
    "Table",
    "attack_curves",
    "collect",
    "drawing",
    "environment",
    "picture",
    "style_sheet",
]

__getattr__ = lazy(
    __name__,
    {
        "figures": "SERIES Picture drawing picture",
        "observations": "collect",
        "page": "environment style_sheet",
        "runs": "attack_curves",
        "tables": "Table",
    },
)
