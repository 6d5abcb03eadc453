"""Counts against TRL's own batches, to the token; streams, processes and files; and every refusal."""

from __future__ import annotations

import gzip
import json
import os
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset, concatenate_datasets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from trl.trainer.dpo_trainer import DataCollatorForPreference

from plot_align.errors import InputError, RunError
from plot_align.preference.distribution import PreferenceDistribution
from plot_align.preference.estimation import estimate, estimate_tokenized, load_pairs, scored_pairs, scored_range
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

CHATML = (
    "{% for message in messages %}<|{{ message['role'] }}|>{% if style %}{{ style }}: {% endif %}"
    "{% if tools %}{{ tools | length }} tools: {% endif %}{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if style %}{{ style }}: {% endif %}{% endif %}"
)
# The prompt alone ends with an empty thought that the whole conversation drops: the boundary moves back.
THINKING = CHATML.replace("{% if style %}", "<|thought|> nothing {% if style %}")


def make_tokenizer(texts: list[str], size: int = 400, *, bos: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<bos>", "<|user|>", "<|assistant|>", "<|thought|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


WORDS = ["red", "green", "blue", "sorry", "cannot", "certainly", "the", "sky", "is", "ünïcode", "日本", "\n", "$x$"]


def sentence(generator: np.random.Generator, least: int, most: int) -> str:
    return " ".join(generator.choice(WORDS, generator.integers(least, most)).tolist())


def standard_rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    generator = np.random.default_rng(seed)
    rows = []
    for index in range(n):
        # Every third prompt ends within a word of the answer: tokens merge across the boundary.
        tail = " " if index % 3 else " the sk"
        eos = "<eos>" if index % 5 == 0 else ""  # already there: not appended twice
        rows.append(
            {
                "prompt": sentence(generator, 1, 40) + tail,
                "chosen": ("" if index % 3 else "y ") + sentence(generator, 1, 30) + eos,
                "rejected": ("" if index % 3 else "y ") + sentence(generator, 0, 50),
            }
        )
    return rows


def implicit(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in rows]


def conversational_rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    generator = np.random.default_rng(seed)
    rows = []
    for index in range(n):
        prompt = [{"role": "user", "content": sentence(generator, 1, 30)}]
        if index % 4 == 0:
            prompt += [
                {"role": "assistant", "content": sentence(generator, 1, 10)},
                {"role": "user", "content": sentence(generator, 1, 10)},
            ]
        rows.append(
            {
                "prompt": prompt,
                "chosen": [{"role": "assistant", "content": sentence(generator, 1, 30)}],
                "rejected": [{"role": "assistant", "content": "no " + sentence(generator, 1, 30)}],
            }
        )
    return rows


STANDARD, CONVERSATIONAL = standard_rows(60), conversational_rows(40)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer([" ".join(row.values()) for row in STANDARD])


def build(kind: type, config: type, data: Any, tokenizer: Any, llama: Path, folder: Path, **options: Any) -> Any:
    settings = config(
        output_dir=str(folder),
        per_device_train_batch_size=7,
        report_to="none",
        use_cpu=True,
        max_steps=1,
        **options,
    )
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.resize_token_embeddings(len(tokenizer))
    return kind(model=model, args=settings, train_dataset=data, processing_class=tokenizer)


def labels_of(batches: Any, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts of the labels != -100 that TRL's fused head scores, from collated DPO batches, one by one."""
    counts = torch.zeros(2, size, dtype=torch.int64)
    for batch in batches:
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)[:, 1:]
        for side, rows in enumerate(labels.chunk(2)):
            for label in rows[rows != -100].tolist():
                counts[side, label] += 1
    return counts[0], counts[1]


def trl_counts(data: Any, tokenizer: Any, llama: Path, folder: Path, **options: Any) -> Any:
    trainer = build(DPOTrainer, DPOConfig, data, tokenizer, llama, folder, **options)
    return trainer, labels_of(trainer.get_train_dataloader(), len(tokenizer))


def assert_counts(preference: PreferenceDistribution, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert expected[0].sum() > 0
    assert expected[1].sum() > 0
    torch.testing.assert_close(preference.chosen_counts, expected[0], rtol=0, atol=0)
    torch.testing.assert_close(preference.rejected_counts, expected[1], rtol=0, atol=0)


with_tools = [
    {**row, "tools": json.dumps([{"type": "function", "function": {"name": "f", "parameters": {}}}] * (index % 3))}
    for index, row in enumerate(CONVERSATIONAL)
]
with_options = [{**row, "chat_template_kwargs": {"style": f"s{i % 2}"}} for i, row in enumerate(CONVERSATIONAL)]

CASES = {
    "explicit": (STANDARD, None, {}),
    "implicit": (implicit(STANDARD), None, {}),
    "explicit, keep_start": (STANDARD, None, {"max_length": 30}),
    "explicit, keep_end": (STANDARD, None, {"max_length": 30, "truncation_mode": "keep_end"}),
    "explicit, no limit": (STANDARD, None, {"max_length": None}),
    "implicit, keep_start": (implicit(STANDARD), None, {"max_length": 45}),
    "conversational": (CONVERSATIONAL, CHATML, {}),
    "conversational, thinking": (CONVERSATIONAL, THINKING, {}),
    "conversational, implicit": (
        [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in CONVERSATIONAL],
        CHATML,
        {},
    ),
    "conversational, tools": (with_tools, CHATML, {}),
    "conversational, options": (with_options, THINKING, {}),
    "conversational, keep_end": (CONVERSATIONAL, THINKING, {"max_length": 15, "truncation_mode": "keep_end"}),
    "conversational, keep_start": (CONVERSATIONAL, THINKING, {"max_length": 25}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bos", [False, True], ids=["", "bos"])
def test_counts_are_those_of_trl(case: str, bos: bool, tiny_llama: Path, tmp_path: Path) -> None:
    rows, template, options = CASES[case]
    tokenizer = make_tokenizer([" ".join(row.values()) for row in STANDARD], bos=bos)
    tokenizer.chat_template = template
    data = Dataset.from_list(rows)
    trainer, expected = trl_counts(data, tokenizer, tiny_llama, tmp_path, **options)
    limits = {"max_length": trainer.args.max_length, "truncation_mode": trainer.args.truncation_mode}
    preference = estimate(data, tokenizer, progress=False, batch_size=17, **limits)
    assert_counts(preference, expected)
    assert preference.rows == len(trainer.train_dataset)
    tokenised = estimate_tokenized(trainer.train_dataset, tokenizer, progress=False, batch_size=11, **limits)
    assert_counts(tokenised, expected)
    assert_sequences(scored_pairs(data, tokenizer, batch_size=13, **limits), trainer)


def assert_sequences(pairs: Any, trainer: Any) -> None:
    """Rows that are not dropped are the collator's, context included, to the token."""
    pairs = [pair for pair in pairs if any(side.start < side.stop for side in pair)]
    assert len(pairs) == len(trainer.train_dataset)
    for pair, row in zip(pairs, trainer.train_dataset, strict=True):
        batch = trainer.data_collator([row])
        masks = zip(pair, batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True)
        for side, ids, seen, completion in masks:
            assert side.ids.tolist() == ids[seen == 1].tolist()
            scored = completion[seen == 1].nonzero().squeeze(-1).tolist()
            assert list(range(side.start, side.stop)) == [position for position in scored if position > 0]


def test_cases_reach_the_corners(tokenizer: Any) -> None:
    """The cases above are only worth something if rows are dropped and truncated, and boundaries move."""
    data = Dataset.from_list(STANDARD)
    free = estimate(data, tokenizer, progress=False, max_length=None)
    start = estimate(data, tokenizer, progress=False, max_length=30)
    end = estimate(data, tokenizer, progress=False, max_length=30, truncation_mode="keep_end")
    assert 0 < start.rows < free.rows == end.rows
    assert start.chosen_counts.sum() < free.chosen_counts.sum()
    assert end.rejected_counts.sum() < free.rejected_counts.sum()
    prompt, whole = "a the sk", "a the sky is"
    assert tokenizer(whole)["input_ids"][: len(tokenizer(prompt)["input_ids"])] != tokenizer(prompt)["input_ids"]
    tokenizer.chat_template = THINKING
    turns = CONVERSATIONAL[0]["prompt"]
    alone = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert not tokenizer.apply_chat_template(turns + TURN, tokenize=False).startswith(alone)
    data = Dataset.from_list(CONVERSATIONAL)
    assert estimate(data, tokenizer, progress=False, max_length=25).rows < len(data)


def test_paired_rows_by_hand(tokenizer: Any) -> None:
    """One row, counted by hand: "x y" against "x z z" after the prompt "p", one id for each letter and its space."""
    data = Dataset.from_list([{"prompt": "p", "chosen": " x y", "rejected": " x z z"}])
    ids = {text: tokenizer(text)["input_ids"] for text in (" x", " y", " z", "<eos>")}
    preference = estimate(data, tokenizer, progress=False)
    chosen, rejected = preference.chosen_counts, preference.rejected_counts
    assert int(chosen.sum()) == sum(len(ids[text]) for text in (" x", " y", "<eos>"))
    assert int(rejected.sum()) == sum(len(ids[text]) for text in (" x", " z", " z", "<eos>"))
    assert chosen[ids["<eos>"][0]] == rejected[ids["<eos>"][0]] == 1
    assert rejected[ids[" z"][-1]] == 2
    assert chosen[ids[" z"][-1]] == 0


def test_a_first_token_is_not_scored(tokenizer: Any, tiny_llama: Path, tmp_path: Path) -> None:
    """An empty prompt and no BOS: TRL's labels are shifted, so the answer's first token is never predicted."""
    rows = [
        {"prompt": "", "chosen": "red sky", "rejected": "blue"},
        {"prompt": "a", "chosen": " red", "rejected": "x"},
    ]
    _, expected = trl_counts(Dataset.from_list(rows), tokenizer, tiny_llama, tmp_path)
    preference = estimate(Dataset.from_list(rows), tokenizer, progress=False)
    assert_counts(preference, expected)
    everything = sum(len(tokenizer(row["chosen"] + "<eos>")["input_ids"]) for row in rows)
    assert int(preference.chosen_counts.sum()) == everything - 1


@pytest.mark.parametrize(
    ("mode", "chosen", "rejected"), [("keep_start", [11, 12], [21]), ("keep_end", [12, 13], [21])]
)
def test_the_columns_before_trl_0_29(tokenizer: Any, mode: str, chosen: list[int], rejected: list[int]) -> None:
    """A prompt of one token, truncated to three; what keep_end leaves first has nothing that predicts it."""
    row = {"prompt": "p", "prompt_input_ids": [5], "chosen_input_ids": [11, 12, 13], "rejected_input_ids": [21]}
    found = estimate_tokenized(
        Dataset.from_list([row]), tokenizer, max_length=3, truncation_mode=mode, progress=False
    )  # fmt: skip
    assert found.chosen_counts.nonzero().flatten().tolist() == chosen
    assert found.rejected_counts.nonzero().flatten().tolist() == rejected


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@given(
    prompt=st.integers(0, 12),
    answer=st.integers(0, 12),
    max_length=st.one_of(st.none(), st.integers(1, 14)),
)
@settings(max_examples=150, deadline=None)
def test_scored_range_is_the_collators(mode: str, prompt: int, answer: int, max_length: int | None) -> None:
    example = {
        "prompt_ids": list(range(1, 1 + prompt)),
        "chosen_ids": list(range(101, 101 + answer)),
        "rejected_ids": [7, 8],
    }
    start, stop = scored_range(np.array([prompt]), np.array([answer]), max_length, mode)
    assert 0 <= start[0] <= stop[0] <= answer
    if prompt + answer == 0:
        return  # the collator cannot pad an empty sequence
    batch = DataCollatorForPreference(pad_token_id=0, max_length=max_length, truncation_mode=mode)([example])
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)[0, 1:]
    assert example["chosen_ids"][start[0] : stop[0]] == labels[labels != -100].tolist()


def test_kto_rows(tokenizer: Any, tiny_llama: Path, tmp_path: Path) -> None:
    """Rows with a label, raw and as KTOTrainer tokenised them, against its collated batches."""
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen" if index % 3 else "rejected"], "label": index % 3 > 0}
        for index, row in enumerate(STANDARD)
    ]
    data = Dataset.from_list(rows)
    trainer = build(KTOTrainer, KTOConfig, data, tokenizer, tiny_llama, tmp_path, max_length=30)
    expected = torch.zeros(2, len(tokenizer), dtype=torch.int64)
    for batch in trainer.get_train_dataloader():
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)[:, 1:]
        for liked, row in zip(batch["label"].tolist(), labels, strict=True):
            for label in row[row != -100].tolist():
                expected[0 if liked else 1, label] += 1
    assert_counts(estimate(data, tokenizer, progress=False, max_length=30, batch_size=7), tuple(expected))
    tokenised = estimate_tokenized(trainer.train_dataset, tokenizer, max_length=30, progress=False, batch_size=7)
    assert_counts(tokenised, tuple(expected))
    with pytest.raises(InputError, match="KTOTrainer"):
        estimate(data, tokenizer, progress=False, truncation_mode="keep_end")
    with pytest.raises(InputError, match="KTOTrainer"):
        estimate_tokenized(trainer.train_dataset, tokenizer, max_length=30, truncation_mode="keep_end")


def test_rows_of_labels_by_hand(tokenizer: Any) -> None:
    """What CPO and ORPO train on: −100 is the prompt, and a first token, which nothing predicts, is not scored."""
    rows = {
        "chosen_labels": [[-100, -100, 7, 8], [9, 7], [-100, -100]],
        "rejected_labels": [[-100, 5], [5, 5, 6], [-100]],
    }
    for batch_size in (1, 2, 100):
        found = estimate_tokenized(
            Dataset.from_dict(rows), tokenizer, max_length=4, progress=False, batch_size=batch_size
        )
        assert {i: n for i, n in enumerate(found.chosen_counts.tolist()) if n} == {7: 2, 8: 1}
        assert {i: n for i, n in enumerate(found.rejected_counts.tolist()) if n} == {5: 2, 6: 1}
        assert found.rows == 3


@pytest.mark.parametrize("template", [None, CHATML], ids=["standard", "conversational"])
@pytest.mark.parametrize("bos", [False, True], ids=["", "bos"])
def test_cpo_rows(bos: bool, template: str | None, tiny_llama: Path, tmp_path: Path) -> None:
    """As CPOTrainer tokenised them, against its collated batches, with answers and whole completions cut off."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    tokenizer = make_tokenizer([" ".join(row.values()) for row in STANDARD], bos=bos)
    tokenizer.chat_template = template
    if bos:
        tokenizer.bos_token = "<bos>"
    data = Dataset.from_list(CONVERSATIONAL if template else STANDARD)
    trainer = build(CPOTrainer, CPOConfig, data, tokenizer, tiny_llama, tmp_path, max_length=30)
    expected = torch.zeros(2, len(tokenizer), dtype=torch.int64)
    for batch in trainer.get_train_dataloader():
        for side, name in enumerate(("chosen_labels", "rejected_labels")):
            for label in batch[name][:, 1:].flatten().tolist():
                if label != -100:
                    expected[side, label] += 1
    tokenised = estimate_tokenized(trainer.train_dataset, tokenizer, max_length=30, progress=False, batch_size=7)
    assert_counts(tokenised, tuple(expected))
    with pytest.raises(InputError, match="the only mode of CPOTrainer and ORPOTrainer"):
        estimate_tokenized(trainer.train_dataset, tokenizer, max_length=30, truncation_mode="keep_end")


@pytest.mark.parametrize("template", [None, THINKING], ids=["standard", "conversational"])
def test_streams_and_processes_count_the_same(tokenizer: Any, template: str | None) -> None:
    tokenizer.chat_template = template
    data = Dataset.from_list(implicit(STANDARD) if template is None else CONVERSATIONAL)
    plain = estimate(data, tokenizer, progress=False)
    variants = {
        "small batches": estimate(data, tokenizer, progress=False, batch_size=1),
        "processes": estimate(data, tokenizer, progress=False, num_proc=2, batch_size=9),
        "stream": estimate(data.to_iterable_dataset(), tokenizer, progress=False, batch_size=9),
        "shuffled": estimate(data.shuffle(seed=1), tokenizer, progress=False, batch_size=9),
        "numpy": estimate(data.with_format("numpy"), tokenizer, progress=False, num_proc=2, batch_size=9),
    }
    for name, variant in variants.items():
        assert torch.equal(variant.chosen_counts, plain.chosen_counts), name
        assert torch.equal(variant.rejected_counts, plain.rejected_counts), name
    # (The split's name is lost on the way to a stream; the data set's own fingerprint is not a stream's.)
    assert variants["processes"] == plain


def test_streamed_trainer(tokenizer: Any, tiny_llama: Path, tmp_path: Path) -> None:
    data = Dataset.from_list(STANDARD)
    trainer, expected = trl_counts(data.to_iterable_dataset(), tokenizer, tiny_llama, tmp_path, max_length=30)
    tokenised = estimate_tokenized(trainer.train_dataset, tokenizer, max_length=30, progress=False, batch_size=7)
    whole, _ = trl_counts(data, tokenizer, tiny_llama, tmp_path, max_length=30)
    expected = labels_of([whole.data_collator(list(whole.train_dataset))], len(tokenizer))
    assert_counts(tokenised, expected)


def test_concatenation_counts_as_the_merge(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    whole = Dataset.from_list(implicit(STANDARD))

    @given(cut=st.integers(1, len(STANDARD) - 1))
    @settings(max_examples=10, deadline=None)
    def check(cut: int) -> None:
        left, right = whole.select(range(cut)), whole.select(range(cut, len(whole)))
        merged = estimate(left, tokenizer, progress=False).merge(estimate(right, tokenizer, progress=False))
        together = estimate(concatenate_datasets([left, right]), tokenizer, progress=False)
        assert torch.equal(merged.chosen_counts, together.chosen_counts)
        assert torch.equal(merged.rejected_counts, together.rejected_counts)
        assert merged.rows == together.rows

    check()


TEXT = st.text(st.sampled_from("ab \n$é日<eos>"), min_size=1, max_size=12)
SHARED = st.one_of(st.just(""), st.integers(60, 200).map(lambda length: ("the sky is blue " * 13)[:length]))


@given(shared=SHARED, chosen=TEXT, rejected=TEXT)
@settings(max_examples=300, deadline=None)
def test_extraction_is_trls(shared: str, chosen: str, rejected: str) -> None:
    """Skipping ahead in a long common prompt changes nothing, for strings and for messages."""
    from trl.data_utils import extract_prompt

    from plot_align.preference.completions import _extract

    for one, other in ((shared + chosen, shared + rejected), (list(shared + chosen), list(shared + rejected))):
        expected = extract_prompt({"chosen": one, "rejected": other})
        assert _extract(one, other) == (expected["prompt"], expected["chosen"], expected["rejected"])


@given(rows=st.lists(st.fixed_dictionaries({"chosen": TEXT, "rejected": TEXT}), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_implicit_text_counts_as_in_trl(tokenizer: Any, rows: list[dict[str, str]]) -> None:
    """TRL's own tokenisation, copied from its trainer row by row, on texts that no one would write."""
    from trl.data_utils import common_prefix_length, extract_prompt

    expected = torch.zeros(2, len(tokenizer), dtype=torch.int64)
    for row in rows:
        parts = extract_prompt(row)
        alone = tokenizer(parts["prompt"])["input_ids"]
        answers = []
        for side in ("chosen", "rejected"):
            text = parts[side] if parts[side].endswith("<eos>") else parts[side] + "<eos>"
            answers.append(tokenizer(parts["prompt"] + text)["input_ids"])
        length = min(common_prefix_length(alone, answer) for answer in answers)
        for side, answer in enumerate(answers):
            for token in answer[max(length, 1) :]:
                expected[side, token] += 1
    if not (expected.sum(1) > 0).all():
        return  # nothing to count on a side: refused, as tested below
    assert_counts(estimate(Dataset.from_list(rows), tokenizer, progress=False), tuple(expected))


@pytest.mark.parametrize("vocabulary", ["of this file", "of another text"])
def test_real_data(real_data: Path, tiny_llama: Path, tiny_base: Path, tmp_path: Path, vocabulary: str) -> None:
    data = load_pairs(real_data / "hh_rlhf_harmless_2000.jsonl.gz")
    if vocabulary == "of another text":
        tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    else:
        tokenizer = make_tokenizer(data["chosen"][:500] + data["rejected"][:500], 4000)
    trainer, expected = trl_counts(data, tokenizer, tiny_llama, tmp_path, max_length=512)
    preference = estimate(data, tokenizer, max_length=512, progress=False)
    assert_counts(preference, expected)
    assert preference.rows == len(trainer.train_dataset) <= len(data) == 2000
    assert_counts(estimate_tokenized(trainer.train_dataset, tokenizer, max_length=512, progress=False), expected)


def test_memory_does_not_grow_with_the_rows(tokenizer: Any) -> None:
    def peak(n: int) -> int:
        def rows() -> Any:
            for index in range(n):
                yield STANDARD[index % len(STANDARD)]

        data = IterableDataset.from_generator(rows)
        tracemalloc.start()
        estimate(data, tokenizer, progress=False, batch_size=100)
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    peak(200)  # whatever is imported and cached on first use
    few, many = peak(300), peak(1500)
    assert many < 1.2 * few, (few, many)


def test_provenance(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = None
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in STANDARD))
    preference = estimate(load_pairs(path), tokenizer, max_length=30, progress=False)
    (source,) = preference.sources
    assert source["id"] == "pairs.jsonl"  # not where it lies
    assert len(source["sha256"]) == 64
    assert source["rows"] + source["dropped_rows"] == len(STANDARD)
    assert source["tokens"] == {
        "chosen": int(preference.chosen_counts.sum()),
        "rejected": int(preference.rejected_counts.sum()),
    }
    assert source["versions"]["trl"]
    assert preference.provenance["policy"] == {
        "template": None,
        "eos": "appended where missing",
        "eos_token": "<eos>",
        "max_length": 30,
        "truncation_mode": "keep_start",
    }
    assert preference.provenance["tokenizer"]["size"] == preference.vocab_size == len(tokenizer)
    tokenizer.chat_template = CHATML
    first = estimate(Dataset.from_list(CONVERSATIONAL), tokenizer, progress=False)
    tokenizer.chat_template = THINKING
    second = estimate(Dataset.from_list(CONVERSATIONAL), tokenizer, progress=False)
    assert first.provenance["policy"]["template"] != second.provenance["policy"]["template"]
    with pytest.raises(InputError, match="same settings"):
        first.merge(second)


