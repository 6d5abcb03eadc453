"""``plot-align doctor``: whether training can run here, and how."""

from __future__ import annotations

import json
import platform
import textwrap
from itertools import groupby
from typing import Any

from plot_align._version import __version__
from plot_align.cli.parser import Parser
from plot_align.environment import NAMED, Package, fast_bf16, packages
from plot_align.errors import first_line


def make_parser() -> Parser:
    parser = Parser(
        "doctor",
        "Show what is installed and whether plot-align works with it, the device, and\n"
        "how the PLOT term reaches each trainer. Exit code 1 if training cannot run.",
        "  plot-align doctor\n  plot-align doctor --json > environment.json",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def run(arguments: list[str]) -> int:
    """Parse ``arguments`` and print what was found; 1 if a required package is missing or not one that works."""
    options = make_parser().parse(arguments)
    found = examine()
    print(json.dumps(found, indent=2) if options.json else as_text(found))
    return 1 if found["problems"] else 0


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
