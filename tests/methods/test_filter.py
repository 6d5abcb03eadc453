"""The filters: scores against whole logits and hidden states pair by pair, selection against its definition, resuming
to the byte."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
)

from plot_align.errors import InputError, RunError
from plot_align.inference import resume
from plot_align.inference.ches import ches
from plot_align.inference.resume import forget_partial
from plot_align.methods import filter as filtering
from plot_align.methods.filter import (
    ches_scores,
    completion_lengths,
    keep_pairs,
    length_ratio,
    pair_scores,
    score_pairs,
    write_pairs,
)
from plot_align.preference.distribution import PreferenceDistribution
from plot_align.preference.estimation import ScoredSequence, estimate, load_pairs

CHATML = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_tokenizer)


@pytest.fixture(scope="module")
def pairs(pair_rows: list[dict[str, str]]) -> Dataset:
    return Dataset.from_list([{**row, "id": index} for index, row in enumerate(pair_rows)])


@pytest.fixture(scope="module")
def preference(pairs: Dataset, tokenizer: Any) -> PreferenceDistribution:
    return estimate(pairs, tokenizer, progress=False)


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    """The tiny Llama with a head that has something to say, and ten rows more than the tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    torch.manual_seed(0)
    model.resize_token_embeddings(model.config.vocab_size + 10)
    model.get_output_embeddings().weight.data.mul_(30)
    return model


def naive(
    model: Any, prompt: list[int], answer: list[int], preference: PreferenceDistribution, reading: str, cut: int = 0
) -> float:
    """Σ_v d_v · mean_t [log] p(v | …) in float64, from the whole logits of one completion, token by token."""
    ids = (prompt + answer)[cut:]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()  # (L, V)
    p = logits.softmax(-1)  # (L, V)
    total, count = 0.0, 0
    difference = preference.difference().tolist()
    for position in range(max(len(prompt) - cut, 1), len(ids)):
        row = (p[position - 1].log() if reading == "log" else p[position - 1]).tolist()
        total += sum(d * value for d, value in zip(difference, row, strict=False))
        count += 1
    return total / count if count else math.nan


def score(model: Any, tokenizer: Any, pairs: Any, preference: PreferenceDistribution, **options: Any) -> torch.Tensor:
    return score_pairs(model, tokenizer, pairs, preference, **{"progress": False, **options})


def encode(tokenizer: Any, rows: Any, eos: bool = True) -> list[tuple[list[int], list[int], list[int]]]:
    """Prompt, chosen and rejected ids; at these boundaries no tokens merge."""
    end = [tokenizer.eos_token_id] if eos else []
    return [
        (tokenizer.encode(row["prompt"]), *(tokenizer.encode(row[side]) + end for side in ("chosen", "rejected")))
        for row in rows
    ]


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reading", ["log", "prob"])
@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_scores_are_the_definition(
    model: Any, tokenizer: Any, pairs: Dataset, preference: PreferenceDistribution, reading: str, batch_size: int
) -> None:
    model.train()
    rows = pairs.select(range(9))
    scores = score(model, tokenizer, rows, preference, reading=reading, batch_size=batch_size)
    expected = [
        [naive(model.eval(), prompt, answer, preference, reading) for answer in answers]
        for prompt, *answers in encode(tokenizer, rows)
    ]
    assert (scores.dtype, scores.shape) == (torch.float64, (9, 2))
    expected = torch.tensor(expected, dtype=torch.float64)
    assert float(expected.std()) > 1e-3
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=2e-6)


