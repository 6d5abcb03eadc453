"""What the ranks of test_estimate_ranks.py count: every case, and one in which a rank dies."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from plot_align.errors import PlotAlignError
from plot_align.parallel import process_state
from plot_align.preference.distribution import PreferenceDistribution
from plot_align.preference.estimation import estimate, estimate_tokenized

ROWS = 61
WORDS = ["red", "green", "blue", "sorry", "cannot", "certainly", "the", "sky", "is"]
READ: list[int] = []  # rows that this process has read of a stream


def pair_rows() -> list[dict[str, Any]]:
    generator = np.random.default_rng(5)

    def words(least: int) -> str:
        return " ".join(generator.choice(WORDS, generator.integers(least, 12)).tolist())

    return [{"prompt": words(1) + " ", "chosen": words(1), "rejected": words(0) + " no"} for _ in range(ROWS)]


def unpaired_rows() -> list[dict[str, Any]]:
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if index % 3 else "rejected"], "label": index % 3 > 0}
        for index, row in enumerate(pair_rows())
    ]


def tokenised_rows(tokenizer: Any) -> list[dict[str, Any]]:
    ids = {
        name: tokenizer([row[name] for row in pair_rows()])["input_ids"] for name in ("prompt", "chosen", "rejected")
    }
    return [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for prompt, chosen, rejected in zip(*ids.values(), strict=True)
    ]


def broken(rows: list[dict[str, Any]], column: str, *where: int) -> list[dict[str, Any]]:
    return [{**row, column: None} if index in where else row for index, row in enumerate(rows)]


def _read(parts: list[list[int]], rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for part in parts:
        for index in part:
            READ.append(index)
            yield rows[index]


def stream(rows: list[dict[str, Any]], shards: int) -> IterableDataset:
    """A stream of ``shards`` unequal parts, the last of them empty where there are several."""
    inner = sorted(np.random.default_rng(shards).choice(len(rows), shards - 2).tolist()) if shards > 1 else []
    parts = [list(range(*ends)) for ends in itertools.pairwise([0, *inner, *[len(rows)] * min(shards, 2)])]
    return IterableDataset.from_generator(_read, gen_kwargs={"parts": parts, "rows": _Rows(rows)})


class _Rows(tuple):
    """Rows that ``datasets`` does not deal out as it deals lists."""


def cases(tokenizer: Any, rank: int) -> dict[str, Callable[[], PreferenceDistribution]]:
    """Name → the count, which the tests also make in one process; ``rank`` is only for what differs between ranks."""
    pairs, unpaired, tokenised = pair_rows(), unpaired_rows(), tokenised_rows(tokenizer)

    def count(data: Any, **options: Any) -> Callable[[], PreferenceDistribution]:
        options = {"progress": False, "distributed": True, "batch_size": 5, **options}
        return lambda: estimate(data, tokenizer, **options)

    def tokens(data: Any) -> Callable[[], PreferenceDistribution]:
        options = {"progress": False, "distributed": True, "batch_size": 5, "max_length": 14}
        return lambda: estimate_tokenized(data, tokenizer, **options)

    def chat(*where: int) -> list[dict[str, Any]]:
        rows = [
            {name: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[name]}]
             for name in ("chosen", "rejected")}
            for row in pairs
        ]  # fmt: skip
        for row in where:
            rows[row]["chosen"] = [rows[row]["chosen"][0], {"role": "stranger", "content": "no"}]
        return rows

    talking = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    talking.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'stranger' %}{{ raise_exception('who?') }}{% endif %}"
        "{{ message['content'] }}<eos>{% endfor %}"
    )

    def fails_here(row: dict[str, Any]) -> dict[str, Any]:
        if rank == 1:
            raise KeyError("only here")
        return row

    def fails_in_counting() -> PreferenceDistribution:
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(sys.modules["plot_align.preference.estimation"], "count_batch", lambda *_, **__: 1 / 0)
            return count(Dataset.from_list(pairs))()

    seven = {"batched": True, "batch_size": 7}
    return {
        "pairs": count(Dataset.from_list(pairs)),
        "pairs, truncated": count(Dataset.from_list(pairs), max_length=14, source=f"what rank {rank} calls it"),
        "pairs, one batch": count(Dataset.from_list(pairs), batch_size=1000),
        "unpaired": count(Dataset.from_list(unpaired)),
        "one row": count(Dataset.from_list(pairs[:1])),
        "pairs, stream": count(stream(pairs, 1)),
        "pairs, shards": count(stream(pairs, 6)),
        "pairs, uneven shards": count(stream(pairs, 5)),
        "pairs, filtered shards": count(stream(pairs, 6).filter(lambda row: len(row["chosen"]) % 2 == 0)),
        "pairs, shards of Arrow": count(Dataset.from_list(pairs).to_iterable_dataset(num_shards=6)),
        "pairs, part of shards": count(stream(pairs, 6).skip(3).take(40)),
        "pairs, shards in batches": count(
            stream(pairs, 6).map(lambda rows: {name: column[:-1] for name, column in rows.items()}, **seven)
        ),
        "unpaired, shards": count(stream(unpaired, 12)),
        "tokenised": tokens(Dataset.from_list(tokenised)),
        "tokenised, stream": tokens(Dataset.from_list(tokenised).to_iterable_dataset()),
        "tokenised, shards": tokens(Dataset.from_list(tokenised).to_iterable_dataset(num_shards=6)),
        "bad row": count(Dataset.from_list(broken(pairs, "chosen", 33, 47))),
        "bad row, late rejected before early chosen": count(
            Dataset.from_list(broken(broken(pairs, "prompt", 39), "rejected", 36))
        ),
        "bad row, stream": count(stream(broken(pairs, "chosen", 38, 56), 1)),
        "bad row, shards": count(stream(broken(pairs, "chosen", 38, 56), 6)),
        "bad row, filtered": count(stream(broken(pairs, "chosen", 38, 39, 56), 6).filter(lambda row: True)),
        "bad row, tokenised": tokens(Dataset.from_list(broken(tokenised, "rejected_ids", 56, 58))),
        "bad row, tokenised shards": tokens(
            Dataset.from_list(broken(tokenised, "rejected_ids", 42, 58)).to_iterable_dataset(num_shards=6)
        ),
        "bad id": tokens(Dataset.from_list([*tokenised[:40], {**tokenised[40], "chosen_ids": [3, 10**6]}])),
        "template": lambda: estimate(
            Dataset.from_list(chat(51, 44)), talking, progress=False, distributed=True, batch_size=6
        ),
        "empty": count(Dataset.from_list(pairs).select([])),
        "one side": count(Dataset.from_list([row for row in unpaired if row["label"]])),
        "num_proc": count(Dataset.from_list(pairs), num_proc=0),
        "reader": count(stream(pairs, 6).map(fails_here)),
        "own fault": fails_in_counting,
        "other options": count(Dataset.from_list(pairs), max_length=10 + rank),
        "other data": count(Dataset.from_list(pairs[: ROWS - rank])),
        "workers": count(Dataset.from_list(pairs), num_proc=2),
        "split already": count(split_dataset_by_node(stream(pairs, 6), rank=0, world_size=2)),
    }


def outcome(work: Callable[[], PreferenceDistribution]) -> dict[str, Any]:
    READ.clear()
    try:
        found = work()
    except PlotAlignError as error:
        return {"error": f"{error.exit_code} {error}"}
    except Exception as error:
        return {"error": repr(error)}
    return {
        "chosen": found.chosen_counts.tolist(),
        "rejected": found.rejected_counts.tolist(),
        "provenance": found.provenance,
        "read": len(READ),
    }


def count_all(tokenizer: str) -> dict[str, Any]:
    """Case → counts or error of this rank."""
    state = process_state()
    return {
        name: outcome(work)
        for name, work in cases(AutoTokenizer.from_pretrained(tokenizer), state.process_index).items()
    }


def count_and_die(tokenizer: str) -> dict[str, Any]:
    """The same of one case; rank 1 is killed while it counts."""
    rank, last = process_state().process_index, pair_rows()[50]

    def die(row: dict[str, Any]) -> dict[str, Any]:
        if rank == 1 and row == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return row

    data, options = stream(pair_rows(), 1).map(die), {"progress": False, "batch_size": 5}
    return outcome(lambda: estimate(data, AutoTokenizer.from_pretrained(tokenizer), distributed=True, **options))
