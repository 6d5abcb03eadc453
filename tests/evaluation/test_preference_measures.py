"""Accuracy and displacement on pairs, against the model's own loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from plot_align.errors import InputError
from plot_align.evaluation.preference import Displacement, PreferenceAccuracy
from plot_align.evaluation.subject import Subject

PAIRS: list[dict[str, list[dict[str, str]]]] = [
    {
        "prompt": [{"role": "user", "content": f"what is {n} plus two ?"}],
        "chosen": [{"role": "assistant", "content": f"the sum is {n + 2} ."}],
        "rejected": [{"role": "assistant", "content": "leave me alone . " * (n % 3 + 1)}],
    }
    for n in range(7)
]
for _row in PAIRS[::2]:  # so that neither accuracy is 0 or 1
    _row["chosen"], _row["rejected"] = _row["rejected"], _row["chosen"]


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS), encoding="utf-8")
    return str(path)


@pytest.fixture
def subject(tiny_base: Path, tmp_path: Path) -> Subject:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    base = Subject(AutoModelForCausalLM.from_pretrained(tiny_base), tokenizer, "base", "base", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return Subject(model, tokenizer, "tuned", "tuned", tmp_path, reference=base)


def _logp(subject: Subject, row: dict[str, list[dict[str, str]]], side: str) -> tuple[float, int]:
    whole = subject.tokenizer.apply_chat_template([*row["prompt"], *row[side]], return_dict=False)
    start = len(subject.rows([row["prompt"]])[0])
    ids = torch.tensor([whole])
    labels = ids.clone()
    labels[0, :start] = -100
    with torch.no_grad():
        return -float(subject.model(input_ids=ids, labels=labels).loss) * (len(whole) - start), len(whole) - start


def test_accuracy_is_whether_the_chosen_answer_is_likelier(subject: Subject, pairs: str) -> None:
    measure = PreferenceAccuracy(pairs=pairs)
    measure.check()
    found = measure.run(subject)
    whole, mean = [], []
    for row in PAIRS:
        (chosen, n), (rejected, m) = _logp(subject, row, "chosen"), _logp(subject, row, "rejected")
        whole.append(float(chosen > rejected))
        mean.append(float(chosen / n > rejected / m))
    assert list(found.quantities["accuracy"]["items"].values()) == whole
    assert list(found.quantities["accuracy_per_token"]["items"].values()) == mean
    assert 0 < sum(whole) + sum(mean) < 14  # neither is trivial


def test_displacement_is_the_shift_of_both_sides(subject: Subject, pairs: str) -> None:
    found = Displacement(pairs=pairs).run(subject)
    assert subject.reference is not None
    for side in ("chosen", "rejected"):
        shifts = [_logp(subject, row, side)[0] - _logp(subject.reference, row, side)[0] for row in PAIRS]
        assert list(found.quantities[side]["items"].values()) == pytest.approx(shifts, abs=1e-3)
        assert max(map(abs, shifts)) > 0.1
    margins = [
        a - b
        for a, b in zip(
            found.quantities["chosen"]["items"].values(), found.quantities["rejected"]["items"].values(), strict=True
        )
    ]
    assert list(found.quantities["reward_accuracy"]["items"].values()) == [float(margin > 0) for margin in margins]


def test_a_tie_is_half(subject: Subject, tmp_path: Path) -> None:
    """Both sides alike, and a model against itself."""
    same = {"prompt": PAIRS[0]["prompt"], "chosen": PAIRS[0]["chosen"], "rejected": PAIRS[0]["chosen"]}
    path = tmp_path / "same.jsonl"
    path.write_text(json.dumps(same) + "\n", encoding="utf-8")
    accuracy = PreferenceAccuracy(pairs=str(path)).run(subject).quantities
    assert accuracy["accuracy"]["value"] == accuracy["accuracy_per_token"]["value"] == 0.5
    assert subject.reference is not None
    subject.reference.reference = subject.reference
    found = Displacement(pairs=str(path)).run(subject.reference).quantities
    assert found["reward_accuracy"]["value"] == 0.5
    assert found["chosen"]["value"] == 0


def test_pairs_are_scored_once_whoever_asks(subject: Subject, pairs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from plot_align.evaluation import preference

    calls = []
    real = preference.score
    monkeypatch.setattr(preference, "score", lambda *a, **k: calls.append(1) or real(*a, **k))
    PreferenceAccuracy(pairs=pairs).run(subject)
    Displacement(pairs=pairs).run(subject)
    assert len(calls) == 4  # two sides of two models


def test_a_limit_draws_the_same_pairs_for_every_model(subject: Subject, pairs: str) -> None:
    first = PreferenceAccuracy(pairs=pairs, limit=4).run(subject)
    assert subject.reference is not None
    second = PreferenceAccuracy(pairs=pairs, limit=4).run(subject.reference)
    assert first.quantities["accuracy"]["n"] == second.quantities["accuracy"]["n"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": "no/such/file.jsonl"}, "pairs is 'no/such/file.jsonl', which does not exist"),
        ({"pairs": "some/pairs", "limit": 0}, "limit is 0, expected 1 or more"),
        ({"pairs": "some/pairs", "max_length": 0}, "max_length is 0"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_loaded(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PreferenceAccuracy(**options).check()  # type: ignore[arg-type]


def test_nothing_left_to_score_is_said(subject: Subject, pairs: str) -> None:
    with pytest.raises(InputError, match=r"no pair of .* has a token to score"):
        PreferenceAccuracy(pairs=pairs, max_length=2).run(subject)


def test_a_reference_of_another_vocabulary_is_refused(subject: Subject, pairs: str, tiny_tokenizer: Path) -> None:
    assert subject.reference is not None
    subject.reference.tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    with pytest.raises(InputError, match="different vocabularies"):
        Displacement(pairs=pairs).run(subject)
