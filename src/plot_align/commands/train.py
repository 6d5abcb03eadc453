"""``plot-align dpo`` and ``plot-align sft``: TRL's own scripts with the PLOT term.

Options are TRL's dataclasses plus ours, read by TRL's parser, so a YAML file written for ``trl dpo`` works unchanged.
What differs from TRL: an option that nobody knows is refused with the nearest right one, abbreviations are not
guessed, and ``--dataset_name`` may be a local file.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from plot_align.commands.common import did_you_mean, first_line, load_tokenizer
from plot_align.errors import InputError, RunError

_LAUNCHED = "PLOT_ALIGN_LAUNCHED"  # set for the processes that accelerate starts, so that they do not start others
_NOT_OURS = {"-h", "--help", "-m", "--module", "--no_python", "--no-python"}  # accelerate options that we decide

_HELP = """\
usage: plot-align {command} [--config FILE.yaml] [options]

`trl {command}` with the PLOT term: every option of `trl {command}`, as a flag or as a
key of the YAML file, plus those marked *. --help-all lists all of them.

  --config FILE                  options as YAML; flags win over the file
  --model_name_or_path MODEL     hub id or folder
  --dataset_name DATA            hub id, or a .jsonl/.json/.csv/.parquet file
  --output_dir DIR               where checkpoints and the model go
* --alpha A                      weight of the PLOT term; 0 is TRL to the bit
* --preference FILE              from `plot-align estimate`{default}
* --preference_dataset DATA      estimate it from these pairs instead
* --target T                     relu, shift, softmax, anchored
* --divergence D                 w1, kl, js, tv
* --granularity G                batch, sequence, token
  --learning_rate LR             --num_train_epochs N, --max_steps N, --seed N
  --per_device_train_batch_size N, --gradient_accumulation_steps N
  --max_length N                 longer rows are truncated
  --use_peft                     LoRA, with --lora_r, --lora_alpha
  --num_processes N              how many, started by `accelerate launch`
  --resume_from_checkpoint DIR   continue an interrupted run

example:
  plot-align {command} --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name {data} --alpha 0.1{extra}
"""


@dataclass
class PlotArguments:
    """Where the preference distribution comes from."""

    preference: str | None = field(
        default=None,
        metadata={"help": "Artefact written by `plot-align estimate`. Default for dpo: count the training pairs."},
    )
    preference_dataset: str | None = field(
        default=None,
        metadata={"help": "Estimate the preference from these pairs instead: hub id or local file."},
    )
    preference_split: str = field(
        default="train", metadata={"help": "Split of `preference_dataset` to estimate from."}
    )


def run(command: str, arguments: list[str]) -> int:
    """Run ``command`` ("dpo" or "sft"): parse, launch more processes where asked to, train, save."""
    if not {"-h", "--help"}.isdisjoint(arguments):
        print(help_text(command), end="")
        return 0
    arguments = _without_bare_debug(arguments)
    config_path, flags = _split_config(arguments)
    config = _read_yaml(config_path) if config_path is not None else {}
    _set_environment(config.pop("env", None), config_path)  # before torch is imported, so that CUDA_* still counts
    parser = make_parser(command)
    if "--help-all" in flags:
        parser.print_help()
        return 0
    options, launch = parse(parser, config, flags, config_path)

    if _is_launched():
        if launch.flags:
            raise InputError(
                f"{launch.flags[0]} came to a process that is already launched; give it to the launcher instead"
            )
    else:
        launch_arguments = launch.arguments()
        if launch_arguments or _launches_by_default():
            script = ["--config", config_path] if config_path is not None else []
            return _launch(command, launch_arguments, [*script, *launch.rest])
    _train(command, *options)
    return 0


def help_text(command: str) -> str:
    """The short help of ``command``, one screen."""
    dpo = command == "dpo"
    return _HELP.format(
        command=command,
        default=" (default: the pairs)" if dpo else "",
        data="pairs.jsonl" if dpo else "good.jsonl",
        extra="" if dpo else " --preference p.safetensors",
    )


def make_parser(command: str) -> Any:
    """TRL's parser over TRL's dataclasses and ours; its mistakes are :class:`InputError`."""
    from trl import DatasetMixtureConfig, DPOConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

    from plot_align.training.config import PlotConfig

    class TrainingParser(TrlParser):
        def error(self, message: str) -> NoReturn:
            raise InputError(f"{message}; see 'plot-align {command} --help-all'")

    trainer_config = DPOConfig if command == "dpo" else SFTConfig
    return TrainingParser(
        (ScriptArguments, trainer_config, ModelConfig, DatasetMixtureConfig, PlotConfig, PlotArguments),
        prog=f"plot-align {command}",
        usage=f"plot-align {command} [--config FILE.yaml] [options]",
        allow_abbrev=False,
    )


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


def parse(parser: Any, config: dict[str, Any], flags: list[str], config_path: str | None) -> tuple[tuple, Launch]:
    """Read the YAML options and the flags into TRL's dataclasses and ours.

    Returns:
        (script, training, model, mixture, PLOT, preference) options, and what belongs to the launcher.

    Raises:
        InputError: an option nobody knows, with the nearest right one; a value that is refused.
    """
    _check_mixture(config.get("datasets"), config_path)
    known = {action.dest for action in parser._actions}
    launch_config = {key: config.pop(key) for key in list(config) if key not in known}
    if launch_config:
        launcher = {action.dest for action in _launcher_parser()._actions} | {"accelerate_config"}
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
    return options[:-1], Launch(launch_config, unknown)


def _check_launch_flags(parser: Any, unknown: list[str]) -> None:
    """Refuse whatever is neither an option of accelerate's launcher nor the value of one."""
    if not unknown:
        return
    launcher = {**_launcher_parser()._option_string_actions}
    takes_value = {name: action.nargs != 0 for name, action in launcher.items() if name not in _NOT_OURS}
    takes_value["--accelerate_config"] = True
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


