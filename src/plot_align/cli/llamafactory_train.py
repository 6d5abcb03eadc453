"""``plot-align llamafactory-train``: ``llamafactory-cli train`` with the PLOT term."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from plot_align.cli import launch
from plot_align.cli.parser import Parser, add_num_processes
from plot_align.errors import InputError
from plot_align.io import read_yaml

COMMAND = "llamafactory-train"


def make_parser() -> Parser:
    parser = Parser(
        COMMAND,
        "`llamafactory-cli train` on the same file, whose block `plot:` holds options of\n"
        "PLOT and perhaps `preference: FILE`; without the block nothing is added.",
        f"  plot-align {COMMAND} dpo.yaml plot.alpha=0.1 output_dir=out",
    )
    parser.add_argument("config", metavar="FILE.yaml", help="options of LLaMA-Factory, and the block plot")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="options that win over the file")
    add_num_processes(parser)
    return parser


def run(arguments: list[str]) -> int:
    """Parse ``arguments``, launch processes where there are several GPUs, and train."""
    options = make_parser().parse(arguments)
    config = _read(options.config, options.overrides)
    code = launch.with_processes(COMMAND, options.num_processes, arguments)
    if code is not None:
        return code
    if options.num_processes is None and not launch.is_launched() and launch.launches_by_default():
        return launch.launch(COMMAND, [], arguments, output_dir=config.get("output_dir"))

    from plot_align.plugins.llamafactory import train

    train(config)
    return 0


def _read(path: str, overrides: list[str]) -> dict[str, Any]:
    """The file and the overrides, as LLaMA-Factory reads them."""
    for text in overrides:
        if "=" not in text:
            raise InputError(f"unexpected argument {text!r}; expected KEY=VALUE after the file")
    read_yaml(path, "FILE.yaml")  # says what is wrong with the file
    if find_spec("llamafactory") is None:
        raise InputError(f"{COMMAND} needs LLaMA-Factory, which is not installed; pip install llamafactory")

    from omegaconf import OmegaConf

    merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_cli(overrides))
    return OmegaConf.to_container(merged, resolve=True)
