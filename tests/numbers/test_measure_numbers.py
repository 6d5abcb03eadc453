"""Statistics, the doctor's findings and the report's page on the hardest numbers."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st

from plot_align.doctor.data import examine
from plot_align.errors import InputError
from plot_align.preference.distribution import PreferenceDistribution
from plot_align.records import read_record, wilson, write_record
from plot_align.report.observations import collect
from plot_align.report.page import build, write
from plot_align.results import compare, of_items, of_whole
from plot_align.statistics import holm, mean, paired_difference, proportion


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-1e138, 1e138, allow_subnormal=True), min_size=1, max_size=12),
    st.sampled_from([1e-300, 1e-9, 1.0, 1e9]),
)
@example([0.0, 1.7389578811211965e-34], 1e-300)
def test_a_mean_is_the_exact_one(values: list[float], weight: float) -> None:
    """Against fractions; the interval holds finite values and lies within the values."""
    weights = [weight * (1 + i % 3) for i in range(len(values))]
    found = mean(values, weights=weights)
    exact = sum(Fraction(w) * Fraction(v) for w, v in zip(weights, values, strict=True)) / sum(map(Fraction, weights))
    largest = max(map(abs, values))
    assert abs(Fraction(found["value"]) - exact) <= Fraction(1e-12) * Fraction(largest) + Fraction(1e-300)
    if len(values) > 1:
        low, high = found["interval"]
        assert min(values) - 1e-9 * largest <= low <= high <= max(values) + 1e-9 * largest


@pytest.mark.parametrize("values", [[1e308, 5e307], [1.7e308] * 3, [1e200, 1.0], [-1e308, 1e308]])
def test_sums_that_overflow_are_named(values: list[float]) -> None:
    with pytest.raises(InputError, match="cannot hold; scale them"):
        mean(values)
    with pytest.raises(InputError, match=r"cannot hold; scale them|expected a finite number"):
        paired_difference({str(i): v for i, v in enumerate(values)}, dict.fromkeys("012", 0.0), bounds=None)


@pytest.mark.parametrize("n", [1, 2, 5, 1000])
def test_all_equal_scores(n: int) -> None:
    items = {str(i): 0.25 for i in range(n)}
    found = paired_difference(items, items)
    assert (found["value"], found["p"], found["n"]) == (0.0, 1.0, n)
    low, high = found["interval"]
    assert low <= 0 <= high
    assert mean([0.25] * n, bounds=(0.0, 1.0))["value"] == 0.25
    assert compare(of_items("x", items, better="higher"), of_items("x", items, better="higher")) is not None


@pytest.mark.parametrize("n", [1, 3, 10**6, 2**53])
@pytest.mark.parametrize("share", [0.0, 1.0, 1e-17, 1 - 1e-16, 0.5])
def test_an_interval_of_a_share_holds_it_and_stays_within_0_and_1(n: int, share: float) -> None:
    low, high = wilson(share, n)
    assert 0 <= low <= share <= high <= 1


def test_corrections_of_p_values_at_the_ends() -> None:
    assert holm({}) == {}
    assert holm({"a": 0.0, "b": 0.0, "c": 1.0}) == {"a": 0.0, "b": 0.0, "c": 1.0}
    assert holm({"a": 5e-324}) == {"a": 5e-324}
    assert proportion([])["n"] == 0


@pytest.mark.parametrize("count", [2**53 + 2, 2**62, 2**63 - 1])
def test_counts_that_overflow_are_named(count: int) -> None:
    """Their sum would be negative in int64, or lose single tokens in a frequency."""
    counts = torch.tensor([count, 1, 0])
    with pytest.raises(InputError, match=r"chosen_counts has more than 2\^53 tokens"):
        PreferenceDistribution(counts, torch.tensor([1, 2, 3]), {})
    half = PreferenceDistribution(torch.tensor([2**52, 1, 2]), torch.tensor([1, 2, 3]), {"sources": []})
    assert float(half.difference().sum()) == pytest.approx(0, abs=1e-15)
    with pytest.raises(InputError, match=r"more than 2\^53"):
        half.merge(half)


# --- the doctor ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "p", "chosen": " a", "rejected": " b"}],  # a single pair
        [{"prompt": "p", "chosen": " a", "rejected": " a"}] * 5,  # both sides equal throughout
        [{"prompt": "p", "chosen": "", "rejected": ""}] * 2,  # nothing but EOS
        [{"prompt": "", "chosen": "a a a a", "rejected": "a"}] * 3,  # no prompt, one word throughout
        [{"prompt": "p " * 400, "chosen": " a", "rejected": " b"}] * 2,  # the prompt fills max_length
    ],
)  # fmt: skip
def test_the_doctor_says_numbers_only(rows: list[dict[str, str]], tiny_tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    found = examine(Dataset.from_list(rows), AutoTokenizer.from_pretrained(tiny_tokenizer), max_length=64,
                    progress=False)  # fmt: skip
    assert found.pairs == len(rows)
    said = json.loads(json.dumps(asdict(found), allow_nan=False))
    assert not any("nan" in finding["sentence"].lower().split() for finding in said["findings"])


# --- the report ------------------------------------------------------------------------------------------------------

HARD: list[Any] = [
    of_whole("Infinite", math.inf, 3, better="lower"),
    of_whole("None", math.nan, 0, better="lower"),
    of_whole("Tiny", 5e-324, 3, better="lower", interval=(0.0, 1e-320)),
    of_whole("Huge", 1e308, 3, better="lower", interval=(-math.inf, math.inf)),
    of_items("One", {"a": 0.5}, better="higher", bounds=(0.0, 1.0)),
    of_items("Equal", {str(i): 0.0 for i in range(9)}, better="higher", bounds=(0.0, 1.0)),
    of_items("No bounds", {"a": -1e-300, "b": 1e-300}, better=None),
    of_items("Empty", {}, better=None),
]


@pytest.mark.parametrize("quantity", HARD, ids=lambda quantity: quantity["title"])
def test_a_page_of_hard_numbers(quantity: Any, tmp_path: Path) -> None:
    """Two models with the same number: it is written, drawn, compared, and never called better."""
    for model in ("a", "b"):
        described = {"name": model, "source": model, "model": model, "template": "t", "dtype": "float32"}
        config = {
            "model": described, "reference": None, "suite": "s", "section": "mathematics",
            "measure": {"name": "m", "kind": "harness"}, "data": {},
        }  # fmt: skip
        results = {"quantities": {"score": quantity}, "details": {}, "unfinished": None}
        path = write_record(tmp_path / "records" / f"{model}.json", "evaluation", results, config=config, seed=0)
        read = read_record(path)["results"]["quantities"]["score"]["value"]
        assert read == quantity["value"] or math.isnan(read)
    content = build(collect([tmp_path / "records"]))
    write(content, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert quantity["title"] in page
    assert not any(word in page for word in (">nan<", ">inf<", ">NaN<"))
    assert "is better" not in content.verdict.headline
