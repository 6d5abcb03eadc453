"""The report's figures, each as PNG, as SVG, and as SVG for the page, whose colours follow light and dark mode.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; markers, hatches and lines differ too.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from markupsafe import Markup

from plot_align.report.compare import Comparison, Row, is_attack, is_refusal
from plot_align.report.runs import CURVES, Curve
from plot_align.report.tables import Entry, Table, arrow, count, interval_of, section_title
from plot_align.results import ATTACK_CURVES, BUDGET_CURVES, CATEGORIES
from plot_align.text import one_line, readable

PAPER_TIME = 1.0267  # arXiv 2604.01837: +2.67 % training time over DPO
PAPER_ASR = 0.5  # same paper: up to half of DPO's attack success

_INK, _MUTED, _GRID, _CARD = "#1c1e21", "#5f6369", "#d8dbe0", "#fefefe"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_ROLES = {
    _INK: "currentColor",
    _MUTED: "var(--muted)",
    _GRID: "var(--grid)",
    _CARD: "var(--card)",
    **{colour: f"var(--s{index})" for index, colour in enumerate(SERIES)},
}
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "*")
_HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----", "oo", "++++", "||||", "**")
_DASHES = ("-", "--", "-.", ":")
_WIDTH = 4.5  # inches; readable on a phone held upright
_NAME = 24  # characters of a model's name
_RC = {
    "text.parse_math": False,  # "$" is a token here, not the start of a formula
    "text.usetex": False,
    "svg.hashsalt": "plot-align",
    "font.family": ["DejaVu Sans"],  # comes with matplotlib
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "axes.unicode_minus": True,
    "figure.facecolor": _CARD,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.width": 0.8,
    "hatch.linewidth": 0.7,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Picture:
    """A drawn figure.

    Attributes:
        name: of its files. title: for the caption. description: for screen readers.
        svg: for the page. files: ending → content.
        table: the numbers it shows.
    """

    name: str
    title: str
    description: str
    svg: Markup
    files: dict[str, bytes]
    table: Table


def style(index: int) -> dict[str, Any]:
    """Colour, marker and hatch of the index-th model."""
    return {
        "color": SERIES[index % len(SERIES)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "hatch": _HATCHES[index % len(_HATCHES)],
        "linestyle": _DASHES[index // len(SERIES) % len(_DASHES)],
    }


def seven(comparison: Comparison) -> Picture | None:
    """The scores of the seven sub-preferences as bars, each on the scale of its possible range; None if there are
    none."""
    rows = [row for row in comparison.rows if row.score and row.section in CATEGORIES and row.first["bounds"]]
    if not rows:
        return None
    models = [model for model in comparison.models if any(model in row.cells for row in rows)]
    thick = 0.17 if len(models) <= 4 else 0.11
    # Inches; a label of three lines needs room, however few the bars.
    heights = [max(0.5, thick * sum(model in row.cells for model in models) + 0.24) for row in rows]
    with drawing(_WIDTH, sum(heights) + 0.7 + _legend_height(models)) as figure:
        axes = figure.subplots()
        numbers: list[list[Entry]] = []
        middles, top = [], 0.0
        for row, height in zip(rows, heights, strict=True):
            at = top + (height - 0.24 - thick * sum(model in row.cells for model in models)) / 2
            middles.append(top + (height - 0.24) / 2)
            for model in (model for model in models if model in row.cells):
                quantity = row.cells[model].quantity
                value, low, high = _on_possible_scale(quantity)
                look = style(comparison.models.index(model))
                axes.barh(
                    at,
                    value,
                    thick * 0.86,
                    align="edge",
                    color=look["color"],
                    hatch=look["hatch"],
                    edgecolor=_INK,
                    linewidth=0.5,
                )
                axes.plot((low, high), (at + thick * 0.43,) * 2, color=_INK, linewidth=1, solid_capstyle="butt")
                numbers.append([row.section, row.title, model, *_numbers(quantity)])
                at += thick
            top += height
        axes.set_yticks(middles, [_row_label(row) for row in rows], fontsize=8)
        axes.set_ylim(top, -0.12)
        axes.set_xlim(0, 1)
        _percent(axes.xaxis)
        axes.set_xlabel("of what is possible\n(↓ less is better)")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        _legend(figure, axes, comparison, models, bars=True)
        columns = ["sub-preference", "measure", "model", "value", "low", "high", "n"]
        return picture(
            figure,
            "sub_preferences",
            "The seven sub-preferences",
            f"Bars with 95 % intervals of {count(len(rows), 'score')} for {count(len(models), 'model')}.",
            Table("sub_preferences", "The seven sub-preferences: scores with 95 % intervals", columns, numbers),
        )


def safety(comparison: Comparison, *, paper: bool) -> list[Picture]:
    """For each attack, its success against over-refusal: one point per model, with both intervals.

    ``paper`` draws the paper's claim relative to the model that :func:`dpo_among` finds.
    """
    dpo = dpo_among(comparison)
    refusals = [row for row in comparison.rows if is_refusal(row)]
    found = []
    for number, attack in enumerate(row for row in comparison.rows if is_attack(row)):
        refusal = max(refusals, key=lambda row: _partners(attack, row), default=None)
        if refusal is None or not _partners(attack, refusal)[1]:
            continue
        models = [m for m in comparison.models if m in attack.cells and m in refusal.cells]
        with drawing(_WIDTH, 3.7 + _legend_height(models)) as figure:
            axes = figure.subplots()
            numbers: list[list[Entry]] = []
            for model in models:
                x, y = refusal.cells[model].quantity, attack.cells[model].quantity
                look = style(comparison.models.index(model))
                axes.errorbar(
                    x["value"],
                    y["value"],
                    xerr=_arms(x),
                    yerr=_arms(y),
                    fmt=look["marker"],
                    color=look["color"],
                    ecolor=look["color"],
                    elinewidth=1,
                    capsize=2.5,
                    markersize=7,
                    markeredgecolor=_INK,
                    markeredgewidth=0.6,
                )
                numbers.append([model, *_numbers(y), *_numbers(x)])
            if paper and dpo in models:
                half = PAPER_ASR * attack.cells[dpo].quantity["value"]
                axes.axhline(half, color=_MUTED, linewidth=1, linestyle="--")
                text = f"the paper: up to half of {_name(dpo)}'s"
                axes.text(0.99, half, text, ha="right", va="bottom", fontsize=8, color=_MUTED)
            axes.set(
                xlim=(-0.02, 1.02),
                ylim=(-0.02, 1.02),
                xlabel="over-refusal (of harmless requests)",
                ylabel=_wrapped(attack.title, 40),
            )
            _percent(axes.xaxis)
            _percent(axes.yaxis)
            axes.grid()
            axes.annotate(
                "better",
                (0.0, 0.0),
                (0.09, 0.075),
                fontsize=8,
                color=_MUTED,
                arrowprops={"arrowstyle": "->", "color": _MUTED},
            )
            _legend(figure, axes, comparison, models)
            title = f"{attack.title}, against over-refusal"
            columns = ["model", "attack success", "low", "high", "n", "over-refusal", "low", "high", "n"]
            found.append(
                picture(
                    figure,
                    f"safety_{number + 1}",
                    title,
                    f"{count(len(models), 'model')} as points with 95 % intervals; best is the lower left corner.",
                    Table(f"safety_{number + 1}", title, columns, numbers),
                )
            )
    return found


def dpo_among(comparison: Comparison) -> str | None:
    """The model that corresponds to the paper's DPO, by name: DPO without PLOT, preferably the baseline."""
    alike = [m for m in comparison.models if "dpo" in m.lower() and "plot" not in m.lower()]
    return min(alike, key=lambda model: (model != comparison.baseline, model.lower() != "dpo"), default=None)