def _without_bare_debug(arguments: list[str]) -> list[str]:
    """Drop our ``--debug``; transformers' option of the same name always has a value."""
    following = [*arguments[1:], "--"]
    return [
        argument
        for argument, after in zip(arguments, following, strict=True)
        if argument != "--debug" or not after.startswith("--")
    ]


def _split_config(arguments: list[str]) -> tuple[str | None, list[str]]:
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


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {path} cannot be read ({error.strerror}); check the path") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"--config {path}{place} is not valid YAML ({getattr(error, 'problem', error)})") from None
    except UnicodeDecodeError:
        raise InputError(f"--config {path} is not UTF-8 text; name a YAML file") from None
    if not isinstance(content, dict):
        raise InputError(f"--config {path} holds no mapping; write one 'option: value' on each line")
    return content


def _set_environment(env: Any, config_path: str | None) -> None:
    if env is None:
        return
    if not isinstance(env, dict):
        raise InputError(f"'env' in {config_path} is no mapping; write one 'NAME: value' on each line below it")
    for key, value in env.items():
        os.environ[str(key)] = str(value)


def _launcher_parser() -> Any:
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()


def _is_launched() -> bool:
    """Whether a launcher (ours, ``accelerate launch``, torchrun) started this process."""
    return not {_LAUNCHED, "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"}.isdisjoint(os.environ)


def _launches_by_default() -> bool:
    """As ``trl``: with several GPUs, or where the user ran ``accelerate config``, the launcher decides."""
    import torch
    from accelerate.commands.config import default_config_file

    return torch.cuda.device_count() > 1 or os.path.isfile(default_config_file)


def _launch(command: str, launch_arguments: list[str], script_arguments: list[str]) -> int:
    """Run ``accelerate launch ... -m plot_align.cli``; the processes report their own errors."""
    import torch
    from accelerate.commands.launch import launch_command

    script = ["-m", "plot_align.cli", command, *script_arguments]
    options = _launcher_parser().parse_args([*launch_arguments, *script])
    several = options.multi_gpu or options.use_fsdp or options.use_deepspeed or options.config_file is not None
    if (options.num_processes or 0) > 1 and not several and torch.accelerator.device_count() < 2:
        raise InputError(
            f"--num_processes is {options.num_processes}, and with fewer than two accelerators accelerate starts one; "
            f"add --multi_gpu for processes on the CPU"
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


def _train(
    command: str, script_args: Any, training_args: Any, model_args: Any, mixture: Any, plot: Any, preference_args: Any
) -> None:
    """What ``trl/scripts/dpo.py`` and ``sft.py`` do, with our trainers; then a record beside the model."""
    from trl import get_peft_config, get_quantization_config

    from plot_align.records import write_record
    from plot_align.training import PlotDPOTrainer, PlotSFTTrainer

    if model_args.model_name_or_path is None:
        raise InputError("--model_name_or_path is missing, expected a hub id or a folder; name the model to tune")
    preference = _preference(command, training_args, model_args, plot, preference_args)
    train_dataset, eval_dataset = _datasets(script_args, training_args, mixture)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    trainer_class: Any = PlotDPOTrainer if command == "dpo" else PlotSFTTrainer
    trainer = trainer_class(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        plot=plot,
        preference=preference,
    )
    if script_args.ignore_bias_buffers:
        import torch

        # As TRL's script: DDP cannot broadcast boolean buffers.
        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool
        ]
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    if trainer.is_world_process_zero():
        path = write_record(
            Path(training_args.output_dir) / "plot_align_record.json",
            command,
            {"steps": trainer.state.global_step, "metrics": result.metrics, "last_log": _last_log(trainer)},
            config={
                "script": vars(script_args),
                "training": training_args.to_dict(),  # secrets are masked there
                "model": vars(model_args),
                "mixture": mixture,
                "plot": plot.to_dict(),
                "preference": preference_args,
            },
            seed=training_args.seed,
        )
        print(f"model saved to {training_args.output_dir}, record in {path}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()


def _last_log(trainer: Any) -> dict[str, Any]:
    """The training log's last entry, which holds the vanilla and the PLOT loss."""
    return next((entry for entry in reversed(trainer.state.log_history) if "loss" in entry), {})
