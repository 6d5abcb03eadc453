"""How the cost grows: the LM head with PLOT against without, in time and peak memory, in one figure.

    python benchmarks/cost.py                          # minutes on a CPU; writes docs/cost.json and docs/cost.png
    python benchmarks/cost.py --draw docs/cost.json    # draws the record again

Against the vocabulary (8k to 256k), the tokens of a micro-batch, the granularity and the geometry; both arms on the
same kernel, interleaved, the order rotating, the first round dropped. Medians of the rounds' ratios with 95 %
bootstrap intervals; memory without what the process held before. The head's products grow with its hidden size and
what PLOT adds does not, so a CPU's small hidden size shows PLOT dearer than it is on a real model.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from head_problem import HeadProblem, release
from plot_align.bench import compare, interleaved
from plot_align.config import PlotConfig
from plot_align.errors import PlotAlignError
from plot_align.io import complete_or_absent, require_writable
from plot_align.records import read_record, write_record

ROWS = 4  # sequences of a micro-batch, two of them chosen
GRANULARITIES = ("batch", "sequence", "token")
GEOMETRIES = ("norm", "principal", "vocabulary", "sliced", "max_sliced")


@dataclass(frozen=True)
class Sizes:
    """What is measured: one size grows while the others stay at ``vocab`` and ``tokens``."""

    vocabularies: tuple[int, ...]
    tokens: tuple[int, ...]
    vocab: int
    token: int
    hidden: int


VOCABULARIES = (8_192, 16_384, 32_768, 65_536, 131_072, 262_144)
SIZES = {
    "cpu": Sizes(VOCABULARIES, (32, 64, 128, 256, 512), 32_768, 64, 256),
    "cuda": Sizes(VOCABULARIES, (512, 1024, 2048, 4096, 8192), 131_072, 2048, 4096),
    "tiny": Sizes((64, 128), (8, 16), 64, 8, 8),
}


def plot(granularity: str, geometry: str) -> PlotConfig:
    return PlotConfig.from_options(granularity=granularity, geometry=geometry)  # type: ignore[arg-type]


# Lines of the two panels with a size on the axis; then every pair of granularity and geometry that a panel shows.
LINES = {
    f"{g}, {geometry}": plot(g, geometry)
    for g, geometry in zip(GRANULARITIES, ("sliced", "sliced", "norm"), strict=True)
}
PAIRS = {f"{g}, {geometry}": plot(g, geometry) for g in GRANULARITIES for geometry in GEOMETRIES}


def measure(sizes: Sizes, device: torch.device, dtype: torch.dtype, repeats: int, progress: Any) -> dict[str, Any]:
    """Results by panel: ``vocabulary`` and ``tokens`` (size → arm → entries), ``pairs`` (arm → entries)."""
    points: list[tuple[str, int, int, Mapping[str, PlotConfig]]] = [
        *(("vocabulary", vocab, sizes.token, LINES) for vocab in sizes.vocabularies),
        *(("tokens", sizes.vocab, tokens, LINES) for tokens in sizes.tokens),
        ("pairs", sizes.vocab, sizes.token, PAIRS),
    ]
    results: dict[str, Any] = {"vocabulary": {}, "tokens": {}}
    work = [vocab * tokens * len(plots) for _, vocab, tokens, plots in points]
    task = progress.add_task("", total=sum(work))
    for (panel, vocab, tokens, plots), amount in zip(points, work, strict=True):
        progress.update(task, description=f"{vocab:,} ids, {tokens:,} tokens")
        # One token of each sequence is predicted from nothing, so a sequence is one longer than its share.
        length = tokens // ROWS + 1
        problem = HeadProblem(vocab, sizes.hidden, ROWS, length, plots, device=device, dtype=dtype)
        arms = {name: functools.partial(problem.arm, name) for name in ("off", *plots)}
        on_round = functools.partial(_advance, progress, task, amount / (repeats + 1))
        samples = problem.own_peaks(interleaved(arms, repeats=repeats, device=device, on_round=on_round))
        found = compare(samples, "off")
        match panel:
            case "vocabulary":
                results[panel][str(vocab)] = found
            case "tokens":
                results[panel][str(tokens)] = found
            case _:
                results[panel] = found
        del problem, arms
        release(device)
    return results


def _advance(progress: Any, task: Any, amount: float, count: int) -> None:
    progress.advance(task, amount)


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Four panels of time above four of peak memory."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    results, config = record["results"], record["config"]
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}):
        figure = Figure(figsize=(12.5, 6.4), layout="constrained")
        axes = figure.subplots(2, 4, sharey="row", width_ratios=(1.2, 1.2, 0.9, 1.2))
        for row, what in zip(axes, ("time", "memory"), strict=True):
            _lines(row[0], results["vocabulary"], what, "token ids in the vocabulary")
            _lines(row[1], results["tokens"], what, "tokens of a micro-batch")
            _groups(row[2], results["pairs"], what, GRANULARITIES, ("norm", "sliced"), by_geometry=False)
            _groups(row[3], results["pairs"], what, GEOMETRIES, ("batch", "token"), by_geometry=True)
            row[0].set_ylabel("time, PLOT on / off" if what == "time" else "peak memory, PLOT on / off")
            for panel in row:
                panel.set_yscale("log")
                panel.axhline(1.0, color="#5f6369", linewidth=0.8, linestyle=":")
                panel.grid(True, axis="y", which="both", color="#d8dbe0", linewidth=0.7)
                panel.yaxis.set_major_formatter("{x:g}")
                panel.yaxis.set_minor_formatter("{x:g}")
                if what == "time":
                    panel.legend(frameon=False, fontsize=8, loc="upper left")
        axes[0][0].set_ylim(top=2.2 * axes[0][0].get_ylim()[1])  # room for the legends
        figure.suptitle(_title(record, config), fontsize=10)
        with complete_or_absent(path) as temporary:
            figure.savefig(temporary, dpi=130)


def _title(record: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    hardware, sizes = record["hardware"], config["sizes"]
    where = hardware["gpus"][0]["name"] if config["device"] == "cuda" else f"{hardware['cpu']}, CPU figures"
    return (
        f"The LM head, forward and backward, with PLOT against without ({where}, {_threads(hardware['threads'])}, "
        f"{config['dtype']}, hidden size {sizes['hidden']})\n"
        f"elsewhere {sizes['vocab']:,} ids and {sizes['token']:,} tokens; medians of {config['repeats']} rounds, "
        "95 % bootstrap intervals"
    )


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count != 1)}"


def _lines(panel: Any, by_size: Mapping[str, Any], what: str, label: str) -> None:
    """Ratio against a size, a line for each arm."""
    sizes = list(map(int, by_size))
    for index, name in enumerate(LINES):
        beside = [size * 1.05 ** (index - 1) for size in sizes]  # so that equal lines are seen
        _errorbar(panel, beside, [arms[name][what] for arms in by_size.values()], name, index, linestyle="-")
    panel.set_xscale("log", base=2)
    panel.set_xticks(sizes, [f"{size // 1024}k" if size >= 1024 else str(size) for size in sizes])
    panel.set_xlabel(label)


def _groups(
    panel: Any,
    pairs: Mapping[str, Any],
    what: str,
    ticks: tuple[str, ...],
    groups: tuple[str, ...],
    *,
    by_geometry: bool,
) -> None:
    """Ratio of each tick, side by side for each of ``groups``."""
    for index, group in enumerate(groups):
        names = [f"{group}, {tick}" if by_geometry else f"{tick}, {group}" for tick in ticks]
        places = [place + 0.16 * (index - 0.5) for place in range(len(ticks))]
        _errorbar(panel, places, [pairs[name][what] for name in names], group, index + 3, linestyle="none")
    panel.set_xticks(range(len(ticks)), [tick.replace("_", "\n") for tick in ticks], fontsize=8)
    panel.set_xlim(-0.5, len(ticks) - 0.5)
    panel.set_xlabel("geometry" if by_geometry else "granularity")


def _errorbar(
    panel: Any, places: list[Any], entries: list[Mapping[str, Any]], name: str, index: int, **how: Any
) -> None:
    from plot_align.report.figures import style

    look = style(index)
    values = [entry["value"] for entry in entries]  # NaN, which leaves a gap, where nothing was measured
    ends = [entry.get("interval", (math.nan, math.nan)) for entry in entries]
    below = [value - low for value, (low, _) in zip(values, ends, strict=True)]
    above = [high - value for value, (_, high) in zip(values, ends, strict=True)]
    panel.errorbar(
        places, values, [below, above], label=name, color=look["color"], marker=look["marker"], markersize=4.5,
        capsize=2.5, linewidth=1.4, **how,
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="bfloat16; float32 on a CPU")
    parser.add_argument("--repeats", type=int, default=7, help="rounds (%(default)s)")
    parser.add_argument("--sizes", choices=SIZES, help="default: those of the device")
    parser.add_argument("--output", type=Path, default=Path("docs/cost"), help="without suffix (%(default)s)")
    parser.add_argument("--draw", type=Path, metavar="RECORD", help="draw an earlier record, measure nothing")
    args = parser.parse_args()

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    picture, path = args.output.with_suffix(".png"), args.output.with_suffix(".json")
    try:
        if args.draw is not None:
            path = args.draw
        else:
            require_writable(args.output.parent)
            sizes = SIZES[args.sizes or args.device]
            dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            with Progress(*columns, console=console) as progress:
                results = measure(sizes, torch.device(args.device), getattr(torch, dtype), args.repeats, progress)
            config = {"sizes": sizes, "rows": ROWS, "device": args.device, "dtype": dtype, "repeats": args.repeats}
            write_record(path, "cost", results, config=config, seed=0)
        draw(read_record(path, "cost"), picture)
    except PlotAlignError as error:
        console.print(f"cost.py: {error}", style="red", markup=False)
        return error.exit_code
    print(f"record: {path}\nfigure: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