def test_the_mode_of_the_model_is_left(
    model: Any, tokenizer: Any, pairs: Dataset, preference: PreferenceDistribution
) -> None:
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    scores = [score(model.train(mode), tokenizer, pairs.select(range(3)), preference) for mode in (True, False)]
    assert torch.equal(*scores)
    assert score(model.train(), tokenizer, pairs.select(range(3)), preference) is not None
    assert model.training


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_truncated_as_the_trainer_truncates(
    model: Any, tokenizer: Any, pairs: Dataset, preference: PreferenceDistribution, mode: str
) -> None:
    """keep_start drops the rows whose prompt fills max_length: they have no score; keep_end also cuts the context."""
    rows = pairs.select(range(0, 24, 4))
    encoded = encode(tokenizer, rows)
    longest = max(len(prompt) for prompt, *_ in encoded)
    limit = longest if mode == "keep_start" else 12
    scores = score(model, tokenizer, rows, preference, max_length=limit, truncation_mode=mode)
    expected = []
    for prompt, *answers in encoded:
        if mode == "keep_start":
            cuts = [(answer[: limit - len(prompt)], 0) for answer in answers]
        else:
            cuts = [(answer, max(len(prompt) + len(answer) - limit, 0)) for answer in answers]
        expected.append([naive(model, prompt, answer, preference, "log", cut) for answer, cut in cuts])
    expected = torch.tensor(expected, dtype=torch.float64)
    assert bool(expected.isnan().any()) == (mode == "keep_start")
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=2e-6, equal_nan=True)


def test_conversations(model: Any, tiny_tokenizer: Path, pairs: Dataset, preference: PreferenceDistribution) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    tokenizer.chat_template = CHATML
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")},
        }
        for row in pairs.select(range(4))
    ]
    scores = score(model, tokenizer, Dataset.from_list(rows), preference)
    for row, found in zip(pairs.select(range(4)), scores, strict=True):
        prompt = tokenizer.encode(f"user: {row['prompt']}<eos>assistant: ")
        for side, value in zip(("chosen", "rejected"), found, strict=True):
            whole = tokenizer.encode(f"user: {row['prompt']}<eos>assistant: {row[side]}<eos>")
            start = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
            expected = naive(model, whole[:start], whole[start:], preference, "log")
            assert float(value) == pytest.approx(expected, rel=1e-4, abs=2e-6)


def test_streams_have_the_same_scores(
    model: Any, tokenizer: Any, pairs: Dataset, preference: PreferenceDistribution
) -> None:
    stream = IterableDataset.from_generator(lambda: iter(pairs))
    assert torch.equal(score(model, tokenizer, stream, preference), score(model, tokenizer, pairs, preference))


def test_what_models_do_to_their_logits(tokenizer: Any, pairs: Dataset, preference: PreferenceDistribution) -> None:
    """Cohere scales its logits, Gemma 2 caps them: the oracle is the logits that the model itself returns."""
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    scaled = CohereForCausalLM(CohereConfig(**shape, logit_scale=4.0)).eval()
    capped = Gemma2ForCausalLM(Gemma2Config(**shape, head_dim=16, final_logit_softcapping=0.5)).eval()
    capped.get_output_embeddings().weight.data.mul_(10)  # tied: deep in the cap
    rows = pairs.select(range(3))
    for model, reading in ((scaled, "log"), (scaled, "prob"), (capped, "prob")):
        scores = score(model, tokenizer, rows, preference, reading=reading)
        for (prompt, *answers), found in zip(encode(tokenizer, rows), scores.tolist(), strict=True):
            expected = [naive(model, prompt, answer, preference, reading) for answer in answers]
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    with pytest.raises(InputError, match=r"final_logit_softcapping is 0.5.*use the prob reading"):
        score(capped, tokenizer, rows, preference, reading="log")


def test_bfloat16(model: Any, tokenizer: Any, pairs: Dataset, preference: PreferenceDistribution) -> None:
    exact = score(model, tokenizer, pairs, preference)
    rounded = score(model.bfloat16(), tokenizer, pairs, preference)
    assert float((exact - rounded).abs().max()) < 0.05 * float(exact.abs().max())