def curves(found: Mapping[str, Mapping[str, Curve]], comparison: Comparison) -> list[Picture]:
    """A figure for each number in the trainer's log, with a line per run. A run named like a model has its style.

    Args:
        found: key → run → step → value.
    """
    labels = dict(CURVES)
    names = list(dict.fromkeys(name for of in found.values() for name in of))
    known = [name for name in comparison.models if name in names]
    order = [*comparison.models, *(name for name in names if name not in known)] if known else names
    pictures = []
    for key, lines in found.items():
        file = re.sub("[^a-z]+", "_", f"training_runs_{key}")
        title = f"{labels[key]}, training runs"
        with drawing(_WIDTH, 2.6 + _legend_height(list(lines))) as figure:
            axes = figure.subplots()
            numbers: list[list[Entry]] = []
            for name, curve in lines.items():
                look = style(order.index(name))
                axes.plot(
                    list(curve),
                    list(curve.values()),
                    color=look["color"],
                    linestyle=look["linestyle"],
                    marker=look["marker"],
                    markersize=4,
                    markevery=max(1, len(curve) // 8),
                    linewidth=1.5,
                    label=_name(name),
                )
                numbers += [[name, step, value] for step, value in curve.items()]
            axes.set(xlabel="optimiser step", ylabel=_wrapped(labels[key], 34))
            axes.margins(x=0.02)
            axes.grid(axis="y")
            _legend_of(figure, axes)
            table = Table(file, title, ["run", "step", "value"], numbers)
            pictures.append(
                picture(figure, file, title, f"{labels[key]} over the steps of {count(len(lines), 'run')}.", table)
            )
    return pictures


def sensitivity(
    lines: Mapping[str, tuple[str, Mapping[str, Sequence[tuple[float, Any]]], Mapping[str, Any]]], number: int
) -> list[Picture]:
    """A figure for each of a sweep's first four metrics: mean and standard error against α."""
    pictures = []
    for key in list(lines)[:4]:
        label, of, without = lines[key]
        file = f"alpha_{number}_{re.sub('[^a-z0-9]+', '_', key)}"
        with drawing(_WIDTH, 2.9 + _legend_height([*of, *without])) as figure:
            axes = figure.subplots()
            numbers: list[list[Entry]] = []
            for index, (method, entry) in enumerate(without.items()):
                error = _error(entry)
                axes.axhline(
                    entry["value"],
                    color=_MUTED,
                    linestyle=_DASHES[(index + 1) % 4],
                    linewidth=1.2,
                    label=_name(f"{method} without PLOT"),
                )
                axes.axhspan(entry["value"] - error, entry["value"] + error, color=_MUTED, alpha=0.12, linewidth=0)
                numbers.append([f"{method} without PLOT", None, entry["value"], entry.get("error"), entry["n"]])
            for index, (name, points) in enumerate(of.items()):
                look = style(index)
                axes.errorbar(
                    [alpha for alpha, _ in points],
                    [e["value"] for _, e in points],
                    yerr=[_error(e) for _, e in points],
                    color=look["color"],
                    marker=look["marker"],
                    markersize=5,
                    linewidth=1.4,
                    capsize=2.5,
                    linestyle=look["linestyle"],
                    label=_name(name),
                )
                numbers += [[name, alpha, e["value"], e.get("error"), e["n"]] for alpha, e in points]
            axes.set_xscale("log")
            alphas = sorted({alpha for points in of.values() for alpha, _ in points})
            axes.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
            axes.minorticks_off()
            axes.set(xlabel="α, the weight of the PLOT term", ylabel=_wrapped(label, 34))
            axes.grid(axis="y")
            _legend_of(figure, axes)
            title = f"{label.rstrip(' ↑↓')} against α"
            pictures.append(
                picture(
                    figure,
                    file,
                    title,
                    f"Mean and standard error over seeds, {count(len(of), 'line')}.",
                    Table(file, title, ["line", "alpha", "mean", "standard error", "seeds"], numbers),
                )
            )
    return pictures


def attack(
    kind: str, name: str, of: Mapping[str, Mapping[float, Any]], comparison: Comparison, number: int
) -> Picture:
    """Success of an attack against its test cases, or another of ATTACK_CURVES."""
    xlabel = ATTACK_CURVES[kind]
    file, title = f"attack_{kind}_{number}", f"Success of {name} against {xlabel}"
    models = [model for model in comparison.models if model in of]
    with drawing(_WIDTH, 2.9 + _legend_height(models)) as figure:
        from matplotlib.ticker import MaxNLocator

        axes = figure.subplots()
        numbers: list[list[Entry]] = []
        for model in models:
            look, curve = style(comparison.models.index(model)), of[model]
            low, high = zip(*(entry["interval"] for entry in curve.values()), strict=True)
            faint = 0.3 / max(2, len(models))
            axes.fill_between(list(curve), low, high, color=look["color"], alpha=faint, linewidth=0)
            axes.plot(
                list(curve),
                [entry["value"] for entry in curve.values()],
                color=look["color"],
                marker=look["marker"],
                linestyle=look["linestyle"],
                markersize=5,
                linewidth=1.5,
            )
            numbers += [[model, at, *_numbers(entry)] for at, entry in curve.items()]
        axes.set(xlabel=xlabel, ylabel="attack success", ylim=(-0.02, 1.02))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _percent(axes.yaxis)
        axes.grid(axis="y")
        _legend(figure, axes, comparison, models)
        return picture(
            figure,
            file,
            title,
            f"One line with a 95 % band for each of {count(len(models), 'model')}.",
            Table(file, title, ["model", xlabel, "attack success", "low", "high", "n"], numbers),
        )


def budget(kind: str, model: str, of: Mapping[str, Mapping[float, Any]], number: int) -> Picture:
    """Success of a model's attacks against what they spend, one of BUDGET_CURVES: at a place, equal cost."""
    xlabel = BUDGET_CURVES[kind]
    file, title = f"budget_{kind}_{number}", f"Attacks on {one_line(model)} against {xlabel.split(',')[0]}"
    with drawing(_WIDTH, 2.9 + _legend_height(list(of))) as figure:
        axes = figure.subplots()
        numbers: list[list[Entry]] = []
        for index, (attack, curve) in enumerate(of.items()):
            look = style(index)
            low, high = zip(*(entry["interval"] for entry in curve.values()), strict=True)
            faint = 0.3 / max(2, len(of))
            axes.fill_between(list(curve), low, high, step="post", color=look["color"], alpha=faint, linewidth=0)
            if len(curve) == 1:
                axes.vlines(list(curve), low, high, color=look["color"], linewidth=1)
            axes.plot(
                list(curve),
                [entry["value"] for entry in curve.values()],
                drawstyle="steps-post",
                color=look["color"],
                marker=look["marker"],
                linestyle=look["linestyle"],
                markersize=5,
                linewidth=1.5,
                label=_name(attack),
            )
            numbers += [[attack, at, *_numbers(entry)] for at, entry in curve.items()]
        axes.set(xlabel=_wrapped(xlabel, 50), ylabel="attack success", ylim=(-0.02, 1.02), xscale="log")
        _percent(axes.yaxis)
        axes.grid(axis="y")
        _legend_of(figure, axes)
        return picture(
            figure,
            file,
            title,
            f"One line with a 95 % band for each of {count(len(of), 'attack')}.",
            Table(file, title, ["attack", xlabel, "attack success", "low", "high", "n"], numbers),
        )


def moved(model: str, reference: str, rows: Sequence[Mapping[str, Any]], number: int) -> Picture:
    """The tokens whose mean probability rose and fell most."""
    up = sorted((row for row in rows if row["change"] > 0), key=lambda row: -row["change"])[:12]
    down = sorted((row for row in rows if row["change"] < 0), key=lambda row: row["change"])[:12]
    bars = max(len(up), len(down), 1)
    file, title = f"moved_tokens_{number}", f"Most-moved tokens: {one_line(model)}"
    # Laid out by hand, which is several times faster; there is one such figure per model.
    height, sides = 1.1 + 0.21 * bars, (down, up)
    labels = [[_token(row["token"]) for row in side] for side in sides]
    widths = [0.12 + 0.067 * max(map(len, of), default=0) for of in labels]  # inches, of DejaVu Sans Mono at 8 pt
    room = (_WIDTH - sum(widths) - 0.2) / 2
    starts = (widths[0], widths[0] + room + widths[1])
    with drawing(_WIDTH, height, layout=None) as figure:
        for side, texts, start, label in zip(sides, labels, starts, ("Moved from", "Moved to"), strict=True):
            axes = figure.add_axes((start / _WIDTH, 0.75 / height, room / _WIDTH, 1 - 1.1 / height))
            for at, row in enumerate(side):
                liked = _liked(row)
                axes.barh(
                    at,
                    100 * abs(row["change"]),
                    0.74,
                    linewidth=0.5,
                    edgecolor=_INK,
                    color={1: SERIES[0], -1: SERIES[1], 0: _GRID}[liked],
                    hatch={1: "", -1: "////", 0: ""}[liked],
                )
            axes.set_yticks(range(len(side)), texts, fontsize=8, family="DejaVu Sans Mono")
            axes.set_ylim(bars - 0.4, -0.6)
            axes.set_title(label, loc="left", fontsize=9, fontweight="bold")
            axes.tick_params(axis="y", length=0)
            axes.tick_params(axis="x", labelsize=8)
            axes.grid(axis="x")
            axes.spines["left"].set_visible(False)
            axes.locator_params(axis="x", nbins=3)
        says = f"change of the mean probability, in points,\nagainst {_name(reference)}"
        figure.text(0.5, 0.06 / height, says, fontsize=8, ha="center", va="bottom")
        columns = ["token", "id", "change", "preference d", "in chosen", "in rejected"]
        numbers = [
            [readable(row["token"]), *(row.get(key) for key in ("id", "change", "d", "chosen", "rejected"))]
            for row in rows
        ]
        says = "Blue: preferred tokens (more often in chosen answers); hatched: rejected ones."
        return picture(
            figure,
            file,
            title,
            says if any(_liked(row) for row in rows) else "Change of each token.",
            Table(file, title, columns, numbers),
        )


def flows(model: str, rows: Sequence[Mapping[str, Any]], number: int) -> Picture | None:
    """The largest movements of the transport plan as ribbons, from the tokens left to the tokens right."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    largest = sorted((row for row in rows if row["mass"] > 0), key=lambda row: -row["mass"])[:14]
    if not largest:
        return None
    total = math.fsum(row["mass"] for row in largest)
    sources = list(dict.fromkeys(row["from"] for row in largest))
    sinks = list(dict.fromkeys(row["to"] for row in largest))
    gap = 0.035 * total
    file, title = f"transport_{number}", f"Largest flows of probability: {one_line(model)}"
    with drawing(_WIDTH, 0.4 + 0.27 * max(len(sources), len(sinks)), layout=None) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        ends: dict[str, dict[str, float]] = {}
        for side, names, x in (("from", sources, 0.0), ("to", sinks, 1.0)):
            at = 0.0
            ends[side] = {}
            for name in names:
                height = math.fsum(row["mass"] for row in largest if row[side] == name)
                ends[side][name] = at
                axes.plot([x, x], [at, at + height], color=_INK, linewidth=4, solid_capstyle="butt")
                axes.text(
                    x + (-0.03 if x == 0 else 0.03),
                    at + height / 2,
                    _token(name),
                    va="center",
                    fontsize=8,
                    ha="right" if x == 0 else "left",
                    family="DejaVu Sans Mono",
                )
                at += height + gap
        for row in largest:
            y0, y1, mass = ends["from"][row["from"]], ends["to"][row["to"]], row["mass"]
            ends["from"][row["from"]] += mass
            ends["to"][row["to"]] += mass
            corners = [
                (0.0, y0),
                (0.5, y0),
                (0.5, y1),
                (1.0, y1),
                (1.0, y1 + mass),
                (0.5, y1 + mass),
                (0.5, y0 + mass),
                (0.0, y0 + mass),
                (0.0, y0),
            ]
            codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
            axes.add_patch(PathPatch(Path(corners, codes), facecolor=SERIES[0], alpha=0.38, linewidth=0))
        axes.set_xlim(-0.8, 1.8)  # room for 24 characters on either side
        axes.margins(y=0.03)
        axes.invert_yaxis()
        axes.set_axis_off()
        columns = ["from", "to", "mass", "cost a unit"]
        numbers = [[readable(row["from"]), readable(row["to"]), row["mass"], row["cost"]] for row in rows]
        return picture(
            figure,
            file,
            title,
            f"The {count(len(largest), 'largest movement')} of the cheapest plan, {100 * total:.2f} points of "
            "probability together; the width of a ribbon is its mass.",
            Table(file, title, columns, numbers),
        )


def cost(entry: Mapping[str, Any], *, paper: bool) -> Picture:
    """Time of a training step with PLOT, relative to one without."""
    low, high = entry.get("spread") or (entry["value"],) * 2
    with drawing(_WIDTH, 1.35) as figure:
        axes = figure.subplots()
        axes.errorbar(
            entry["value"],
            0,
            xerr=[[max(0.0, entry["value"] - low)], [max(0.0, high - entry["value"])]],
            fmt="o",
            color=SERIES[0],
            markersize=8,
            capsize=4,
            label="measured",
        )
        axes.axvline(1, color=_INK, linewidth=1, label="without PLOT")
        if paper:
            label = "the paper: +2.67 % over DPO"
            axes.axvline(PAPER_TIME, color=SERIES[1], linewidth=1.4, linestyle="--", label=label)
        axes.set(yticks=[], ylim=(-1, 1), xlabel="time of a training step, with PLOT over without")
        axes.margins(x=0.15)
        axes.spines["left"].set_visible(False)
        _legend_of(figure, axes)
        numbers: list[list[Entry]] = [["measured", entry["value"], low, high, entry["n"]]]
        if paper:
            numbers.append(["the paper", PAPER_TIME, None, None, None])
        title = "What PLOT costs in time"
        return picture(
            figure,
            "cost_time",
            title,
            f"The ratio of {entry['n']} pairs of steps, measured in turn; the bar is their middle half.",
            Table("cost_time", title, ["what", "ratio", "low", "high", "rounds"], numbers),
        )


class drawing:
    """A matplotlib figure with the report's settings and without a window."""

    def __init__(self, width: float, height: float, *, layout: Literal["constrained"] | None = "constrained") -> None:
        import matplotlib

        self.context = matplotlib.rc_context(_RC)
        self.size, self.layout = (width, height), layout

    def __enter__(self) -> Any:
        from matplotlib.figure import Figure

        self.context.__enter__()
        return Figure(figsize=self.size, layout=self.layout)

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)


