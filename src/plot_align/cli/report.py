"""``plot-align report``: make one page from the records of the other commands."""

from __future__ import annotations

from pathlib import Path

from plot_align.cli.parser import Parser
from plot_align.errors import InputError, require_packages


def make_parser() -> Parser:
    parser = Parser(
        "report",
        "Make one page from records: a verdict, a table of models and measures with\n"
        "intervals and significance, figures, and how each number was made. The page\n"
        "needs no network. Figures and tables are also written as files beside it.",
        "  plot-align report runs/evaluate runs/redteam --baseline my-dpo -o report.html",
    )
    parser.usage = "plot-align report RECORDS... [options]"
    parser.add_argument("records", nargs="+", metavar="RECORDS", help="files, or folders to search")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), metavar="FILE", help="the page (%(default)s)"
    )
    parser.add_argument(
        "--baseline", metavar="NAME", help="model to compare the others with (default: their reference, if measured)"
    )
    parser.add_argument("--title", default="Which model to ship", metavar="TEXT", help="of the page (%(default)s)")
    parser.add_argument("--paper", action="store_true", help="draw the paper's claims as reference lines")
    parser.add_argument("--skip_bad", action="store_true", help="skip damaged records, and list them")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the resampling (%(default)s)")
    return parser


def run(arguments: list[str]) -> int:
    """Parse ``arguments``, read the records, and write the page and its files."""
    options = make_parser().parse(arguments)
    if options.output.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--output is {str(options.output)!r}, expected a name ending in .html; rename it")
    if options.seed < 0:
        raise InputError(f"--seed is {options.seed}, expected a whole number of 0 or more")
    if not options.title.strip():
        raise InputError("--title is empty, expected a text; write one, or leave it out for the default")

    from plot_align.io import claimed
    from plot_align.report.observations import collect
    from plot_align.report.page import build, write
    from plot_align.text import one_line, terminal

    require_packages("report", "matplotlib", "jinja2", extra="report")
    with claimed(options.output.parent, options.output.name):
        collected = collect(options.records, skip_bad=options.skip_bad)
        content = build(
            collected, baseline=options.baseline, title=options.title, paper=options.paper, seed=options.seed
        )
        folder = write(content, options.output)
    console = terminal()
    chosen = [content.chosen] if content.chosen else []
    for line in (content.verdict.headline, *content.verdict.notes, *chosen, *collected.left_out):
        console.print(one_line(line, longest=900), soft_wrap=True)
    console.print(f"page: {options.output}, its figures and tables: {folder}", soft_wrap=True)
    return 0