def test_refused(model: Any, tokenizer: Any, pairs: Dataset, preference: PreferenceDistribution) -> None:
    for options, said in [
        ({"reading": "logs"}, "reading is 'logs', expected log or prob"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_length": 0}, "max_length is 0"),
    ]:
        with pytest.raises(InputError, match=said):
            score(model, tokenizer, pairs, preference, **options)
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    other.add_tokens(["<new>"])
    with pytest.raises(InputError, match="counted with"):
        score(model, other, pairs, preference)
    with pytest.raises(InputError, match="no column 'chosen'"):
        score(model, tokenizer, pairs.remove_columns("chosen"), preference)
    labelled = Dataset.from_list([{"prompt": "a", "completion": " b", "label": True}])
    with pytest.raises(InputError, match="column 'label' instead of"):
        score(model, tokenizer, labelled, preference)
    nothing = PreferenceDistribution(preference.chosen_counts, preference.chosen_counts, preference.provenance)
    with pytest.raises(InputError, match="d = 0 for every token"):
        score(model, tokenizer, pairs, nothing)
    model.resize_token_embeddings(200)
    with pytest.raises(InputError, match="head has 200 rows"):
        score(model, tokenizer, pairs, preference)


def test_a_model_that_overflows_is_named(
    model: Any, tokenizer: Any, pairs: Dataset, preference: PreferenceDistribution
) -> None:
    model.get_output_embeddings().weight.data.fill_(math.inf)
    with pytest.raises(RunError, match=r"completion of row \d+ scores nan.*use bfloat16"):
        score(model, tokenizer, pairs, preference)


def test_out_of_memory_says_what_to_change(
    model: Any, tokenizer: Any, pairs: Dataset, preference: PreferenceDistribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(filtering, "collate", exhausted)
    with pytest.raises(
        RunError, match=r"out of memory at 16 completions of up to \d+ tokens; use a smaller batch_size"
    ):
        score(model, tokenizer, pairs, preference)


# --- selection -------------------------------------------------------------------------------------------------------


def test_selection_by_hand() -> None:
    """Scores 3, 1, nan, 3, 2: half of four is two; the highest two are the rows 0 and 3, the lowest the rows 1 and 4.
    One of the two 3s at a quarter: the earlier. Three of four at 51 %."""
    scores = torch.tensor([3.0, 1.0, math.nan, 3.0, 2.0], dtype=torch.float64)

    def kept(share: float, direction: str = "highest") -> list[int]:
        return keep_pairs(scores, share, direction).nonzero().squeeze(-1).tolist()

    assert kept(0.5) == [0, 3]
    assert kept(0.5, "lowest") == [1, 4]
    assert kept(0.25) == kept(1e-9) == [0]
    assert kept(0.51) == [0, 3, 4]
    assert kept(1.0) == kept(1.0, "lowest") == [0, 1, 3, 4]


def test_margin_is_chosen_minus_rejected() -> None:
    scores = torch.tensor([[1.0, 3.0], [2.0, math.nan], [5.0, 1.0]], dtype=torch.float64)
    assert pair_scores(scores, "chosen").tolist() == [1.0, 2.0, 5.0]
    assert pair_scores(scores, "margin").nan_to_num(-9.0).tolist() == [-2.0, -9.0, 4.0]
    assert keep_pairs(pair_scores(scores, "margin"), 1.0).tolist() == [True, False, True]
    assert keep_pairs(pair_scores(scores, "margin"), 0.5).tolist() == [False, False, True]
    with pytest.raises(InputError, match="score is 'both'"):
        pair_scores(scores, "both")


@pytest.mark.parametrize("n", [1, 3, 20, 60, 100, 1000])
def test_the_share_is_the_decimal_that_was_written(n: int) -> None:
    """In floating point 0.07 · 100 > 7, and its ceiling would be 8."""
    for hundredths in range(1, 101):
        expected = max(-(-hundredths * n // 100), 1)
        assert int(keep_pairs(torch.zeros(n, dtype=torch.float64), hundredths / 100).sum()) == expected


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.one_of(st.just(math.nan), st.integers(-3, 3).map(float)), min_size=1, max_size=30),
    share=st.floats(1e-6, 1.0),
    direction=st.sampled_from(filtering.DIRECTIONS),
)
def test_no_row_left_out_beats_one_that_is_kept(values: list[float], share: float, direction: str) -> None:
    scores = torch.tensor(values, dtype=torch.float64)
    if bool(scores.isnan().all()):
        with pytest.raises(InputError, match="none of the"):
            keep_pairs(scores, share, direction)
        return
    kept = keep_pairs(scores, share, direction).tolist()
    sign = 1 if direction == "highest" else -1
    ranks = [(-sign * value, row) for row, value in enumerate(values)]  # best first; of equals the earlier row
    assert not any(keep and math.isnan(value) for keep, value in zip(kept, values, strict=True))
    worst = max(rank for rank, keep in zip(ranks, kept, strict=True) if keep)
    others = [rank for rank, keep, x in zip(ranks, kept, values, strict=True) if not keep and not math.isnan(x)]
    assert all(rank > worst for rank in others)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, math.nan, 5])
