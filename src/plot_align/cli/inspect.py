"""``plot-align inspect``: show what a preference distribution prefers and rejects."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from plot_align.cli.parser import Parser
from plot_align.errors import InputError, require_packages
from plot_align.inference.load import load_tokenizer


def make_parser() -> Parser:
    parser = Parser(
        "inspect",
        "Show the most preferred and the most rejected tokens of a file written by\n"
        "`plot-align estimate`, with counts and 95 % confidence intervals.",
        "  plot-align inspect preference.safetensors --tokenizer Qwen/Qwen3-0.6B \\\n"
        "    --top 30 --figure preference.png",
    )
    parser.add_argument("file", type=Path, help="written by `plot-align estimate`")
    parser.add_argument("--tokenizer", required=True, metavar="MODEL", help="hub id or folder it was estimated with")
    parser.add_argument("--top", type=int, default=20, metavar="N", help="tokens on each side (%(default)s)")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw them as well, as .png, .svg or .pdf")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--trust_remote_code", action="store_true", help="allow a tokenizer's own code")
    return parser


def run(arguments: list[str]) -> int:
    """Parse ``arguments`` and print the tokens. The figure's path goes to standard error, so that JSON stays JSON."""
    options = make_parser().parse(arguments)
    if options.top < 1:
        raise InputError(f"--top is {options.top}, expected how many tokens to show on each side, 1 or more")
    if options.figure is not None:
        require_packages("--figure", "matplotlib", extra="report")

    from plot_align.preference import inspection
    from plot_align.preference.distribution import PreferenceDistribution

    preference = PreferenceDistribution.load(options.file)
    tokenizer = load_tokenizer(options.tokenizer, trust_remote_code=options.trust_remote_code)
    found = inspection.inspect(preference, tokenizer, n=options.top)
    figure = inspection.write_figure(found, options.figure) if options.figure is not None else None
    if options.json:
        print(json.dumps(found.to_dict(), indent=2, allow_nan=False))
    else:
        from rich.console import Console

        Console().print(inspection.render(found))
    if figure is not None:
        print(f"figure: {figure}", file=sys.stderr)
    return 0
