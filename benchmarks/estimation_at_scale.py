"""Millions of tokens: throughput of `plot-align estimate` against the tokenizer alone, and its memory.

Real pairs, repeated until their completions have 1, 3 and 10 million tokens, lie in four files and are streamed from
there. Five arms take turns, each in processes of its own, one thread each:

    tokenizer       the tokenizer alone on the texts that TRL encodes, which are in memory
    2 tokenizers    the same in two processes
    estimate        plot-align estimate --streaming
    2 workers       the same with --num_proc 2: two tokenising processes, which one reading process feeds
    2 ranks         the same with --num_processes 2: they read two files each

A ratio is seconds of counting over seconds of the tokenizer alone in as many processes, starts of processes left out
of both. Memory is what all processes of an arm hold resident together, at its highest; pages that they share count in
each.

    python benchmarks/estimation_at_scale.py --out runs/estimation_at_scale.json
    python benchmarks/estimation_at_scale.py --millions 1 --repeats 5 --arms "2 tokenizers" "2 ranks"
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil

from estimation import HARMLESS, ROOT, spread, texts_of, train_tokenizer
from plot_align.errors import RunError
from plot_align.preference.estimation import estimate, load_pairs
from plot_align.records import read_record, write_record

FILES = 4  # as many shards: two for each of two ranks
BATCH = 1000  # the default of estimate
ARMS = {  # processes, options of estimate; None: the tokenizer alone
    "tokenizer": (1, None),
    "2 tokenizers": (2, None),
    "estimate": (1, []),
    "2 workers": (2, ["--num_proc", "2"]),
    "2 ranks": (2, ["--num_processes", "2"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    folder = Path(os.environ.get("PLOT_ALIGN_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("data", nargs="?", default=str(folder / HARMLESS), help="preference pairs, standard format")
    parser.add_argument("--vocabulary", type=int, default=8000, help="size of a BPE tokenizer trained on the data")
    parser.add_argument(
        "--millions", type=float, nargs="+", default=[1, 3, 10], help="completion tokens (%(default)s)"
    )
    parser.add_argument("--repeats", type=int, nargs="+", default=[5, 3, 1], help="of each of these (%(default)s)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="(default: all)")
    parser.add_argument("--out", type=Path, help="also write a record there")
    options = parser.parse_args()
    if len(options.millions) != len(options.repeats) or min(options.repeats) < 1:
        parser.error(f"--repeats {options.repeats}: expected one number of 1 or more for each of --millions")

    pairs = load_pairs(options.data)
    tokenizer = train_tokenizer(pairs, options.vocabulary)
    once = estimate(pairs, tokenizer, max_length=None, progress=False)
    tokens = int(once.chosen_counts.sum() + once.rejected_counts.sum())
    config = {
        "data": Path(options.data).name,
        "tokenizer": f"BPE trained on the data, {len(tokenizer)} ids",
        "millions": options.millions,
        "repeats": options.repeats,
        "arms": options.arms,
        "files": FILES,
    }
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        tokenizer.save_pretrained(work / "tokenizer")
        batches = texts_of(pairs, tokenizer.eos_token, BATCH)
        (work / "texts.json").write_text(json.dumps(batches), encoding="utf-8")
        results: dict[str, Any] = {}
        for size, found in measure_all(options, list(pairs), tokens, work):
            results[size] = found
            if options.out:  # what there is so far
                write_record(options.out, "benchmark estimation at scale", results, config=config)
    show(results, options.arms)


def measure_all(
    options: argparse.Namespace, rows: list[Any], tokens: int, work: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Size and its results: the arms in turn, in the other order each second time. ``tokens`` is that of ``rows``."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=sum(options.repeats) * len(options.arms))
        for millions, repeats in zip(options.millions, options.repeats, strict=True):
            number = round(millions * 1e6 / tokens * len(rows))
            write_files(itertools.islice(itertools.cycle(rows), number), work / "pairs")
            seconds: dict[str, list[float]] = defaultdict(list)
            memory: dict[str, list[float]] = defaultdict(list)
            counted = 0
            for repeat in range(repeats):
                for arm in options.arms if repeat % 2 == 0 else reversed(options.arms):
                    progress.update(task, description=f"{millions:g} million tokens: {arm}, {repeat + 1} of {repeats}")
                    elapsed, highest, found = run_arm(arm, number, work)
                    if found is not None and counted not in (0, found):
                        raise RunError(f"{arm} counted {found} tokens and another arm {counted}, expected the same")
                    counted = found or counted
                    seconds[arm].append(elapsed)
                    memory[arm].append(highest / 2**20)
                    progress.advance(task)
            yield f"{millions:g} million", summary(number, counted or round(millions * 1e6), seconds, memory)


def summary(rows: int, tokens: int, seconds: dict[str, list[float]], memory: dict[str, list[float]]) -> dict[str, Any]:
    found: dict[str, Any] = {"rows": rows, "completion_tokens": tokens}
    for arm in seconds:
        processes, options = ARMS[arm]
        found[arm] = {
            "seconds": spread(seconds[arm]),
            "tokens_per_second": spread([tokens / elapsed for elapsed in seconds[arm]]),
            "memory_mib": spread(memory[arm]),
        }
        alone = seconds.get("tokenizer" if processes == 1 else f"{processes} tokenizers")
        if options is not None and alone is not None:
            found[arm]["ratio"] = spread([one / other for one, other in zip(seconds[arm], alone, strict=True)])
    return found


def write_files(rows: Iterable[Any], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    files = [(folder / f"{part}.jsonl").open("w", encoding="utf-8") for part in range(FILES)]
    for file, row in zip(itertools.cycle(files), rows, strict=False):
        file.write(json.dumps(row) + "\n")
    for file in files:
        file.close()


def run_arm(arm: str, rows: int, work: Path) -> tuple[float, int, int | None]:
    """Seconds of the work itself, highest resident memory in bytes, and what was counted."""
    processes, options = ARMS[arm]
    output = work / "counts.safetensors"
    if options is None:
        command = [sys.executable, __file__, "--alone", str(work), str(rows), str(processes)]
    else:
        command = [sys.executable, "-m", "plot_align.cli", "estimate", str(work / "pairs"), "--streaming"]
        command += ["--tokenizer", str(work / "tokenizer"), "--max_length", "none", "--output", str(output), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    highest = 0
    try:
        while True:
            try:
                out, err = process.communicate(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                highest = max(highest, resident(process.pid))
    finally:
        if process.poll() is None:  # interrupted
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                child.kill()
    if process.returncode:
        raise RunError(f"{arm} ended with exit code {process.returncode}: {err[-500:]}")
    if options is None:
        return float(out), highest, None
    results = read_record(output.with_suffix(".record.json"))["results"]
    return results["seconds"], highest, results["chosen_tokens"] + results["rejected_tokens"]


def resident(process: int) -> int:
    """Bytes that a process and all it started hold in memory."""
    total = 0
    try:
        tree = [psutil.Process(process), *psutil.Process(process).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for one in tree:
        try:
            total += one.memory_info().rss
        except psutil.NoSuchProcess:  # it has just ended
            continue
    return total


def tokenise_alone(work: Path, rows: int, processes: int) -> None:
    """Prints the seconds in which ``processes`` encode the texts of ``rows`` rows, each every so manieth batch."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    batches = json.loads((work / "texts.json").read_text(encoding="utf-8"))
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(processes + 1)

    def encode(rank: int) -> None:
        ready.wait()
        left = rows
        for number, texts in enumerate(itertools.cycle(batches)):
            if left <= 0:
                return
            size = len(texts) // 3  # prompts, chosen, rejected
            if number % processes == rank:
                some = [text for kind in range(3) for text in texts[kind * size :][: min(size, left)]]
                tokenizer(some, return_attention_mask=False, return_token_type_ids=False, verbose=False)
            left -= size

    workers = [context.Process(target=encode, args=(rank,)) for rank in range(processes)]
    for worker in workers:
        worker.start()
    ready.wait()
    start = time.perf_counter()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise RunError("a process of the tokenizer failed")
    print(time.perf_counter() - start)


def show(results: dict[str, Any], arms: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "tokens", "seconds", "tokens/s", "of the tokenizer alone (n, from, to)", "MiB", box=None)
    for found in results.values():
        for arm in arms:
            values, ratio = found[arm], found[arm].get("ratio")
            table.add_row(
                arm,
                f"{found['completion_tokens']:,}",
                f"{values['seconds']['median']:.1f}",
                f"{values['tokens_per_second']['median']:,.0f}",
                "{median:.2f} ({n}, {min:.2f}, {max:.2f})".format(**ratio) if ratio else "",
                f"{values['memory_mib']['max']:,.0f}",
            )
    Console().print(table)


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["--alone"]:
            tokenise_alone(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
        else:
            main()
    except KeyboardInterrupt:
        sys.exit(130)