def test_refused_shares(share: float) -> None:
    with pytest.raises(InputError, match=r"share is .*, expected a share of the pairs above 0 and at most 1"):
        keep_pairs(torch.zeros(3), share)
    with pytest.raises(InputError, match="direction is 'up'"):
        keep_pairs(torch.zeros(3), 0.5, "up")


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kept.jsonl", "my.kept.jsonl.gz"])
def test_kept_rows_load_again(name: str, tmp_path: Path) -> None:
    """All columns, exactly: numbers of any length, nulls, nested turns, text of any script."""
    rows = [
        {
            "prompt": f"p{index}",
            "chosen": [{"role": "user", "content": "日本\n\u2028"}],
            "rejected": [{"role": "user", "content": "</script>"}],
            "id": 2**60 + index if index % 2 else None,
            "weight": 0.1 + 1e-17 * index + index / 3,
        }
        for index in range(7)
    ]
    scores = torch.arange(14, dtype=torch.float64).view(7, 2) / 3
    scores[2, 1] = math.nan
    kept = torch.tensor([True, False, True, False, False, True, False])
    path = tmp_path / name
    beside = write_pairs(Dataset.from_list(rows), scores, kept, path)
    assert list(load_pairs(path)) == [rows[0], rows[2], rows[5]]
    assert beside.name == name.replace("kept.", "kept.scores.")
    text = (gzip.decompress(beside.read_bytes()) if beside.suffix == ".gz" else beside.read_bytes()).decode()
    found = [json.loads(line) for line in text.splitlines()]
    assert found == [
        {"row": i, "chosen": 2 * i / 3, "rejected": None if i == 2 else (2 * i + 1) / 3, "kept": bool(kept[i])}
        for i in range(7)
    ]
    before = path.read_bytes(), beside.read_bytes()
    assert path.suffix != ".gz" or before[0][3:8] == before[1][3:8] == bytes(5)  # gzip: no name, and not when
    write_pairs(Dataset.from_list(rows), scores, kept, path)
    assert (path.read_bytes(), beside.read_bytes()) == before
    assert sorted(tmp_path.iterdir()) == sorted([path, beside])


def test_dates_are_written_and_bytes_refused(tmp_path: Path) -> None:
    when = Dataset.from_list([{"chosen": "a", "when": datetime(2024, 2, 3, 4, 5)}])
    write_pairs(when, torch.zeros(1, 2), torch.tensor([True]), tmp_path / "a.jsonl")
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {"chosen": "a", "when": "2024-02-03T04:05:00"}
    for value, said in ((b"x", "bytes is no JSON value"), (math.nan, "not JSON compliant")):
        data = Dataset.from_list([{"chosen": "a", "what": value}])
        with pytest.raises(InputError, match=said):
            filtering.require_json(data)
        with pytest.raises(InputError, match=said):
            write_pairs(data, torch.zeros(1, 2), torch.tensor([True]), tmp_path / "b.jsonl")
        assert not (tmp_path / "b.jsonl").exists()
    with pytest.raises(InputError, match=r"'c.json', expected a name ending in .jsonl or .jsonl.gz"):
        write_pairs(when, torch.zeros(1, 2), torch.tensor([True]), Path("c.json"))


