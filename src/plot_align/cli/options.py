"""The options of ``plot-align dpo``, ``sft`` and ``pro``: TRL's dataclasses and ours, read by TRL's parser.

A YAML file written for ``trl dpo`` works unchanged. Unlike in TRL, an unknown option is an error that names the
nearest known one, and abbreviations are not expanded.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn, get_type_hints

from plot_align.cli.launch import Launch, launcher_options
from plot_align.config import PlotAblations, PlotConfig
from plot_align.errors import InputError, did_you_mean, first_line
from plot_align.io import fits


@dataclass
class PlotOptions(PlotConfig):
    """The options of PlotConfig itself. HfArgumentParser ignores fields without ``init``."""

    ablations: PlotAblations = field(default_factory=PlotAblations, init=False)

    def join(self, ablations: PlotAblations) -> PlotConfig:
        """These options and the ablations, which have separate flags, as one PlotConfig."""
        own = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.init}
        return PlotConfig(**own, ablations=ablations)


@dataclass
class PreferenceOptions:
    """Where the preference distribution comes from."""

    _argument_group_name = "preference"

    preference: str | None = field(
        default=None,
        metadata={"help": "File written by `plot-align estimate`. Default for dpo and pro: count the training set."},
    )
    preference_dataset: str | None = field(
        default=None, metadata={"help": "Count these pairs instead: a hub id or a local file."}
    )
    preference_split: str = field(default="train", metadata={"help": "Split of preference_dataset to count."})


@dataclass
class MonitorOptions:
    """Watching the training: see ``plot_align.PreferenceMonitor``."""

    _argument_group_name = "monitor"

    monitor: bool = field(
        default=False,
        metadata={
            "help": "Log how far the chosen answers fall, ask the model a few requests at each evaluation, and warn "
            "when the training goes wrong."
        },
    )
    stop_on: list[str] = field(
        default_factory=list,
        metadata={
            "help": "With monitor: end the training at chosen_fall, rejected_fall, benign_refusals or repetition."
        },
    )
    monitor_requests: str | None = field(
        default=None,
        metadata={
            "help": "With monitor: ask these instead of our own: XSTest's .csv, or a .jsonl file of prompt and kind "
            "(benign, harmful)."
        },
    )

    def __post_init__(self) -> None:
        given = "stop_on" if self.stop_on else "monitor_requests" if self.monitor_requests is not None else None
        if given is not None and not self.monitor:
            raise InputError(f"--{given} came without --monitor, which it belongs to; add --monitor")


def plot_parser() -> argparse.ArgumentParser:
    """PLOT's own options and the ablations, as one of the ``parents`` of another parser."""
    from transformers import HfArgumentParser

    return HfArgumentParser([PlotOptions, PlotAblations], add_help=False)


def make_parser(command: str) -> Any:
    """TRL's parser over TRL's dataclasses and ours; it raises :class:`InputError` instead of exiting."""
    from trl import DatasetMixtureConfig, DPOConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

    class TrainingParser(TrlParser):
        def error(self, message: str) -> NoReturn:
            raise InputError(f"{message}; see 'plot-align {command} --help-all'")

    trainer_config = {"dpo": DPOConfig, "sft": SFTConfig}.get(command)
    if trainer_config is None:
        from plot_align.methods.pro import PROConfig

        trainer_config = PROConfig
    return TrainingParser(
        [
            *(ScriptArguments, trainer_config, ModelConfig, DatasetMixtureConfig),
            *(PlotOptions, PreferenceOptions, MonitorOptions, PlotAblations),
        ],
        prog=f"plot-align {command}",
        usage=f"plot-align {command} [--config FILE.yaml] [options]",
        allow_abbrev=False,
    )


