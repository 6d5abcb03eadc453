"""Start several processes as ``trl`` does: through ``accelerate launch``, with its options."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from typing import Any

from plot_align.commands.common import first_line
from plot_align.errors import InputError

_LAUNCHED = "PLOT_ALIGN_LAUNCHED"  # set for the processes that accelerate starts, so that they do not start others
_DECIDED_HERE = {"-h", "--help", "-m", "--module", "--no_python", "--no-python"}  # options of accelerate


@dataclass
class Launch:
    """What accelerate's launcher is told: options of the YAML file and of the command line."""

    config: dict[str, Any]
    flags: list[str]

    def arguments(self) -> list[str]:
        """As arguments of ``accelerate launch``; the command line comes last and so wins."""
        if not self.config and not self.flags:
            return []
        from trl.cli.accelerate_config import resolve_accelerate_config_argument

        found: list[str] = []
        for key, value in self.config.items():
            if isinstance(value, bool):  # its switches take no value
                found += [f"--{key}"] * value
            else:
                found += [f"--{key}", str(value)]
        for flag in self.flags:
            found += flag.split("=", 1) if flag.startswith("--") else [flag]
        try:
            return resolve_accelerate_config_argument(found)
        except ValueError as error:
            raise InputError(f"--accelerate_config: {first_line(error)}") from error


def is_launched() -> bool:
    """Whether a launcher (ours, ``accelerate launch``, torchrun) started this process."""
    return not {_LAUNCHED, "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"}.isdisjoint(os.environ)


def launched_by_us() -> bool:
    """Whether this process got the arguments as the user gave them, launcher options included."""
    return _LAUNCHED in os.environ


def launches_by_default() -> bool:
    """As ``trl``: with several GPUs, or where the user ran ``accelerate config``, the launcher decides."""
    import torch
    from accelerate.commands.config import default_config_file

    return torch.cuda.device_count() > 1 or os.path.isfile(default_config_file)


def launcher_options() -> dict[str, bool]:
    """Every option of the launcher, with its dashes, and whether a value follows it."""
    options = _parser()._option_string_actions.items()
    return {name: action.nargs != 0 for name, action in options if name not in _DECIDED_HERE} | {
        "--accelerate_config": True
    }


def launch(command: str, launch_arguments: list[str], script_arguments: list[str]) -> int:
    """Run ``accelerate launch ... -m plot_align.cli``; the processes report their own errors."""
    import torch
    from accelerate.commands.launch import launch_command

    script = ["-m", "plot_align.cli", command, *script_arguments]
    options = _parser().parse_args([*launch_arguments, *script])
    several = options.multi_gpu or options.use_fsdp or options.use_deepspeed or options.config_file is not None
    if (options.num_processes or 0) > 1 and not several and torch.accelerator.device_count() < 2:
        raise InputError(
            f"--num_processes is {options.num_processes}, and with fewer than two accelerators accelerate starts one; "
            "add --multi_gpu for processes on the CPU"
        )
    os.environ[_LAUNCHED] = "1"
    try:
        launch_command(options)
    except subprocess.CalledProcessError as error:
        return error.returncode
    except ValueError as error:
        raise InputError(f"accelerate launch refused its options: {first_line(error)}") from error
    except Exception as error:
        first_failure = getattr(error, "get_first_failure", None)  # torch.distributed.elastic's ChildFailedError
        if first_failure is None:
            raise
        return first_failure()[1].exitcode or 1
    finally:
        del os.environ[_LAUNCHED]
    return 0


def _parser() -> Any:
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()
