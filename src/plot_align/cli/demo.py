"""``plot-align demo``: tune one real model with three losses, and compare them on one page."""

from __future__ import annotations

from pathlib import Path

from plot_align.cli.parser import Parser
from plot_align.errors import InputError


def make_parser() -> Parser:
    parser = Parser(
        "demo",
        "Tune SmolLM2-135M-Instruct with DPO, DPO+SFT and DPO+PLOT on our own preference\n"
        "pairs, judge each on held-out requests, attack it, and write one page,\n"
        "report.html, with the answers side by side. Run it again to resume.",
        "  plot-align demo --quick",
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps and requests; under five minutes")
    parser.add_argument("--model", metavar="MODEL", help="another chat model: hub id or folder")
    parser.add_argument("--dataset", metavar="DATA", help="other pairs to train on: a file or a hub id")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of training and sampling (%(default)s)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="output folder (runs/demo, with --quick runs/demo-quick)"
    )
    return parser


def run(arguments: list[str]) -> int:
    """Parse ``arguments`` and run the demonstration."""
    options = make_parser().parse(arguments)
    if options.seed < 0:
        raise InputError(f"--seed is {options.seed}, expected a whole number of 0 or more")

    from plot_align.demo.run import main

    output = options.output or Path("runs/demo-quick" if options.quick else "runs/demo")
    return main(quick=options.quick, output=output, model=options.model, dataset=options.dataset, seed=options.seed)
