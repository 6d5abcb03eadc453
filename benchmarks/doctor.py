"""How long does `plot-align doctor PAIRS` take on many rows, and does its memory stay flat?

Makes rows of random words (Zipf's law, 20,000 of them; prompts of 5 to 40, answers of 20 to 200), the last one no
pair, writes them as JSON lines, and examines the file. Memory that is not mapped from a file is sampled ten times a
second.

    python benchmarks/doctor.py --rows 100000 --out runs/doctor.json

Prints one JSON object: seconds, rows a second, MiB before the first row and at the peak.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from estimation import train_tokenizer
from plot_align.doctor import diagnose
from plot_align.preference.estimation import load_pairs
from plot_align.records import measure, write_record

WARM_UP = 500  # rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--vocabulary", type=int, default=8000, help="size of the BPE tokenizer, trained on the rows")
    parser.add_argument("--out", type=Path, help="also write a record there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        write_rows(path, options.rows)
        tokenizer = train_tokenizer(load_pairs(path).select(range(min(2000, options.rows - 1))), options.vocabulary)
        diagnose(load_pairs(path).select(range(WARM_UP)), tokenizer, progress=False)  # warm-up
        before = anonymous()
        with peak() as memory:
            start = time.perf_counter()
            found = diagnose(path, tokenizer, progress=False)
            seconds = time.perf_counter() - start
    results = {
        "rows": found.examination.rows,
        "pairs": found.examination.pairs,
        "findings": [finding.check for finding in found.examination.findings],
        "seconds": measure(seconds, 1, unit="s"),
        "rows_per_second": found.examination.rows / seconds,
        "before": measure(before, 1, unit="MiB"),
        "peak": measure(max(memory), 1, unit="MiB"),
    }
    print(json.dumps(results, indent=2))
    if options.out is not None:
        write_record(
            options.out,
            "doctor-at-scale",
            results,
            config={"rows": options.rows, "vocabulary": options.vocabulary},
            seed=0,
        )


def write_rows(path: Path, rows: int) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlucm", k=rng.randint(2, 9))) for _ in range(20_000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    pool = rng.choices(words, weights, k=1_000_000)

    def text(least: int, most: int) -> str:
        at = rng.randrange(len(pool) - most)
        return " " + " ".join(pool[at : at + rng.randint(least, most)])

    with path.open("w", encoding="utf-8") as file:
        for row in range(rows):
            pair: dict[str, str | None] = {
                "prompt": f"{row}:{text(5, 40)} ?",
                "chosen": text(20, 200),
                "rejected": text(20, 200),
            }
            if row == rows - 1:
                pair["rejected"] = None
            file.write(json.dumps(pair) + "\n")


def anonymous() -> float:
    """MiB of this process that are mapped from no file."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


@contextmanager
def peak() -> Iterator[list[float]]:
    """Samples :func:`anonymous` meanwhile, into the list."""
    samples, done = [anonymous()], threading.Event()

    def sample() -> None:
        while not done.wait(0.1):
            samples.append(anonymous())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    main()
