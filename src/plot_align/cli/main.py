"""``plot-align``: which subcommand runs, and what a user sees when it goes wrong."""

from __future__ import annotations

import os
import sys
import traceback

from plot_align._version import __version__
from plot_align.cli.common import did_you_mean, first_line
from plot_align.cli.launch import tell_launcher
from plot_align.errors import InputError, PlotAlignError

_COMMANDS = (
    "fetch",
    "estimate",
    "inspect",
    "filter",
    "dpo",
    "sft",
    "pro",
    "demo",
    "sweep",
    "redteam",
    "evaluate",
    "report",
    "bench",
)

_HELP = """\
usage: plot-align [--version] [--debug] COMMAND [options]

Preference fine-tuning with the PLOT term: L = L_vanilla + alpha * L_PLOT.

commands:
  fetch      bring a model onto this machine: SmolLM2-135M-Instruct by default
  estimate   count preferred and rejected tokens of a data set of pairs
  inspect    show what such a count prefers and rejects, with a figure
  filter     keep the pairs with the highest distribution reward (DEFT)
  dpo        `trl dpo` with the PLOT term: the same YAML files and flags
  sft        `trl sft` with the PLOT term: the same YAML files and flags
  pro        ranking optimisation (PRO) with the PLOT term, of ranked lists
  demo       DPO with and without PLOT on a small real model, judged
  sweep      a grid over PLOT's options, methods and seeds: table and figures
  redteam    attack your own model: success rate, with over-refusal beside it
  evaluate   models on the seven sub-preferences and on what must not get worse
  report     one page from records: verdict, tables, figures
  bench      what PLOT costs on this machine: time, memory, a profile

options:
  -h, --help  this text; `plot-align COMMAND --help` for each command
  --version   version of plot-align
  --debug     show the traceback of an error

example:
  plot-align estimate pairs.jsonl --tokenizer Qwen/Qwen3-0.6B
  plot-align dpo --config dpo.yaml --alpha 0.1

exit codes: 0 done, 1 the run failed, 2 wrong input, 130 interrupted
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand and return the exit code; ``arguments`` defaults to those of the process."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as leave:  # argparse after --help
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except KeyboardInterrupt:
        return _report("interrupted before it was done", 130, debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left, as `| head` does
        return 1
    except PlotAlignError as error:
        return _report(str(error), error.exit_code, debug)
    except ModuleNotFoundError as error:
        if error.name != "trl":
            return _report(f"{error}; reinstall plot-align, or the extra that brings it", 1, debug)
        return _report("this needs TRL, which is not installed; on Python 3.11 or newer run pip install trl", 2, debug)
    except Exception as error:
        hint = "" if debug else " (--debug shows where)"
        return _report(f"{type(error).__name__}: {first_line(error)}{hint}", 1, debug)


def _dispatch(arguments: list[str]) -> int:
    while arguments and arguments[0] == "--debug":
        del arguments[0]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    if command == "--version":
        print(f"plot-align {__version__}")
        return 0
    if command.startswith("-"):
        advice = did_you_mean(command, ("--version", "--debug", "--help"), "see 'plot-align --help'")
        raise InputError(f"unknown option {command!r} before the command; {advice}")

    # Each module is imported only when its command runs: --help must not wait for torch.
    match command:
        case "dpo" | "sft" | "pro":
            from plot_align.cli.train import run as train

            return train(command, rest)
        case "fetch":
            from plot_align.cli.fetch import run as fetch

            return fetch(_without_debug(rest))
        case "estimate":
            from plot_align.cli.estimate import run as estimate

            return estimate(_without_debug(rest))
        case "inspect":
            from plot_align.cli.inspect import run as inspect

            return inspect(_without_debug(rest))
        case "filter":
            from plot_align.cli.filter import run as filter_pairs

            return filter_pairs(_without_debug(rest))
        case "demo":
            from plot_align.cli.demo import run as demo

            return demo(_without_debug(rest))
        case "sweep":
            from plot_align.cli.sweep import run as sweep

            return sweep(_without_debug(rest))
        case "redteam":
            from plot_align.cli.redteam import run as redteam

            return redteam(_without_debug(rest))
        case "evaluate":
            from plot_align.cli.evaluate import run as evaluate

            return evaluate(_without_debug(rest))
        case "report":
            from plot_align.cli.report import run as report

            return report(_without_debug(rest))
        case "bench":
            from plot_align.cli.bench import run as bench

            return bench(_without_debug(rest))
    raise InputError(f"unknown command {command!r}; {did_you_mean(command, _COMMANDS, 'see plot-align --help')}")


def _without_debug(arguments: list[str]) -> list[str]:
    return [argument for argument in arguments if argument != "--debug"]


def _report(message: str, code: int, debug: bool) -> int:
    sys.stdout.flush()
    if debug:
        traceback.print_exc()
    elif tell_launcher(message):
        return code
    print(f"plot-align: {message}", file=sys.stderr)
    return code
