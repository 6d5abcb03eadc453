"""Four arms from one base, judged on held-out prompts; a table, a figure, records, checkpoints."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..errors import InputError
from ..estimate import estimate
from ..files import complete_or_absent, require_writable
from ..records import mean_of, measure, write_record
from ..training import PlotConfig, attach
from ..training.overhead import interleaved, paired_ratio, without_plot
from . import CATEGORIES, build_base, pairs
from .experiment import JUDGING, Arm, Setting, make_trainer, quiet, record_path, run_all

PLOT = PlotConfig()
BASE = Arm("base")
ARMS = (
    Arm("DPO", ("sigmoid",)),
    Arm("DPO+SFT", ("sigmoid", "sft")),
    Arm("DPO+PLOT", ("sigmoid",), PLOT),
    Arm("DPO+SFT+PLOT", ("sigmoid", "sft"), PLOT),
)
# Rows of the table after the seven scores: key in the results, label, whether more is better.
GUARDS = (
    ("over_refusal", "over-refusal", False),
    ("twin_help", "benign twins helped", True),
    ("nll_good", "NLL of good answers", False),
    ("fluent", "fluent answers", True),
    ("distinct_2", "distinct-2", True),
    ("distance", "distance to target", False),
)


@dataclass(frozen=True)
class Tuned:
    """What the demonstration leaves behind: checkpoint folders of its first seed by arm, the base among them, and the
    preference distribution of the pairs they were trained on."""

    models: dict[str, Path]
    preference: Path


def main(*, quick: bool = False, output: Path = Path("runs/demo"), seeds: int | None = None) -> Tuned:
    """Runs the demonstration; finished runs found under ``output`` are read, not run again.

    Args:
        quick: one seed instead of three.
        output: folder of the records, the table and the figure.
        seeds: how many seeds, over ``quick``.
    """
    if seeds is not None and seeds < 1:
        raise InputError(f"seeds is {seeds}; expected 1 or more.")
    require_writable(output)
    started = time.monotonic()
    console = Console()
    chosen_seeds = list(range(seeds or (1 if quick else 3)))
    # A quick demo trains for fewer steps: what it must show is that everything works, in under three minutes.
    setting = Setting(steps=40) if quick else Setting()
    quiet()
    console.print(
        "[bold]plot-align demo[/bold]: a small offline world with programmatic truth. "
        "It is a test bench; its numbers say nothing about real models."
    )
    base = build_base()
    runs = _run_all(console, base, setting, chosen_seeds, output)
    with console.status("step time and memory: PLOT on against off, interleaved"):
        cost = _overhead(base, setting)
    summary = _summary(runs, cost)
    write_record(
        output / "summary.json",
        "demo",
        summary,
        config={"seeds": chosen_seeds, "plot": PLOT.to_dict(), "steps": setting.steps},
    )
    table = _table(summary, len(chosen_seeds))
    console.print(table)
    _print_cost(console, cost)
    _print_verdict(console, summary)
    with complete_or_absent(output / "table.md") as temporary:
        temporary.write_text(_markdown(summary, len(chosen_seeds)), encoding="utf-8")
    figure = output / "demo.png"
    _figure(summary, figure)
    console.print(f"records, table.md and {figure.name} are in {output} ({time.monotonic() - started:.0f} s)")
    trained = {arm.name: record_path(output, arm, setting, chosen_seeds[0], base).with_suffix("") for arm in ARMS}
    return Tuned({BASE.name: base, **trained}, _preference(base, chosen_seeds[0], output))


def _preference(base: Path, seed: int, output: Path) -> Path:
    """The preference distribution of the training pairs, as a file."""
    from transformers import AutoTokenizer

    counts = estimate(pairs("train", seed=seed), AutoTokenizer.from_pretrained(base), progress=False)
    return counts.save(output / "preference.safetensors")


def _run_all(
    console: Console, base: Path, setting: Setting, seeds: Sequence[int], output: Path
) -> dict[str, list[dict[str, Any]]]:
    """Results of every arm, one a seed; seeds outside, so that an interrupted demo has whole comparisons."""
    jobs = [(arm, seed) for seed in seeds for arm in (BASE, *ARMS)]
    places = [record_path(output, arm, setting, seed, base) for arm, seed in jobs]
    finished = sum(place.exists() and place.with_suffix("").is_dir() for place in places)
    if finished:
        console.print(f"{finished} runs were finished before and are read from {output}; delete it to run them again")
    with _progress(console) as progress:
        task = progress.add_task("training and judging", total=len(jobs) * (setting.steps + JUDGING))
        done = [0] * len(jobs)

        def on_progress(job: int, steps: int) -> None:
            # The last report comes twice: after the last step, and after the judging.
            done[job] = steps + (JUDGING if done[job] >= setting.steps or steps == 0 else 0)
            progress.update(task, completed=sum(done))

        records = run_all(jobs, setting, base, output, on_progress, keep_models=True)
        progress.update(task, completed=len(jobs) * (setting.steps + JUDGING))
    runs: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in (BASE, *ARMS)}
    for (arm, _), record in zip(jobs, records, strict=True):
        runs[arm.name].append(record["results"])
    return runs


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        yield progress


def _overhead(base: Path, setting: Setting, rounds: int = 20) -> dict[str, Any]:
    """Whole DPO steps, PLOT on against off on the same kernel: median of the rounds' ratios and their middle half."""
    with tempfile.TemporaryDirectory() as output:
        trainer = make_trainer(ARMS[0], setting, 0, base, output)
        device = trainer.accelerator.device
        trainer.model.to(device).train()
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        batch = next(iter(trainer.get_train_dataloader()))

        def step() -> None:
            trainer.model.zero_grad()
            trainer.training_step(trainer.model, dict(batch), None)

        @contextmanager
        def off() -> Iterator[Any]:
            with without_plot(trainer):
                yield step

        @contextmanager
        def on() -> Iterator[Any]:
            handle = attach(trainer, config=PLOT)
            yield step
            handle.detach()

        samples = interleaved({"off": off, "on": on}, repeats=rounds, device=device)
    time_ratio, *half = paired_ratio(samples["on"].seconds, samples["off"].seconds)
    memory_ratio, *_ = paired_ratio(samples["on"].peak, samples["off"].peak)
    return {
        "time_ratio": measure(time_ratio, rounds, spread=(half[0], half[1])),
        "memory_ratio": measure(memory_ratio, rounds),
    }


