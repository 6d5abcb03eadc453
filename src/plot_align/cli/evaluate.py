"""``plot-align evaluate``: models against a suite of measures, one record each."""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plot_align.cli.launch import on_processes
from plot_align.cli.parser import Parser, add_loading_options, add_num_processes, named_models
from plot_align.errors import InputError, PlotAlignError, first_line
from plot_align.inference.load import check_dtype, load_model, load_tokenizer
from plot_align.io import complete_or_absent, file_name
from plot_align.text import printable, terminal

if TYPE_CHECKING:
    from rich.progress import Progress

    from plot_align.evaluation.subject import Subject
    from plot_align.evaluation.suite import Entry, Suite


def make_parser() -> Parser:
    parser = Parser(
        "evaluate",
        "Measure models on the seven sub-preferences and on what must not get worse.\n"
        "Every measure of every model is one record, with n and a confidence interval; an\n"
        "interrupted run resumes. `plot-align report DIR` shows them.",
        "  plot-align evaluate base-model DPO=runs/dpo PLOT=runs/dpo-plot --suite quick \\\n"
        "    --reference base-model --preference preference.safetensors",
    )
    parser.usage = "plot-align evaluate MODEL [MODEL ...] [options]"
    parser.add_argument("models", metavar="MODEL", nargs="+", help="hub id or folder of a chat model, or NAME=MODEL")
    parser.add_argument("--suite", default="quick", help="paper, quick or a .yaml file (%(default)s)")
    parser.add_argument("--reference", metavar="MODEL", help="what the models were tuned from: KL, drift, shifts")
    parser.add_argument("--preference", metavar="FILE", help="from `plot-align estimate`: distance to the target")
    parser.add_argument("--only", metavar="A,B", help="measures, sections or kinds of the suite")
    parser.add_argument("--skip", metavar="A,B", help="the same, left out")
    parser.add_argument("--limit", type=int, metavar="N", help="items a measure, at most")
    parser.add_argument("--mt_bench", metavar="DIR", help="FastChat's questions, judge prompts and references")
    parser.add_argument("--judge", metavar="A,B", help="of refusals and attacks, see redteam; the first decides")
    parser.add_argument("--judge_url", metavar="URL", help="an OpenAI-compatible endpoint that judges")
    parser.add_argument("--judge_model", metavar="NAME", help="the name of its model")
    parser.add_argument("--judge_key", default="OPENAI_API_KEY", metavar="VAR", help="holds its key (%(default)s)")
    parser.add_argument("--judge_prices", metavar="P,C", help="its prices per million prompt and completion tokens")
    parser.add_argument("--behaviors", metavar="FILE", help="harmful requests, a .csv as redteam takes")
    parser.add_argument("--targets", metavar="FILE", help="HarmBench's targets, .json")
    parser.add_argument(
        "--allow_code_execution", action="store_true",
        help="run code that the models write (HumanEval, MBPP), with your rights: only in a sandbox of your own",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=16, metavar="N", help="rows a pass (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of samples and intervals (%(default)s)")
    add_num_processes(parser)
    add_loading_options(parser)
    parser.add_argument("--quiet", action="store_true", help="print no table")
    parser.add_argument("--output", type=Path, default=Path("runs/evaluate"), metavar="DIR", help="(%(default)s)")
    return parser


def run(arguments: list[str]) -> int:
    """Parse ``arguments``, measure what is not measured yet, print a table; returns 1 if a measure failed."""
    options = make_parser().parse(arguments)
    return on_processes("evaluate", options.num_processes, arguments, lambda: _run(options))


