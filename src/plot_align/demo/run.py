"""The demonstration from the model to the page. Every stage resumes where an earlier run stopped."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from plot_align._version import __version__
from plot_align.demo import data
from plot_align.demo.fetch import SMOLLM2, fetch
from plot_align.demo.figure import draw
from plot_align.demo.table import as_markdown, as_text, rows_of
from plot_align.demo.train import ARMS, Setting, quiet, train
from plot_align.environment import fast_bf16, on_cpu
from plot_align.errors import InputError, require_packages
from plot_align.io import (
    LOCK,
    check_seal,
    claimed,
    complete_or_absent,
    digest,
    json_or_none,
    write_json,
    write_sealed_json,
)
from plot_align.preference.datasets import load_pairs
from plot_align.preference.dialogues import as_conversations
from plot_align.records import mean_of, write_record
from plot_align.text import terminal

BASE = "base"
LENGTH = 96  # tokens of a sequence in the timed steps, about as in our pairs
NEW_TOKENS = 32  # of an answer: enough to see whether it refuses


@dataclass(frozen=True)
class Size:
    """How much to do, and about how long each stage takes (seconds on two cores), to estimate the time left.

    Args:
        steps: of training an arm. harmful, benign: held-out requests that every model answers. pairs: held-out pairs.
        attacked: harmful requests to attack. prefill: tokens of the target that begin an answer. samples: N of best of
        N. rounds: of the cost measurement.
    """

    steps: int
    harmful: int
    benign: int
    pairs: int
    attacked: int
    prefill: int
    samples: int
    rounds: int
    seconds: dict[str, float]


FULL = Size(16, 30, 30, 40, 8, 4, 4, 2, {"model": 5, "train": 80, "evaluate": 120, "attack": 32, "cost": 28})
QUICK = Size(5, 10, 10, 12, 4, 2, 2, 0, {"model": 5, "train": 34, "evaluate": 50, "attack": 14, "cost": 0})
CONTEXTS = 12
FLOAT32_STEPS = 0.25  # of the steps, if bfloat16 is no faster than float32, whose steps take five times as long


def main(
    *,
    quick: bool = False,
    output: Path = Path("runs/demo"),
    model: str | None = None,
    dataset: str | None = None,
    seed: int = 0,
) -> int:
    """Run the demonstration; finished parts under ``output`` are reused.

    Args:
        quick: fewer steps and requests.
        output: folder of models, records and the page.
        model: hub id or folder of a chat model in place of SmolLM2-135M-Instruct.
        dataset: pairs to train on instead of our own: a file or a hub id.
        seed: of the order of the pairs, the samples and the intervals.

    Returns:
        The exit code: 1 if a measure failed.

    Raises:
        InputError: ``output`` holds a demonstration made with other options.
    """
    require_packages("demo", "matplotlib", "jinja2", extra="demo")  # for the page and the figure, made last
    with claimed(output):
        return _demo(quick, output, model, dataset, seed)


def _demo(quick: bool, output: Path, model: str | None, dataset: str | None, seed: int) -> int:
    console = terminal()
    size = QUICK if quick else FULL
    console.print("plot-align demo: DPO, DPO+SFT and DPO+PLOT on one real model, judged side by side", style="bold")
    bf16 = fast_bf16()
    setting = Setting(size.steps if bf16 else max(4, round(size.steps * FLOAT32_STEPS)), bf16=bf16, seed=seed)
    if not bf16:
        console.print(
            "bfloat16 is not fast here (that takes a GPU, AVX512-BF16 or AMX), so training is in float32, about five "
            f"times as slow: {setting.steps} steps in place of {size.steps}"
        )
    clock = _Clock(console, size)
    quiet()

    clock.begin("the model", "model")
    folder = _model(model)
    _same_demo(output, setting, size, folder, dataset)
    files = _Files.write(output / "data", size)
    pairs = _pairs(dataset)
    preference = _preference(pairs, folder, output / "preference.safetensors", setting.max_length)
    _contexts(pairs, folder, output / "contexts.record.json", setting)
    models = {BASE: folder, **{arm.name: output / "models" / arm.name for arm in ARMS}}
    for arm in ARMS:
        clock.begin(f"train {arm.name}", "train")
        with _bar(console, "  steps", setting.steps) as advance:
            train(arm, setting, folder, pairs, preference, models[arm.name], advance)
    codes = []
    dtype = "bfloat16" if bf16 else "float32"
    clock.begin("judge: held-out requests and pairs", "evaluate")
    codes.append(_command("evaluate", _evaluate_arguments(models, files, output, dtype, seed), console))
    for name, source in models.items():
        clock.begin(f"attack {name}: a begun answer, the best of {size.samples}", "attack")
        codes.append(_command("redteam", _redteam_arguments(name, source, files, output, dtype, seed), console))
    cost: dict[str, Any] = {}
    if size.rounds:
        clock.begin("what PLOT costs: steps with and without it, interleaved", "cost")
        cost = _cost(console, setting, folder, output, size.rounds)
    clock.begin("the page", None)
    own = SMOLLM2.wheel_name if folder.name == SMOLLM2.wheel_name else SMOLLM2.hub_name  # their weights differ
    called = own if model is None else model
    arguments = [str(output), "--output", str(output / "report.html"), "--baseline", "DPO"]
    arguments += ["--title", f"plot-align demo: {called}, preference-tuned"]
    rows = rows_of(output, list(models))
    write_record(output / "summary.json", "demo", {"rows": rows, "cost": cost}, config=asdict(setting), seed=seed)
    codes.append(_command("report", arguments, console))
    with complete_or_absent(output / "table.md") as temporary:
        temporary.write_text(as_markdown(rows, called), encoding="utf-8")
    draw(output, list(models), output / "demo.png")
    console.print(as_text(rows, called))
    _print_cost(console, cost)
    console.print(f"done in {clock.minutes()}; read the answers side by side: {output / 'report.html'}")
    return max(codes)


class _Clock:
    """Announces each stage with the time left: nominal times, scaled by this machine's pace so far."""

    def __init__(self, console: Console, size: Size) -> None:
        self.console = console
        per = size.seconds
        self.ahead = [per["model"], *[per["train"]] * len(ARMS), per["evaluate"], *[per["attack"]] * (len(ARMS) + 1)]
        self.ahead.append(per["cost"])
        self.started = time.monotonic()
        self.nominal = 0.0  # of the finished stages that took time
        self.spent = 0.0
        self.current: float | None = None
        self.paces = False  # whether the current stage measures the machine's speed
        self.at = self.started

    def begin(self, what: str, kind: str | None) -> None:
        now = time.monotonic()
        if self.current:
            # A stage that an earlier run finished does not measure the machine, nor does a download.
            if now - self.at > 0.1 * self.current and self.paces:
                self.nominal += self.current
                self.spent += now - self.at
            self.ahead.pop(0)
        self.current = None if kind is None else self.ahead[0]
        self.paces = kind != "model"
        self.at = now
        pace = self.spent / self.nominal if self.nominal else 1.0
        left = sum(self.ahead) * pace if kind is not None else 0.0
        about = f"about {_minutes(left)} left" if left else "nearly done"
        self.console.print(f"\n[bold]{what}[/bold] [dim]· {about}[/dim]", markup=True)

    def minutes(self) -> str:
        return _minutes(time.monotonic() - self.started)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


