"""The preference distribution: d, targets and confidence against independent formulas; merging, files, refusals."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from scipy import special, stats

from plot_align.errors import InputError
from plot_align.io import complete_or_absent
from plot_align.preference.distribution import (
    PreferenceDistribution,
    tokenizer_name,
    vocabulary_fingerprint,
    vocabulary_size,
)


class Vocabulary:
    """As much of a tokenizer as a preference distribution asks for."""

    def __init__(self, tokens: list[str], name: str = "a/tokenizer") -> None:
        self.tokens, self.name_or_path = tokens, name

    def get_vocab(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}


TOKENIZER = Vocabulary(list("abcde"))


def preference(
    chosen: list[int], rejected: list[int], *, source: str = "s", policy: Any = None, tokenizer: Any = None
) -> PreferenceDistribution:
    provenance = {
        "tokenizer": {
            "fingerprint": vocabulary_fingerprint(tokenizer or Vocabulary([str(i) for i in range(len(chosen))])),
            "size": len(chosen),
        },
        "policy": policy or {"max_length": 8},
        "sources": [{"id": source, "rows": 3, "tokenizer": "a/tokenizer"}],
    }
    return PreferenceDistribution(torch.tensor(chosen), torch.tensor(rejected), provenance)


# Q⁺ = (6, 2, 2, 0, 0), Q⁻ = (1, 1, 1, 2, 0):  d = (.6, .2, .2, 0, 0) − (.2, .2, .2, .4, 0) = (.4, 0, 0, −.4, 0).
HAND = preference([6, 2, 2, 0, 0], [1, 1, 1, 2, 0], tokenizer=TOKENIZER)


def close(found: torch.Tensor, expected: Any) -> None:
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-15)


def test_difference_and_masks_by_hand() -> None:
    close(HAND.difference(), [0.4, 0, 0, -0.4, 0])
    assert HAND.preferred().tolist() == [True, False, False, False, False]
    assert HAND.rejected().tolist() == [False, False, False, True, False]
    assert HAND.rejected(7).tolist() == [False, False, False, True, False, False, False]
    assert HAND.vocab_size == 5
    assert HAND.rows == 3


def test_targets_by_hand() -> None:
    close(HAND.target(), [1, 0, 0, 0, 0])
    close(HAND.target("shift"), [0.8 / 2, 0.4 / 2, 0.4 / 2, 0, 0.4 / 2])  # d + .4 = (.8, .4, .4, 0, .4)
    # The unit of temperature is .4/ln 5, so the exponents are (ln 5, 0, 0, −ln 5, 0): weights (5, 1, 1, 1/5, 1).
    close(HAND.target("softmax"), np.array([5, 1, 1, 0.2, 1]) / 8.2)
    close(HAND.target("softmax", temperature=2.0), np.array([5, 1, 1, 0.2, 1]) ** 0.5 / (3 + 5**0.5 + 0.2**0.5))
    # p_ref + d/2 = (.2, .2, .2, .2, .2) + (.2, 0, 0, −.2, 0) = (.4, .2, .2, 0, .2): already sums to one.
    uniform = torch.full((5,), 0.2)
    close(HAND.target("anchored", reference=uniform, strength=0.5), [0.4, 0.2, 0.2, 0, 0.2])
    # At strength 1: (.6, .2, .2, −.2, .2), cut at zero and divided by 1.2.
    close(HAND.target("anchored", reference=uniform), np.array([0.6, 0.2, 0.2, 0, 0.2]) / 1.2)
    close(HAND.target("anchored", reference=uniform, strength=0.0), [0.2] * 5)


def test_padding_rows_get_no_mass() -> None:
    for transform in ("relu", "shift", "softmax"):
        close(HAND.target(transform, size=7), np.pad(HAND.target(transform).numpy(), (0, 2)))
    # A reference over the head's seven rows: what it puts on padding cannot be asked for.
    reference = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 0.25, 0.25], dtype=torch.float64)
    expected = HAND.target("anchored", reference=torch.full((5,), 0.2, dtype=torch.float64))
    close(HAND.target("anchored", reference=reference, size=7), np.pad(expected.numpy(), (0, 2)))


COUNTS = st.integers(2, 12).flatmap(
    lambda size: st.tuples(
        *[st.lists(st.integers(0, 10**7), min_size=size, max_size=size).filter(any) for _ in range(2)],
        st.lists(st.floats(0, 1), min_size=size, max_size=size).filter(lambda weights: sum(weights) > 1e-3),
    )
)


@given(counts=COUNTS, temperature=st.floats(1e-3, 1e3), strength=st.floats(0, 1e3))
@settings(max_examples=200, deadline=None)
def test_targets_are_distributions_and_match_numpy(
    counts: tuple[list[int], list[int], list[float]], temperature: float, strength: float
) -> None:
    chosen, rejected, weights = counts
    one = preference(chosen, rejected)
    d = np.array(chosen) / np.sum(chosen) - np.array(rejected) / np.sum(rejected)
    np.testing.assert_allclose(one.difference().numpy(), d, atol=1e-16)
    assert abs(float(one.difference().sum())) < 1e-12
    if not one.difference().any():
        for transform in ("relu", "shift", "softmax", "anchored"):
            with pytest.raises(InputError, match="no target exists"):
                one.target(transform, reference=torch.ones(len(chosen)) / len(chosen))
        return
    p_ref = np.array(weights) / np.sum(weights)
    size = len(chosen) + 3
    expected = {
        "relu": np.where(d > 0, d, 0),
        "shift": d - d.min(),
        "softmax": special.softmax(d * math.log(len(d)) / (np.abs(d).max() * temperature)),
        "anchored": np.maximum(p_ref + strength * d, 0),
    }
    for transform, raw in expected.items():
        target = one.target(
            transform, temperature=temperature, strength=strength, reference=torch.from_numpy(p_ref), size=size
        )
        assert target.shape == (size,)
        assert float(target.min()) >= 0
        assert abs(float(target.sum()) - 1) < 1e-12
        assert not target[len(chosen) :].any()
        np.testing.assert_allclose(target[: len(chosen)].numpy(), raw / raw.sum(), rtol=1e-6, atol=1e-12)


@given(counts=COUNTS)
@settings(max_examples=100, deadline=None)
def test_confidence_is_the_two_proportion_test(counts: tuple[list[int], list[int], list[float]]) -> None:
    """z² is Pearson's χ² of the 2×2 table (token or not, chosen or rejected), which SciPy computes on its own."""
    chosen, rejected, _ = counts
    one = preference(chosen, rejected)
    for index, z in enumerate(one.confidence().tolist()):
        table = np.array([[c[index], sum(c) - c[index]] for c in (chosen, rejected)])
        if (table.sum(0) == 0).any():
            assert z == 0  # never seen, or the only token seen
            continue
        expected = stats.chi2_contingency(table, correction=False).statistic
        assert z**2 == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert np.sign(z) == np.sign(float(one.difference()[index]))