def parse(parser: Any, config: dict[str, Any], flags: list[str], config_path: str | None) -> tuple[tuple, Launch]:
    """Read the YAML options and the flags into TRL's dataclasses and ours.

    Returns:
        The options (script, training, model, mixture, monitor, PLOT, preference), and those of the launcher.

    Raises:
        InputError: an unknown option, with the nearest right one; or a value that is refused.
    """
    _check_mixture(config.get("datasets"), config_path)
    known = {action.dest for action in parser._actions} - {"help"}
    launch_config = {key: config.pop(key) for key in list(config) if key not in known}
    if launch_config:
        launcher = {name.lstrip("-") for name in launcher_options() if "-" not in name.lstrip("-")}
        for key in launch_config:
            if key not in launcher:
                advice = did_you_mean(str(key), known | launcher, f"see '{parser.prog} --help-all'")
                raise InputError(f"unknown option {str(key)!r} in {config_path}; {advice}")
    parser.set_defaults_with_config(**config)

    # Unknown flags first: otherwise the error would be about the missing value.
    _, unknown = parser.parse_known_args(flags)
    _check_launch_flags(parser, unknown)
    try:
        options = parser.parse_args_into_dataclasses(flags, return_remaining_strings=True, look_for_args_file=False)
    except InputError:
        raise
    except Exception as error:  # TRL's and transformers' own checks raise anything where a value has another type
        kind = "" if isinstance(error, ValueError | TypeError | ImportError) else f"{type(error).__name__}: "
        raise InputError(f"the options were refused: {kind}{first_line(error)}") from error
    *trl, plot, preference, monitor, ablations, _ = options
    for group in (preference, monitor):
        hints = get_type_hints(type(group))
        for entry in fields(group):
            value = getattr(group, entry.name)
            if not fits(value, hints[entry.name]):
                raise InputError(f"{entry.name} is {value!r}, expected {entry.type}; correct it")
    return (*trl, monitor, plot.join(ablations), preference), Launch(launch_config, unknown)


def _check_launch_flags(parser: Any, unknown: list[str]) -> None:
    """Refuse everything but the launcher's options and their values."""
    takes_value = launcher_options() if unknown else {}
    waiting = False
    for token in unknown:
        name, equals, _ = token.partition("=")
        if waiting and not token.startswith("--"):
            waiting = False
        elif name in takes_value:
            waiting = takes_value[name] and not equals
        elif name.startswith("-"):
            known = [*parser._option_string_actions, *takes_value, "--config", "--help-all"]
            advice = did_you_mean(name, known, f"see '{parser.prog} --help-all'")
            raise InputError(f"unknown option {name!r}; {advice}")
        else:
            yaml = name.endswith((".yaml", ".yml"))
            advice = f"did you mean '--config {name}'?" if yaml else f"see '{parser.prog} --help'"
            raise InputError(f"unexpected argument {name!r}; {advice}")


def _check_mixture(datasets: Any, config_path: str | None) -> None:
    """Refuse a misspelt key in TRL's ``datasets:`` list, where TRL raises a TypeError."""
    if datasets is None:
        return
    from trl.scripts.utils import DatasetConfig

    known = [entry.name for entry in fields(DatasetConfig)]
    if not isinstance(datasets, list) or not all(isinstance(entry, Mapping) for entry in datasets):
        raise InputError(f"'datasets' in {config_path} is not a list of mappings; write '- path: ...' for each")
    for index, entry in enumerate(datasets):
        for key in entry:
            if key not in known:
                advice = did_you_mean(str(key), known, f"expected one of {', '.join(known)}")
                raise InputError(f"unknown key {str(key)!r} in datasets[{index}] of {config_path}; {advice}")
        if "path" not in entry:
            raise InputError(f"datasets[{index}] of {config_path} has no 'path'; name a hub id or a local file")


def without_bare_debug(arguments: list[str]) -> list[str]:
    """Drop our ``--debug``; the option of that name in transformers always has a value."""
    following = [*arguments[1:], "--"]
    return [
        argument
        for argument, after in zip(arguments, following, strict=True)
        if argument != "--debug" or not after.startswith("--")
    ]


def split_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Take ``--config FILE`` or ``--config=FILE`` out of the arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", default=[])
    try:
        found, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError:
        raise InputError("--config came without a file, expected a path after it; write --config FILE.yaml") from None
    if len(found.config) > 1:
        raise InputError("--config was given twice, expected one file; merge the two")
    return (found.config[0] if found.config else None), rest


def set_environment(env: Any, config_path: str | None) -> None:
    """Set the variables under ``env:`` of the YAML file, as TRL does."""
    if env is None:
        return
    if not isinstance(env, dict):
        raise InputError(f"'env' in {config_path} is not a mapping; write one 'NAME: value' on each line below it")
    for key, value in env.items():
        try:
            os.environ[str(key)] = str(value)
        except (ValueError, OSError):  # a null byte, half an emoji, "=" in the name
            raise InputError(
                f"'env' in {config_path} has {str(key)!r}: {str(value)!r}, which no environment can hold; correct it"
            ) from None
