"""The options of ``plot-align dpo``, ``sft`` and ``pro``: TRL's dataclasses plus ours, read by TRL's parser.

A YAML file written for ``trl dpo`` works unchanged. What differs from TRL: an option that nobody knows is refused with
the nearest right one, and abbreviations are not guessed.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

from plot_align.cli.common import did_you_mean, first_line
from plot_align.cli.launch import Launch, launcher_options
from plot_align.errors import InputError


@dataclass
class PlotArguments:
    """Where the preference distribution comes from."""

    preference: str | None = field(
        default=None,
        metadata={
            "help": "Artefact written by `plot-align estimate`. Default for dpo and pro: count the training set."
        },
    )
    preference_dataset: str | None = field(
        default=None,
        metadata={"help": "Estimate the preference from these pairs instead: hub id or local file."},
    )
    preference_split: str = field(
        default="train", metadata={"help": "Split of `preference_dataset` to estimate from."}
    )


def make_parser(command: str) -> Any:
    """TRL's parser over TRL's dataclasses and ours; its mistakes are :class:`InputError`."""
    from plot_align.config import PlotAblations, PlotConfig
    from plot_align.methods.pro import PROConfig
    from trl import DatasetMixtureConfig, DPOConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

    class TrainingParser(TrlParser):
        def _parse_dataclass_field(self, parser: Any, field: Any) -> None:
            if field.name != "ablations":  # PlotAblations has flags of its own
                super()._parse_dataclass_field(parser, field)

        def error(self, message: str) -> NoReturn:
            raise InputError(f"{message}; see 'plot-align {command} --help-all'")

    trainer_config = {"dpo": DPOConfig, "sft": SFTConfig, "pro": PROConfig}[command]
    return TrainingParser(
        (ScriptArguments, trainer_config, ModelConfig, DatasetMixtureConfig, PlotConfig, PlotAblations, PlotArguments),
        prog=f"plot-align {command}",
        usage=f"plot-align {command} [--config FILE.yaml] [options]",
        allow_abbrev=False,
    )


def parse(parser: Any, config: dict[str, Any], flags: list[str], config_path: str | None) -> tuple[tuple, Launch]:
    """Read the YAML options and the flags into TRL's dataclasses and ours.

    Returns:
        (script, training, model, mixture, PLOT, preference) options, and what belongs to the launcher.

    Raises:
        InputError: an option nobody knows, with the nearest right one; a value that is refused.
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

    # Unknown flags first: a misspelt one must not hide behind the consequences of its absence.
    _, unknown = parser.parse_known_args(flags)
    _check_launch_flags(parser, unknown)
    try:
        options = parser.parse_args_into_dataclasses(flags, return_remaining_strings=True, look_for_args_file=False)
    except InputError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"the options were refused: {first_line(error)}") from error
    *trl, plot, ablations, preference, _ = options
    return (*trl, dataclasses.replace(plot, ablations=ablations), preference), Launch(launch_config, unknown)


def _check_launch_flags(parser: Any, unknown: list[str]) -> None:
    """Refuse whatever is neither an option of the launcher nor the value of one."""
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
    """Refuse a misspelt key of TRL's ``datasets:`` list, which it would report as a TypeError."""
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
    """Drop our ``--debug``; transformers' option of the same name always has a value."""
    following = [*arguments[1:], "--"]
    return [
        argument
        for argument, after in zip(arguments, following, strict=True)
        if argument != "--debug" or not after.startswith("--")
    ]


def split_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Take ``--config FILE`` or ``--config=FILE`` out of the arguments."""
    path: str | None = None
    rest: list[str] = []
    waiting = False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if waiting:
            path, waiting = argument, False
        elif name == "--config" and path is not None:
            raise InputError("--config was given twice, expected one file; merge the two")
        elif name == "--config" and equals:
            path = value
        elif name == "--config":
            waiting = True
        else:
            rest.append(argument)
    if waiting:
        raise InputError("--config came without a file, expected a path after it; write --config FILE.yaml")
    return path, rest


def set_environment(env: Any, config_path: str | None) -> None:
    """Set the variables under ``env:`` of the YAML file, as TRL does."""
    if env is None:
        return
    if not isinstance(env, dict):
        raise InputError(f"'env' in {config_path} is no mapping; write one 'NAME: value' on each line below it")
    for key, value in env.items():
        os.environ[str(key)] = str(value)
