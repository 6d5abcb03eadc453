"""The diagnosis as one page without network or script: what was found, what to do, pictures, pairs to read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plot_align._version import __version__
from plot_align.doctor.diagnosis import Diagnosis, forecasts, model_sentence, preference_sentence
from plot_align.doctor.findings import percent
from plot_align.io import complete_or_absent
from plot_align.records import hardware, versions
from plot_align.report import SERIES, Picture, Table, drawing, environment, picture, style_sheet
from plot_align.text import one_line, readable

_WIDTH = 4.5  # inches, as the report's figures
_BINS = 40
_LOOK = {"error": "bad", "warning": "bad", "note": ""}  # classes of a tag


def write(diagnosis: Diagnosis, path: Path) -> Path:
    """Write the page; returns its path. It is complete or it is not there.

    Raises:
        InputError: the folder cannot be written.
    """
    page = render(diagnosis).encode("utf-8", "backslashreplace")
    with complete_or_absent(path) as temporary:
        temporary.write_bytes(page)
    return path


def render(diagnosis: Diagnosis) -> str:
    """The HTML; every text of the data is escaped."""
    of = diagnosis.examination
    found = environment("plot_align.doctor")
    found.filters |= {"percent": percent, "code": _code}
    machine = hardware()
    facts = {
        "options": ", ".join(f"{name} {value}" for name, value in diagnosis.config.items() if value is not None),
        "took": f"{diagnosis.seconds:.0f} s, {machine['cpu']}, {machine['cpu_count']} cores",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items() if version),
    }
    return found.get_template("page.html.jinja").render(
        title=f"Preference data: {one_line(diagnosis.source)}",
        diagnosis=diagnosis,
        of=of,
        looks=_LOOK,
        length=_lengths(of.length_differences),
        words=_words(of.first_words),
        tokens=None if of.preference is None else _tokens(of.preference),
        says=None if of.preference is None else preference_sentence(of.preference),
        model=None if diagnosis.model is None else _model(diagnosis.model),
        facts={name: one_line(text, longest=600) for name, text in facts.items()},
        style=style_sheet(),
        version=__version__,
        longest=None,
        folder="",
    )


def _code(text: str) -> Any:
    """What stands between backticks as ``<code>``; all else is escaped."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _model(model: Mapping[str, Any]) -> dict[str, Any]:
    found = zip(model["ches_normalised"], model["rows"], strict=True)
    pairs = [(value, row) for value, row in found if value is not None]
    return {
        "says": model_sentence(model),
        "forecast": _forecast(model) if forecasts(model) else None,
        "ches": _ches([value for value, _ in pairs]) if pairs else None,
        "rows": [f"{row:,}" for _, row in sorted(pairs, reverse=True)[:10]],
    }


def _forecast(model: Mapping[str, Any]) -> Picture:
    """What a first step does to the log-probability of chosen answers, by loss, with the interval of the mean."""
    names = list(forecasts(model))
    values = [model["forecast"][name] for name in names]
    intervals = [model["forecast_interval"][name] or [value, value] for name, value in zip(names, values, strict=True)]
    table = Table(
        "forecast",
        "Change of a chosen answer's log-probability in the first step, in nats",
        ["loss", "mean", "from", "to", "falls, %"],
        [
            [name, value, *interval, 100 * model["forecast_falls"][name]]
            for name, value, interval in zip(names, values, intervals, strict=True)
        ],
    )
    with drawing(_WIDTH, 2.6) as figure:
        axes = figure.subplots()
        spread = [
            [max(value - low, 0.0) for value, (low, _) in zip(values, intervals, strict=True)],
            [max(high - value, 0.0) for value, (_, high) in zip(values, intervals, strict=True)],
        ]
        axes.barh(names[::-1], values[::-1], xerr=[side[::-1] for side in spread], color=SERIES[0], capsize=3)
        axes.axvline(0, color="#5f6369", linewidth=0.8)
        axes.set_xlabel("nats")
        axes.grid(axis="x")
        return picture(
            figure,
            "forecast",
            "What a first step does to chosen answers",
            f"At a learning rate of {model['step']['learning_rate']:g}; 95 % interval of the mean over answers.",
            table,
        )


def _ches(values: Sequence[float]) -> Picture:
    """Histogram of length-normalised CHES."""
    counts, edges = np.histogram(values, bins=min(_BINS, max(5, len(values) // 5)))
    table = Table(
        "ches",
        "Length-normalised CHES",
        ["from", "to", "pairs"],
        [[float(low), float(high), int(n)] for low, high, n in zip(edges[:-1], edges[1:], counts, strict=True)],
    )
    with drawing(_WIDTH, 2.6) as figure:
        axes = figure.subplots()
        axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=SERIES[0])
        axes.set_xlabel("length-normalised CHES")
        axes.set_ylabel("pairs")
        axes.grid(axis="y")
        return picture(
            figure, "ches", "How alike the two answers look to the model", "Histogram over the pairs.", table
        )


def _lengths(differences: Mapping[int, int]) -> Picture:
    """Histogram of chosen − rejected; the 1 % at either end stands in the outermost bins."""
    total, values = sum(differences.values()), sorted(differences)
    reach = max(1, abs(_at(differences, values, 0.01 * total)), abs(_at(differences, values, 0.99 * total)))
    width = max(1, math.ceil(2 * reach / _BINS))
    edge = math.ceil(reach / width)  # bins on either side of the one around 0
    counts = dict.fromkeys(range(-edge, edge + 1), 0)
    for value, count in differences.items():
        counts[min(max(round(value / width), -edge), edge)] += count
    table = Table(
        "length_differences",
        "Chosen less rejected answer, in tokens; the outermost rows hold all beyond",
        ["tokens, about", "pairs"],
        [[at * width, count] for at, count in counts.items()],
    )
    with drawing(_WIDTH, 2.6) as figure:
        axes = figure.subplots()
        colours = [SERIES[0] if at >= 0 else SERIES[1] for at in counts]
        axes.bar([at * width for at in counts], counts.values(), width * 0.9, color=colours)
        axes.axvline(0, color="#5f6369", linewidth=0.8)
        axes.set_xlabel("chosen − rejected, tokens")
        axes.set_ylabel("pairs")
        axes.grid(axis="y")
        return picture(
            figure,
            "length_differences",
            "How much longer the chosen answer is",
            "Histogram over pairs. Right of the line (blue) the chosen answer is longer.",
            table,
        )


def _at(differences: Mapping[int, int], values: Sequence[int], place: float) -> int:
    below = 0
    for value in values:
        below += differences[value]
        if below >= place:
            return value
    return values[-1]


def _words(rows: Sequence[Mapping[str, Any]]) -> Table:
    texts = [[one_line(row["word"], longest=24), row["chosen"], row["rejected"]] for row in rows]
    caption = "First words whose counts differ most between chosen and rejected answers"
    return Table("first_words", caption, ["first word", "chosen", "rejected"], texts)


def _tokens(preference: Mapping[str, Any]) -> Table:
    rows = [
        [readable(of["text"]), of["kind"], of["chosen"], of["rejected"], 100 * of["difference"], of["z"]]
        for side in ("preferred", "rejected")
        for of in preference[side]
    ]
    columns = ["token", "kind", "chosen", "rejected", "d in %", "z"]
    return Table("preference", "The most preferred tokens, then the most rejected", columns, rows)
