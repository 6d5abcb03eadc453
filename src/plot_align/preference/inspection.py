"""The most preferred and most rejected tokens of a preference distribution, as a table and as a figure."""

from __future__ import annotations

import os
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from plot_align.errors import InputError
from plot_align.io import complete_or_absent
from plot_align.preference.distribution import PreferenceDistribution, require_preference
from plot_align.records import NORMAL_95
from plot_align.text import readable

if TYPE_CHECKING:
    from rich.console import RenderableType

# Metadata that leaves the date out of a figure, so that the same preference gives the same file.
_UNDATED: dict[str, dict[str, None]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


@dataclass(frozen=True)
class TokenPreference:
    """One token: its counts, and its preference d with a confidence interval.

    Attributes:
        id: token id.
        text: the token's text, e.g. ``" sorry"``.
        chosen, rejected: its count in chosen and in rejected completions.
        difference: d, its frequency among the chosen tokens minus that among the rejected ones.
        low, high: 95 % confidence interval of d (normal approximation; tokens count as independent).
        z: two-proportion z-score of d.
    """

    id: int
    text: str
    chosen: int
    rejected: int
    difference: float
    low: float
    high: float
    z: float


@dataclass(frozen=True)
class Inspection:
    """The extremes of a preference distribution, and the size of its data.

    Attributes:
        preferred: tokens with the largest d > 0, largest first.
        rejected: tokens with the smallest d < 0, smallest first.
        rows: rows counted.
        chosen_tokens, rejected_tokens: ΣQ⁺ and ΣQ⁻.
        vocab_size: V.
        seen: tokens seen on either side.
        preferred_ids, rejected_ids: number of tokens with d > 0 and d < 0.
        distance: total variation ``½ Σ|d|`` between the chosen and the rejected tokens, 0 to 1.
        sources: the data sets counted, from the provenance.
    """

    preferred: list[TokenPreference]
    rejected: list[TokenPreference]
    rows: int
    chosen_tokens: int
    rejected_tokens: int
    vocab_size: int
    seen: int
    preferred_ids: int
    rejected_ids: int
    distance: float
    sources: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return asdict(self)


def inspect(preference: PreferenceDistribution, tokenizer: Any, *, n: int = 20) -> Inspection:
    """The ``n`` most preferred and the ``n`` most rejected tokens (fewer where fewer have a preference), by d.

    Args:
        preference: the preference distribution.
        tokenizer: the tokenizer it was counted with.
        n: number of tokens on each side, at least 1.

    Raises:
        InputError: another tokenizer, d = 0 everywhere, an empty side, or ``n`` below 1.
    """
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise InputError(f"n is {n!r}, expected how many tokens to show on each side, a whole number of 1 or more")
    preference.check_tokenizer(tokenizer)
    difference, error, z = preference.difference(), preference.standard_error(), preference.confidence()  # (V,)
    require_preference(difference)
    chosen, rejected = preference.chosen_counts, preference.rejected_counts

    def entry(index: int) -> TokenPreference:
        middle, half = float(difference[index]), NORMAL_95 * float(error[index])
        return TokenPreference(
            id=index,
            text=token_text(tokenizer, index),
            chosen=int(chosen[index]),
            rejected=int(rejected[index]),
            difference=middle,
            low=middle - half,
            high=middle + half,
            z=float(z[index]),
        )

    order = torch.argsort(difference, stable=True).tolist()  # most rejected first
    preferred_ids, rejected_ids = int((difference > 0).sum()), int((difference < 0).sum())
    return Inspection(
        preferred=[entry(index) for index in reversed(order[-min(n, preferred_ids) :])],
        rejected=[entry(index) for index in order[: min(n, rejected_ids)]],
        rows=preference.rows,
        chosen_tokens=int(chosen.sum()),
        rejected_tokens=int(rejected.sum()),
        vocab_size=preference.vocab_size,
        seen=int(((chosen + rejected) > 0).sum()),
        preferred_ids=preferred_ids,
        rejected_ids=rejected_ids,
        distance=float(difference.abs().sum()) / 2,
        sources=preference.sources,
    )


def token_text(tokenizer: Any, index: int) -> str:
    """The text of a token; its raw form if it is only a part of a character."""
    raw = tokenizer.convert_ids_to_tokens(index)
    if raw is None:
        return f"<no token {index}>"
    text = tokenizer.decode([index], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if "�" in text and "�" not in raw:
        return str(raw)
    if raw.startswith("▁") and not text.startswith(" "):
        return " " + text  # SentencePiece's decoder drops the space at the start of a text
    return text


def render(inspection: Inspection) -> RenderableType:
    """Two tables (most preferred, most rejected) below a summary of the data, for a rich console."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def table(title: str, tokens: list[TokenPreference], style: str) -> Table:
        grid = Table(title=title, title_style=f"bold {style}", title_justify="left", box=None, pad_edge=False)
        for name in ("token", "id", "chosen", "rejected", "d in %", "95 % interval", "z"):
            grid.add_column(name, justify="left" if name == "token" else "right", no_wrap=True)
        for token in tokens:
            grid.add_row(
                Text(readable(token.text), style=style),  # a Text: a token such as "[/b]" is no markup
                str(token.id),
                f"{token.chosen:,}",
                f"{token.rejected:,}",
                f"{100 * token.difference:+.3f}",
                f"{100 * token.low:+.3f} to {100 * token.high:+.3f}",
                f"{token.z:+.1f}",
            )
        return grid

    return Group(
        *map(Text, _summary(inspection)),
        Text(),
        table("most preferred", inspection.preferred, "blue"),
        Text(),
        table("most rejected", inspection.rejected, "dark_orange3"),
        Text(),
        Text("d: frequency among chosen minus frequency among rejected tokens; z takes tokens as independent draws."),
    )


def write_figure(inspection: Inspection, path: str | os.PathLike[str]) -> Path:
    """Draw the most rejected and the most preferred tokens as bars with 95 % intervals; returns the path.

    Args:
        inspection: what to draw.
        path: ``.png``, ``.svg`` or ``.pdf``. The file is never partial.

    Raises:
        InputError: another ending, or a folder that cannot be written.
    """
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    if path.suffix.lower() not in _UNDATED:
        raise InputError(f"figure is {str(path)!r}, expected a name ending in {', '.join(_UNDATED)}; rename it")
    glyphs = font_manager.get_font(font_manager.findfont("DejaVu Sans Mono")).get_charmap()
    panels = [
        ("Most rejected", inspection.rejected, "#D55E00"),  # Okabe and Ito's colours, safe for colour-blind readers
        ("Most preferred", inspection.preferred, "#0072B2"),
    ]
    bars = max(len(inspection.rejected), len(inspection.preferred))
    # parse_math: a token "$" is a dollar, not the start of a formula.
    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False, "svg.hashsalt": "plot-align"}):
        figure = Figure(figsize=(10.5, 1.9 + 0.24 * bars), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (title, tokens, colour) in zip(figure.subplots(1, 2), panels, strict=True):
            middle = [100 * token.difference for token in tokens]
            half = [100 * (token.high - token.difference) for token in tokens]
            axes.barh(
                range(len(tokens)),
                middle,
                xerr=half,
                height=0.72,
                color=colour,
                error_kw={"ecolor": "#333333", "elinewidth": 1.0, "capsize": 2.0},
            )
            labels = [readable(token.text, lambda character: ord(character) in glyphs) for token in tokens]
            axes.set_yticks(range(len(tokens)), labels, family="DejaVu Sans Mono", fontsize=9)
            axes.set_ylim(bars - 0.4, -0.6)  # the strongest on top, bars of both panels in line
            axes.axvline(0, color="#333333", linewidth=0.8)
            axes.set_title(title, loc="left", color=colour, fontsize=11, fontweight="bold")
            axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.tick_params(axis="y", length=0)
            axes.tick_params(axis="x", labelsize=9)
            for side in ("top", "right", "left"):
                axes.spines[side].set_visible(False)
        figure.supxlabel(
            "d: frequency among chosen minus frequency among rejected tokens, in percentage points (95 % interval)",
            fontsize=9,
        )
        title = "\n".join(textwrap.fill(line, width=150) for line in _summary(inspection))
        figure.suptitle(title, fontsize=9, color="#444444", x=0.01, ha="left")
        with complete_or_absent(path) as temporary:
            figure.savefig(temporary, dpi=160, metadata=_UNDATED[path.suffix.lower()])
    return path


def _summary(inspection: Inspection) -> list[str]:
    """Two lines: the data counted, and the difference between the two sides."""
    names = ", ".join(str(source.get("id")) for source in inspection.sources) or "unknown data"
    return [
        f"{names}: {inspection.rows:,} rows, {inspection.chosen_tokens:,} chosen and "
        f"{inspection.rejected_tokens:,} rejected tokens",
        f"of {inspection.vocab_size:,} token ids {inspection.preferred_ids:,} are preferred and "
        f"{inspection.rejected_ids:,} rejected; total variation between the two sides {inspection.distance:.3f}",
    ]