# --- opening --------------------------------------------------------------------------------------------------------


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    data = Dataset.from_list(rows)
    kind = path.suffixes[0]
    plain = path.with_name("plain" + kind)
    match kind:
        case ".jsonl":
            data.to_json(plain)
        case ".json":
            plain.write_text(json.dumps(rows))
        case ".csv":
            data.to_csv(plain)
        case ".parquet":
            data.to_parquet(plain)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(plain.read_bytes()))
    else:
        os.replace(plain, path)
    return path


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.json.gz", "a.csv.gz"],
)
def test_every_file_type(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, STANDARD[:9])
    data = load_pairs(path)
    assert [dict(row) for row in data] == STANDARD[:9]
    assert [dict(row) for row in load_pairs(path, streaming=True)] == STANDARD[:9]


def test_folders(tmp_path: Path) -> None:
    data = Dataset.from_list(STANDARD[:9])
    data.save_to_disk(tmp_path / "one")
    DatasetDict({"train": data, "test": data.select(range(3))}).save_to_disk(tmp_path / "two")
    (tmp_path / "raw").mkdir()
    data.to_json(tmp_path / "raw" / "train.jsonl")
    assert list(load_pairs(tmp_path / "one")) == STANDARD[:9]
    assert list(load_pairs(tmp_path / "two", split="test")) == STANDARD[:3]
    assert list(load_pairs(tmp_path / "two", split="test", streaming=True)) == STANDARD[:3]
    assert list(load_pairs(tmp_path / "raw")) == STANDARD[:9]
    with pytest.raises(InputError, match=r"'validation'.*train, test"):
        load_pairs(tmp_path / "two", split="validation")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(InputError, match="save_to_disk"):
        load_pairs(tmp_path / "one")


