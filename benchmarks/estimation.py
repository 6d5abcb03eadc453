"""How much slower is counting than tokenising? `estimate` against the tokenizer alone, on the same rows.

The tokenizer alone encodes the texts that TRL encodes for these rows (prompt, prompt + chosen, prompt + rejected, EOS
appended), already built and in memory, in batches of the same size. `estimate` reads the rows from the opened data
set, extracts the prompts, builds the texts, encodes them, finds the boundaries and counts. The two take turns, so that
a change of the machine's speed meets both, and their order swaps each time.

    python benchmarks/estimation.py                         # HH-RLHF from $PLOT_ALIGN_DATA or ../shared/data
    python benchmarks/estimation.py pairs.jsonl --repeats 9 --out runs/estimation.json

Prints one JSON object: seconds, their ratio and the ratio of processor seconds, each with median, quartiles, smallest
and largest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plot_align.preference.estimation import estimate, load_pairs
from plot_align.records import write_record

ROOT = Path(__file__).resolve().parent.parent
HARMLESS = "hh_rlhf_harmless_2000.jsonl.gz"
TARGET = 1.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    folder = Path(os.environ.get("PLOT_ALIGN_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("data", nargs="?", default=str(folder / HARMLESS), help="preference pairs, standard format")
    parser.add_argument("--tokenizer", help="folder or Hub id; default: a BPE tokenizer trained on the data")
    parser.add_argument("--vocabulary", type=int, default=8000, help="size of that BPE tokenizer")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="also write a record there")
    options = parser.parse_args()

    data = load_pairs(options.data)
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else train_tokenizer(data, options.vocabulary)
    batches = texts_of(data, tokenizer.eos_token, options.batch_size)

    def alone() -> None:
        for texts in batches:
            tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)

    def counted() -> None:
        estimate(data, tokenizer, max_length=None, batch_size=options.batch_size, progress=False)

    seconds: dict[str, list[float]] = {"tokenizer": [], "estimate": []}
    processor: dict[str, list[float]] = {"tokenizer": [], "estimate": []}
    alone(), counted()  # warm-up
    for repeat in range(options.repeats):
        order = [("tokenizer", alone), ("estimate", counted)]
        for name, work in order if repeat % 2 == 0 else reversed(order):
            elapsed, worked = timed(work)
            seconds[name].append(elapsed)
            processor[name].append(worked)
    results = {
        "rows": len(data),
        "characters": sum(len(text) for texts in batches for text in texts),
        "tokenizer_s": spread(seconds["tokenizer"]),
        "estimate_s": spread(seconds["estimate"]),
        "ratio": spread(ratios(seconds)),
        "processor_ratio": spread(ratios(processor)),
        "target_ratio": TARGET,
        "rows_per_second": len(data) / statistics.median(seconds["estimate"]),
    }
    config = {
        "data": Path(options.data).name,
        "tokenizer": options.tokenizer or f"BPE trained on the data, {len(tokenizer)} ids",
        "batch_size": options.batch_size,
        "repeats": options.repeats,
    }
    print(json.dumps({"config": config, **results}, indent=2))
    if options.out:
        write_record(options.out, "benchmark estimation", results, config=config)


def load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def train_tokenizer(data: Any, size: int) -> Any:
    """A byte-level BPE tokenizer trained on both answers of every row."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for side in ("chosen", "rejected") for text in data[side]), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def texts_of(data: Any, eos: str, batch_size: int) -> list[list[str]]:
    """The texts that TRL's DPOTrainer encodes, batch by batch: prompts, then the chosen, then the rejected sides."""
    from trl.data_utils import extract_prompt

    batches = []
    for start in range(0, len(data), batch_size):
        rows = [data[index] for index in range(start, min(start + batch_size, len(data)))]
        rows = [row if "prompt" in row else extract_prompt(row) for row in rows]
        sides = [
            [row["prompt"] + row[side] + ("" if row[side].endswith(eos) else eos) for row in rows]
            for side in ("chosen", "rejected")
        ]
        batches.append([row["prompt"] for row in rows] + sides[0] + sides[1])
    return batches


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds on the clock, and processor seconds of all threads, which other programs disturb less."""
    start, worked = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - worked


def ratios(seconds: dict[str, list[float]]) -> list[float]:
    return [counting / encoding for counting, encoding in zip(seconds["estimate"], seconds["tokenizer"], strict=True)]


def spread(values: list[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {
        "median": statistics.median(values),
        "quartile_1": low,
        "quartile_3": high,
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


if __name__ == "__main__":
    main()
