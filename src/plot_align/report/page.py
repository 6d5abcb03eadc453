"""Write the page and the folder of files beside it."""

from __future__ import annotations

import hashlib
import json
import string
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from plot_align._version import __version__
from plot_align.errors import InputError
from plot_align.io import PART, complete_or_absent, unwritable
from plot_align.report import compare, figures, runs
from plot_align.report.answers import SideBySide, answers_table, side_by_side
from plot_align.report.compare import Cell, Comparison, Row, Verdict
from plot_align.report.figures import Picture
from plot_align.report.observations import Collected, Observation, Record
from plot_align.report.tables import (
    Entry,
    Table,
    arrow,
    as_csv,
    as_markdown,
    difference_text,
    interval_of,
    interval_text,
    number,
    p_text,
    section_title,
    shown,
    value_text,
)
from plot_align.results import CATEGORIES, SECTIONS
from plot_align.text import one_line, passage, readable

_LIST = ".plot-align-report"  # in the folder beside the page: lists the files that the report wrote, and a digest
_LONGEST_TABLE = 150  # rows of a figure's numbers on the page; the file has all of them
_LONGEST_TEXT = 300  # characters of a text in a record's configuration
_LONGEST_CONFIG = 6000
_SHOWN = ("moved", "flows", "masses", "answers")  # of the details, elsewhere on the page
_MARKS = {"better": "▲", "worse": "▼", "none": "○"}
_WORDS = {"better": "better", "worse": "worse", "none": "no clear sign"}


@dataclass
class Transport:
    """How one model moved, from a measure of kind ``drift``."""

    model: str
    reference: str
    masses: Table | None
    pictures: list[Picture]


@dataclass
class Content:
    """Everything that a page shows, before markup."""

    title: str
    collected: Collected
    comparison: Comparison
    verdict: Verdict
    pictures: dict[str, list[Picture]] = field(default_factory=dict)  # part of the page → its figures
    answers: list[SideBySide] = field(default_factory=list)
    transports: list[Transport] = field(default_factory=list)
    chosen: str = ""  # why this baseline, if the user named none
    tables: list[Table] = field(default_factory=list)  # those that no figure shows
    paper: bool = False

    def every_picture(self) -> Iterator[Picture]:
        for pictures in self.pictures.values():
            yield from pictures
        for transport in self.transports:
            yield from transport.pictures


def build(
    collected: Collected,
    *,
    baseline: str | None = None,
    title: str = "What was measured",
    paper: bool = False,
    seed: int = 0,
) -> Content:
    """Compare the models and draw the figures.

    Args:
        collected: see :func:`plot_align.report.observations.collect`.
        baseline: see :func:`plot_align.report.compare.choose_baseline`.
        title: of the page.
        paper: show the published claims as reference lines.
        seed: of the resampling.

    Raises:
        InputError: the baseline was not measured.
    """
    name, why = compare.choose_baseline(collected, baseline)
    comparison = compare.compare_models(collected, name, seed=seed)
    content = Content(title, collected, comparison, compare.judge(comparison), paper=paper)
    if why and len(comparison.models) > 1:
        content.chosen = f"The baseline is {compare.called(name)}, as none was named and {why}."
    seven = figures.seven(comparison)
    sweeps = [runs.sweep_lines(record) for record in collected.of_kind("sweep")]
    attacks = enumerate(runs.attack_curves(collected), start=1)
    budgets = enumerate(runs.budget_curves(collected), start=1)
    ratios = [record.results["cost"].get("time_ratio") for record in collected.of_kind("demo")]
    content.pictures = {
        "scores": [seven] if seven else [],
        "safety": [
            *figures.safety(comparison, paper=paper),
            *(figures.attack(kind, name, of, comparison, i) for i, (kind, name, of) in attacks),
            *(figures.budget(kind, name, of, i) for i, (kind, name, of) in budgets),
        ],
        "training": figures.curves(runs.training_curves(collected), comparison),
        "alpha": [p for i, lines in enumerate(sweeps, start=1) for p in figures.sensitivity(lines, i)],
        "costs": [figures.cost(ratio, paper=paper) for ratio in ratios[-1:] if ratio],
    }
    content.answers = side_by_side(comparison, collected.references)
    content.transports = [_transport(o, i) for i, o in enumerate(_drifts(collected), start=1)]
    content.tables = [
        _wide(comparison),
        _long(comparison),
        *([answers_table(content.answers)] if content.answers else []),
        *(table for table in (runs.costs(collected), runs.counts(collected), runs.contexts(collected)) if table.rows),
        *(transport.masses for transport in content.transports if transport.masses),
    ]
    return content


