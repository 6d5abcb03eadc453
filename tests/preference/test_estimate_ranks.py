"""Counts of several ranks are those of one process, and an error of one rank is that of all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from estimate_worker import ROWS, cases, count_all, count_and_die, pair_rows, tokenised_rows, unpaired_rows
from transformers import AutoTokenizer

import processes
from plot_align.errors import InputError
from plot_align.preference.distribution import PreferenceDistribution

# Its fixtures start processes: once, on one worker.
pytestmark = [pytest.mark.xdist_group("estimate ranks"), pytest.mark.slow]

COUNTED = (
    "pairs", "pairs, truncated", "pairs, one batch", "unpaired", "one row", "pairs, stream", "pairs, shards",
    "pairs, uneven shards", "pairs, filtered shards", "pairs, shards of Arrow", "pairs, part of shards",
    "pairs, shards in batches", "unpaired, shards", "tokenised", "tokenised, stream", "tokenised, shards",
)  # fmt: skip
# What stops every rank, and one process, with the same sentence.
REFUSED = {
    "bad row": "data row 33: 'chosen' is missing",
    "bad row, late rejected before early chosen": "data row 36: 'rejected' is missing",
    "bad row, stream": "data row 38: 'chosen' is missing",
    "bad row, shards": "data row 38: 'chosen' is missing",
    "bad row, filtered": "data row 38: 'chosen' is missing",
    "bad row, tokenised": "dataset row 56: 'rejected_ids' is missing",
    "bad row, tokenised shards": "dataset row 42: 'rejected_ids' is missing",
    "bad id": "dataset row 40: 'chosen_ids' has token id 1000000",
    "template": "data row 44: the tokenizer's chat template refused",
    "empty": "the data set is empty",
    "one side": "no rejected token is left",
    "num_proc": "num_proc is 0",
}


@pytest.fixture(scope="module")
def outcomes(tiny_tokenizer: Path) -> dict[int, list[dict[str, Any]]]:
    """Number of ranks → what each rank got, by case."""
    with on_the_cpu():
        return {ranks: processes.run(count_all, str(tiny_tokenizer), ranks=ranks) for ranks in (1, 2, 3)}


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """As ``--num_processes`` tells the processes it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_tokenizer)


def counts(outcome: dict[str, Any]) -> tuple[list[int], list[int]]:
    return outcome["chosen"], outcome["rejected"]


@pytest.mark.parametrize("case", COUNTED)
def test_every_rank_has_the_counts_of_one_process(case: str, outcomes: Any) -> None:
    (alone,) = outcomes[1]
    assert sum(alone[case]["chosen"]) > 0
    for ranks in (2, 3):
        for found in outcomes[ranks]:
            assert counts(found[case]) == counts(alone[case])
            assert found[case]["provenance"] == alone[case]["provenance"]


