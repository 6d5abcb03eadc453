"""Start several processes like ``trl``: through ``accelerate launch``, with its options."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from plot_align.errors import InputError, PlotAlignError, RunError, first_line
from plot_align.parallel import LAUNCHED

PARENT = "PLOT_ALIGN_PARENT"  # the process that started this one for its own work, and without which it should end
_DECIDED_HERE = {"-h", "--help", "-m", "--module", "--no_python", "--no-python"}  # options of accelerate


class Terminated(KeyboardInterrupt):
    """SIGTERM: what ends an interrupted run in order ends this one."""


@contextmanager
def termination_raised() -> Iterator[None]:
    """Within this context SIGTERM raises :class:`Terminated`.

    Not in a process of several: it may wait for another inside of a library, where no exception reaches it.
    """
    ours = threading.current_thread() is threading.main_thread() and not is_launched()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def raise_it(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: it must not disturb the end
        raise Terminated

    signal.signal(signal.SIGTERM, raise_it)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def end_with_launcher() -> None:
    """In a process that another of ours started: end when that one is killed, where the system can do so (Linux).

    It would go on for itself otherwise, and write into what the next run writes.
    """
    if sys.platform == "linux" and os.environ.get(PARENT) == str(os.getppid()):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG


@dataclass
class Launch:
    """Options for accelerate's launcher, from the YAML file and the command line."""

    config: dict[str, Any]
    flags: list[str]

    def arguments(self) -> list[str]:
        """Arguments of ``accelerate launch``; the command line comes last and so wins."""
        if not self.config and not self.flags:
            return []
        found: list[str] = []
        for key, value in self.config.items():
            if isinstance(value, bool):  # its switches take no value
                found += [f"--{key}"] * value
            else:
                found += [f"--{key}", str(value)]
        for flag in self.flags:
            found += flag.split("=", 1) if flag.startswith("--") else [flag]
        if "--accelerate_config" in found[:-1]:
            place = found.index("--accelerate_config") + 1
            own = resources.files("plot_align") / "accelerate_configs" / f"{found[place]}.yaml"
            if own.is_file() and not Path(found[place]).is_file():
                found[place] = str(own)
        try:
            from trl.cli.accelerate_config import resolve_accelerate_config_argument
        except ImportError:  # TRL before 0.29
            if "--accelerate_config" in found:
                raise InputError(
                    "--accelerate_config came, which needs trl 0.29 or newer; expected --config_file with the path of "
                    "one of accelerate's own"
                ) from None
            return found
        try:
            return resolve_accelerate_config_argument(found)
        except ValueError as error:
            raise InputError(f"--accelerate_config: {first_line(error)}") from error


def is_launched() -> bool:
    """Whether a launcher (ours, ``accelerate launch``, torchrun) started this process."""
    return not {LAUNCHED, "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"}.isdisjoint(os.environ)


def launched_by_us() -> bool:
    """Whether this process got all arguments of the user, including those for the launcher."""
    return LAUNCHED in os.environ


def launches_by_default() -> bool:
    """Like ``trl``, with several GPUs or after ``accelerate config``, whose file then decides."""
    import torch
    from accelerate.commands.config import default_config_file

    return torch.cuda.device_count() > 1 or os.path.isfile(default_config_file)


def launcher_options() -> dict[str, bool]:
    """Every option of the launcher, with its dashes, and whether a value follows it."""
    options = _parser()._option_string_actions.items()
    return {name: action.nargs != 0 for name, action in options if name not in _DECIDED_HERE} | {
        "--accelerate_config": True
    }


def with_processes(command: str, num_processes: int | None, arguments: list[str]) -> int | None:
    """Run ``plot-align command`` in ``num_processes`` processes, for commands that parse their options themselves.

    Args:
        num_processes: as the user gave it. arguments: all of the command's, including ``--num_processes``.

    Returns:
        The exit code; None if this process should do the work, as one of several or the only one.

    Raises:
        InputError: this machine cannot start so many processes. RunError, InputError: what stopped a process.
    """
    if num_processes is not None and num_processes < 1:
        raise InputError(f"--num_processes is {num_processes}, expected 1 or more; correct it")
    if num_processes in (None, 1) or is_launched():
        return None
    return launch(command, ["--num_processes", str(num_processes)], arguments)


def on_processes(command: str, num_processes: int | None, arguments: list[str], main: Callable[[], int]) -> int:
    """Run ``main`` in this process, or in several in step, started here or by the user's own launcher.

    Args:
        command, arguments: what the user called, repeated in the processes started here.

    Returns:
        The exit code. The main process raises the errors of all processes; the others return 0.

    Raises:
        PlotAlignError: raised by ``main``, or a process could not be started or was killed.
    """
    from plot_align.parallel import OutOfStep, everywhere, in_step, rank

    code = with_processes(command, num_processes, arguments)
    if code is not None:
        return code
    if not is_launched():
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