def picture(figure: Any, name: str, title: str, description: str, table: Table) -> Picture:
    """Lay out and draw as PNG, draw the same as SVG, and make the page's SVG from that."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    png, svg = io.BytesIO(), io.StringIO()
    figure.dpi = 144
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    figure.set_layout_engine("none")
    FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": None})
    title, description = one_line(title, longest=160), one_line(description, longest=400)
    markup = _inline(svg.getvalue(), name, title, description)
    return Picture(name, title, description, markup, {".png": png.getvalue(), ".svg": svg.getvalue().encode()}, table)


def _inline(svg: str, name: str, title: str, description: str) -> Markup:
    """An SVG document as an element of the page: no prologue, no comments, unique ids, colours by role.

    Texts are drawn as paths, so only the title and the description contain text of data or models.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]+)"', body)
    body = re.sub(r"^<svg[^>]*>", "", body)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", body)
    body = re.sub(
        r'(?:style|fill|stroke)="[^"]*"',
        lambda match: re.sub(r"#[0-9a-f]{6}\b", lambda hit: _ROLES.get(hit[0], hit[0]), match[0]),
        body,
    )
    body = re.sub(  # a hundredth of a point is enough
        r' d="[^"]*"', lambda match: re.sub(r"(\d\.\d{2})\d+", r"\1", match[0]), body
    )
    body = re.sub(r"\s*\n\s*", "\n", body)
    start = Markup(
        '<svg class="figure" viewBox="{}" role="img" aria-labelledby="{name}-title {name}-desc" '
        'style="stroke-linejoin:round;stroke-linecap:butt"><title id="{name}-title">{}</title>'
        '<desc id="{name}-desc">{}</desc>'
    ).format(box[1] if box else "", title, description, name=name)
    return start + Markup(body)