def lines(*rows: Any) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


GOOD = {"chosen": "a b", "rejected": "a c"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", lines(GOOD, GOOD, "{broken"), "line 3 is no valid JSON"),
        ("bad.jsonl", lines(GOOD, [1, 2]), r"line 2 is a list of length 2"),
        ("empty.jsonl", "", "empty"),
        ("bad.json", '[{"chosen": "a",', "no valid json"),
        ("bad.csv", 'chosen,rejected\n"a,b\n', "no valid csv"),
        ("bad.parquet", "no parquet", "no valid parquet"),
        ("bad.jsonl.gz", "no gzip", "bad.jsonl.gz"),
        ("bad.parquet.gz", "PAR1", r"bad\.parquet\.gz is no valid parquet"),
        ("pairs.txt", "x", r"ends in '\.txt'"),
    ],
)
def test_broken_files(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        load_pairs(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_files(tmp_path: Path) -> None:
    for source in (tmp_path / "no.jsonl", "no.parquet", "./owner/name", "a/b/c"):
        with pytest.raises(InputError, match="does not exist"):
            load_pairs(source)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_pairs("nobody/nothing")  # the network is off
    path = write(tmp_path / "a.jsonl", STANDARD[:2])
    with pytest.raises(InputError, match="no splits"):
        load_pairs(path, split="test")


def test_a_stream_that_breaks(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "bad.jsonl").write_text(lines(GOOD, "{broken"))
    with pytest.raises(InputError, match="cannot be read further"):
        estimate(load_pairs(tmp_path / "bad.jsonl", streaming=True), tokenizer, progress=False)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_workers_are_for_a_data_set_in_one_piece(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="num_proc is 2 for a stream"):
        estimate(Dataset.from_list([GOOD] * 8).to_iterable_dataset(), tokenizer, progress=False, num_proc=2)


@pytest.mark.parametrize("where", [0, 3, 25])
@pytest.mark.parametrize("workers", [None, 2])
def test_a_row_without_rejected_is_named(where: int, workers: int | None, tmp_path: Path, tokenizer: Any) -> None:
    rows: list[dict[str, Any]] = [dict(GOOD) for _ in range(30)]
    del rows[where]["rejected"]
    del rows[28]["rejected"]
    path = tmp_path / "pairs.jsonl"
    path.write_text(lines(*rows))
    for streaming in (False, True) if workers is None else (False,):
        data = load_pairs(path, streaming=streaming)
        with pytest.raises(InputError, match=rf"row {where}: 'rejected' is missing"):
            estimate(data, tokenizer, progress=False, batch_size=4, num_proc=workers)


CHAT = {"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "a"}]}
TURN = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "empty"),
        ([{"chosen": "a"}], "no column 'rejected'"),
        ([{"rejected": "a"}], "no column 'chosen'"),
        ([{"text": "a"}], r"no column 'chosen' and no column 'rejected' \(columns: text\)"),
        ([{"prompt": "a", "completion": "b"}], "no column 'chosen'"),
        ([{"prompt": "a", "completion": "b", "label": True}] * 2, "no rejected token"),
        ([{"prompt": "a", "completion": "b", "label": 1}, {"prompt": "a", "completion": "b"}], "row 1: 'label'"),
        ([GOOD, {"chosen": 3, "rejected": "a"}], "row 1: 'chosen' is 3"),
        ([GOOD, {"chosen": TURN, "rejected": "a"}], "row 1: 'chosen' is a list of length 1, expected a string"),
        ([GOOD, {"chosen": "", "rejected": "a"}], "row 1: 'chosen' is empty"),
        ([{"chosen": TURN, "rejected": TURN}], "no first message"),
        (
            [{"chosen": TURN, "rejected": [{"role": "user", "content": "b"}]}],
            "row 0: chosen and rejected share no first message",
        ),
        ([{"prompt": "a", "chosen": TURN, "rejected": TURN}], "string 'prompt'"),
        ([{"prompt": TURN, "chosen": [{"who": 1}], "rejected": TURN}], "row 0: 'chosen' is a list"),
        ([{"prompt": TURN, "chosen": TURN, "rejected": TURN, "tools": "{"}], "row 0: 'tools'"),
        ([{**GOOD, "images": []}], "images"),
        ([{"prompt_ids": [1], "chosen_ids": [1], "rejected_ids": [1]}], "estimate_tokenized"),
    ],
)
def test_refused_rows(rows: list[dict[str, Any]], message: str, tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML

    def stream() -> Any:
        yield from rows

    # A stream, because Arrow would not hold rows of mixed types.
    with pytest.raises(InputError, match=message) as caught:
        estimate(IterableDataset.from_generator(stream), tokenizer, progress=False)
    assert "\n" not in str(caught.value)


def test_refused_arguments(tokenizer: Any) -> None:
    data = Dataset.from_list([GOOD])
    tokenizer.chat_template = None
    for options, message in [
        ({"max_length": 0}, "max_length is 0"),
        ({"max_length": 2.5}, "max_length is 2.5"),
        ({"truncation_mode": "middle"}, "truncation_mode is 'middle'"),
        ({"num_proc": 0}, "num_proc is 0"),
        ({"batch_size": True}, "batch_size is True"),
        ({"max_length": 1}, "no chosen token is left of 1 rows"),
    ]:
        with pytest.raises(InputError, match=message):
            estimate(data, tokenizer, progress=False, **options)
    with pytest.raises(InputError, match="load_pairs"):
        estimate([GOOD], tokenizer)
    with pytest.raises(InputError, match="splits train"):
        estimate(DatasetDict({"train": data}), tokenizer)
    with pytest.raises(InputError, match="empty"):
        estimate(data.select([]), tokenizer, progress=False)
    with pytest.raises(InputError, match="tokenizer is a str"):
        estimate(data, "gpt2")
    with pytest.raises(InputError, match="no chat template"):
        estimate(Dataset.from_list([CHAT]), tokenizer, progress=False)
    mute = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="no EOS"):
        estimate(data, mute, progress=False)


