"""``plot-align doctor``: whether training can run here, and how; with PAIRS, what is wrong with a data set."""

from __future__ import annotations

import json
import platform
import sys
import textwrap
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from plot_align._version import __version__
from plot_align.cli.launch import on_processes
from plot_align.cli.parser import Parser, add_loading_options, add_num_processes, length
from plot_align.environment import NAMED, Package, fast_bf16, packages
from plot_align.errors import InputError, first_line, require_packages
from plot_align.inference.load import check_dtype
from plot_align.io import claimed
from plot_align.text import printable


def make_parser() -> Parser:
    parser = Parser(
        "doctor",
        "Can training run here? With PAIRS: what is wrong with them, or a model on them.",
        "  plot-align doctor pairs.jsonl --model Qwen/Qwen3-0.6B --page doctor.html",
    )
    parser.usage = "plot-align doctor [PAIRS --model MODEL] [options]"
    parser.add_argument("pairs", nargs="?", metavar="PAIRS", help="hub id, or a .jsonl/.json/.csv/.parquet file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    group = parser.add_argument_group("of PAIRS")
    group.add_argument("--model", help="hub id or folder of the model to tune")
    group.add_argument("--tokenizer", metavar="MODEL", help="another than the model's; alone: look at the data alone")
    group.add_argument(
        "--sample", type=int, default=1000, metavar="N", help="pairs put to the model (%(default)s; 0: none)"
    )
    group.add_argument("--split", default="train", help="split of the data set (%(default)s)")
    group.add_argument("--name", help="configuration of a hub data set")
    group.add_argument("--max_length", type=length, default=1024, metavar="N", help="as for estimate (%(default)s)")
    group.add_argument("--strict", action="store_true", help="refuse a row that is no pair")
    group.add_argument("--overlap", metavar="FILE", help="of prompts that should not be in the data")
    group.add_argument("--record", type=Path, metavar="FILE", help="write what was found, as .json")
    group.add_argument("--page", type=Path, metavar="FILE", help="write it with pictures, as .html")
    group.add_argument(
        "--fail_on", choices=("warning", "error"), metavar="S", help="exit code 3 on a warning or error"
    )
    add_num_processes(group)
    add_loading_options(group)
    return parser


def run(arguments: list[str]) -> int:
    """Parse ``arguments`` and print what was found; 1 if a required package is missing or not one that works."""
    parser = make_parser()
    options = parser.parse(arguments)
    if options.pairs is not None:
        return on_processes("doctor", options.num_processes, arguments, lambda: _examine_pairs(options))
    given = [name for name, value in vars(options).items() if value != parser.get_default(name) and name != "json"]
    if given:
        raise InputError(f"--{given[0]} is for a data set, and PAIRS is missing; name the pairs before it")
    found = examine()
    print(json.dumps(found, indent=2) if options.json else printable(as_text(found)))
    return 1 if found["problems"] else 0


def _examine_pairs(options: Any) -> int:
    """Print what is wrong with the pairs; 3 where a finding or the verdict is as severe as ``--fail_on``."""
    if options.tokenizer is None and options.model is None:
        raise InputError(
            "neither --model nor --tokenizer is given, expected the model to tune, or a tokenizer to look at the data "
            "alone; name one of them"
        )
    from plot_align.parallel import on_main

    check_dtype(options.dtype)
    written = {name: getattr(options, name) for name in ("record", "page") if getattr(options, name) is not None}
    for name, endings in (("record", (".json",)), ("page", (".html", ".htm"))):
        if name in written and written[name].suffix.lower() not in endings:
            raise InputError(f"--{name} is {str(written[name])!r}, expected a name ending in {endings[0]}; rename it")
    if options.page is not None:
        require_packages("--page", "matplotlib", "jinja2", extra="report")
    with ExitStack() as held:
        for path in written.values():
            on_main(partial(held.enter_context, claimed(path.parent, path.name)))
        return _diagnose(options)


def _diagnose(options: Any) -> int:
    from plot_align.doctor import diagnose
    from plot_align.parallel import rank

    journal = None if options.record is None else options.record.with_suffix(".partial")
    found = diagnose(
        options.pairs,
        options.model or options.tokenizer,
        tokenizer=options.tokenizer if options.model else None,
        name=options.name,
        split=options.split,
        max_length=options.max_length,
        strict=options.strict,
        overlap=options.overlap,
        trust_remote_code=options.trust_remote_code,
        sample=options.sample if options.model else 0,
        device=options.device,
        dtype=options.dtype,
        partial=journal,
        salvage=lambda of_data: _print(of_data, options) if rank() == 0 else None,
    )
    if rank() == 0:
        _show(found, options, journal)
    return 3 if options.fail_on and found.reaches(options.fail_on) else 0


def _show(found: Any, options: Any, journal: Path | None) -> None:
    """Print what was found; write the record and the page."""
    _print(found, options)
    if journal is not None:
        from plot_align.inference.resume import forget_partial

        print(printable(f"record: {found.write(options.record)}"), file=sys.stderr)
        forget_partial(journal)
    if options.page is not None:
        from plot_align.doctor.page import write

        print(printable(f"page: {write(found, options.page)}"), file=sys.stderr)


def _print(found: Any, options: Any) -> None:
    print(json.dumps(found.to_dict(), indent=2, allow_nan=False) if options.json else printable(found.as_text()))


def examine() -> dict[str, Any]:
    """The environment as JSON: ``python``, ``packages``, ``device``, ``backends`` and ``problems``, one sentence each.

    Only torch and TRL are imported; where that fails, it is a problem among the others.
    """
    python, *rest = packages()
    problems = [_problem(package) for package in (python, *rest) if package.required and not package.fits]
    missing = {package.name for package in rest if package.required and package.found is None}
    looked: dict[str, Any] = {"torch": None, "trl": None}
    for name, look in (("torch", _device), ("trl", _backends)):
        try:
            looked[name] = look()
        except Exception as error:  # anything may be wrong with an installation
            if name not in missing:
                cause = error.__cause__ or error  # transformers imports lazily, and says no more than "look up"
                problems.append(f"{name} cannot be used: {type(cause).__name__}: {first_line(cause)}")
    return {
        "plot_align": __version__,
        "python": _entry(python),
        "packages": [_entry(package) for package in rest],
        "device": looked["torch"],
        "backends": looked["trl"],
        "problems": problems,
    }


def _entry(package: Package) -> dict[str, Any]:
    return {**vars(package), "fits": package.fits}


def _problem(package: Package) -> str:
    if package.name == "python":
        return f"Python is {package.found}, plot-align needs {package.needs}: install it into such a Python"
    state = "is not installed" if package.found is None else f"is {package.found}"
    return f"{package.name} {state}, plot-align needs {package.needs}: pip install '{package.name}{package.needs}'"


def _device() -> dict[str, Any]:
    """What training would run on, and whether bfloat16, TRL's default, is fast on it."""
    import torch

    from plot_align.records import hardware

    machine = hardware()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {
        "type": "cpu" if accelerator is None else accelerator.type,
        "gpus": machine["gpus"],
        "cpu": machine["cpu"] or platform.machine(),
        "cores": machine["cpu_count"],
        "fast_bf16": fast_bf16(),
    }


def _backends() -> list[dict[str, str]]:
    from plot_align.trl.batches import SUPPORTED
    from plot_align.trl.choice import backend_for

    found = []
    for kind in SUPPORTED:
        name, reason = backend_for(kind)
        found.append({"trainer": kind, "backend": name, "reason": reason})
    return found


def as_text(found: dict[str, Any]) -> str:
    """The same for people, in 80 columns."""
    named = [found["python"], *found["packages"]]
    shown = [entry for entry in named if entry["name"] in ("python", *NAMED) or not entry["fits"]]
    lines = [f"plot-align {found['plot_align']}", ""]
    for entry in shown:
        state = "does not fit" if not entry["fits"] else "" if entry["required"] else "optional"
        lines.append(f"{entry['name']:<17}{entry['found'] or '-':<15}{entry['needs']:<16}{state}".rstrip())
    if found["device"] is not None:
        lines += ["", *_device_lines(found["device"])]
    if found["backends"] is not None:
        lines.append("")
        for (backend, reason), entries in groupby(
            found["backends"], lambda entry: (entry["backend"], entry["reason"])
        ):
            lines.append(f"{', '.join(entry['trainer'].removesuffix('Trainer') for entry in entries)}: {backend}")
            lines.append(textwrap.fill(reason, 80, initial_indent="  ", subsequent_indent="  "))
    return "\n".join([*lines, "", *(found["problems"] or ["training can run here"])])


def _device_lines(device: dict[str, Any]) -> list[str]:
    speed = "faster than float32" if device["fast_bf16"] else "not faster than float32: train with --bf16 false"
    gpus = [f"{gpu['name']}, {gpu['memory'] / 2**30:.0f} GiB" for gpu in device["gpus"]]
    name = "; ".join(gpus) or f"{device['type']}, {device['cpu']}, {device['cores']} cores"
    return [f"{'device':<17}{name}", f"{'bfloat16':<17}{speed}"]