def test_confidence_by_hand() -> None:
    """Token 0: 6 of 10 against 1 of 5, pooled 7/15: z = .4 / sqrt(7/15 · 8/15 · (1/10 + 1/5)) = 1.46385..."""
    z = HAND.confidence()
    assert float(z[0]) == pytest.approx(0.4 / math.sqrt(7 / 15 * 8 / 15 * 0.3), rel=1e-14)
    assert float(z[4]) == 0
    error = HAND.standard_error()
    assert float(error[0]) == pytest.approx(math.sqrt(0.6 * 0.4 / 10 + 0.2 * 0.8 / 5), rel=1e-14)
    assert float(error[4]) == 0


def test_standard_error_is_the_spread_of_d() -> None:
    """Draw the counts 4,000 times: the spread of d is the standard error, and 95 % of the intervals hold the truth."""
    generator = np.random.default_rng(0)
    p, q, m, n = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.4, 0.3, 0.1, 0.2]), 400, 300
    drawn = [preference(*map(list, pair)) for pair in zip(
        generator.multinomial(m, p, 4000).tolist(), generator.multinomial(n, q, 4000).tolist(), strict=True
    )]  # fmt: skip
    differences = torch.stack([one.difference() for one in drawn])
    errors = torch.stack([one.standard_error() for one in drawn])
    np.testing.assert_allclose(errors.mean(0), differences.std(0), rtol=0.04)
    covered = ((differences - torch.from_numpy(p - q)).abs() < 1.96 * errors).double().mean(0)
    assert float((covered - 0.95).abs().max()) < 0.015


# --- merging --------------------------------------------------------------------------------------------------------

VECTOR = st.lists(st.integers(0, 2**40), min_size=4, max_size=4)


@given(counts=st.lists(st.tuples(VECTOR, VECTOR, st.sampled_from("xyz")), min_size=3, max_size=3))
@settings(max_examples=100, deadline=None)
def test_merge_is_associative_and_commutative(counts: list[tuple[list[int], list[int], str]]) -> None:
    a, b, c = (preference(chosen, rejected, source=source) for chosen, rejected, source in counts)
    assert a.merge(b) == b.merge(a)
    assert a.merge(b).merge(c) == a.merge(b.merge(c))
    merged = a.merge(b)
    assert merged.chosen_counts.tolist() == [
        left + right for left, right in zip(counts[0][0], counts[1][0], strict=True)
    ]
    assert merged.rejected_counts.tolist() == [x + y for x, y in zip(counts[0][1], counts[1][1], strict=True)]
    assert merged.rows == 6