# --- resuming --------------------------------------------------------------------------------------------------------


class Passes:
    """Counts the forward passes of a scoring, and interrupts it at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.stop_at = 0, 0
        collate = filtering.collate

        def counted(batch: Any) -> Any:
            self.count += 1
            if self.count == self.stop_at:
                raise KeyboardInterrupt
            return collate(batch)

        monkeypatch.setattr(filtering, "collate", counted)

    def of(self, *arguments: Any, stop_at: int = 0, **options: Any) -> tuple[int, torch.Tensor | None]:
        self.count, self.stop_at = 0, stop_at
        try:
            return self.count, score(*arguments, batch_size=5, **options)
        except KeyboardInterrupt:
            return self.count, None
        finally:
            self.stop_at = 0


@pytest.mark.parametrize("reading", ["log", "prob"])
def test_an_interrupted_run_goes_on(
    model: Any,
    tokenizer: Any,
    pairs: Dataset,
    preference: PreferenceDistribution,
    reading: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """48 completions are ten batches of five: three done, then four, then the rest; and a line that was cut off."""
    passes = Passes(monkeypatch)
    arguments = (model, tokenizer, pairs, preference)
    options: dict[str, Any] = {"reading": reading, "partial": tmp_path / "new" / "kept.scores.partial"}
    expected = score(*arguments, reading=reading, batch_size=5)
    assert passes.of(*arguments, stop_at=4, **options)[0] == 4
    (journal,) = (tmp_path / "new").iterdir()
    assert re.fullmatch(r"kept\.scores\.partial\.[0-9a-f]{16}", journal.name)
    assert passes.of(*arguments, stop_at=5, **options)[0] == 5
    journal.write_bytes(journal.read_bytes()[:-7])  # the last of the seven is cut off
    _, scores = passes.of(*arguments, **options)
    assert passes.count == 4
    assert scores is not None
    assert torch.equal(scores, expected)
    assert torch.equal(passes.of(*arguments, **options)[1], expected)
    assert passes.count == 0
    (journal.parent / "kept.scores.partial.mine").touch()
    forget_partial(options["partial"])
    assert [path.name for path in journal.parent.iterdir()] == ["kept.scores.partial.mine"]


def test_scores_of_other_runs_are_never_taken(
    model: Any,
    tokenizer: Any,
    pairs: Dataset,
    preference: PreferenceDistribution,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One finished journal; then every single thing that decides a score is changed, down to one weight."""
    passes = Passes(monkeypatch)
    partial = tmp_path / "partial"
    passes.of(model, tokenizer, pairs, preference, partial=partial)
    assert passes.count == 10
    passes.of(model, tokenizer, pairs.add_column("x", [1] * 24), preference, partial=partial)
    assert passes.count == 0  # a column that is not scored

    def changed(*arguments: Any, **options: Any) -> None:
        before = len(list(tmp_path.iterdir()))
        _, scores = passes.of(*arguments, partial=partial, **options)
        assert passes.count > 0
        assert len(list(tmp_path.iterdir())) == before + 1
        assert scores is not None
        assert torch.equal(scores.nan_to_num(), passes.of(*arguments, **options)[1].nan_to_num())

    changed(model, tokenizer, pairs, preference, reading="prob")
    changed(model, tokenizer, pairs, preference, max_length=14)
    changed(model, tokenizer, pairs, preference, max_length=14, truncation_mode="keep_end")
    changed(model, tokenizer, pairs.select(range(23)), preference)
    changed(model, tokenizer, pairs.select([1, 0, *range(2, 24)]), preference)
    counts = preference.chosen_counts.clone()
    counts[5] += 1
    other = PreferenceDistribution(counts, preference.rejected_counts, preference.provenance)
    changed(model, tokenizer, pairs, other)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] += 1e-3
    changed(model, tokenizer, pairs, preference)
    changed(model.bfloat16(), tokenizer, pairs, preference)


