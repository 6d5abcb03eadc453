"""What every subcommand shares: a parser that raises instead of exiting."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from plot_align.errors import InputError, did_you_mean, first_line


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
        for argument in arguments:  # before argparse, which would first miss the option that was misspelt
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


def check_dtype(name: str) -> None:
    """The value of an option ``--dtype``.

    Raises:
        InputError: it is neither auto nor a floating-point dtype of torch.
    """
    import torch

    dtype = getattr(torch, name, None)
    if name != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(f"--dtype is {name!r}, expected auto, float32, bfloat16 or float16")


def load_tokenizer(name: str, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The tokenizer of a hub id or a folder.

    Raises:
        InputError: there is none, or it needs code of its own that was not allowed.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, revision=revision or "main")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"no tokenizer could be loaded from {name!r} ({first_line(error)}); name a hub id or a folder holding one"
        ) from error


def add_num_processes(parser: Parser) -> None:
    """What :func:`on_processes` reads."""
    parser.add_argument(
        "--num_processes", type=int, metavar="N", help="share the work among N processes, a GPU each (default: 1)"
    )


def on_processes(command: str, num_processes: int | None, arguments: list[str], main: Callable[[], int]) -> int:
    """``main`` in this process, or in step in several, started here or by the user's own launcher.

    Args:
        command, arguments: as they were called, for the processes to be started.

    Returns:
        The exit code; 0 in other processes than the main one, which raises the errors of all.

    Raises:
        PlotAlignError: as ``main``; or a process could not be started, or was killed.
    """
    from plot_align.cli import launch
    from plot_align.parallel import OutOfStep, everywhere, in_step, rank

    code = launch.with_processes(command, num_processes, arguments)
    if code is not None:
        return code
    if not launch.is_launched():
        return main()
    with in_step():
        try:
            code = everywhere(main)
        except OutOfStep:
            raise
        except Exception:
            if rank() == 0:
                raise
            code = 0
        return code if rank() == 0 else 0


def add_loading_options(parser: Parser) -> None:
    """What :func:`load_chat_model` reads."""
    parser.add_argument("--device", help="e.g. cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: the model's)")
    parser.add_argument("--trust_remote_code", action="store_true", help="allow a model's own code")


def load_chat_model(name: str, options: Any) -> tuple[Any, Any]:
    """Model, on its device, and tokenizer of a hub id or a folder; with several processes each loads its own.

    Args:
        options: of :func:`add_loading_options`.

    Raises:
        InputError: they cannot be loaded.
    """
    from plot_align.parallel import everywhere

    return everywhere(lambda: _chat_model(name, options.device, options.dtype, options.trust_remote_code))


def _chat_model(name: str, device: str | None, dtype: str, trust_remote_code: bool) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    from plot_align.parallel import own_device

    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code)
        return model.to(own_device(device)), tokenizer
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError) as error:
        raise InputError(
            f"no model could be loaded from {name!r} ({first_line(error)}); name a hub id or a folder, and a device "
            "that this machine has"
        ) from error


def named_models(models: list[str]) -> dict[str, str]:
    """Name → hub id or folder, of ``NAME=MODEL`` or the model alone.

    Raises:
        InputError: two models of one name, or a name that is no folder's.
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
    return named