def write(content: Content, output: Path) -> Path:
    """Write the page, and its figures and tables as files in the folder beside it; all of them or nothing.

    Returns:
        The folder.

    Raises:
        InputError: they cannot be written, or the folder holds files that no report wrote.
    """
    folder = output.with_name(f"{output.stem}_files")
    page = render(content, folder.name).encode("utf-8", "backslashreplace")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=PART, suffix=f".{output.name}") as temporary:
            new = Path(temporary) / "new"
            new.mkdir()
            for name, data in _files(content):
                (new / name).write_bytes(data)
            names = sorted(file.name for file in new.iterdir())
            stranger = _stranger(folder, names)
            if stranger is not None:
                raise InputError(
                    f"the report's files would take the place of {stranger}, which no report wrote; move it or the "
                    f"whole of {folder}, or name another page with --output"
                )
            (new / _LIST).write_text("\n".join([*names, _seal(names)]), encoding="utf-8")
            if folder.exists():
                folder.rename(Path(temporary) / "old")
            new.rename(folder)
    except OSError as error:
        raise unwritable(folder, error) from None
    with complete_or_absent(output) as part:
        part.write_bytes(page)
    return folder


def _stranger(folder: Path, names: Sequence[str]) -> Path | None:
    """A file in the report's folder that no report wrote; None if there is none.

    Where the list in it was altered or cut off, a file under one of ``names``, those of this report, is a report's.
    """
    if not folder.is_dir():
        return folder if folder.exists() else None
    own = {_LIST}
    try:
        if (folder / _LIST).is_file():
            *listed, seal = (folder / _LIST).read_text(encoding="utf-8", errors="replace").split("\n")
            own.update(listed, () if seal == _seal(listed) else names)
        return next((f for f in sorted(folder.iterdir()) if f.name not in own or not f.is_file()), None)
    except OSError:
        return folder  # it cannot be read