def test_a_journal_outlives_a_process_that_is_killed(tmp_path: Path) -> None:
    """Nothing waits in a buffer for the file to be closed."""
    path = tmp_path / "journal"
    with resume._journal(path) as keep:
        keep(3, [0.1, -2e-9])
        assert resume.read_journal(path) == {3: [0.1, -2e-9]}


def test_a_line_of_a_journal_that_was_altered_is_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    computed: list[int] = []

    def compute(batch: int) -> list[float]:
        computed.append(batch)
        return [batch / 8]

    assert list(resume.resumed(compute, [1, 2, 3], path)) == [[0.125], [0.25], [0.375]]
    text = path.read_text()
    assert text.count("0.25") == 1
    path.write_text(text.replace("0.25", "0.75"))
    computed.clear()
    assert list(resume.resumed(compute, [1, 2, 3], path)) == [[0.125], [0.25], [0.375]]
    assert computed == [2]


def test_a_full_disk_is_said_of_a_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with open("/dev/full", "ab", buffering=0) as full:
        monkeypatch.setattr(resume, "open", lambda *given, **options: full, raising=False)
        with pytest.raises(InputError, match=r"journal cannot be written .*; free some space"):
            list(resume.resumed(lambda batch: [1.0], [1, 2], tmp_path / "journal"))