@cache
def _glyphs() -> frozenset[int]:
    from matplotlib import font_manager

    mono = font_manager.get_font(font_manager.findfont("DejaVu Sans Mono")).get_charmap()
    sans = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
    return frozenset(mono) & frozenset(sans)


def _has_glyph(character: str) -> bool:
    return ord(character) in _glyphs()


def _name(text: str) -> str:
    shown = one_line(text, _has_glyph, longest=_NAME)
    return f" {shown}" if shown.startswith("_") else shown  # matplotlib hides labels that begin with "_"


def _token(text: str) -> str:
    return one_line(text, _has_glyph, space="␣", longest=14)


def _wrapped(text: str, width: int) -> str:
    """Wrap on at most three lines."""
    return "\n".join(textwrap.wrap(one_line(text, _has_glyph), width, max_lines=3, placeholder="…"))


def _row_label(row: Row) -> str:
    less = f" {arrow('lower')}" if row.first["better"] == "lower" else ""
    return f"{section_title(row.section)}\n{_wrapped(row.title, 24)}{less}"


def _on_possible_scale(quantity: Mapping[str, Any]) -> tuple[float, float, float]:
    """Value and interval on a scale from the smallest to the largest possible value."""
    low, high = quantity["bounds"]
    ends = interval_of(quantity) or (quantity["value"],) * 2
    value, start, end = ((x - low) / (high - low) for x in (quantity["value"], *ends))
    return value, start, end