def test_counts_are_those_of_a_loop(outcomes: Any, tokenizer: Any) -> None:
    """An independent count, token by token: of these texts the prompt's ids begin those of prompt + answer."""

    def naive(rows: Any, liked: Any, length: int | None = None) -> tuple[list[int], list[int]]:
        found = [0] * len(tokenizer), [0] * len(tokenizer)
        for prompt, answer, good in zip(*rows, liked, strict=True):
            for position, token in enumerate(prompt + answer):
                if position >= max(1, len(prompt)) and (length is None or position < length):
                    found[0 if good else 1][token] += 1
        return found

    def ids(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    def split(prompt: str, answer: str) -> tuple[list[int], list[int]]:
        whole, start = ids(prompt + answer + "<eos>"), ids(prompt)
        kept = next((i for i, (a, b) in enumerate(zip(start, whole, strict=False)) if a != b), len(start))
        return whole[:kept], whole[kept:]

    (unpaired_alone,) = outcomes[1]
    rows = [split(row["prompt"], row["completion"]) for row in unpaired_rows()]
    want = naive(zip(*rows, strict=True), [row["label"] for row in unpaired_rows()])
    assert counts(unpaired_alone["unpaired"]) == want == counts(unpaired_alone["unpaired, shards"])
    assert counts(outcomes[3][2]["unpaired, shards"]) == want

    tokenised = tokenised_rows(tokenizer)
    rows = [(row["prompt_ids"], row[side]) for row in tokenised for side in ("chosen_ids", "rejected_ids")]
    want = naive(zip(*rows, strict=True), [True, False] * ROWS, 14)
    for case in ("tokenised", "tokenised, stream", "tokenised, shards"):
        assert counts(outcomes[2][1][case]) == want


def test_the_same_without_a_launcher(outcomes: Any, tokenizer: Any) -> None:
    """``distributed=False``, the default, on the rows as they are."""
    from datasets import Dataset

    from plot_align import estimate

    found = estimate(Dataset.from_list(pair_rows()), tokenizer, progress=False)
    for case in (
        "pairs",
        "pairs, one batch",
        "pairs, stream",
        "pairs, shards",
        "pairs, shards of Arrow",
    ):
        assert counts(outcomes[2][0][case]) == (found.chosen_counts.tolist(), found.rejected_counts.tolist())


def test_who_reads_what_of_a_stream(outcomes: Any) -> None:
    """Whole files are read by one rank each; what cannot be told apart by all."""
    for ranks in (2, 3):
        read = [found["pairs, shards"]["read"] for found in outcomes[ranks]]
        assert (
            ROWS <= sum(read) <= ROWS + 2 * ranks
        )  # every rank looks at the first row, on the way it reads some more
        assert max(read) < ROWS
        for case in ("pairs, stream", "pairs, uneven shards", "pairs, filtered shards", "pairs, shards in batches"):
            assert all(found[case]["read"] >= ROWS for found in outcomes[ranks]), case


@pytest.mark.parametrize("case", REFUSED)
def test_the_first_bad_row_stops_all(case: str, outcomes: Any) -> None:
    (alone,) = outcomes[1]
    assert alone[case]["error"].startswith(f"2 {REFUSED[case]}")
    for ranks in (2, 3):
        assert [found[case] for found in outcomes[ranks]] == [alone[case]] * ranks


def test_what_is_wrong_on_one_rank_only(outcomes: Any) -> None:
    for ranks in (2, 3):
        everyone = outcomes[ranks]
        for case, message in {
            "reader": "2 the data set cannot be read further (KeyError: 'only here')",
            "other options": "2 max_length is 11 on rank 1 and 10 on rank 0, expected the same on every rank",
            "other data": f"2 the number of rows is {ROWS - 1} on rank 1 and {ROWS} on rank 0",
            "split already": "2 data was already split with split_dataset_by_node",
            "workers": f"2 num_proc is 2 on {ranks} ranks",
        }.items():
            assert all(found[case]["error"].startswith(message) for found in everyone), case
        faults = [found["own fault"]["error"] for found in everyone]
        assert faults.pop(1) == "ZeroDivisionError('division by zero')"  # as it was, for whoever debugs it
        assert set(faults) == {"1 rank 1 failed while counting (ZeroDivisionError: division by zero)"}


def test_every_case_is_looked_at(outcomes: Any, tokenizer: Any) -> None:
    others = {"reader", "own fault", "other options", "other data", "split already", "workers"}
    assert set(outcomes[1][0]) == set(cases(tokenizer, 0)) == {*COUNTED, *REFUSED, *others}


def test_a_rank_that_dies(tiny_tokenizer: Path) -> None:
    """The other one says so."""
    with on_the_cpu(), processes.start(count_and_die, str(tiny_tokenizer), ranks=2) as started:
        left, killed = started.outcomes()
    assert killed.error == "SIGKILL"
    error = left.value["error"]
    assert error.startswith("1 rank 0 could not add its counts to those of the other ranks"), error
    assert "\n" not in error


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "plot_align.cli", "estimate", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_the_command_on_two_ranks(tmp_path: Path, pairs_file: Path, tiny_tokenizer: Path) -> None:
    """``--num_processes 2`` with ``--streaming`` and ``--merge``: once written, once said."""
    from plot_align.cli.main import main

    one, two = tmp_path / "one.safetensors", tmp_path / "two" / "two.safetensors"
    assert main(["estimate", str(pairs_file), "--tokenizer", str(tiny_tokenizer), "--output", str(one)]) == 0
    done = run(
        pairs_file, "--tokenizer", tiny_tokenizer, "--output", two, "--merge", one,
        "--streaming", "--num_processes", 2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("record:") == 1
    assert done.stderr.count("counting tokens, process 1 of 2") >= 1
    assert {path.name for path in two.parent.iterdir()} == {"two.safetensors", "two.record.json"}
    alone, shared = PreferenceDistribution.load(one), PreferenceDistribution.load(two)
    assert torch.equal(shared.chosen_counts, 2 * alone.chosen_counts)
    assert torch.equal(shared.rejected_counts, 2 * alone.rejected_counts)
    assert shared.rows == 2 * alone.rows == 48


def test_the_command_leaves_nothing_where_a_row_is_bad(tmp_path: Path, tiny_tokenizer: Path) -> None:
    rows = pair_rows()
    rows[20]["rejected"] = None
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "out" / "counts.safetensors"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(pairs, "--tokenizer", tiny_tokenizer, "--output", out, "--num_processes", 2)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("plot-align:") == 1
    assert "data row 20: 'rejected' is missing" in done.stderr
    assert not out.parent.exists()


def test_refused_options(tmp_path: Path, pairs_file: Path, tiny_tokenizer: Path) -> None:
    from plot_align.cli.estimate import run as command

    arguments = [str(pairs_file), "--tokenizer", str(tiny_tokenizer), "--output", str(tmp_path / "a.safetensors")]
    for option in ("--num_processes", "--num_proc"):
        with pytest.raises(InputError, match=f"{option} is 0, expected 1 or more"):
            command([*arguments, option, "0"])
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):  # before any process is started
        command([*arguments[:-1], str(tmp_path / "file" / "a.safetensors"), "--num_processes", "2"])
