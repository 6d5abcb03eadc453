"""``plot-align bench``: measure what the term costs on the user's machine."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plot_align.cli.options import PlotOptions, plot_parser
from plot_align.cli.parser import Parser
from plot_align.config import PlotAblations, PlotConfig
from plot_align.errors import InputError, first_line
from plot_align.text import terminal

if TYPE_CHECKING:
    import torch

    from plot_align.bench.run import Setting


def make_parser(*, every_option: bool = False) -> Parser:
    """``every_option``: list PLOT's options in the help too."""
    plot = plot_parser()
    for action in () if every_option else plot._actions:
        action.help = argparse.SUPPRESS
    parser = Parser(
        "bench",
        "Measure what PLOT costs on this machine: training steps with and without it, on\n"
        "the same kernel and as TRL ships them, in time and memory. Every option of PLOT\n"
        "is a flag here too, e.g. --granularity token.",
        "  plot-align bench Qwen/Qwen3-0.6B --rows 2 --length 1024\n"
        "  plot-align bench Qwen/Qwen2.5-7B --random_weights --profile trace.json",
        parents=[plot],
    )
    parser.usage = "plot-align bench MODEL [options]"
    parser.add_argument("--help-all", action="help", help="this text and all options of PLOT")
    parser.add_argument("model", nargs="?", metavar="MODEL", help="hub id or folder of the model to tune")
    parser.add_argument("--random_weights", action="store_true", help="read MODEL's config.json and nothing else")
    parser.add_argument("--method", choices=["dpo", "sft"], default="dpo", help="training method (%(default)s)")
    parser.add_argument("--rows", type=int, metavar="N", help="sequences, half of them chosen with dpo (2)")
    parser.add_argument("--length", type=int, metavar="N", help="tokens of each (1024)")
    parser.add_argument("--dtype", metavar="D", help="of weights and products (bfloat16, on a CPU float32)")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16 by autocast, as TRL's --bf16")
    parser.add_argument("--use_peft", action="store_true", help="LoRA in place of full fine-tuning")
    parser.add_argument(
        "--gradient_checkpointing",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="recompute activations (default: on a GPU)",
    )
    parser.add_argument("--repeats", type=int, default=15, metavar="N", help="rounds (%(default)s)")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="write a torch.profiler trace of one step")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/bench.json"), metavar="FILE", help="the record (%(default)s)"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="allow a model's own code")
    return parser


def run(arguments: list[str]) -> int:
    """Parse ``arguments``, measure, print, and write the record."""
    options = make_parser(every_option="--help-all" in arguments).parse(arguments)
    _check(options)

    from plot_align.bench.run import bench, plain_rounds
    from plot_align.bench.show import line, tables
    from plot_align.io import require_writable
    from plot_align.records import read_record, write_record

    setting = _setting(options)
    for path in filter(None, (options.output, options.profile)):
        require_writable(path.parent)  # before the work rather than after it
    load = _source(options, setting)

    with _progress(setting.repeats + 1) as on_round:
        results = bench(load, setting, plain_rounds(setting, on_round), options.profile)
    config = {
        "model": options.model,
        "random_weights": options.random_weights,
        "rows": setting.rows,
        "length": setting.length,
        "method": setting.method,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "bf16": setting.bf16,
        "device": str(setting.device),
        "gradient_checkpointing": setting.checkpointing,
        "use_peft": setting.use_peft,
        "repeats": setting.repeats,
        "plot": setting.plot.to_dict(),
        "optimizer_step": False,
        "reference_shares_weights": setting.method == "dpo",
    }
    path = write_record(options.output, "bench", results, config=config, seed=0)
    console = terminal()
    for table in tables(results):
        console.print(table)
    console.print("\nto paste into an issue:")
    console.print(line(read_record(path, "bench")), soft_wrap=True)
    console.print(f"\nrecord: {path}", soft_wrap=True)
    if options.profile is not None:
        console.print(f"trace:  {options.profile} (open it in ui.perfetto.dev)", soft_wrap=True)
    return 0


def _check(options: Any) -> None:
    """What needs no library to be seen."""
    if options.model is None:
        raise InputError("no MODEL was named, expected a hub id or a folder; name the model you tune")
    for name in ("rows", "length", "repeats"):
        value = getattr(options, name)
        least = 2 if name == "length" else 1
        if value is not None and value < least:
            raise InputError(f"--{name} is {value}, expected {least} or more; leave it out for the default")
    if options.method == "dpo" and options.rows is not None and options.rows % 2:
        raise InputError(
            f"--rows is {options.rows}, expected an even number of sequences for dpo, half of them chosen; add one"
        )


def _setting(options: Any) -> Setting:
    import torch

    from plot_align.bench.run import Setting

    device = _device(options.device)
    on_cpu = device.type == "cpu"
    name = options.dtype or ("float32" if on_cpu or options.bf16 else "bfloat16")
    if name not in ("float32", "bfloat16", "float16"):
        raise InputError(f"--dtype is {name!r}, expected float32, bfloat16 or float16; correct it")
    checkpointing = options.gradient_checkpointing
    return Setting(
        rows=options.rows or 2,
        length=options.length or 1024,
        method=options.method,
        device=device,
        dtype=getattr(torch, name),
        bf16=options.bf16,
        checkpointing=not on_cpu if checkpointing is None else checkpointing,
        use_peft=options.use_peft,
        plot=_plot(options),
        repeats=options.repeats,
    )


def _device(name: str | None) -> torch.device:
    import torch

    available = torch.cuda.is_available()
    if name not in (None, "cpu", "cuda"):
        # The Trainer takes the first GPU it sees, whatever the model is on.
        raise InputError(
            f"--device is {name!r}, expected cpu or cuda; for another GPU than the first set CUDA_VISIBLE_DEVICES"
        )
    if name == "cuda" and not available:
        raise InputError("--device is 'cuda' and torch sees no GPU here; install torch with CUDA, or leave it out")
    return torch.device(name or ("cuda" if available else "cpu"))


def _plot(options: Any) -> PlotConfig:
    names = [entry.name for kind in (PlotOptions, PlotAblations) for entry in fields(kind) if entry.init]
    config = PlotConfig.from_options(**{name: getattr(options, name) for name in names})
    if config.is_off:
        raise InputError("--alpha is 0, so there would be no term to measure; leave it out, or give a positive weight")
    return config


def _source(options: Any, setting: Setting) -> Callable[[], tuple[Any, Any]]:
    """A function that makes model and tokenizer."""
    from transformers import AutoConfig

    from plot_align.bench.random_weights import random_model, word_tokenizer
    from plot_align.inference.load import load_model

    try:
        config = AutoConfig.from_pretrained(options.model, trust_remote_code=options.trust_remote_code)
        vocab = config.get_text_config().vocab_size
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"no model could be found at {options.model!r} ({first_line(error)}); name a hub id or a folder"
        ) from error
    if options.random_weights:
        return lambda: (random_model(config, setting.device, setting.dtype), word_tokenizer(vocab))
    return functools.partial(
        load_model,
        options.model,
        device=str(setting.device),
        dtype=str(setting.dtype).removeprefix("torch."),
        trust_remote_code=options.trust_remote_code,
    )


@contextlib.contextmanager
def _progress(rounds: int) -> Iterator[Callable[[str, int], None]]:
    """Yields a callback that takes the part that runs and how many of its ``rounds`` are done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=terminal(sys.stderr)) as progress:
        task = progress.add_task("building", total=rounds)
        yield lambda what, count: progress.update(task, description=what, completed=count)
