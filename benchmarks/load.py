"""Time and memory of the commands that read data sets and records, as these grow: is memory flat?

    estimate    plot-align estimate on rows of short synthetic pairs, from Parquet files
    filter      plot-align filter --by length on such rows
    doctor      plot-align doctor --tokenizer on such rows
    report      plot-align report on evaluation records of models with twenty measures each

Beside each command on rows runs `datasets`' own map, which tokenises prompt, chosen and rejected of the same rows; a
command's time is given as a ratio to it, in processor seconds of all processes. Memory is sampled five times a second
over all processes of a command: resident, and the part of it that is mapped from no file. What is finished is in the
record, and is not run again.

    python benchmarks/load.py --rows estimate=1000000,10000000 --rows filter=10000,100000 --rows doctor=10000,100000 \
        --rows report=200,2000 --out runs/load.json
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from estimation import train_tokenizer
from plot_align.errors import RunError
from plot_align.records import read_record, write_record
from plot_align.results import of_items

KIND = "load"
COMMANDS = ("estimate", "filter", "doctor", "report")
BATCH = 100_000  # rows of a Parquet file
MEASURES = 20  # records of a model
WORDS = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", action="append", default=[], metavar="COMMAND=N[,N]", help="may be given repeatedly")
    parser.add_argument("--vocabulary", type=int, default=8000, help="size of the BPE tokenizer, trained on the rows")
    parser.add_argument("--out", type=Path, required=True, help="the record")
    options = parser.parse_args()
    jobs = []
    for given in options.rows:
        command, _, sizes = given.partition("=")
        if command not in COMMANDS or not sizes.replace(",", "").isdigit():
            parser.error(f"--rows {given}: expected one of {', '.join(COMMANDS)}, = and numbers")
        jobs += [(command, int(size)) for size in sizes.split(",")]
    config = {"vocabulary": options.vocabulary, "rows of a file": BATCH, "measures": MEASURES}
    results = read_record(options.out, KIND)["results"] if options.out.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for command, size in jobs:
            name = f"{command}, {size}"
            if name not in results:
                results[name] = measured(command, size, options.vocabulary, work)
                write_record(options.out, KIND, results, config=config, seed=0)
    show(results)


def measured(command: str, size: int, vocabulary: int, work: Path) -> dict[str, Any]:
    """What one command took on so many rows or records, and the tokenising map beside it."""
    if command == "report":
        write_records(work / f"records-{size}", size)
        page = work / "page.html"
        found = run([*PLOT, "report", str(work / f"records-{size}"), "-o", str(page)], work)
        return {**found, "page_mib": page.stat().st_size / 2**20}
    folder, tokenizer = work / f"pairs-{size}", work / "tokenizer"
    if not folder.exists():
        write_rows(folder, size)
    if not tokenizer.exists():
        train_tokenizer(next(tables(min(size, 2000))), vocabulary).save_pretrained(tokenizer)
    options = {
        "estimate": ["--tokenizer", str(tokenizer), "--output", str(work / "counts.safetensors")],
        "filter": [
            "--by",
            "length",
            "--share",
            "0.5",
            "--model",
            str(tokenizer),
            "--output",
            str(work / "kept.jsonl"),
        ],
        "doctor": ["--tokenizer", str(tokenizer), "--record", str(work / "doctor.json")],
    }[command]
    alone = run([sys.executable, __file__, "--alone", str(folder), str(tokenizer)], work)
    found = run([*PLOT, command, str(folder), *options], work)
    return {**found, "ratio": found["processor_seconds"] / alone["processor_seconds"], "map": alone}


PLOT = (sys.executable, "-m", "plot_align.cli")


def run(command: list[str], work: Path) -> dict[str, float]:
    """Run a command to its end.

    Raises:
        RunError: it failed.
    """
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(work / "cache"),
        "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1",
    }  # fmt: skip
    highest = [0.0, 0.0]
    with (work / "said").open("w+") as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)
        try:
            while process.poll() is None:
                highest = list(map(max, highest, memory(process.pid)))
                time.sleep(0.2)
        finally:
            if process.poll() is None:  # interrupted
                process.kill()
        if process.returncode:
            said.seek(0)
            raise RunError(f"{' '.join(command[1:5])} ended with exit code {process.returncode}: {said.read()[-500:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": time.monotonic() - begun,
        "processor_seconds": spent,
        "peak_mib": highest[0],
        "peak_anonymous_mib": highest[1],
    }


def memory(process: int) -> tuple[float, float]:
    """MiB that a process and all it started hold resident, and what of it is mapped from no file."""
    totals = [0, 0]
    try:
        tree = [psutil.Process(process), *psutil.Process(process).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0, 0.0
    for one in tree:
        try:
            status = Path(f"/proc/{one.pid}/status").read_text(encoding="utf-8")
        except OSError:  # it has just ended
            continue
        for at, name in enumerate(("VmRSS:", "RssAnon:")):
            totals[at] += int((status.partition(name)[2].split() or ["0"])[0])
    return totals[0] / 1024, totals[1] / 1024


def tables(rows: int) -> Iterator[dict[str, list[str]]]:
    """Columns of pairs of 3 to 12 random words (Zipf's law) a side, :data:`BATCH` rows at a time."""
    import numpy as np

    letters, rng = random.Random(0), np.random.default_rng(0)
    words = ["".join(letters.choices("etaoinshrdlucm", k=letters.randint(2, 9))) for _ in range(WORDS)]
    chances = 1 / np.arange(1, WORDS + 1)
    for first in range(0, rows, BATCH):
        number = min(BATCH, rows - first)
        columns = {}
        for name in ("prompt", "chosen", "rejected"):
            lengths = rng.integers(3, 13, number)
            drawn = iter(rng.choice(WORDS, int(lengths.sum()), p=chances / chances.sum()).tolist())
            columns[name] = [" " + " ".join(words[at] for at in itertools.islice(drawn, n)) for n in lengths.tolist()]
        yield columns


def write_rows(folder: Path, rows: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    for number, columns in enumerate(tables(rows)):
        pq.write_table(pa.table(columns), folder / f"{number:04}.parquet")


def write_records(folder: Path, records: int) -> None:
    """Evaluations of models, each of two hundred requests."""
    rng = random.Random(0)
    for number in range(records):
        model, measure = divmod(number, MEASURES)
        items = {str(item): float(rng.random() < 0.5) for item in range(200)}
        who = {"name": f"model {model}", "source": f"models/{model}", "model": f"digest {model}", "template": "t",
               "dtype": "float32"}  # fmt: skip
        title = f"Measure {measure}"
        write_record(
            folder / f"{model}-{measure}.json",
            "evaluation",
            {
                "quantities": {"score": of_items(title, items, better="higher", bounds=(0.0, 1.0))},
                "details": {"tasks": "x" * 2000},
                "unfinished": None,
            },
            config={
                "model": who, "reference": None, "suite": "quick", "section": "mathematics",
                "measure": {"name": f"measure_{measure}", "kind": "harness"}, "data": {},
            },
            seed=0,
        )  # fmt: skip


def tokenise(folder: str, tokenizer_folder: str) -> None:
    """`datasets`' map over the rows, three texts each."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    data = datasets.load_dataset(folder, split="train")

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = [prompt + answer for name in ("chosen", "rejected") for prompt, answer in zip(
            rows["prompt"], rows[name], strict=True)]  # fmt: skip
        ids = tokenizer([*rows["prompt"], *texts], return_attention_mask=False)["input_ids"]
        size = len(rows["prompt"])
        return {name: ids[at * size : (at + 1) * size] for at, name in enumerate(("p", "c", "r"))}

    data.map(encode, batched=True, batch_size=1000, remove_columns=data.column_names, load_from_cache_file=False)


def show(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "rows or records", "processor seconds", "of map's", "MiB", "of no file", "page", box=None)
    for name, found in results.items():
        command, _, size = name.partition(", ")
        table.add_row(
            command,
            f"{int(size):,}",
            f"{found['processor_seconds']:.1f}",
            f"{found['ratio']:.2f}" if "ratio" in found else "",
            f"{found['peak_mib']:,.0f}",
            f"{found['peak_anonymous_mib']:,.0f}",
            f"{found['page_mib']:.1f} MiB" if "page_mib" in found else "",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--alone"]:
        tokenise(*sys.argv[2:4])
    else:
        main()