def _summary(runs: dict[str, list[dict[str, Any]]], cost: dict[str, Any]) -> dict[str, Any]:
    """Mean and spread over the seeds of every row, and the paired difference of PLOT to the arm without it."""
    rows: dict[str, dict[str, Any]] = {}
    for name, results in runs.items():
        rows[name] = {c: mean_of([r["scores"][c]["value"] for r in results]) for c in CATEGORIES}
        for key, _, _ in GUARDS:
            rows[name][key] = mean_of([r[key]["value"] for r in results])
    pairs = {}
    for without, with_plot in (("DPO", "DPO+PLOT"), ("DPO+SFT", "DPO+SFT+PLOT")):
        keys = [*CATEGORIES, *(key for key, _, _ in GUARDS)]
        pairs[with_plot] = {
            key: mean_of(
                [_value(b, key) - _value(a, key) for a, b in zip(runs[without], runs[with_plot], strict=True)]
            )
            for key in keys
        }
    return {"arms": rows, "plot_minus_without": pairs, "cost": cost}


def _value(results: dict[str, Any], key: str) -> float:
    return float((results["scores"] if key in CATEGORIES else results)[key]["value"])


def _rows() -> Iterator[tuple[str, str, bool]]:
    """Every row of the table: key, label, whether more is better."""
    for category in CATEGORIES:
        yield category, category, True
    yield from GUARDS


def _cell(key: str, entry: dict[str, Any]) -> str:
    """Mean ± half the range over the seeds; short enough for six columns in a terminal of 80."""
    low, high = entry.get("spread", (entry["value"],) * 2)
    places = 3 if key == "distance" else 2
    numbers = [f"{number:.{places}f}" for number in (entry["value"], (high - low) / 2)]
    if places == 3:
        numbers = [number.removeprefix("0") for number in numbers]
    return numbers[0] if entry["n"] == 1 else "±".join(numbers)


