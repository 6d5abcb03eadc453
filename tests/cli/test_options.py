"""docs/options.md says what the dataclasses say."""

from __future__ import annotations

import types
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from plot_align.config import PlotAblations, PlotConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "options.md"


def values(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return values(next(part for part in get_args(hint) if part is not type(None)))
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    return {bool: "`true`, `false`", int: "whole number", float: "number"}[hint]


def table(kind: Any) -> str:
    hints = get_type_hints(kind)
    rows = ["| option | values | default | |", "|---|---|---|---|"]
    for option in fields(kind):
        if option.name != "ablations":
            default = "" if option.default is None else f"`{str(option.default).lower()}`"
            text = option.metadata["help"].replace("|", "\\|")
            rows.append(f"| `{option.name}` | {values(hints[option.name])} | {default} | {text} |")
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize("kind", [PlotConfig, PlotAblations])
def test_page_has_every_option(kind):
    assert table(kind) in PAGE.read_text(encoding="utf-8"), f"docs/options.md lacks this table:\n{table(kind)}"
