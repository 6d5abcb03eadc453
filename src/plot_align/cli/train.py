"""``plot-align dpo``, ``sft`` and ``pro``: what TRL's scripts do, with the PLOT term."""

from __future__ import annotations

import inspect
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from plot_align.cli import launch, output
from plot_align.cli.options import (
    PreferenceOptions,
    make_parser,
    parse,
    set_environment,
    split_config,
    without_bare_debug,
)
from plot_align.errors import InputError, first_line, require_packages
from plot_align.inference.load import load_tokenizer, refuse_pickles
from plot_align.io import claimed, read_yaml
from plot_align.text import printable

_HELP = """\
usage: plot-align {command} [--config FILE.yaml] [options]

{title}, as a flag or as a
key of the YAML file, and those marked *. --help-all lists them all.

  --config FILE                  options as YAML; flags win over the file
  --model_name_or_path MODEL     hub id or folder
  --dataset_name DATA            hub id, or a .jsonl/.json/.csv/.parquet file{columns}
  --output_dir DIR               where checkpoints and the model go
* --alpha A                      weight of the PLOT term; 0 is {vanilla} to the bit
* --balance_ratio R              without --alpha: PLOT's gradient / vanilla
* --preference FILE              from `plot-align estimate`{default}
* --preference_dataset DATA      count these pairs instead
* --alpha_schedule S             constant, linear, cosine, balance
* --target T                     auto, anchored, chosen, relu, shift, softmax
* --granularity G                batch, sequence, token
{monitor}  --learning_rate LR             --num_train_epochs N, --max_steps N, --seed N
  --per_device_train_batch_size N, --gradient_accumulation_steps N
  --max_length N                 longer rows are truncated
  --use_peft                     LoRA, with --lora_r, --lora_alpha
  --num_processes N              started by `accelerate launch`
  --resume_from_checkpoint DIR   continue an interrupted run

example:
  plot-align {command} --model_name_or_path Qwen/Qwen3-0.6B \\
    --dataset_name {data}{extra}
"""


def run(command: str, arguments: list[str]) -> int:
    """Run ``command`` ("dpo", "sft" or "pro"): parse, launch processes if asked to, train, save."""
    if not {"-h", "--help"}.isdisjoint(arguments):
        print(help_text(command), end="")
        return 0
    config_path, flags = split_config(without_bare_debug(arguments))
    config = read_yaml(config_path) if config_path is not None else {}
    set_environment(config.pop("env", None), config_path)  # before torch is imported, so that CUDA_* still counts
    parser = make_parser(command)
    if "--help-all" in flags:
        parser.print_help()
        return 0
    options, launcher = parse(parser, config, flags, config_path)
    _, training_args, *_ = options
    if not launch.is_launched():
        launch_arguments = launcher.arguments()
        if launch_arguments or launch.launches_by_default():
            return launch.launch(
                command,
                launch_arguments,
                arguments,
                use_cpu=training_args.use_cpu,
                output_dir=training_args.output_dir,
            )
    elif launcher.flags and not launch.launched_by_us():
        raise InputError(
            f"{launcher.flags[0]} came to a process that is already launched; give it to the launcher instead"
        )
    with claimed(Path(training_args.output_dir)) if training_args.process_index == 0 else nullcontext():
        _train(command, *options)
    return 0


def help_text(command: str) -> str:
    """The short help of ``command``, one screen."""
    title = f"`trl {command}` with the PLOT term: every option of `trl {command}`"
    vanilla, columns, default, extra = "TRL", "", "", ""
    monitor = "* --monitor                      warn when it goes wrong; --stop_on LINE: end it\n"
    match command:
        case "dpo":
            data, default = "pairs.jsonl", " (default: the pairs)"
        case "sft":
            data, extra, monitor = "good.jsonl", " --preference p.safetensors", ""
        case "pro":
            title = "Preference Ranking Optimization with the PLOT term: every option of PROConfig"
            title += "\nand of TRL's ModelConfig and ScriptArguments"
            columns = "\n                                 of prompt, completions, rewards; or of pairs"
            columns += "\n  --sft_weight W                 weight of the best completion's NLL (0.05)"
            vanilla = "PRO"
            data, default = "ranked.jsonl", " (default: the lists)"
        case _:
            raise ValueError(command)
    return _HELP.format(
        command=command, title=title, vanilla=vanilla, columns=columns, default=default, monitor=monitor, data=data,
        extra=extra,
    )  # fmt: skip