def _arms(entry: Mapping[str, Any]) -> list[list[float]]:
    """Lengths of the interval's two arms, as matplotlib wants them."""
    low, high = interval_of(entry) or (entry["value"],) * 2
    return [[max(0.0, entry["value"] - low)], [max(0.0, high - entry["value"])]]


def _numbers(entry: Mapping[str, Any]) -> list[Entry]:
    return [entry["value"], *(interval_of(entry) or (None, None)), entry["n"]]


def _error(entry: Mapping[str, Any]) -> float:
    error = entry.get("error")
    return float(error) if error is not None and math.isfinite(error) else 0.0


def _partners(attack: Row, refusal: Row) -> tuple[bool, int]:
    """How well an over-refusal row matches an attack: same command, and how many models both have."""
    same = attack.measure.startswith("redteam ") == refusal.measure.startswith("redteam ")
    return same, len(attack.cells.keys() & refusal.cells.keys())


def _liked(row: Mapping[str, Any]) -> int:
    d = row.get("d") or 0
    return (d > 0) - (d < 0)


def _percent(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))


def _legend_columns(names: Sequence[str]) -> int:
    widest = max((min(len(name), _NAME) for name in names), default=1)
    if widest > 16:  # letters differ in width, so two such names can be too wide for a line
        return 1
    return max(1, min(len(names), 62 // (widest + 7)))


def _legend_height(names: Sequence[str]) -> float:
    """In inches."""
    return 0.1 + 0.19 * math.ceil(len(names) / _legend_columns(names))


def _legend(figure: Any, axes: Any, comparison: Comparison, models: Sequence[str], *, bars: bool = False) -> None:
    """A legend of the models, in their colours and markers."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    for model in models:
        look = style(comparison.models.index(model))
        if bars:
            handles.append(Patch(facecolor=look["color"], hatch=look["hatch"], edgecolor=_INK, linewidth=0.5))
        else:
            handles.append(
                Line2D(
                    [],
                    [],
                    color=look["color"],
                    marker=look["marker"],
                    linestyle=look["linestyle"],
                    markeredgecolor=_INK,
                    markeredgewidth=0.5,
                )
            )
    figure.legend(
        handles,
        [_name(model) for model in models],
        loc="outside lower center",
        ncols=_legend_columns(models),
        fontsize=8,
    )


def _legend_of(figure: Any, axes: Any) -> None:
    """A legend of what is drawn."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=_legend_columns(names), fontsize=8)
