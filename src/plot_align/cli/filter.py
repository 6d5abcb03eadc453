"""``plot-align filter``: score pairs by DEFT's distribution reward, by CHES or by length, and keep some of them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from plot_align.cli.parser import Parser, add_loading_options, length
from plot_align.errors import InputError
from plot_align.inference.load import check_dtype, load_model, load_tokenizer
from plot_align.text import terminal

if TYPE_CHECKING:
    from torch import Tensor

_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_DEFT = {"preference": None, "direction": "highest", "score": "chosen", "reading": "log"}
_MODEL = {"batch_size": 16, "device": None, "dtype": "auto", "trust_remote_code": False}
_OWN: dict[str, dict[str, Any]] = {  # options, with their defaults
    "deft": {**_DEFT, **_MODEL},
    "ches": _MODEL,
    "length": {"trust_remote_code": False},
}
_OWNERS = dict.fromkeys(_MODEL, "ches or deft") | dict.fromkeys(_DEFT, "deft")


def make_parser() -> Parser:
    parser = Parser(
        "filter",
        "Keep some of the pairs: deft, the highest distribution reward; ches, the least\n"
        "danger of pulling the chosen answer down; length, sides of similar length.\n"
        "An interrupted run continues. Train on FILE with `dpo --dataset_name FILE`.",
        "  plot-align filter pairs.jsonl --model Qwen/Qwen3-0.6B --by ches --share 0.5",
    )
    parser.usage = "plot-align filter DATA --model MODEL [options]"  # argparse's own usage takes a third of the screen
    parser.add_argument("data", metavar="DATA", help="hub id, or a .jsonl/.json/.csv/.parquet file, also .gz")
    parser.add_argument("--model", required=True, help="hub id or folder of the model to tune")
    parser.add_argument("--by", choices=list(_OWN), default="deft", metavar="B", help="deft, ches or length (deft)")
    parser.add_argument("--share", type=float, default=0.05, help="share of the pairs to keep (%(default)s)")
    parser.add_argument("--preference", metavar="FILE", help="deft: from `plot-align estimate` (default: these pairs)")
    for name, choices in (("direction", ("highest", "lowest")), ("score", ("chosen", "margin")),
                          ("reading", ("log", "prob"))):  # fmt: skip
        text = f"deft: {' or '.join(choices)} ({_DEFT[name]})"
        parser.add_argument(f"--{name}", choices=choices, metavar=name[0].upper(), help=text)
    parser.add_argument(
        "--output", type=Path, default=Path("kept.jsonl"), metavar="FILE", help=".jsonl or .jsonl.gz (%(default)s)"
    )
    parser.add_argument("--split", default="train", help="split of the data set (%(default)s)")
    parser.add_argument("--name", help="configuration of a hub data set")
    parser.add_argument("--max_length", type=length, default=1024, metavar="N", help="as for estimate (%(default)s)")
    parser.add_argument("--truncation_mode", default="keep_start", metavar="M", help="as for estimate (%(default)s)")
    parser.add_argument("--batch_size", type=int, metavar="N", help="completions a pass (16)")
    add_loading_options(parser)
    parser.set_defaults(dtype=None)  # so that _settle sees what was given
    return parser


class _Scored(NamedTuple):
    """What one way of scoring found.

    Attributes:
        scores: ``(N, C)``, written beside the kept rows under ``names``.
        by: ``(N,)``, what decides. direction: of it, the side that is kept.
        config: what the record says beside the options.
    """

    scores: Tensor
    names: tuple[str, str]
    by: Tensor
    direction: str
    config: dict[str, Any]


def run(arguments: list[str]) -> int:
    """Parse ``arguments``, score, and write the kept rows, ``*.scores.jsonl`` and ``*.record.json`` beside them."""
    options = make_parser().parse(arguments)

    from plot_align.inference.resume import forget_partial
    from plot_align.io import claimed
    from plot_align.methods import filter as filtering
    from plot_align.preference.datasets import require_pairs
    from plot_align.preference.distribution import PreferenceDistribution
    from plot_align.preference.estimation import load_pairs
    from plot_align.records import write_record

    _settle(options)
    _check(options)
    given = getattr(options, "preference", None)
    preference = None if given is None else PreferenceDistribution.load(given)
    pairs = load_pairs(options.data, name=options.name, split=options.split)
    require_pairs(pairs)
    filtering.require_json(pairs)
    with claimed(options.output.parent, options.output.name):
        found, seconds = _score(options, pairs, preference)
        kept = filtering.keep_pairs(found.by, options.share, found.direction)  # (N,)
        results = {**_results(found, kept), "seconds": seconds}
        beside = filtering.write_pairs(pairs, found.scores, kept, options.output, found.names)
        config = {**vars(options), **found.config}
        record = write_record(filtering.record_path(options.output), "filter", results, config=config)
        forget_partial(filtering.partial_path(options.output))
    _print(results, options.output, beside, record)
    return 0


def _settle(options: Any) -> None:
    """Refuses options of another ``--by``, and fills in the defaults of its own."""
    own = _OWN[options.by]
    for name, owners in _OWNERS.items():
        given = getattr(options, name)
        if name in own:
            setattr(options, name, own[name] if given is None else given)
        elif given not in (None, False):
            raise InputError(
                f"--{name} came with --by {options.by}, expected it with --by {owners} only; leave it out"
            )
        else:
            delattr(options, name)


def _check(options: Any) -> None:
    """Check before the scoring, which takes long."""
    from plot_align.methods import filter as filtering

    if not 0 < options.share <= 1:
        raise InputError(f"--share is {options.share}, expected a share above 0 and at most 1, e.g. 0.05")
    if options.by != "length":
        if options.batch_size < 1:
            raise InputError(f"--batch_size is {options.batch_size}, expected 1 or more")
        check_dtype(options.dtype)
    written = (options.output, filtering.scores_path(options.output))  # this also checks the ending
    if any(path.exists() and Path(options.data).exists() and path.samefile(options.data) for path in written):
        raise InputError(f"--output {options.output} would overwrite the data it is made from; name another file")


def _score(options: Any, pairs: Any, preference: Any) -> tuple[_Scored, float]:
    """The scores, and the seconds that they took without loading the model and counting tokens."""
    from plot_align.methods import filter as filtering
    from plot_align.preference.estimation import estimate

    truncation = {"max_length": options.max_length, "truncation_mode": options.truncation_mode}
    if options.by == "length":
        tokenizer = load_tokenizer(options.model, trust_remote_code=options.trust_remote_code)
        start = time.perf_counter()
        lengths = filtering.completion_lengths(tokenizer, pairs, **truncation)  # (N, 2)
        found = _Scored(lengths, ("chosen", "rejected"), filtering.length_ratio(lengths), "lowest", {})
        return found, time.perf_counter() - start
    model, tokenizer = load_model(
        options.model, device=options.device, dtype=options.dtype, trust_remote_code=options.trust_remote_code
    )
    config = {"device": str(model.device), "dtype": str(model.dtype)}
    shared = {"batch_size": options.batch_size, "partial": filtering.partial_path(options.output), **truncation}
    if options.by == "ches":
        start = time.perf_counter()
        values = filtering.ches_scores(model, tokenizer, pairs, **shared)  # (N, 2)
        found = _Scored(values, ("ches", "normalised"), values[:, 1], "lowest", config)
        return found, time.perf_counter() - start
    if preference is None:
        preference = estimate(pairs, tokenizer, **truncation)
    start = time.perf_counter()
    rewards = filtering.score_pairs(model, tokenizer, pairs, preference, reading=options.reading, **shared)  # (N, 2)
    config["data_sources"] = preference.sources
    by = filtering.pair_scores(rewards, options.score)
    found = _Scored(rewards, ("chosen", "rejected"), by, options.direction, config)
    return found, time.perf_counter() - start


def _results(found: _Scored, kept: Tensor) -> dict[str, Any]:
    import torch

    finite = found.by[found.by.isfinite()]  # (n,)
    last = found.by[kept].min() if found.direction == "highest" else found.by[kept].max()
    quantiles = torch.quantile(finite, torch.tensor(_QUANTILES, dtype=finite.dtype)).tolist()
    return {
        "pairs": len(found.by),
        "unscored": len(found.by) - len(finite),
        "kept": int(kept.sum()),
        "threshold": float(last),
        "quantiles": {f"{quantile:g}": value for quantile, value in zip(_QUANTILES, quantiles, strict=True)},
        **{f"mean_{name}": float(values.nanmean()) for name, values in zip(found.names, found.scores.T, strict=True)},
    }


def _print(results: dict[str, Any], output: Path, scores: Path, record: Path) -> None:
    from rich.table import Table

    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(justify="right")
    for label, value in (
        ("pairs", f"{results['pairs']:,}"),
        ("pairs without a score", f"{results['unscored']:,}"),
        ("pairs kept", f"{results['kept']:,}"),
        ("score of the last pair kept", f"{results['threshold']:.6g}"),
        ("scores, smallest", f"{results['quantiles']['0']:.6g}"),
        ("  median", f"{results['quantiles']['0.5']:.6g}"),
        ("  largest", f"{results['quantiles']['1']:.6g}"),
        *((f"mean, {name[5:]}", f"{value:.6g}") for name, value in results.items() if name.startswith("mean_")),
        ("seconds", f"{results['seconds']:.1f}"),
    ):
        table.add_row(label, value)
    console = terminal()
    console.print(table)
    for label, path in (("kept:  ", output), ("scores:", scores), ("record:", record)):
        console.print(f"{label} {path}", soft_wrap=True)
