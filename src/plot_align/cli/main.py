"""``plot-align``: run the subcommand, and report its errors to the user."""

from __future__ import annotations

import importlib
import os
import sys
import traceback

from plot_align._version import __version__
from plot_align.cli.launch import Terminated, end_with_launcher, termination_raised
from plot_align.cli.output import readable
from plot_align.errors import InputError, PlotAlignError, did_you_mean, first_line, is_out_of_memory
from plot_align.io import is_full
from plot_align.parallel import tell_launcher
from plot_align.text import printable

_TRAINING = {
    "dpo": "`trl dpo` with the PLOT term: the same YAML files and flags",
    "sft": "`trl sft` with the PLOT term: the same YAML files and flags",
    "pro": "ranking optimisation (PRO) with the PLOT term, on ranked lists",
}
COMMANDS = {  # each is a module of this package
    "doctor": "show whether training can run here; find faults in a data set",
    "fetch": "download a model: SmolLM2-135M-Instruct by default",
    "estimate": "count the tokens of preferred and rejected answers in a data set",
    "inspect": "show the tokens most preferred and most rejected, with a figure",
    "filter": "keep some of the pairs: by DEFT's reward, by CHES, by length",
    **_TRAINING,
    "llamafactory-train": "`llamafactory-cli train` with the PLOT term",
    "demo": "tune SmolLM2-135M-Instruct with three losses, and compare them",
    "sweep": "train over a grid of PLOT's options, methods and seeds; compare",
    "redteam": "attack your own model: success rate and over-refusal",
    "evaluate": "measure models on the seven sub-preferences, and for side effects",
    "report": "make one page from records: verdict, tables, figures",
    "bench": "measure what PLOT costs on this machine: time, memory, a profile",
}

_HELP = """\
usage: plot-align [--version] [--debug] COMMAND [options]

Preference fine-tuning with the PLOT term: L = L_vanilla + alpha * L_PLOT.

commands:
{commands}

options:
  -h, --help  this text; `plot-align COMMAND --help` for each command
  --version   version of plot-align
  --debug     show the traceback of an error

example:
  plot-align dpo --config dpo.yaml --alpha 0.1

exit codes: 0 done, 1 run failed, 2 wrong input, 3 --fail_on, 130, 143 stopped
""".format(commands="\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items()))


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand and return the exit code; ``arguments`` defaults to those of the process."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    end_with_launcher()
    try:
        with readable(), termination_raised():
            code = dispatch(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as leave:  # argparse after --help
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except Terminated:
        return _report("ended by SIGTERM before it was done; what is finished is kept", 143, debug)
    except KeyboardInterrupt:
        return _report("interrupted before it was done", 130, debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader closed the pipe, e.g. `| head`
        return 1
    except PlotAlignError as error:
        return _report(str(error), error.exit_code, debug)
    except ModuleNotFoundError as error:
        if error.name != "trl":
            return _report(f"{error}; reinstall plot-align, or the extra that brings it", 1, debug)
        return _report("this needs TRL, which is not installed; run pip install 'trl<1.17'", 2, debug)
    except Exception as error:
        said = first_line(error)
        if is_full(error):
            return _report(f"the disk is full ({said}); free some space, and run the same again", 1, debug)
        if is_out_of_memory(error):
            return _report(f"memory ran out ({said}); make the batches smaller, or free some, and go on", 1, debug)
        hint = "" if debug else " (--debug shows where)"
        return _report(f"{type(error).__name__}: {said}{hint}", 1, debug)


def dispatch(arguments: list[str]) -> int:
    """Run one subcommand and return its exit code; errors are raised."""
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

    if command not in COMMANDS:
        raise InputError(f"unknown command {command!r}; {did_you_mean(command, COMMANDS, 'see plot-align --help')}")

    # Each module is imported only when its command runs: --help must not wait for torch.
    if command in _TRAINING:
        from plot_align.cli.train import run

        return run(command, rest)
    module = importlib.import_module(f"plot_align.cli.{command.replace('-', '_')}")
    return module.run([argument for argument in rest if argument != "--debug"])


def _report(message: str, code: int, debug: bool) -> int:
    sys.stdout.flush()
    if debug:
        print(printable(traceback.format_exc()), end="", file=sys.stderr)
    elif tell_launcher(message):
        return code
    print(f"plot-align: {printable(message)}", file=sys.stderr)
    return code
