"""``plot-align demo``: the whole pipeline on the offline world."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from plot_align.commands.common import Parser
from plot_align.errors import InputError

if TYPE_CHECKING:
    from plot_align.sandbox.demo import Tuned


def make_parser() -> Parser:
    parser = Parser(
        "demo",
        "Train DPO, DPO+SFT, DPO+PLOT and DPO+SFT+PLOT side by side on a small offline\n"
        "world with programmatic truth, judge each on held-out prompts, evaluate the\n"
        "models, and write a table, a figure, records and one page, report.html. It is a\n"
        "test bench: its numbers say nothing about real models.",
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

    tuned = main(quick=options.quick, output=options.output, seeds=options.seeds)
    return _page(tuned, options.output)


def _page(tuned: Tuned, output: Path) -> int:
    """What a user does next with models of their own: measure them, and look at one page."""
    from plot_align.commands.evaluate import run as evaluate
    from plot_align.commands.report import run as report

    base = next(iter(tuned.models.values()))
    steps = {
        "evaluate": [
            *(f"{name}={folder}" for name, folder in tuned.models.items()),
            *("--suite", "sandbox", "--reference", str(base), "--preference", str(tuned.preference)),
            *("--output", str(output / "evaluation"), "--quiet"),
        ],
        "report": [
            *(str(output), "--output", str(output / "report.html"), "--baseline", "DPO", "--paper"),
            *("--title", "plot-align demo: a small offline world"),
        ],
    }
    for (name, arguments), command in zip(steps.items(), (evaluate, report), strict=True):
        print(f"\n$ plot-align {name} {shlex.join(arguments)}")
        code = command(arguments)
        if code:
            return code
    return 0
