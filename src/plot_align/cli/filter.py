"""``plot-align filter``: score pairs with DEFT's distribution reward and keep some of them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from plot_align.cli.parser import Parser, add_loading_options, length
from plot_align.errors import InputError
from plot_align.inference.load import check_dtype, load_model

_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def make_parser() -> Parser:
    parser = Parser(
        "filter",
        "Keep the pairs with the highest or lowest distribution reward under a model. An\n"
        "interrupted run continues where it stopped. Train on the result with\n"
        "`plot-align dpo --dataset_name FILE`.",
        "  plot-align filter pairs.jsonl --model Qwen/Qwen3-0.6B --share 0.05",
    )
    parser.usage = "plot-align filter DATA --model MODEL [options]"  # argparse's own usage takes a third of the screen
    parser.add_argument("data", metavar="DATA", help="hub id, or a .jsonl/.json/.csv/.parquet file, also .gz")
    parser.add_argument("--model", required=True, help="hub id or folder of the model to tune")
    parser.add_argument("--preference", metavar="FILE", help="from `plot-align estimate` (default: these pairs)")
    parser.add_argument("--share", type=float, default=0.05, help="share of the pairs to keep (%(default)s)")
    for name, choices, default in (
        ("direction", ("highest", "lowest"), "highest"),
        ("score", ("chosen", "margin"), "chosen"),
        ("reading", ("log", "prob"), "log"),
    ):
        text = f"{' or '.join(choices)} (%(default)s)"
        parser.add_argument(f"--{name}", choices=choices, default=default, metavar=name[0].upper(), help=text)
    parser.add_argument(
        "--output", type=Path, default=Path("kept.jsonl"), metavar="FILE", help=".jsonl or .jsonl.gz (%(default)s)"
    )
    parser.add_argument("--split", default="train", help="split of the data set (%(default)s)")
    parser.add_argument("--name", help="configuration of a hub data set")
    parser.add_argument("--max_length", type=length, default=1024, metavar="N", help="as for estimate (%(default)s)")
    parser.add_argument("--truncation_mode", default="keep_start", metavar="M", help="as for estimate (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, metavar="N", help="completions a pass (%(default)s)")
    add_loading_options(parser)
    return parser


def run(arguments: list[str]) -> int:
    """Parse ``arguments``, score, and write the kept rows, ``*.scores.jsonl`` and ``*.record.json`` beside them."""
    options = make_parser().parse(arguments)

    from plot_align.io import require_writable
    from plot_align.methods import filter as filtering
    from plot_align.preference.datasets import require_pairs
    from plot_align.preference.distribution import PreferenceDistribution
    from plot_align.preference.estimation import estimate, load_pairs
    from plot_align.records import write_record

    _check(options)
    preference = None if options.preference is None else PreferenceDistribution.load(options.preference)
    pairs = load_pairs(options.data, name=options.name, split=options.split)
    require_pairs(pairs)
    filtering.require_json(pairs)
    require_writable(options.output.parent)  # before the work rather than after it
    model, tokenizer = load_model(
        options.model, device=options.device, dtype=options.dtype, trust_remote_code=options.trust_remote_code
    )
    truncation = {"max_length": options.max_length, "truncation_mode": options.truncation_mode}
    if preference is None:
        preference = estimate(pairs, tokenizer, **truncation)

    start = time.perf_counter()
    partial = filtering.partial_path(options.output)
    scores = filtering.score_pairs(
        model,
        tokenizer,
        pairs,
        preference,
        reading=options.reading,
        batch_size=options.batch_size,
        partial=partial,
        **truncation,
    )  # (N, 2)
    seconds = time.perf_counter() - start
    by = filtering.pair_scores(scores, options.score)  # (N,)
    kept = filtering.keep_pairs(by, options.share, options.direction)  # (N,)
    results = {**_results(scores, by, kept, options.direction), "seconds": seconds}
    beside = filtering.write_pairs(pairs, scores, kept, options.output)
    config = {
        **vars(options),
        "device": str(model.device),
        "dtype": str(model.dtype),
        "data_sources": preference.sources,
    }
    record = write_record(filtering.record_path(options.output), "filter", results, config=config)
    filtering.forget_partial(partial)
    _print(results, options.output, beside, record)
    return 0


def _check(options: Any) -> None:
    """Check before the scoring, which takes long."""
    from plot_align.methods import filter as filtering

    if not 0 < options.share <= 1:
        raise InputError(f"--share is {options.share}, expected a share above 0 and at most 1, e.g. 0.05")
    if options.batch_size < 1:
        raise InputError(f"--batch_size is {options.batch_size}, expected 1 or more")
    check_dtype(options.dtype)
    written = (options.output, filtering.scores_path(options.output))  # this also checks the ending
    if any(path.exists() and Path(options.data).exists() and path.samefile(options.data) for path in written):
        raise InputError(f"--output {options.output} would overwrite the data it is made from; name another file")


def _results(scores: Any, by: Any, kept: Any, direction: str) -> dict[str, Any]:
    import torch

    finite = by[by.isfinite()]  # (n,)
    last = by[kept].min() if direction == "highest" else by[kept].max()
    quantiles = torch.quantile(finite, torch.tensor(_QUANTILES, dtype=finite.dtype)).tolist()
    return {
        "pairs": len(by),
        "unscored": len(by) - len(finite),
        "kept": int(kept.sum()),
        "threshold": float(last),
        "quantiles": {f"{quantile:g}": value for quantile, value in zip(_QUANTILES, quantiles, strict=True)},
        "mean_chosen": float(scores[:, 0].nanmean()),
        "mean_rejected": float(scores[:, 1].nanmean()),
    }


def _print(results: dict[str, Any], output: Path, scores: Path, record: Path) -> None:
    from rich.console import Console
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
        ("mean reward of chosen completions", f"{results['mean_chosen']:.6g}"),
        ("mean reward of rejected completions", f"{results['mean_rejected']:.6g}"),
        ("seconds", f"{results['seconds']:.1f}"),
    ):
        table.add_row(label, value)
    console = Console(highlight=False)
    console.print(table)
    for label, path in (("kept:  ", output), ("scores:", scores), ("record:", record)):
        console.print(f"{label} {path}", markup=False, soft_wrap=True)
