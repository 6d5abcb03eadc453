"""Distinct n-grams, repetition, their intervals, and perplexity."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from plot_align.evaluation.fluency import Diversity, Perplexity, distinct, repetition
from plot_align.evaluation.subject import Subject
from plot_align.statistics import jackknife_interval


def test_distinct_by_hand() -> None:
    """Pairs: ab, bc | ab, bd, so 3 distinct of 4; words: a, b, c, d of 6."""
    answers = [["a", "b", "c"], ["a", "b", "d"]]
    assert distinct(answers, 2)["value"] == pytest.approx(3 / 4)
    assert distinct(answers, 1)["value"] == pytest.approx(4 / 6)
    assert math.isnan(distinct([["a"]], 2)["value"])


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=8), min_size=3, max_size=8))
def test_the_jackknife_leaves_each_answer_out(answers: list[list[str]]) -> None:
    """Against distinct-n computed anew without each answer."""
    whole = distinct(answers, 2)
    without = [distinct(answers[:i] + answers[i + 1 :], 2)["value"] for i in range(len(answers))]
    without = [value for value in without if not math.isnan(value)]
    if math.isnan(whole["value"]):
        return
    low, high = jackknife_interval(whole["value"], without)
    assert whole["interval"] == pytest.approx([max(low, 0.0), min(high, 1.0)], nan_ok=True)  # a share of n-grams


def test_the_jackknife_of_a_mean_is_the_standard_error() -> None:
    """The delete-one jackknife of a mean is Student's interval, t s / √n, exactly."""
    values = np.random.default_rng(0).normal(size=12)
    without = [(values.sum() - v) / 11 for v in values]
    half = scipy.stats.t.ppf(0.975, 11) * values.std(ddof=1) / math.sqrt(12)
    assert jackknife_interval(values.mean(), without) == pytest.approx((values.mean() - half, values.mean() + half))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a b c d", 0.0), ("a b c d a b c d", 1 / 5), ("a a a a a a", 2 / 3), ("a b", 0.0), ("", 0.0)],
)
def test_repetition_by_hand(text: str, expected: float) -> None:
    """Of 5 four-grams of abcdabcd the last repeats the first; of 3 equal ones two repeat."""
    assert repetition(text.split()) == pytest.approx(expected)


@pytest.fixture
def subject(tiny_base: Path, tmp_path: Path) -> Subject:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_base), AutoTokenizer.from_pretrained(tiny_base)
    return Subject(model, tokenizer, "tiny", str(tiny_base), tmp_path)


def test_perplexity_is_that_of_whole_windows(subject: Subject, tmp_path: Path) -> None:
    """Two texts in windows of 8 tokens; the oracle is the model's own loss on each window."""
    texts = ["the cat sat on the mat and the dog sat on the rug by the door", "what is two plus three ?"]
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(texts) + "\n\n   \n", encoding="utf-8")
    nats, tokens = [], []
    for text in texts:
        ids = subject.tokenizer(text).input_ids
        total, count = 0.0, 0
        for start in range(0, len(ids), 8):
            window = torch.tensor([ids[start : start + 8]])
            if window.size(1) < 2:
                continue
            with torch.no_grad():
                loss = subject.model(input_ids=window, labels=window).loss
            total, count = total + float(loss) * (window.size(1) - 1), count + window.size(1) - 1
        nats.append(total)
        tokens.append(count)
    found = Perplexity(texts=str(path), max_length=8).run(subject)
    expected = sum(nats) / sum(tokens)
    assert found.quantities["nll"]["value"] == pytest.approx(expected, rel=1e-5)
    assert found.quantities["nll"]["items"] == pytest.approx(
        {"0": nats[0] / tokens[0], "1": nats[1] / tokens[1]}, rel=1e-5
    )
    assert found.quantities["perplexity"]["value"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert found.details == {"tokens": sum(tokens), "texts": 2}


def test_an_answer_as_long_as_the_limit_was_cut_off(
    subject: Subject, chat_pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["what is two ?", "what is two plus three plus two ?"]
    lengths = [len(subject.tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    monkeypatch.setattr(Subject, "answers", lambda self, asked, *rest: texts)
    found = Diversity(prompts=str(chat_pairs_file), limit=2, max_new_tokens=lengths[1]).run(subject)
    assert list(found.quantities["length"]["items"].values()) == lengths
    assert list(found.quantities["unfinished"]["items"].values()) == [0.0, 1.0]


def test_diversity_answers_every_prompt_once(subject: Subject, chat_pairs_file: Path) -> None:
    measure = Diversity(prompts=str(chat_pairs_file), limit=10, max_new_tokens=6)
    measure.check()
    found = measure.run(subject)
    assert found.quantities["length"]["n"] == 10
    assert next(iter(found.quantities)) == "repetition"
    answers = next(iter(subject.memory.values()))
    expected = distinct([text.split() for text in answers], 1)["value"]
    assert found.quantities["distinct_1"]["value"] == pytest.approx(expected, nan_ok=True)
    again = Diversity(prompts=str(chat_pairs_file), limit=10, max_new_tokens=6).run(subject)
    assert again.quantities["length"] == found.quantities["length"]
    assert len(subject.memory) == 1