def test_merge_refuses_another_tokenizer_or_policy() -> None:
    other = preference([1, 1, 1, 1, 2], [1, 1, 1, 1, 1], tokenizer=Vocabulary(list("abcdf")))
    other.provenance["sources"][0]["tokenizer"] = "another/one"
    with pytest.raises(InputError, match=r"a/tokenizer \(vocabulary \w{12}\).*another/one \(vocabulary \w{12}\)"):
        HAND.merge(other)
    other = preference([1] * 5, [1] * 5, tokenizer=TOKENIZER, policy={"max_length": 16})
    with pytest.raises(InputError, match=r'"max_length": 8.*"max_length": 16'):
        HAND.merge(other)


# --- tokenizers -----------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_the_vocabulary() -> None:
    same = Vocabulary(list("abcde"), name="another/name")
    HAND.check_tokenizer(TOKENIZER)
    HAND.check_tokenizer(same)
    for tokens in ("abced", "abcd", "abcdef", "abcdE"):
        with pytest.raises(InputError, match=r"tokenizer is a/tokenizer \(vocabulary \w+\), but .* a/tokenizer \(voc"):
            HAND.check_tokenizer(Vocabulary(list(tokens)))
    with pytest.raises(InputError, match="of unknown name"):
        PreferenceDistribution(HAND.chosen_counts, HAND.rejected_counts, {}).check_tokenizer(TOKENIZER)


def test_size_counts_holes() -> None:
    tokenizer = Vocabulary([])
    tokenizer.get_vocab = lambda: {"a": 0, "b": 7}  # type: ignore[method-assign]
    assert vocabulary_size(tokenizer) == 8