def test_a_journal_that_cannot_be_written(
    model: Any, tokenizer: Any, pairs: Dataset, preference: PreferenceDistribution, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        score(model, tokenizer, pairs, preference, partial=tmp_path / "file" / "partial")


def test_real_pairs(model: Any, tokenizer: Any, real_data: Path, tmp_path: Path) -> None:
    """Human pairs with an implicit prompt: scored as the definition says, kept as they were."""
    from trl.data_utils import extract_prompt

    pairs = load_pairs(real_data / "hh_rlhf_harmless_2000.jsonl.gz").select(range(30))
    preference = estimate(pairs, tokenizer, max_length=300, truncation_mode="keep_end", progress=False)
    scores = score(model, tokenizer, pairs, preference, max_length=300, truncation_mode="keep_end")
    assert bool(scores.isfinite().all())
    for index in (0, 11, 29):
        row = extract_prompt(pairs[index])
        whole = [
            [*tokenizer.encode(row["prompt"] + row[side]), tokenizer.eos_token_id] for side in ("chosen", "rejected")
        ]
        start = len(tokenizer.encode(row["prompt"]))
        assert all(ids[:start] == tokenizer.encode(row["prompt"]) for ids in whole)
        for found, ids in zip(scores[index].tolist(), whole, strict=True):
            expected = naive(model, ids[:start], ids[start:], preference, "log", max(len(ids) - 300, 0))
            assert found == pytest.approx(expected, rel=1e-4, abs=2e-6)
    kept = keep_pairs(pair_scores(scores, "margin"), 0.1)
    write_pairs(pairs, scores, kept, tmp_path / "kept.jsonl.gz")
    again = load_pairs(tmp_path / "kept.jsonl.gz")
    assert list(again) == list(pairs.select(kept.nonzero().squeeze(-1).tolist()))
    assert len(again) == 3


# --- by CHES and by length -------------------------------------------------------------------------------------------


def test_ches_of_the_rows_and_its_journal(
    model: Any, tokenizer: Any, pairs: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of hidden states that the model itself returns, in float64. Of 24 pairs in batches of two, three batches
    are done before the interrupt and nine after it."""
    passes, stop_at = 0, 4

    def counted(*arguments: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == stop_at:
            raise KeyboardInterrupt
        return ches(*arguments)

    options: dict[str, Any] = {"batch_size": 4, "partial": tmp_path / "kept.scores.partial", "progress": False}
    monkeypatch.setattr(filtering, "ches", counted)
    with pytest.raises(KeyboardInterrupt):
        ches_scores(model, tokenizer, pairs, **options)
    stop_at = 0
    found = ches_scores(model, tokenizer, pairs, **options)
    assert passes == 4 + 9
    expected = []
    for prompt, *answers in encode(tokenizer, pairs):
        sums = []
        for answer in answers:
            with torch.no_grad():
                states = (
                    model(torch.tensor([prompt + answer]), output_hidden_states=True).hidden_states[-1][0].double()
                )
            sums.append(states[len(prompt) - 1 : -1].sum(0))
        means = [total / len(answer) for total, answer in zip(sums, answers, strict=True)]
        expected.append([float(a @ b - a @ a) for a, b in (sums, means)])
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-4)
    model.model.norm.weight.data[3] += 1
    assert not torch.equal(ches_scores(model, tokenizer, pairs, **options), found)
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(InputError, match="batch_size is 0"):
        ches_scores(model, tokenizer, pairs, batch_size=0)
    model.model.norm.weight.data.fill_(math.inf)
    with pytest.raises(RunError, match=r"the pair of row \d+ scores (nan|-inf).*use bfloat16"):
        ches_scores(model, tokenizer, pairs, progress=False)


_KILLED = """
import os, signal, sys
from plot_align.cli.main import main
from plot_align.methods import filter as filtering
passes, ches = 0, filtering.ches
def counted(*arguments):
    global passes
    passes += 1
    if passes == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return ches(*arguments)
filtering.ches = counted
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_ches_after_sigkill_writes_the_same_bytes(tiny_llama: Path, pairs_file: Path, tmp_path: Path) -> None:
    """Killed in the fourth of six batches; the second process makes three passes, one too few to be killed."""
    for name, code in (("whole", "import sys; from plot_align.cli.main import main; main(sys.argv[1:])"),
                       ("killed", _KILLED), ("killed", _KILLED)):  # fmt: skip
        output = tmp_path / name / "kept.jsonl"
        command = [sys.executable, "-c", code, "filter", pairs_file, "--model", tiny_llama, "--by", "ches", "--share"]
        command += ["0.5", "--batch_size", "8", "--output", output]
        before = output.parent.exists()
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == (-signal.SIGKILL if name == "killed" and not before else 0), done.stderr
    for name in ("kept.jsonl", "kept.scores.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(list((tmp_path / "killed").iterdir())) == 3


def test_lengths_by_hand(tokenizer: Any) -> None:
    """Answers of one letter a token and an EOS: 2 and 4 tokens, 3 and 2, 2 and 2. A prompt of three letters fills a
    max_length of three, and leaves one scored token of one of four."""
    rows = Dataset.from_list(
        [{"prompt": "X", "chosen": "Q", "rejected": "QZQ"}, {"prompt": "X", "chosen": "QZ", "rejected": "Q"},
         {"prompt": "XXX", "chosen": "Q", "rejected": "Z"}]
    )  # fmt: skip
    found = completion_lengths(tokenizer, rows, progress=False)
    assert found.tolist() == [[2, 4], [3, 2], [2, 2]]
    assert length_ratio(found).tolist() == [2, 1.5, 1]
    assert keep_pairs(length_ratio(found), 0.5, "lowest").tolist() == [False, True, True]
    cut = completion_lengths(tokenizer, rows, max_length=3, progress=False)
    assert cut[:2].tolist() == [[2, 2], [2, 2]]
    assert bool(cut[2].isnan().all())
    assert length_ratio(cut).isnan().tolist() == [False, False, True]


def test_lengths_need_no_more_memory_for_more_rows(monkeypatch):
    def pairs(*_: object, **__: object) -> Iterator[tuple[ScoredSequence, ...]]:
        for size in range(100):
            yield tuple(ScoredSequence(np.zeros(1 << 20, np.int32), 1, 1 + n) for n in (size, 2))

    monkeypatch.setattr(filtering, "scored_pairs", pairs)
    tracemalloc.start()
    found = completion_lengths(None, iter(()), progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 << 20  # a few sequences of 4 MiB; all of them are 800
    assert math.isnan(found[0, 0])
    assert found[1:].tolist() == [[size, 2] for size in range(1, 100)]