def _seal(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _files(content: Content) -> Iterator[tuple[str, bytes]]:
    pictures = list(content.every_picture())
    for picture in pictures:
        for ending, data in picture.files.items():
            yield f"{picture.name}{ending}", data
    for table in {table.name: table for table in (*content.tables, *(p.table for p in pictures))}.values():
        yield f"{table.name}.csv", as_csv(table).encode("utf-8", "backslashreplace")
        yield f"{table.name}.md", as_markdown(table).encode("utf-8", "backslashreplace")


def render(content: Content, folder: str) -> str:
    """The HTML. ``folder``: of the files beside it, as named in the text."""
    comparison, collected = content.comparison, content.collected
    notes = _Notes()
    scores = _sections([row for row in comparison.rows if row.score], comparison, notes)
    others = _sections([row for row in comparison.rows if not row.score], comparison, None)
    return (
        environment()
        .get_template("template.html.jinja")
        .render(
            content=content,
            title=content.title,
            style=style_sheet(),
            folder=folder,
            verdict=content.verdict,
            comparison=comparison,
            models=comparison.models,
            looks=[figures.style(i) for i in range(len(comparison.models))],
            scores=scores,
            others=others,
            reasons=notes.reasons,
            missing=[section for section in CATEGORIES if not any(row.section == section for row in comparison.rows)],
            pictures=content.pictures,
            costs=runs.costs(collected),
            counts=runs.counts(collected),
            contexts=runs.contexts(collected),
            dates=sorted({record.at.strftime("%Y-%m-%d") for record in collected.records}),
            records=[_how(record) for record in collected.records],
            longest=_LONGEST_TABLE,
            alpha=compare.ALPHA,
            version=__version__,
            paper_time=figures.PAPER_TIME,
            dpo=figures.dpo_among(comparison),
        )
    )


def environment(package: str = "plot_align.report") -> Any:
    """A Jinja2 environment that escapes, over the templates of ``package`` and the report's own, with its filters."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    found = Environment(
        loader=ChoiceLoader([PackageLoader(name, ".") for name in dict.fromkeys((package, "plot_align.report"))]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"line": one_line, "shown": shown, "token": readable, "count": number, "passage": passage}
    return found


def style_sheet() -> str:
    """The page's CSS: light and dark, phone and desk, paper."""
    return (resources.files("plot_align.report") / "style.css").read_text(encoding="utf-8")


class _Notes:
    """Footnote letters for the reasons why something was not tested."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def letter(self, reason: str) -> str:
        return self.reasons.setdefault(reason, string.ascii_lowercase[len(self.reasons)])


def _sections(rows: Sequence[Row], comparison: Comparison, notes: _Notes | None) -> list[dict[str, Any]]:
    """Rows by section, each cell as text."""
    return [
        {
            "title": section_title(section),
            "rows": [
                {
                    "title": row.title,
                    "unit": row.first.get("unit"),
                    "arrow": arrow(row.first["better"]),
                    "cells": [_cell(row.cells.get(model), model, comparison, notes) for model in comparison.models],
                }
                for row in rows
                if row.section == section
            ],
        }
        for section in SECTIONS
        if any(row.section == section for row in rows)
    ]


def _cell(cell: Cell | None, model: str, comparison: Comparison, notes: _Notes | None) -> dict[str, Any] | None:
    if cell is None:
        return None
    quantity = cell.quantity
    found = {
        "value": value_text(quantity),
        "interval": interval_text(quantity),
        "n": number(quantity["n"]),
        "sign": cell.sign,
        "mark": "",
        "says": "",
        "note": "",
        "gaps": "; ".join(cell.observation.gaps),
        "judged": "; ".join(cell.observation.judged),
    }
    if cell.difference is not None and cell.sign is not None:
        found["mark"] = _MARKS[cell.sign]
        gap = cell.difference
        said = [_WORDS[cell.sign], difference_text(gap, quantity), p_text(gap["p_holm"])]
        found["says"] = ", ".join(said + ["items count alike"] * bool(gap.get("unweighted")))
    elif model != comparison.baseline and notes is not None and cell.reason is not None:
        found["says"], found["note"] = "not tested", notes.letter(cell.reason)
    return found


def _wide(comparison: Comparison) -> Table:
    """A table with one column per model, for readers."""
    rows: list[list[Entry]] = []
    for row in comparison.rows:
        unit = f" ({row.first['unit']})" if row.first.get("unit") else ""
        title = f"{row.title}{unit} {arrow(row.first['better'])}".rstrip()
        texts: list[Entry] = [section_title(row.section), title]
        for model in comparison.models:
            cell = _cell(row.cells.get(model), model, comparison, None)
            if cell is None:
                texts.append(None)
                continue
            interval = f" ({cell['interval']})" if cell["interval"] else ""
            sign = f"; {cell['mark']} {cell['says']}" if cell["says"] else ""
            told = "".join(f"; {cell[what]}" for what in ("judged", "gaps") if cell[what])
            texts.append(f"{cell['value']}{interval}, n {cell['n']}{told}{sign}")
        rows.append(texts)
    caption = f"Every measure, with 95 % intervals; differences to {comparison.baseline}, p after Holm's correction"
    return Table("measures_by_model", caption, ["section", "measure", *comparison.models], rows)


def _long(comparison: Comparison) -> Table:
    """A table with one row per quantity and model, for other programs."""
    columns = ["section", "measure", "quantity", "title", "better", "unit", "model", "value", "low", "high", "n",
               "baseline", "difference", "difference low", "difference high", "pairs", "p", "p Holm", "sign",
               "not tested because", "record"]  # fmt: skip
    rows: list[list[Entry]] = []
    for row in comparison.rows:
        for model, cell in row.cells.items():
            of, gap = cell.quantity, cell.difference
            rows.append([
                row.section, row.measure, row.name, of["title"], of["better"], of.get("unit"), model, of["value"],
                *(interval_of(of) or (None, None)), of["n"], comparison.baseline,
                *((gap["value"], *gap["interval"], gap["n"], gap["p"], gap["p_holm"]) if gap else (None,) * 6),
                cell.sign, cell.reason, cell.observation.record.name,
            ])  # fmt: skip
    return Table("measures", "Every quantity of every model", columns, rows)


def _drifts(collected: Collected) -> list[Observation]:
    """The observations whose record says which tokens moved."""
    return [o for o in collected.observations if o.score and _details(o).get("moved")]


def _details(observation: Observation) -> Mapping[str, Any]:
    return observation.record.results["details"] if observation.record.kind == "evaluation" else {}


def _transport(observation: Observation, number_: int) -> Transport:
    details = _details(observation)
    reference = str((observation.record.config.get("reference") or {}).get("name") or "the reference")
    masses = None
    if details.get("masses"):
        of = details["masses"]
        rows: list[list[Entry]] = [
            [f"{side} tokens", of["reference"][side], of["model"][side], of["model"][side] - of["reference"][side]]
            for side in ("preferred", "rejected")
        ]
        caption = f"Probability on preferred and rejected tokens: {one_line(observation.model)}"
        masses = Table(f"masses_{number_}", caption, ["", one_line(reference), one_line(observation.model), "change"],
                       rows)  # fmt: skip
    flows = figures.flows(observation.model, details.get("flows") or (), number_)
    pictures = [figures.moved(observation.model, reference, details["moved"], number_), *([flows] if flows else [])]
    return Transport(observation.model, reference, masses, pictures)


def _how(record: Record) -> dict[str, Any]:
    """How the numbers of a record were made."""
    content = record.content
    quantities = record.results.get("quantities") if record.kind == "evaluation" else None
    said = _said(record)
    config = record.config
    gpus = content["hardware"].get("gpus")
    commit = content["commit"] if isinstance(content["commit"], dict) else {}
    facts = {
        "kind": record.kind,
        "created": record.at.strftime("%Y-%m-%d %H:%M %Z"),
        "seed": "none" if record.seed is None else str(record.seed),
        "commit": f"{commit.get('id')}{', with uncommitted changes' if commit.get('dirty') else ''}"
        if commit
        else "–",
        "versions": ", ".join(f"{name} {version}" for name, version in content["versions"].items() if version),
        "processor": f"{content['hardware'].get('cpu')}, {content['hardware'].get('cpu_count')} cores",
        "accelerators": ", ".join(str(gpu.get("name")) for gpu in gpus) if gpus else "none",
    }
    if quantities:
        facts["n"] = ", ".join(f"{name} {quantity['n']:,}" for name, quantity in quantities.items())
    return {
        "name": record.name,
        "what": _what(record),
        "facts": {name: one_line(text, longest=600) for name, text in facts.items()},
        "config": _json(config),
        "details": _json(said) if said else "",
    }


def _what(record: Record) -> str:
    """A record in a few words."""
    config = record.config
    match record.kind:
        case "evaluation":
            return f"{config['measure']['name']} of {config['model']['name']}"
        case "redteam":
            return f"attacks on {', '.join(record.results['models'])}"
        case "dpo" | "sft" | "pro":
            return f"training ({record.kind}): {runs.run_name(record)}"
    return record.kind


def _said(record: Record) -> dict[str, Any]:
    """Details of a record that the page shows nowhere else; short entries first, as the end is cut."""
    if record.kind == "redteam":
        models = record.results["models"].items()
        return {m: {k: of[k] for k in ("undecided", "failed") if of.get(k)} for m, of in models}
    if record.kind != "evaluation":
        return {}
    unfinished = record.results.get("unfinished")
    said = {name: value for name, value in record.results["details"].items() if name not in _SHOWN}
    ordered = dict(sorted(said.items(), key=lambda entry: isinstance(entry[1], dict | list)))
    return {"unfinished": unfinished, **ordered} if unfinished else ordered


def _json(value: Any) -> str:
    """As ASCII, so that no control character works; long texts and configurations are cut."""
    text = json.dumps(_cut(value), indent=1, ensure_ascii=True)
    return text if len(text) <= _LONGEST_CONFIG else text[: _LONGEST_CONFIG - 2] + " …"


def _cut(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name)[:_LONGEST_TEXT]: _cut(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_cut(entry) for entry in value[:50]]
    return value[:_LONGEST_TEXT] + "…" if isinstance(value, str) and len(value) > _LONGEST_TEXT else value