def _heading(seeds: int) -> str:
    spread = "one seed, no spread" if seeds == 1 else f"mean ± half the range of {seeds} seeds"
    return f"Held-out prompts of the sandbox, {spread}; ↑ more is better, ↓ less is better"


def _table(summary: dict[str, Any], seeds: int) -> Table:
    table = Table(title=_heading(seeds), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for name in summary["arms"]:
        table.add_column(name.replace("SFT+PLOT", "SFT\n+PLOT"), justify="right", no_wrap=True)
    for key, label, more in _rows():
        table.add_row(
            f"{label} {'↑' if more else '↓'}",
            *(_cell(key, summary["arms"][name][key]) for name in summary["arms"]),
            end_section=key == CATEGORIES[-1],
        )
    return table


def _markdown(summary: dict[str, Any], seeds: int) -> str:
    names = list(summary["arms"])
    lines = [_heading(seeds) + ".", "", f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for key, label, more in _rows():
        cells = " | ".join(_cell(key, summary["arms"][name][key]) for name in names)
        lines.append(f"| {label} {'↑' if more else '↓'} | {cells} |")
    return "\n".join(lines) + "\n"


def _print_cost(console: Console, cost: dict[str, Any]) -> None:
    ratio, memory = cost["time_ratio"], cost["memory_ratio"]
    low, high = ratio["spread"]
    console.print(
        f"PLOT on against off, the same kernel, {ratio['n']} interleaved steps: time × {ratio['value']:.3f} "
        f"(middle half {low:.3f}–{high:.3f}), peak memory × {memory['value']:.3f}"
    )


def _print_verdict(console: Console, summary: dict[str, Any]) -> None:
    """In words, from the paired differences: where every seed agrees on the sign, and where they do not."""
    for name, rows in summary["plot_minus_without"].items():
        better: list[str] = []
        worse: list[str] = []
        open_: list[str] = []
        for key, label, more in _rows():
            low, high = rows[key].get("spread", (rows[key]["value"],) * 2)
            if low > 0 or high < 0:
                (better if (low > 0) == more else worse).append(label)
            else:
                open_.append(label)
        seeds = rows[GUARDS[0][0]]["n"]
        agreeing = "in the one seed that was run" if seeds == 1 else f"in each of the {seeds} seeds"
        console.print(
            f"{name} against the same without PLOT, {agreeing}: better in {', '.join(better) or 'nothing'}; "
            f"worse in {', '.join(worse) or 'nothing'}; no clear sign in {', '.join(open_) or 'nothing'}."
        )


def _figure(summary: dict[str, Any], path: Path) -> None:
    """Bars of the seven scores, over-refusal and NLL, every arm, with the spread over seeds as whiskers."""
    from matplotlib.figure import Figure

    names = list(summary["arms"])
    colours = dict(zip(names, ("#9aa0a6", "#7fb3d5", "#1f618d", "#f5b041", "#b9480e"), strict=True))
    figure = Figure(figsize=(12, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(1.3, 1))
    guards = [(key, label) for key, label, _ in GUARDS]
    for axes, keys in ((top, [(c, c) for c in CATEGORIES]), (bottom, guards)):
        for i, name in enumerate(names):
            entries = [summary["arms"][name][key] for key, _ in keys]
            values = [e["value"] for e in entries]
            errors = [[v - e["spread"][0] for v, e in zip(values, entries, strict=True)],
                      [e["spread"][1] - v for v, e in zip(values, entries, strict=True)]]  # fmt: skip
            places = [x + (i - (len(names) - 1) / 2) * 0.16 for x in range(len(keys))]
            axes.bar(places, values, 0.15, yerr=errors, label=name, color=colours[name], error_kw={"lw": 1})
        axes.set_xticks(range(len(keys)), [label for _, label in keys])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    top.set_ylim(0, 1)
    top.set_ylabel("share of good answers")
    top.legend(ncols=len(names), loc="upper center", bbox_to_anchor=(0.5, 1.2), frameon=False)
    seeds = statistics.mode(e["n"] for e in summary["arms"][names[0]].values())
    bottom.set_title(f"What must not get worse; whiskers: smallest and largest of {seeds} seed(s)", fontsize=10)
    with complete_or_absent(path) as temporary:
        figure.savefig(temporary, dpi=150)
