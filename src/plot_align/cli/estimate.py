"""``plot-align estimate``: count the tokens of a data set of pairs, save the artefact and its record."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from plot_align.cli import launch
from plot_align.cli.parser import Parser, length
from plot_align.errors import InputError
from plot_align.inference.load import load_tokenizer
from plot_align.io import claimed, require_writable
from plot_align.parallel import patient_state, pulse
from plot_align.text import terminal


def make_parser() -> Parser:
    parser = Parser(
        "estimate",
        "Count how often chosen and rejected completions use each token, exactly the\n"
        "tokens that a TRL preference trainer would train on.",
        "  plot-align estimate pairs.jsonl.gz --tokenizer Qwen/Qwen3-0.6B\n"
        "  plot-align estimate trl-lib/ultrafeedback_binarized --tokenizer my/model",
    )
    parser.add_argument("data", help="hub id, or a .jsonl/.json/.csv/.parquet file, also .gz")
    parser.add_argument("--tokenizer", required=True, metavar="MODEL", help="hub id or folder of the model to tune")
    parser.add_argument(
        "--output", type=Path, default=Path("preference.safetensors"), metavar="FILE", help="artefact (%(default)s)"
    )
    parser.add_argument("--split", default="train", help="split of the data set (%(default)s)")
    parser.add_argument("--name", help="configuration of a hub data set")
    parser.add_argument(
        "--max_length", type=length, default=1024, metavar="N", help="longest row trained on, or none (%(default)s)"
    )
    parser.add_argument(
        "--truncation_mode", default="keep_start", metavar="MODE", help="as TRL's option of that name (%(default)s)"
    )
    parser.add_argument("--streaming", action="store_true", help="read the data set without downloading it first")
    parser.add_argument("--num_proc", type=int, metavar="N", help="worker processes (default: none)")
    parser.add_argument(
        "--num_processes",
        type=int,
        metavar="N",
        help="launch N to divide the work (default: 1)",
    )
    parser.add_argument(
        "--merge", nargs="+", default=[], metavar="A", help="add the counts of these artefacts to the new ones"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="allow a tokenizer's own code")
    return parser


def run(arguments: list[str]) -> int:
    """Parse ``arguments``, estimate, and write ``FILE`` and ``FILE`` with the suffix ``.record.json``.

    Under a launcher every rank runs this and counts its part; the main one writes.
    """
    options = make_parser().parse(arguments)
    _check(options)
    launched = launch.is_launched()
    if options.num_processes not in (None, 1) and not launched:
        require_writable(options.output.parent)  # before the work rather than after it
        return launch.launch("estimate", ["--num_processes", str(options.num_processes)], arguments, use_cpu=True)
    if not launched:
        return _estimate(options)
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # accelerators count no tokens
    # Otherwise the tokenizer of each rank would start a thread for every core.
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, cores)))
    state = patient_state()  # ranks meet only at the end, and a stream's files differ in size
    try:
        with pulse(state):
            return _estimate(options, state.is_main_process)
    finally:
        state.destroy_process_group()


def _check(options: Any) -> None:
    if options.output.suffix != ".safetensors":
        raise InputError(f"--output is {str(options.output)!r}, expected a name ending in .safetensors; rename it")
    for name in ("num_proc", "num_processes"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise InputError(f"--{name} is {value}, expected 1 or more; leave it out for one process")


def _estimate(options: Any, writes: bool = True) -> int:
    with claimed(options.output.parent, options.output.name) if writes else nullcontext():
        return _count(options, writes)


def _count(options: Any, writes: bool) -> int:
    from plot_align.preference.distribution import PreferenceDistribution, require_preference
    from plot_align.preference.estimation import estimate, load_pairs
    from plot_align.records import write_record

    if not writes:
        import datasets

        datasets.disable_progress_bars()
    others = [PreferenceDistribution.load(path) for path in options.merge]
    tokenizer = load_tokenizer(options.tokenizer, trust_remote_code=options.trust_remote_code)
    pairs = load_pairs(options.data, name=options.name, split=options.split, streaming=options.streaming)
    start = time.perf_counter()
    preference = estimate(
        pairs,
        tokenizer,
        max_length=options.max_length,
        truncation_mode=options.truncation_mode,
        num_proc=options.num_proc,
        distributed=launch.is_launched(),
    )
    seconds = time.perf_counter() - start
    for other in others:
        preference = preference.merge(other)
    require_preference(preference.difference())  # an artefact without a target would fail every later step
    if writes:
        results = {**_results(preference), "seconds": seconds}
        preference.save(options.output)
        record = write_record(options.output.with_suffix(".record.json"), "estimate", results, config=vars(options))
        _print(results, options.output, record)
    return 0


def _results(preference: Any) -> dict[str, Any]:
    """Exact counts, hence without intervals."""
    difference = preference.difference()
    return {
        "rows": preference.rows,
        "dropped_rows": sum(source.get("dropped_rows", 0) for source in preference.sources),
        "vocabulary": preference.vocab_size,
        "chosen_tokens": int(preference.chosen_counts.sum()),
        "rejected_tokens": int(preference.rejected_counts.sum()),
        "preferred_ids": int((difference > 0).sum()),
        "rejected_ids": int((difference < 0).sum()),
        "total_variation": float(difference.abs().sum()) / 2,
    }


def _print(results: dict[str, Any], artefact: Path, record: Path) -> None:
    from rich.table import Table

    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(justify="right")
    for label, value in (
        ("pairs counted", f"{results['rows']:,}"),
        ("pairs dropped by the trainer's length filter", f"{results['dropped_rows']:,}"),
        ("tokens in chosen completions", f"{results['chosen_tokens']:,}"),
        ("tokens in rejected completions", f"{results['rejected_tokens']:,}"),
        ("token ids in the vocabulary", f"{results['vocabulary']:,}"),
        ("  used more in chosen", f"{results['preferred_ids']:,}"),
        ("  used more in rejected", f"{results['rejected_ids']:,}"),
        ("total variation between the two", f"{results['total_variation']:.4f}"),
        ("seconds", f"{results['seconds']:.1f}"),
    ):
        table.add_row(label, value)
    console = terminal()
    console.print(table)
    console.print(f"preference: {artefact}", soft_wrap=True)
    console.print(f"record:     {record}", soft_wrap=True)
