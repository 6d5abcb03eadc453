"""``plot-align demo``: the whole pipeline on the offline world."""

from __future__ import annotations

from pathlib import Path

from plot_align.commands.common import Parser
from plot_align.errors import InputError


def make_parser() -> Parser:
    parser = Parser(
        "demo",
        "Train DPO, DPO+SFT, DPO+PLOT and DPO+SFT+PLOT side by side on a small offline\n"
        "world with programmatic truth, judge each on held-out prompts, and write a\n"
        "table, a figure and records. It is a test bench: its numbers say nothing about\n"
        "real models.",
        "  plot-align demo --quick --output runs/demo",
    )
    parser.add_argument("--quick", action="store_true", help="one seed (under three minutes on two cores)")
    parser.add_argument("--seeds", type=int, metavar="N", help="how many seeds (default: 3; 1 with --quick)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), metavar="DIR", help="folder of the results (%(default)s)"
    )
    return parser


def run(arguments: list[str]) -> int:
    """Parse ``arguments`` and run the demonstration."""
    options = make_parser().parse(arguments)
    if options.seeds is not None and options.seeds < 1:
        raise InputError(f"--seeds is {options.seeds}, expected 1 or more; leave it out for the default")

    from plot_align.sandbox.demo import main

    main(quick=options.quick, output=options.output, seeds=options.seeds)
    return 0
