"""The parser of a subcommand, which raises instead of exiting, and options that several commands have."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from plot_align.errors import InputError, did_you_mean
from plot_align.io import require_distinct


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are :class:`InputError`, with the nearest right option named."""

    def __init__(
        self, command: str, description: str, example: str, parents: Sequence[argparse.ArgumentParser] = ()
    ) -> None:
        super().__init__(
            prog=f"plot-align {command}",
            description=description,
            epilog=f"example:\n{example}",
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=80),
            allow_abbrev=False,
            parents=parents,
        )

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        """Parse all of ``arguments``.

        Raises:
            InputError: an unknown option (the nearest known one is named), a missing or a malformed value.
        """
        for argument in arguments:  # before argparse, which would first report the correct option as missing
            name = argument.partition("=")[0]
            if name == "--":
                break
            if name.startswith("--") and name not in self._option_string_actions:
                advice = did_you_mean(name, self._option_string_actions, f"see '{self.prog} --help'")
                raise InputError(f"unknown option {name!r}; {advice}")
        return self.parse_args(arguments)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see '{self.prog} --help'")


def length(text: str) -> int | None:
    """The value of an option ``--max_length``: a whole number or ``none``."""
    try:
        return None if text.lower() == "none" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} came, expected a whole number or none") from None


def add_num_processes(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """``--num_processes``, see :func:`plot_align.cli.launch.on_processes`."""
    parser.add_argument(
        "--num_processes", type=int, metavar="N", help="divide the work among N processes, a GPU each (1)"
    )


def add_loading_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """How a model is loaded, see :func:`plot_align.inference.load.load_model`."""
    parser.add_argument("--device", help="e.g. cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: the model's)")
    parser.add_argument("--trust_remote_code", action="store_true", help="allow a model's own code")


def named_models(models: list[str]) -> dict[str, str]:
    """``NAME=MODEL`` or the model alone, as name → hub id or folder.

    Raises:
        InputError: two models have one name, or a name could not name a folder.
    """
    named: dict[str, str] = {}
    for given in models:
        name, equals, source = given.partition("=")
        if not equals or Path(given).exists():
            name, source = Path(given).name, given
        if not name or not source or Path(name).name != name or name.startswith("."):
            raise InputError(f"model is {given!r}, expected a hub id, a folder or NAME=MODEL with a plain name")
        if name in named:
            raise InputError(f"two models are called {name!r}; name them apart, as NAME=MODEL")
        named[name] = source
    require_distinct(named, "the models")
    return named