def _train(
    command: str,
    script_args: Any,
    training_args: Any,
    model_args: Any,
    mixture: Any,
    monitor: Any,
    plot: Any,
    preference_args: Any,
) -> None:
    """What ``trl/scripts/dpo.py`` and ``sft.py`` do, with our trainers. Leaves a record beside the model."""
    output.drop_deprecations()
    if model_args.use_peft:
        require_packages("--use_peft", "peft", extra="peft")
    if monitor.monitor and command == "sft":
        raise InputError("--monitor came to sft, whose data hold no rejected answers; leave it out")
    if model_args.model_name_or_path is None:
        raise InputError("--model_name_or_path is missing, expected a hub id or a folder; name the model to tune")
    from plot_align.cli import progress
    from plot_align.preference.datasets import require_pairs, require_ranked
    from plot_align.records import write_record
    from plot_align.trl import PlotDPOTrainer, PlotSFTTrainer
    from plot_align.trl.artifacts import results_of
    from plot_align.trl.checkpoints import train
    from trl import get_peft_config

    resume = _checkpoint(training_args)
    for folder in (model_args.model_name_or_path, resume):
        if folder is not None:
            refuse_pickles(str(folder))
    preference = _preference(command, training_args, model_args, preference_args)
    train_dataset, eval_dataset = _datasets(script_args, training_args, mixture)
    trainer_class: Any
    match command:
        case "dpo":
            require_pairs(train_dataset)
            trainer_class = PlotDPOTrainer
        case "sft":
            trainer_class = PlotSFTTrainer
        case "pro":
            from plot_align.methods.pro import PlotPROTrainer

            require_ranked(train_dataset)
            trainer_class = PlotPROTrainer
        case _:
            raise ValueError(command)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": _trusts_remote_code(training_args, model_args),
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "use_safetensors": True,
        **(training_args.model_init_kwargs or {}),
    }
    try:
        trainer = trainer_class(
            model=model_args.model_name_or_path,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **_quantization(trainer_class, training_args, model_args),
            peft_config=get_peft_config(model_args),
            plot=plot,
            preference=preference,
        )
    except OSError as error:
        raise InputError(
            f"no model could be loaded from {model_args.model_name_or_path!r} ({first_line(error)}); name a hub id or "
            "a checkpoint folder"
        ) from error
    if script_args.ignore_bias_buffers:
        import torch

        # As TRL's script: DDP cannot broadcast boolean buffers.
        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool
        ]
    progress.use(trainer)
    if monitor.monitor:
        from plot_align.monitor import PreferenceMonitor

        requests = monitor.monitor_requests
        trainer.add_callback(PreferenceMonitor(trainer, stop_on=monitor.stop_on, requests=requests))
    metrics = train(trainer, resume)
    trainer.save_model(training_args.output_dir)
    if trainer.is_world_process_zero():
        path = write_record(
            Path(training_args.output_dir) / "plot_align_record.json",
            command,
            results_of(trainer, metrics, resumed=resume is not None),
            config={
                "script": vars(script_args),
                "training": _without_tokens(training_args.to_dict()),
                "model": vars(model_args),
                "mixture": mixture,
                "plot": plot.to_dict(),
                "preference": preference_args,
                "monitor": monitor,
            },
            seed=training_args.seed,
        )
        print(printable(f"model saved to {training_args.output_dir}, record in {path}"))
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    if hasattr(trainer, "end"):  # transformers 5.18 and later
        trainer.end()


def _without_tokens(options: dict[str, Any]) -> dict[str, Any]:
    """``TrainingArguments.to_dict`` masks its own tokens, and here those of ``model_init_kwargs`` as well."""
    init = {name: "<TOKEN>" if "token" in name else value for name, value in options["model_init_kwargs"].items()}
    return {**options, "model_init_kwargs": init}


def _checkpoint(training_args: Any) -> Path | None:
    """The checkpoint to go on from. With ``true`` the newest whole one; none of it yet is no error: the same command
    can be run until it is done."""
    from plot_align.io import check_folder
    from plot_align.trl.checkpoints import last_checkpoint

    resume = training_args.resume_from_checkpoint
    if str(resume).lower() == "true":
        resume = last_checkpoint(Path(training_args.output_dir))
    elif resume and not os.path.isdir(resume):
        raise InputError(
            f"--resume_from_checkpoint is {resume!r}, expected a folder; name a checkpoint, or write true for the "
            "newest in output_dir"
        )
    if not resume:
        return None
    check_folder(Path(resume))
    return Path(resume)