def launch(
    command: str,
    launch_arguments: list[str],
    script_arguments: list[str],
    *,
    use_cpu: bool = False,
    output_dir: str | None = None,
) -> int:
    """Run ``accelerate launch ... -m plot_align.cli`` on all accelerators, or on the CPU with gloo if there are none.

    Args:
        use_cpu: do not use accelerators.
        output_dir: of checkpoints, so that the error of a killed process can name the last one.

    Raises:
        InputError: accelerate refuses the options, there are more processes than accelerators, or a process got wrong
            input.
        RunError: a process failed or was killed; the message names the first one and its reason.
    """
    import torch
    from accelerate.commands.launch import launch_command

    script = ["-m", "plot_align.cli", command, *script_arguments]
    options = _parser().parse_args([*launch_arguments, *script])
    use_cpu = use_cpu or options.cpu or not torch.accelerator.is_available()
    _choose_devices(options, use_cpu)
    before = dict(os.environ)
    os.environ[LAUNCHED] = "1"
    os.environ[PARENT] = str(os.getpid())
    if use_cpu:
        # Otherwise each process would train alone: accelerate joins processes on the CPU only when told to.
        options.cpu, os.environ["ACCELERATE_USE_CPU"] = False, "true"  # its own --cpu starts only one process
    try:
        with _quiet_launchers():
            launch_command(options)
    except subprocess.CalledProcessError as error:
        return error.returncode
    except ValueError as error:
        raise InputError(f"accelerate launch refused its options: {first_line(error)}") from error
    except ImportError as error:  # a package of FSDP's or DeepSpeed's
        raise InputError(f"accelerate launch lacks a package: {first_line(error)}") from error
    except Exception as error:
        failures = getattr(error, "failures", None)  # torch.distributed.elastic's ChildFailedError
        if failures:
            raise _reason(failures, output_dir) from None
        match getattr(error, "sigval", None):  # of its SignalException
            case signal.SIGINT:
                raise KeyboardInterrupt from None
            case signal.SIGTERM:
                raise Terminated from None
        raise
    finally:
        os.environ.clear()
        os.environ.update(before)
    return 0


def _choose_devices(options: Any, use_cpu: bool) -> None:
    """Fill in what accelerate would ask for or guess; ``multi_gpu`` starts several processes on the CPU too."""
    import torch
    from accelerate.commands.config import default_config_file

    if use_cpu and (options.use_fsdp or options.use_deepspeed):
        engine = "--use_fsdp" if options.use_fsdp else "--use_deepspeed"
        raise InputError(
            f"{engine} came without an accelerator to train on, and accelerate shards models over accelerators only; "
            f"leave {engine} out to train data-parallel on the CPU"
        )
    if options.config_file is not None or (os.path.isfile(default_config_file) and not use_cpu):
        return
    count = options.num_processes or 1
    present = 0 if use_cpu else torch.accelerator.device_count()
    machines = options.num_machines or 1
    if 0 < present < count // machines:
        raise InputError(
            f"--num_processes is {options.num_processes} and this machine has {present} accelerator"
            f"{'s' * (present > 1)}; expected one process each: lower it, or add --use_cpu to train on the CPU"
        )
    options.num_processes = options.num_processes or max(1, present)
    options.multi_gpu = options.num_processes > 1 and not (
        options.use_fsdp or options.use_deepspeed or options.use_megatron_lm
    )
    options.num_machines = machines
    options.mixed_precision = options.mixed_precision or "no"
    options.dynamo_backend = options.dynamo_backend or "no"
    if machines == 1 and options.main_process_port is None:
        options.main_process_port = 0  # any free one


def _reason(failures: Mapping[int, Any], output_dir: str | None) -> PlotAlignError:
    """One sentence about the process that failed first; the others mostly stopped because of it."""

    def order(item: tuple[int, Any]) -> tuple[bool, bool, float, int]:
        rank, failure = item
        ended = -failure.exitcode == signal.SIGTERM  # killed by the launcher after another process failed
        reported = failure.message if isinstance(failure.message, Mapping) else {}
        when = float(reported.get("extraInfo", {}).get("time", failure.timestamp + 1))
        return ended, failure.exitcode >= 0, when, rank

    rank, failure = min(failures.items(), key=order)
    if failure.exitcode < 0:
        memory = ", perhaps because memory ran out" if failure.signal_name() == "SIGKILL" else ""
        return RunError(
            f"rank {rank} was killed by {failure.signal_name()}{memory}, and the other ranks were stopped; "
            f"{_how_to_resume(output_dir)}"
        )
    kind = InputError if failure.exitcode == InputError.exit_code else RunError
    if isinstance(failure.message, Mapping):  # from parallel.tell_launcher()
        return kind(f"rank {rank}: {failure.message['message']}")
    return kind(f"rank {rank} ended with exit code {failure.exitcode}; its message is above")


def _how_to_resume(output_dir: str | None) -> str:
    if output_dir is None:
        return "run the command again"
    # The Trainer writes this file last, so a checkpoint without it is incomplete.
    complete = [path.parent for path in Path(output_dir).glob("checkpoint-*/trainer_state.json")]
    if not complete:
        return f"{output_dir} holds no checkpoint yet: run the command again, with a smaller --save_steps"
    last = max(complete, key=lambda path: (len(path.name), path.name))
    return f"go on with --resume_from_checkpoint {last}, with as many processes as you like"


@contextmanager
def _quiet_launchers() -> Iterator[None]:
    """Silence torch elastic's report on every process it stops; :func:`_reason` says the same in one sentence."""
    loggers = [logging.getLogger(name) for name in ("torch.distributed.elastic", "torch.distributed.run")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _parser() -> Any:
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()
