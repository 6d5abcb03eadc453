"""``plot-align inspect``: show what a preference distribution prefers and rejects, and where."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

from plot_align.cli.parser import Parser, add_loading_options
from plot_align.errors import InputError, require_packages
from plot_align.inference.load import load_model, load_tokenizer
from plot_align.io import require_writable
from plot_align.text import printable, terminal


def make_parser() -> Parser:
    parser = Parser(
        "inspect",
        "Show the most preferred and the most rejected tokens of a file written by\n"
        "`plot-align estimate`; with --pairs also what is preferred in which context.",
        "  plot-align inspect preference.safetensors --tokenizer Qwen/Qwen3-0.6B \\\n"
        "    --figure preference.png --pairs pairs.jsonl",
    )
    parser.usage = "plot-align inspect FILE --tokenizer MODEL [options]"
    parser.add_argument("file", type=Path, help="written by `plot-align estimate`")
    parser.add_argument("--tokenizer", required=True, metavar="MODEL", help="hub id or folder it was estimated with")
    parser.add_argument("--top", type=int, default=20, metavar="N", help="tokens on each side (%(default)s)")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw them as well, as .png, .svg or .pdf")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    group = parser.add_argument_group("preferences by context")
    group.add_argument("--pairs", metavar="DATA", help="hub id or file of the pairs; MODEL reads them")
    group.add_argument("--contexts", type=int, default=16, metavar="K", help="kinds of answers (%(default)s)")
    group.add_argument("--rows", type=int, default=1000, metavar="N", help="the first so many pairs (%(default)s)")
    group.add_argument("--record", type=Path, metavar="FILE", help="write them for `plot-align report`, as .json")
    add_loading_options(parser)
    return parser


def run(arguments: list[str]) -> int:
    """Parse ``arguments`` and print the tokens. Paths of files go to standard error, so that JSON stays JSON."""
    options = make_parser().parse(arguments)
    _check(options)

    from plot_align.preference import inspection
    from plot_align.preference.distribution import PreferenceDistribution

    preference = PreferenceDistribution.load(options.file)
    tokenizer = load_tokenizer(options.tokenizer, trust_remote_code=options.trust_remote_code)
    found = inspection.inspect(preference, tokenizer, n=options.top)
    contexts = _contexts(options, tokenizer) if options.pairs else None
    figure = inspection.write_figure(found, options.figure) if options.figure is not None else None
    if options.json:
        content = found.to_dict()
        if contexts is not None:
            content["contexts"] = [context.to_dict() for context in contexts]
        print(json.dumps(content, indent=2, allow_nan=False))
    else:
        from plot_align.inference.contexts import render

        terminal().print(inspection.render(found))
        if contexts is not None:
            terminal().print("", render(contexts), sep="\n")
    if figure is not None:
        print(printable(f"figure: {figure}"), file=sys.stderr)
    if options.record is not None and contexts is not None:
        from plot_align.records import write_record

        results = {"contexts": [context.to_dict() for context in contexts]}
        record = write_record(options.record, "inspect", results, config=vars(options))
        print(printable(f"record: {record}"), file=sys.stderr)
    return 0


def _check(options: Any) -> None:
    if options.top < 1:
        raise InputError(f"--top is {options.top}, expected how many tokens to show on each side, 1 or more")
    if options.figure is not None:
        require_packages("--figure", "matplotlib", extra="report")
    for name, least in (("contexts", 2), ("rows", 1)):
        if getattr(options, name) < least:
            raise InputError(f"--{name} is {getattr(options, name)}, expected {least} or more")
    if options.record is None:
        return
    if options.pairs is None:
        raise InputError("--record is for the preferences by context, which need --pairs: name the pairs")
    if options.record.suffix != ".json":
        raise InputError(f"--record is {str(options.record)!r}, expected a name ending in .json; rename it")
    require_writable(options.record.parent)


def _contexts(options: Any, tokenizer: Any) -> Any:
    from plot_align.inference.contexts import preferences_by_context
    from plot_align.preference.estimation import load_pairs, progress_bar, scored_pairs

    rows = itertools.islice(scored_pairs(load_pairs(options.pairs), tokenizer), options.rows)
    pairs = list(rows)
    model, _ = load_model(
        options.tokenizer,
        device=options.device,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
    )
    with progress_bar("reading answers", True, 2 * len(pairs), unit="answers") as advance:
        return preferences_by_context(model, tokenizer, pairs, contexts=options.contexts, advance=advance)