def _run(options: Any) -> int:
    from plot_align.evaluation.suite import Given, read_suite
    from plot_align.inference.chat import require_template
    from plot_align.io import claimed
    from plot_align.parallel import on_main, rank

    for name in ("batch_size", "limit"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise InputError(f"--{name} is {getattr(options, name)}, expected 1 or more")
    check_dtype(options.dtype)
    models = named_models(options.models)
    given = Given(
        reference=options.reference is not None,
        preference=options.preference,
        judge=options.judge,
        judge_url=options.judge_url,
        judge_model=options.judge_model,
        judge_key=options.judge_key,
        judge_prices=_prices(options.judge_prices),
        mt_bench=options.mt_bench,
        behaviors=options.behaviors,
        targets=options.targets,
        allow_code_execution=options.allow_code_execution,
        limit=options.limit,
    )
    suite = read_suite(options.suite, given, only=_list(options.only), skip=_list(options.skip) or ())
    for source in {*models.values(), *([options.reference] if options.reference else [])}:
        require_template(load_tokenizer(source, trust_remote_code=options.trust_remote_code))
    for name in suite.runs_code if rank() == 0 else ():
        print(
            f"plot-align: {printable(name)} runs programs that the models write, on this machine and with your "
            "rights; they can delete or send away what you can",
            file=sys.stderr,
        )
    with ExitStack() as held:
        on_main(lambda: held.enter_context(claimed(options.output)))
        return _evaluate(models, suite, options)


def _list(text: str | None) -> list[str] | None:
    found = [part.strip() for part in (text or "").split(",") if part.strip()]
    return found or None


def _prices(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        prompt, completion = (float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--judge_prices is {text!r}, expected two numbers such as 2.5,10") from None
    return prompt, completion


def _evaluate(models: dict[str, str], suite: Suite, options: Any) -> int:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from plot_align.parallel import on_main, rank

    console = terminal(quiet=rank() > 0)
    for name, reason in suite.left_out.items():
        console.print(f"left out: {name}: {reason}", soft_wrap=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    failed: dict[str, str] = {}
    again: dict[str, list[str]] = {"other": [], "damaged": []}
    with Progress(*columns, console=terminal(sys.stderr), disable=rank() > 0) as progress:
        whole = progress.add_task("measures", total=len(models) * len(suite.entries))
        reference = None
        if options.reference is not None:
            known = {source: name for name, source in models.items()}
            reference = _load(
                known.get(options.reference, Path(options.reference).name), options.reference, options, progress
            )
        for name, source in models.items():
            subject = reference if source == options.reference else None
            if subject is None:
                try:
                    subject = _load(name, source, options, progress)
                except InputError as error:  # found only here, e.g. damaged weights
                    failed[name] = f"failed: {error}"
                    progress.advance(whole, len(suite.entries))
                    continue
            subject.reference = reference
            for entry in suite.entries:
                progress.update(whole, description=f"{name}: {entry.name}")
                path = _record(options.output, name, entry)
                config = _config(subject, entry, suite.name)
                state = on_main(partial(_state, path, config, options.seed))
                if state != "there":
                    if state in again:  # if the measure fails, a report must not take the old record for this one
                        on_main(partial(path.replace, path.with_suffix(".json.old")))
                    problem = _measure(subject, entry, path, config, options)
                    if problem is not None:
                        failed[f"{name}, {entry.name}"] = problem
                    elif state in again:
                        again[state].append(f"{name}, {entry.name}")
                progress.advance(whole)
            subject = None  # free it before the next one is loaded
    if not options.quiet and rank() == 0:
        _show(console, models, suite, options.output)
    why = {
        "other": "the model, the options, a judge's rules, the data or the seed were others",
        "damaged": "the record was damaged",
    }
    for state, of in again.items():
        if of:
            console.print(
                f"measured again, as {why[state]} (the old records end in .old): {'; '.join(of)}", soft_wrap=True
            )
    for what, problem in failed.items():
        console.print(f"{what}: {problem}", soft_wrap=True)
    console.print(f"see them with: plot-align report {options.output}", soft_wrap=True)
    return 1 if failed else 0


def _load(name: str, source: str, options: Any, progress: Progress) -> Subject:
    from plot_align.evaluation.subject import Subject

    def bar(description: str, total: int) -> Callable[[int], None]:
        task = progress.add_task(f"  {description}", total=total)
        left = total

        def advance(done: int) -> None:
            nonlocal left
            left -= done
            progress.advance(task, done)
            if left <= 0:
                progress.update(task, visible=False)

        return advance

    model, tokenizer = load_model(
        source, device=options.device, dtype=options.dtype, trust_remote_code=options.trust_remote_code
    )
    work = options.output / "work" / file_name(name)
    subject = Subject(model, tokenizer, name, source, work, options.seed, options.batch_size, bar=bar)
    # Another model of the same name must not reuse this one's answers.
    subject.folder = work / subject.identity["model"]
    return subject


def _config(subject: Subject, entry: Entry, suite: str) -> dict[str, Any]:
    """Everything that decides the record, and the suite it came from."""
    from plot_align.evaluation.suite import NEED_REFERENCE

    def described(of: Subject) -> dict[str, str]:
        return {"name": of.name, "source": of.source, **of.identity}

    reference = subject.reference if entry.kind in NEED_REFERENCE else None
    return {
        "model": described(subject),
        "reference": None if reference is None else described(reference),
        "suite": suite,
        "section": entry.section,
        "measure": entry.options(),
        "data": entry.data,
    }


def _record(output: Path, model: str, entry: Entry) -> Path:
    return output / file_name(model) / f"{file_name(entry.name)}.json"


def _state(path: Path, config: dict[str, Any], seed: int) -> str:
    """``"there"``: the record matches; ``"other"``: it was made with something else; ``"damaged"``; ``"missing"``:
    there is none, or an unfinished one."""
    from plot_align.records import read_record
    from plot_align.results import EVALUATION

    if not path.exists():
        return "missing"
    try:
        record = read_record(path, EVALUATION)
    except InputError:
        return "damaged"
    if not isinstance(record["config"], dict) or not isinstance(record["results"], dict):
        return "damaged"
    plain = json.loads(json.dumps(config))
    same = all(record["config"].get(key) == value for key, value in plain.items() if key != "suite")
    if not isinstance(record["results"].get("quantities"), dict):
        return "damaged"
    if not same or record["seed"] != seed:
        return "other"
    return "missing" if record["results"].get("unfinished") else "there"


def _measure(subject: Subject, entry: Entry, path: Path, config: dict[str, Any], options: Any) -> str | None:
    """Measure and write the record. Returns what went wrong, if anything did, so that the other measures go on."""
    from plot_align.parallel import OutOfStep, everywhere, on_main, rank
    from plot_align.records import write_record
    from plot_align.results import EVALUATION

    log = subject.folder / f"{file_name(entry.name)}.error.txt"
    try:
        found = everywhere(lambda: entry.measure.run(subject))
        results = {"quantities": found.quantities, "details": found.details, "unfinished": found.unfinished}
        on_main(lambda: write_record(path, EVALUATION, results, config=config, seed=options.seed))
    except OutOfStep:
        raise
    except PlotAlignError as error:
        return f"failed: {error}"
    except Exception as error:  # an error of a library must not stop the other measures
        if rank() == 0:
            with complete_or_absent(log) as temporary:  # in place of a link, not through it
                temporary.write_text(traceback.format_exc(), encoding="utf-8")
        return f"failed: {type(error).__name__}: {first_line(error)} (the whole of it is in {log})"
    if rank() == 0:
        log.unlink(missing_ok=True)
    if found.unfinished:
        return f"unfinished, run the same again to go on: {found.unfinished}"
    return None


def _show(console: Any, models: dict[str, str], suite: Suite, output: Path) -> None:
    """A table of every measure's score, and all quantities of the guards."""
    from rich.table import Table

    from plot_align.records import read_record
    from plot_align.results import EVALUATION, GUARDS, agreement_text

    table = Table("", *models, title=f"suite {suite.name}; 95 % intervals", title_justify="left")
    section = None
    said: list[str] = []
    for entry in suite.entries:
        found = {}
        for name in models:
            path = _record(output, name, entry)
            if path.exists():
                found[name] = read_record(path, EVALUATION)["results"]["quantities"]
        if not found:
            continue
        if entry.section != section:
            section = entry.section
            table.add_section()
            table.add_row(section, style="bold")
        first = next(iter(found.values()))
        for place, key in enumerate(first):
            if place and entry.section != GUARDS and "agreement" not in first[key]:
                continue
            kind = key.split("_")[0]
            arrow = {"higher": " ↑", "lower": " ↓"}.get(first[key]["better"], "")
            unit = f", {first[key]['unit']}" if "unit" in first[key] else ""
            cells = [number(found[name][key]) if key in found.get(name, {}) else "-" for name in models]
            table.add_row(f"{first[key]['title']}{unit}{arrow}", *cells)
            said += [
                f"{name}, {entry.name}: {agreement_text(of[key]['agreement'], 'answers', harmful=kind != 'refused')}"
                for name, of in found.items()
                if kind != "helped" and "agreement" in of.get(key, {})
            ]
    console.print(table)
    for sentence in said:
        console.print(sentence, soft_wrap=True)


def number(entry: dict[str, Any]) -> str:
    """``0.71 (.65–.77)``: short enough for four models in a terminal; small numbers to four places."""
    value, (low, high) = entry["value"], entry.get("interval") or (math.nan, math.nan)
    places = 2 if abs(value) >= 0.1 or value == 0 else 4
    text = f"{value:.{places}f}"
    if not (math.isfinite(low) and math.isfinite(high)):
        return text
    ends = (f"{end:.{places}f}".replace("0.", ".", 1) if abs(end) < 1 else f"{end:.{places}f}" for end in (low, high))
    return f"{text} ({'–'.join(ends)})"