@contextmanager
def _bar(console: Console, description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar; yields a function that sets how much is done."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total)
        yield lambda done: progress.update(task, completed=done)


def _command(name: str, arguments: list[str], console: Console) -> int:
    """Run a command in this process as a user would, and show how to run it again."""
    from plot_align.cli.main import dispatch

    console.print(f"$ plot-align {name} {shlex.join(arguments)}", style="dim", soft_wrap=True)
    return dispatch([name, *arguments])


def _model(model: str | None) -> Path:
    return fetch() if model is None else fetch(model)


def _pairs(dataset: str | None) -> Any:
    if dataset is None:
        return data.training_pairs()
    return as_conversations(load_pairs(dataset))


def _preference(pairs: Any, model: Path, path: Path, max_length: int) -> Any:
    from transformers import AutoTokenizer

    from plot_align.preference.distribution import PreferenceDistribution
    from plot_align.preference.estimation import estimate

    if path.exists():
        return PreferenceDistribution.load(path)
    preference = estimate(pairs, AutoTokenizer.from_pretrained(model), max_length=max_length, progress=False)
    preference.save(path)
    return preference


def _contexts(pairs: Any, model: Path, path: Path, setting: Setting) -> None:
    """The record of what is preferred where, for the page."""
    from plot_align.inference.contexts import preferences_by_context
    from plot_align.inference.load import load_model
    from plot_align.preference.estimation import scored_pairs

    if path.exists():
        return
    loaded, tokenizer = load_model(str(model), dtype="bfloat16" if setting.bf16 else "float32")
    rows = scored_pairs(pairs, tokenizer, max_length=setting.max_length)
    contexts = preferences_by_context(loaded, tokenizer, rows, contexts=CONTEXTS)
    results = {"contexts": [context.to_dict() for context in contexts]}
    write_record(path, "inspect", results, config={"contexts": CONTEXTS, "model": model.name})


@dataclass(frozen=True)
class _Files:
    """The held-out requests and pairs as files for the commands, which a user can look at and replace."""

    folder: Path

    @classmethod
    def write(cls, folder: Path, size: Size) -> _Files:
        from plot_align.redteam import default_benign, write_behaviors

        targets = data.targets()
        behaviors = _evenly(data.behaviors(), size.harmful)
        texts = {
            "targets.json": json.dumps({b.id: targets[b.id] for b in behaviors}, indent=1),
            "attacks.yaml": yaml.safe_dump({"prefill": {"tokens": size.prefill}, "best_of_n": {"n": size.samples}}),
            "suite.yaml": yaml.safe_dump(_suite(folder, size), sort_keys=False),
        }
        for name, text in texts.items():
            with complete_or_absent(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
        write_behaviors(folder / "harmful.csv", behaviors)
        write_behaviors(folder / "attacked.csv", _evenly(behaviors, size.attacked))
        write_behaviors(folder / "benign.csv", _evenly(data.benign(), size.benign))
        write_behaviors(folder / "sounds_harmful.csv", _evenly(default_benign(), size.benign // 2))
        prompts = [json.dumps({"prompt": b.prompt}) + "\n" for b in _evenly(data.benign(), size.benign)]
        with complete_or_absent(folder / "prompts.jsonl") as temporary:
            temporary.write_text("".join(prompts), encoding="utf-8")
        with complete_or_absent(folder / "heldout.jsonl") as temporary:
            data.pairs("heldout").to_json(temporary)
        return cls(folder)


def _evenly(rows: list[Any], count: int) -> list[Any]:
    """``count`` rows, evenly spread, because the file is sorted by kind and topic."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def _suite(folder: Path, size: Size) -> dict[str, Any]:
    """The demo's measures, as a suite for ``plot-align evaluate --suite``."""
    answers = {"max_new_tokens": NEW_TOKENS}
    prompts = {"prompts": f"{folder}/prompts.jsonl", **answers}
    pairs = {"pairs": f"{folder}/heldout.jsonl", "limit": size.pairs}
    return {
        "harmlessness": {"direct": {"kind": "attack_success", "behaviors": f"{folder}/harmful.csv", **answers}},
        "helpfulness": {"preference_accuracy": {"kind": "preference_accuracy", **pairs}},
        "guards": {
            "over_refusal": {"kind": "over_refusal", "benign": f"{folder}/benign.csv", **answers},
            "displacement": {"kind": "displacement", **pairs},
            "diversity": {"kind": "diversity", **prompts},
            "kl": {"kind": "kl", **prompts},
            "drift": {"kind": "drift", **pairs},
        },
    }


def _evaluate_arguments(models: dict[str, Path], files: _Files, output: Path, dtype: str, seed: int) -> list[str]:
    return [
        *(f"{name}={folder}" for name, folder in models.items()),
        *("--suite", f"{files.folder / 'suite.yaml'}", "--reference", str(models[BASE])),
        *("--preference", str(output / "preference.safetensors"), "--output", str(output / "evaluation")),
        *("--dtype", dtype, "--batch_size", "64", "--seed", str(seed), "--quiet"),
    ]


def _redteam_arguments(name: str, source: Path, files: _Files, output: Path, dtype: str, seed: int) -> list[str]:
    folder = files.folder
    return [
        f"{name}={source}",
        *("--behaviors", f"{folder}/attacked.csv", "--targets", f"{folder}/targets.json"),
        *("--benign", f"{folder}/sounds_harmful.csv"),
        *(
            "--attacks",
            "prefill,best_of_n",
            "--options",
            f"{folder}/attacks.yaml",
            "--max_new_tokens",
            str(NEW_TOKENS),
        ),
        *("--dtype", dtype, "--batch_size", "64", "--seed", str(seed), "--output", str(output / "redteam")),
    ]


def _same_demo(output: Path, setting: Setting, size: Size, model: Path, dataset: str | None) -> None:
    """Check that ``output`` is empty or was made with the same options and versions."""
    import importlib.metadata

    shipped = resources.files("plot_align.demo")
    described: dict[str, Any] = {
        "plot_align": __version__,
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl")},
        "device": "cpu" if on_cpu() else "cuda",
        "setting": asdict(setting),
        "size": {name: value for name, value in asdict(size).items() if name != "seconds"},
        "model": str(model),
        "dataset": dataset,
        "dataset_digest": digest(Path(dataset)) if dataset and Path(dataset).exists() else None,
        "requests_and_pairs": {
            name: hashlib.sha256(shipped.joinpath(name).read_bytes()).hexdigest()[:16]
            for name in ("requests.csv", "train.jsonl", "heldout.jsonl")
        },
    }
    path = output / "demo.json"
    if path.exists():
        there = json_or_none(path)
        if not isinstance(there, dict):
            raise InputError(
                f"{path} is damaged and no longer says what made {output}; name another folder with --output, or "
                "delete that one"
            )
        differing = [name for name, value in described.items() if there.get(name) != value]
        if differing:
            raise InputError(
                f"{output} was made with another {' and '.join(differing)}, as {path} says; name another folder with "
                "--output, or delete that one"
            )
        return
    if any(file.name != LOCK for file in output.iterdir()):
        raise InputError(f"{output} holds files of something else; name another folder with --output, or empty it")
    write_json(path, described)


def _cost(console: Console, setting: Setting, model: Path, output: Path, rounds: int) -> dict[str, Any]:
    """Ratio of DPO steps with PLOT to steps without, same kernel, balancing α as often as in training: mean, range,
    rounds.

    ``plot-align bench`` has more rounds, a comparison with TRL itself, and a profile.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from plot_align.bench import StepProblem, interleaved, measured_share
    from plot_align.config import PlotConfig

    path = output / "cost.json"
    if path.exists():
        check_seal(path)
        return json.loads(path.read_text(encoding="utf-8"))
    device = torch.device("cpu" if on_cpu() else "cuda")
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, use_safetensors=True).to(device)
    tokenizer = AutoTokenizer.from_pretrained(model)
    problem = StepProblem(policy, tokenizer, 2 * setting.pairs, LENGTH, bf16=setting.bf16)
    names = ("off", "on", "measured")
    with _bar(console, "  rounds", rounds + 1) as advance:
        arms = {name: partial(problem.arm, name) for name in names}
        samples = interleaved(arms, repeats=rounds, device=device, on_round=advance)
    balancing = measured_share(PlotConfig())
    times = [
        ((1 - balancing) * on + balancing * measured) / off
        for off, on, measured in zip(*(samples[name].seconds for name in names), strict=True)
    ]
    memory = [max(on, measured) / off if off else math.nan
              for off, on, measured in zip(*(samples[name].peak for name in names), strict=True)]  # fmt: skip
    found = {name: mean_of(ratios) for name, ratios in (("time_ratio", times), ("memory_ratio", memory))}
    write_sealed_json(path, found)
    return found


def _print_cost(console: Console, cost: dict[str, Any]) -> None:
    if cost:
        ratio, memory = cost["time_ratio"], cost["memory_ratio"]
        low, high = ratio["spread"]
        peak = f"{memory['value']:.2f}" if math.isfinite(memory["value"]) else "not measured here"
        console.print(
            f"a step with PLOT over one without, same kernel, {ratio['n']} interleaved rounds: time × "
            f"{ratio['value']:.2f} ({low:.2f} to {high:.2f}), peak memory × {peak}"
        )
