"""``plot-align sweep``: your own training over a grid of PLOT's options, methods and seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plot_align.cli.common import Parser, did_you_mean
from plot_align.errors import InputError
from plot_align.io import read_yaml

_HELP = """\
usage: plot-align sweep --train FILE.yaml [--config FILE.yaml] [options]

Run your own training over a grid and compare every cell with the same without
PLOT, paired by seed. Every option of PLOT, the method, the loss and the seed
take several values, as a flag or as a key of --config (flags win).
--help-all lists them.

  --train FILE.yaml         your training, as for `plot-align dpo --config`
  --method M ...            dpo, sft, pro (default: dpo)
  --loss_type L ...         of DPO; join several with +: sigmoid+sft
  --alpha A ...             weight of the term (default: that of the training's
                            file); without PLOT is always run
  --target T ..., --divergence D ..., --geometry G ..., --granularity G ...
  --seed N ...              (default: that of the training's file)
  --steps N ..., --learning_rate LR ..., --beta B ..., --batch_size N ...
  --workers N               how many runs at once (default: one a GPU)
  --dry_run                 list what would run and what is finished
  --output DIR              records, summary, table, figures (runs/sweep)

Finished runs are read, not run again: the same command goes on where it was.

example:
  plot-align sweep --train dpo.yaml --alpha 0.1 1 10 --divergence w1 tv \\
    --seed 0 1 2 3 4 --output runs/sweep
"""


def make_parser() -> Parser:
    """Every key of the grid takes several values; types and choices are checked with those of the YAML file."""
    from plot_align.sweep import keys

    parser = Parser(
        "sweep",
        "Run your own training over a grid and compare every cell with the same without PLOT.",
        "  plot-align sweep --train dpo.yaml --alpha 0.1 1 10 --seed 0 1 2 3 4",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML: the options below, each a value or a list")
    parser.add_argument("--train", metavar="FILE", help="YAML: your training, as `plot-align METHOD --config` has it")
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
    from plot_align.sweep.training import Training

    if train is None:
        raise InputError(
            "--train is missing, expected the YAML file of your training, as `plot-align dpo --config` takes it; "
            "name one with --train FILE.yaml"
        )
    content = read_yaml(train, "--train")
    training = Training(output, Path(train), content)
    jobs = expand({"seed": [_seed(content, train)], **grid}, base=training.plot_options())
    training.check(jobs)
    if dry_run:
        describe(jobs, training)
        return 0
    run_sweep(jobs, training, output, config={"grid": grid, "train": train}, workers=workers)
    return 0


def _seed(content: dict[str, Any], path: str) -> int:
    """The seed of the training's file, 42 without one, as in ``transformers``."""
    seed = content.get("seed", 42)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise InputError(f"seed in {path} is {seed!r}, expected a whole number; correct it")
    return seed