def test_a_template_that_refuses(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match=r"row 0: .*roles must alternate"):
        estimate(Dataset.from_list(CONVERSATIONAL), tokenizer, progress=False)


def test_refused_tokenized_rows(tokenizer: Any) -> None:
    def refuse(row: dict[str, Any], message: str, **options: Any) -> None:
        with pytest.raises(InputError, match=message):
            estimate_tokenized(Dataset.from_list([row]), tokenizer, **{"max_length": 9, "progress": False, **options})

    refuse(GOOD, "expected prompt_ids, chosen_ids and rejected_ids")
    refuse({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [len(tokenizer)]}, f"id {len(tokenizer)}")
    refuse({"prompt_ids": [1], "chosen_ids": [-1], "rejected_ids": [2]}, "id -1")
    refuse({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": []}, "no rejected token")
    refuse({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [2]}, "max_length is 0", max_length=0)
    refuse({"chosen_labels": [-100, -100], "rejected_labels": [1, 2]}, "no chosen token")
    refuse({"chosen_labels": [-100, -1], "rejected_labels": [1, 2]}, "'chosen_labels' has token id -1")
    refuse({"chosen_labels": [1, 2], "rejected_labels": [1, len(tokenizer)]}, f"id {len(tokenizer)}")
    holes = Dataset.from_dict({"prompt_ids": [[1], [1]], "chosen_ids": [[2], None], "rejected_ids": [[2], [2]]})
    for batch_size in (1, 2):
        with pytest.raises(InputError, match="row 1: 'chosen_ids' is missing"):
            estimate_tokenized(holes, tokenizer, max_length=9, progress=False, batch_size=batch_size)
    with pytest.raises(InputError, match="empty"):
        estimate_tokenized(holes.select([]), tokenizer, max_length=9, progress=False)


@pytest.mark.skipif(sys.platform != "linux", reason="the killed worker is a forked one")
def test_a_worker_that_dies(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["plot_align.preference.parallel_counting"], "count_batch", lambda *_: os._exit(9))
    with pytest.raises(RunError, match=r"worker process died.*num_proc = 2"):
        estimate(Dataset.from_list([GOOD] * 8), tokenizer, progress=False, num_proc=2, batch_size=2)


def test_progress_goes_to_standard_error(
    tokenizer: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets.enable_progress_bars()  # some commands turn them off for their process
    tokenizer.chat_template = None
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")  # the workers set it for their time
    environment = dict(os.environ)
    for workers, count in ((None, "8/8 rows"), (2, "8/8 [")):
        estimate(Dataset.from_list([GOOD] * 8), tokenizer, num_proc=workers, batch_size=2)
        shown = capfd.readouterr()
        assert shown.out == ""
        assert count in shown.err
        assert "huggingface/tokenizers" not in shown.err  # its warning about forks
        assert os.environ == environment
        estimate(Dataset.from_list([GOOD] * 8), tokenizer, num_proc=workers, progress=False)
        assert capfd.readouterr().err == ""
    assert not datasets.are_progress_bars_disabled()


def test_the_tokenizer_survives(tokenizer: Any, tmp_path: Path) -> None:
    """Counting leaves no truncation or padding behind in the tokenizer."""
    tokenizer.chat_template = CHATML
    estimate(Dataset.from_list(CONVERSATIONAL), tokenizer, progress=False, max_length=20, truncation_mode="keep_end")
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.backend_tokenizer.truncation is None
    assert again.backend_tokenizer.padding is None