def _trusts_remote_code(training_args: Any, model_args: Any) -> bool:
    """The option of that name, which TRL 1.8 moved from the model's options to those of training."""
    owner = training_args if hasattr(training_args, "trust_remote_code") else model_args
    return bool(owner.trust_remote_code)


def _quantization(trainer_class: Any, training_args: Any, model_args: Any) -> dict[str, Any]:
    """How the model is quantised, as the trainer takes it: an argument of its own, or before TRL 1.8 one of
    ``from_pretrained``."""
    from trl import get_quantization_config

    config = get_quantization_config(model_args)
    base = trainer_class.__mro__[2]  # behind Attached
    if "quantization_config" in inspect.signature(base.__init__).parameters:
        return {"quantization_config": config}
    if config is not None:
        from trl import get_kbit_device_map

        training_args.model_init_kwargs |= {"quantization_config": config, "device_map": get_kbit_device_map()}
    return {}


def _preference(command: str, training_args: Any, model_args: Any, where: PreferenceOptions) -> Any:
    """The preference distribution to use, or None: then the DPO or PRO trainer counts its training set."""
    if where.preference is not None and where.preference_dataset is not None:
        raise InputError("--preference and --preference_dataset were both given, expected one of them; drop the other")
    if where.preference is not None:
        from plot_align.preference.distribution import PreferenceDistribution

        return PreferenceDistribution.load(where.preference)
    if where.preference_dataset is not None:
        return _estimated(training_args, model_args, where.preference_dataset, where.preference_split)
    if command == "sft":
        raise InputError(
            "--preference is missing: SFT data has no rejected answers to learn a preference from; name a file that "
            "`plot-align estimate` wrote, or pairs with --preference_dataset"
        )
    return None


def _estimated(training_args: Any, model_args: Any, pairs: str, split: str) -> Any:
    """Counts of ``pairs`` under the template, EOS and truncation of this training run."""
    from plot_align.preference.estimation import estimate, load_pairs

    if getattr(training_args, "chat_template_path", None) is not None:
        raise InputError(
            "--chat_template_path and --preference_dataset were both given, and the template changes which tokens are "
            "counted; save the tokenizer with that template, run `plot-align estimate` with it, and pass --preference"
        )
    name = model_args.model_name_or_path
    tokenizer = load_tokenizer(
        name, trust_remote_code=_trusts_remote_code(training_args, model_args), revision=model_args.model_revision
    )
    if getattr(training_args, "eos_token", None) is not None:
        tokenizer.eos_token = training_args.eos_token
    return estimate(
        load_pairs(pairs, split=split),
        tokenizer,
        max_length=training_args.max_length,
        truncation_mode=getattr(training_args, "truncation_mode", "keep_start"),
        num_proc=training_args.dataset_num_proc,
        progress=not training_args.disable_tqdm,
        distributed=training_args.world_size > 1,
    )


def _datasets(script_args: Any, training_args: Any, mixture: Any) -> tuple[Any, Any]:
    """Training set, and evaluation set or None.

    TRL loads a mixture. A single data set is opened by :func:`plot_align.load_pairs`, which takes files as well.
    """
    strategy = getattr(training_args.eval_strategy, "value", training_args.eval_strategy)  # an Enum, mostly
    evaluates = strategy != "no"
    train, test = script_args.dataset_train_split, script_args.dataset_test_split
    if mixture.datasets:
        from trl import get_dataset

        try:
            splits = get_dataset(mixture)
        except Exception as error:
            raise InputError(
                f"the mixture under 'datasets' cannot be loaded ({first_line(error)}); check its paths and splits"
            ) from error
        for split in [train, test] if evaluates else [train]:
            if split not in splits:
                raise InputError(
                    f"split is {split!r}, but the mixture has {', '.join(splits)}; set test_split_size to split off a "
                    "test set, or eval_strategy to no"
                )
        return splits[train], splits[test] if evaluates else None
    source = script_args.dataset_name
    if source is None:
        raise InputError(
            "--dataset_name is missing, expected a hub id, a file, or 'datasets' in the YAML file; add it"
        )

    from plot_align.preference.datasets import load_pairs

    options = {"name": script_args.dataset_config, "streaming": script_args.dataset_streaming}
    if evaluates and os.path.isfile(source):
        raise InputError(
            f"--eval_strategy is {strategy!r}, but the file {source} has no test split; "
            "set it to no, or list the file under 'datasets' in the YAML file with test_split_size"
        )
    return (
        load_pairs(source, split=train, **options),
        load_pairs(source, split=test, **options) if evaluates else None,
    )
