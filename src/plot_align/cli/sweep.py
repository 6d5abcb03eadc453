"""``plot-align sweep``: a grid over the options of PLOT, the methods and the seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plot_align.cli.common import Parser, did_you_mean
from plot_align.errors import InputError
from plot_align.io import read_yaml

_HELP = """\
usage: plot-align sweep [--config FILE.yaml] [options]

Run a grid and compare every cell with the same without PLOT, paired by seed.
Every option of PLOT, the method, the setting and the seed take several values,
as a flag or as a key of the YAML file (flags win). --help-all lists them.

  --method M ...            dpo, sft, kto, pro, cpo, simpo, orpo (default: dpo)
  --loss_type L ...         of DPO; join several with +: sigmoid+sft
  --alpha A ...             weight of the term (default: balanced, shown as
                            auto); without PLOT is always run
  --target T ..., --divergence D ..., --geometry G ..., --granularity G ...
  --seed N ...              (default: 0 1 2; with --train that of its file)
  --steps N ..., --learning_rate LR ..., --beta B ..., --batch_size N ...
  --per_category N ...      little data; --flipped SHARE ...  label noise
  --train FILE.yaml         your own training, by `plot-align METHOD --config`,
                            in place of the small offline world
  --workers N               how many runs at once (default: one a GPU; without
                            GPUs one a core, with --train one)
  --dry_run                 list what would run and what is finished
  --output DIR              records, summary, table, figures (runs/sweep)

Finished runs are read, not run again: the same command goes on where it was.

example:
  plot-align sweep --method dpo sft --alpha 0.1 1 10 --divergence w1 tv \\
    --seed 0 1 2 3 4 --output runs/sweep
"""
_DEFAULT_SEEDS = [0, 1, 2]


def make_parser() -> Parser:
    """Every key of the grid takes several values; types and choices are checked with those of the YAML file."""
    from plot_align.sweep import keys

    parser = Parser(
        "sweep",
        "Run a grid and compare every cell with the same without PLOT, paired by seed.",
        "  plot-align sweep --method dpo sft --alpha 0.1 1 10 --seed 0 1 2 3 4",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML: the options below, each a value or a list")
    parser.add_argument("--train", metavar="FILE", help="your own training in place of the offline world")
    parser.add_argument("--output", metavar="DIR", help="folder of the results (runs/sweep)")
    parser.add_argument("--workers", metavar="N", help="how many runs at once")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="list what would run, and run nothing")
    parser.add_argument("--help-all", action="help", help="this list")
    for key in keys().values():
        help_text = f"{key.help} ({', '.join(key.choices)})" if key.choices else key.help
        parser.add_argument(f"--{key.name}", nargs="+", metavar="V", help=help_text.replace("%", "%%"))
    return parser


def run(arguments: list[str]) -> int:
    """Parse ``arguments`` and run the sweep."""
    if not {"-h", "--help"}.isdisjoint(arguments):
        print(_HELP, end="")
        return 0
    given = {name: value for name, value in vars(make_parser().parse(arguments)).items() if value is not None}
    content = _read(given.pop("config")) if "config" in given else {}
    dry_run = given.pop("dry_run")
    options = {**content, **given}
    train = options.pop("train", None)
    output = Path(options.pop("output", "runs/sweep"))
    workers = _workers(options.pop("workers", None))
    grid = read_grid(options)
    return _sweep(grid, train, output, workers, dry_run=dry_run)


def read_grid(options: dict[str, Any]) -> dict[str, list[Any]]:
    """Key to values of their own type, from single values and lists alike, without repetition.

    Raises:
        InputError: a value of another type, or an empty list.
    """
    from plot_align.sweep import coerce, keys

    known = keys()
    grid: dict[str, list[Any]] = {}
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        if not values:
            raise InputError(f"{name} is an empty list, expected one value or more; add one or drop the key")
        grid[name] = list(dict.fromkeys(coerce(known[name], entry) for entry in values))
    return grid


def _read(path: str) -> dict[str, Any]:
    from plot_align.sweep import keys

    content = read_yaml(path)
    known = {*keys(), "train", "output", "workers"}
    for name in content:
        if name not in known:
            advice = did_you_mean(str(name), known, "see 'plot-align sweep --help-all'")
            raise InputError(f"unknown key {str(name)!r} in {path}; {advice}")
    for name in ("train", "output"):
        if name in content and not isinstance(content[name], str):
            raise InputError(f"{name} in {path} is {content[name]!r}, expected a path; write one")
    return content


def _workers(value: Any) -> int | None:
    if value is None:
        return None
    text = str(value)
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"workers is {value!r}, expected how many runs at once, 1 or more; leave it out to be chosen")
    return int(text)


def _sweep(grid: dict[str, list[Any]], train: str | None, output: Path, workers: int | None, *, dry_run: bool) -> int:
    from plot_align.sweep import expand
    from plot_align.sweep.run import describe
    from plot_align.sweep.run import run as run_sweep
    from plot_align.sweep.workloads import Sandbox, Training, Workload, sandbox_run

    workload: Workload
    if train is not None:
        content = read_yaml(train, "--train")
        training = Training(output, Path(train), content)
        jobs = expand({"seed": [_seed(content, train)], **grid}, base=training.plot_options())
        training.check(jobs)
        workload = training
    else:
        from plot_align.sandbox.experiment import default_base

        jobs = expand({"seed": _DEFAULT_SEEDS, **grid})
        for job in jobs:
            sandbox_run(job)  # refuses what is out of range before anything runs
        workload = Sandbox(output, default_base())
    if dry_run:
        describe(jobs, workload)
        return 0
    if train is None:
        from plot_align.io import require_writable
        from plot_align.sandbox import build_base

        require_writable(output)
        build_base()
    run_sweep(jobs, workload, output, config={"grid": grid, "train": train}, workers=workers)
    return 0


def _seed(content: dict[str, Any], path: str) -> int:
    """The seed in the training's file, 42 without one, as ``transformers`` has it."""
    seed = content.get("seed", 42)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise InputError(f"seed in {path} is {seed!r}, expected a whole number; correct it")
    return seed