def test_an_added_token_changes_the_fingerprint(tiny_tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    before = vocabulary_fingerprint(tokenizer)
    tokenizer.add_tokens(["<new>"])
    assert vocabulary_fingerprint(tokenizer) != before
    assert vocabulary_size(tokenizer) == len(tokenizer)
    assert tokenizer_name(tokenizer) == tiny_tokenizer.name  # not the whole path
    assert tokenizer_name(TOKENIZER) == "a/tokenizer"
    assert tokenizer_name(object()) == "object"


def test_check_head() -> None:
    HAND.check_head(5)
    HAND.check_head(8)
    for call in (lambda: HAND.check_head(4), lambda: HAND.target(size=4), lambda: HAND.preferred(4)):
        with pytest.raises(InputError, match="head has 4 rows, but the preference distribution covers 5"):
            call()


# --- files ----------------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path: Path) -> None:
    path = HAND.save(tmp_path / "new" / "p.safetensors")
    again = PreferenceDistribution.load(path)
    assert again == HAND
    assert again.provenance == HAND.provenance
    assert os.listdir(path.parent) == ["p.safetensors"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    preference([5, 1], [1, 5]).save(path)  # replaces
    assert PreferenceDistribution.load(path).vocab_size == 2


def test_same_counts_make_the_same_bytes(tmp_path: Path) -> None:
    """safetensors alone orders its metadata at random, so eight files of it are seldom all alike."""
    files = {HAND.save(tmp_path / f"{index}.safetensors").read_bytes() for index in range(8)}
    assert len(files) == 1
    assert len(files.pop()) % 8 == 0


def test_what_was_loaded_does_not_hang_on_the_file(tmp_path: Path) -> None:
    """safetensors maps the file into memory; overwritten in place (as `cp` does), it would change the counts."""
    path = HAND.save(tmp_path / "p.safetensors")
    again = PreferenceDistribution.load(path)
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert again == HAND


@given(VECTOR, VECTOR, st.text())
@settings(max_examples=40, deadline=None)
def test_any_counts_and_names_survive_a_file(chosen: list[int], rejected: list[int], source: str) -> None:
    import tempfile

    one = preference(chosen, rejected, source=source)
    with tempfile.TemporaryDirectory() as folder:
        assert PreferenceDistribution.load(one.save(Path(folder) / "p.safetensors")) == one


def test_every_truncation_and_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = HAND.save(tmp_path / "p.safetensors")
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"preference file|no preference distribution"):
            PreferenceDistribution.load(path)
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with contextlib.suppress(InputError):
            assert PreferenceDistribution.load(path) == HAND, position  # a flip in JSON's white space means the same


def rewritten(path: Path, tensors: dict[str, torch.Tensor] | None = None, **metadata: str) -> Path:
    """A well-formed safetensors file with other content."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    path.write_bytes(save(tensors or load(content), {**header["__metadata__"], **metadata}))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "2"}, "has schema 2, and this version reads schema 1"),
        ({"format": "something"}, "no preference distribution"),
        ({"provenance": "{"}, "damaged"),
        ({"provenance": "{}"}, "damaged"),
        ({"digest": "0"}, "damaged"),
        ({"tensors": {"x": torch.zeros(2)}}, "no preference distribution"),
        ({"tensors": {"chosen_counts": torch.ones(5), "rejected_counts": torch.ones(5)}}, "damaged"),
        (
            {"tensors": {"chosen_counts": torch.tensor([6, 2, 2, 1, 0]), "rejected_counts": HAND.rejected_counts}},
            "damaged",
        ),
    ],
)
def test_other_content_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = rewritten(HAND.save(tmp_path / "p.safetensors"), **change)
    with pytest.raises(InputError, match=message):
        PreferenceDistribution.load(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        PreferenceDistribution.load(tmp_path / "no.safetensors")
    with pytest.raises(InputError, match="does not exist"):
        PreferenceDistribution.load(tmp_path)
    path = tmp_path / "p.safetensors"
    path.write_bytes(pickle.dumps({"chosen_counts": [1]}))
    with pytest.raises(InputError, match="truncated or damaged"):
        PreferenceDistribution.load(path)
    with pytest.raises(InputError, match=r"ending in \.safetensors"):
        HAND.save(tmp_path / "p.pt")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        HAND.save(tmp_path / "file" / "p.safetensors")


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def interrupted() -> None:
        with complete_or_absent(path) as temporary:
            temporary.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


# --- refusals -------------------------------------------------------------------------------------------------------


def test_refused_counts() -> None:
    good = torch.tensor([1, 2])
    for bad in (torch.tensor([1.0, 2.0]), torch.tensor([1, 2, 3]), torch.tensor([[1, 2]]), torch.tensor([1, -2])):
        with pytest.raises(InputError, match="rejected_counts"):
            PreferenceDistribution(good, bad, {})
    with pytest.raises(InputError, match="chosen_counts"):
        PreferenceDistribution(torch.tensor(3), good, {})
    empty = torch.tensor([], dtype=torch.int64)
    with pytest.raises(InputError, match="chosen_counts is empty"):
        PreferenceDistribution(empty, empty, {})


def test_an_empty_side_is_refused() -> None:
    for one, side in ((preference([0, 0], [1, 2]), "chosen"), (preference([1, 2], [0, 0]), "rejected")):
        for call in (one.difference, one.target, one.confidence, one.standard_error, one.preferred):
            with pytest.raises(InputError, match=f"no {side} token"):
                call()


def test_no_preference_no_target() -> None:
    same = preference([2, 4, 6], [1, 2, 3])  # the same shares from different counts
    for transform in ("relu", "shift", "softmax", "anchored"):
        with pytest.raises(InputError, match="no target exists"):
            same.target(transform, reference=torch.ones(3) / 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transform": "relu6"}, "transform is 'relu6', expected one of relu, shift, softmax, chosen, anchored"),
        ({"transform": "softmax", "temperature": 0.0}, "temperature is 0.0"),
        ({"transform": "softmax", "temperature": math.nan}, "temperature is nan"),
        ({"transform": "anchored"}, "reference is missing"),
        ({"transform": "anchored", "reference": torch.ones(4) / 4}, r"shape \(4,\)"),
        ({"transform": "anchored", "reference": torch.ones(1, 5) / 5}, r"shape \(1, 5\)"),
        ({"transform": "anchored", "reference": torch.ones(5)}, "sums to 5"),
        ({"transform": "anchored", "reference": torch.tensor([1.5, -0.5, 0, 0, 0])}, "from -0.5"),
        ({"transform": "anchored", "reference": torch.full((5,), math.nan)}, "nan"),
        (
            {"transform": "anchored", "reference": torch.tensor([0.0, 0, 0, 0, 0, 1]), "size": 6},
            "no mass on the tokenizer's ids",
        ),
        ({"transform": "anchored", "reference": torch.ones(5) / 5, "strength": -1.0}, "strength is -1.0"),
        ({"transform": "anchored", "reference": torch.ones(5) / 5, "strength": math.inf}, "strength is inf"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        HAND.target(**options)
