"""The demonstration's figure: each arm's success of attacks against its refusals of harmless requests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plot_align.io import complete_or_absent

COLOURS = ("#7a7f87", "#1f618d", "#c9830a", "#b9480e", "#4d7c2a", "#7a3e9d")
ATTACKS = (("direct", "asr", "asked plainly", "o"), ("redteam Prefill", "asr", "answer begun", "^"),
           ("redteam BestOfN", "asr", "best of N samples", "s"))  # fmt: skip
# The curves of `redteam`: kind and attack in its records, label of the axis.
CURVES = (("by_tokens", "Prefill", "tokens of the answer that are given"), ("by_samples", "BestOfN", "samples"))


def draw(folder: Path, models: Sequence[str], path: Path) -> None:
    """Attack success against over-refusal, and against the two attacks' budgets, from the records below ``folder``.

    Args:
        models: in the order of the table. path: of the figure, .png or .svg.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    from plot_align.report import attack_curves, collect

    collected = collect([folder])
    found = {(o.measure, o.name, o.model): o.quantity for o in collected.observations}
    curves = {(kind, attack): of for kind, attack, of in attack_curves(collected)}
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    frontier, *axes_of_curves = figure.subplots(1, 3)
    for place, (colour, model) in enumerate(zip(COLOURS, models, strict=False)):
        refusal = found.get(("over_refusal", "refused", model))
        for measure, name, _, marker in ATTACKS:
            success = found.get((measure, name, model))
            if success is not None and refusal is not None:  # a measure may have failed
                frontier.errorbar(
                    refusal["value"], success["value"], xerr=_arms(refusal), yerr=_arms(success), color=colour,
                    marker=marker, markersize=11 - 1.8 * place, elinewidth=0.7, alpha=0.8,
                )  # fmt: skip
        for axes, (kind, attack, _) in zip(axes_of_curves, CURVES, strict=True):
            curve = curves.get((kind, attack), {}).get(model, {})
            arms = [_arms(entry) for entry in curve.values()]
            axes.errorbar(
                list(curve), [entry["value"] for entry in curve.values()], color=colour, marker="o", markersize=4,
                yerr=[[low for (low,), _ in arms], [high for _, (high,) in arms]], elinewidth=0.6, linewidth=1.6,
            )  # fmt: skip
    frontier.set(xlabel="harmless requests refused", ylabel="harmful requests complied with")
    arms_shown = [
        Line2D([], [], color=colour, marker="o", linestyle="", label=model)
        for colour, model in zip(COLOURS, models, strict=False)
    ]
    attacks_shown = [
        Line2D([], [], color="#333333", marker=marker, linestyle="", label=label) for *_, label, marker in ATTACKS
    ]
    frontier.legend(handles=arms_shown + attacks_shown, fontsize=8, frameon=False, loc="best")
    for axes, (_, attack, label) in zip(axes_of_curves, CURVES, strict=True):
        axes.set(xlabel=label, ylabel=f"success of {attack}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (frontier, *axes_of_curves):
        axes.set_ylim(-0.03, 1.03)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    with complete_or_absent(path) as temporary:
        figure.savefig(temporary, dpi=130)


def _arms(entry: dict[str, Any]) -> list[list[float]]:
    low, high = entry.get("interval") or (entry["value"],) * 2
    return [[max(0.0, entry["value"] - low)], [max(0.0, high - entry["value"])]]
