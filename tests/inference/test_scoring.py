"""Scores and divergences of sequences against materialised logits."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from plot_align.errors import RunError
from plot_align.inference import scoring
from plot_align.inference.scoring import divergences, score
from plot_align.preference.estimation import ScoredSequence


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def other(model: torch.nn.Module, tiny_llama: Path) -> torch.nn.Module:
    torch.manual_seed(1)
    moved = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return moved


SEQUENCES = [
    ScoredSequence(np.array(ids, np.int32), start, stop)
    for ids, start, stop in (
        ([5, 9, 17, 40, 2], 2, 5),
        ([7, 7, 30], 1, 2),
        ([11, 3], 2, 2),  # nothing scored
        (list(range(20, 34)), 1, 14),
    )
]


def _log_p(model: torch.nn.Module, sequence: ScoredSequence) -> torch.Tensor:
    """(scored, V) float64 log-probabilities of the positions that predict the scored tokens, one sequence alone."""
    ids = torch.from_numpy(sequence.ids.astype(np.int64))
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0].double()
    return logits.log_softmax(-1)[sequence.start - 1 : sequence.stop - 1]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_are_those_of_materialised_logits(model: torch.nn.Module, batch_size: int) -> None:
    done: list[int] = []
    found = score(model, SEQUENCES, batch_size=batch_size, advance=done.append)
    total = torch.zeros_like(found.total)
    for i, sequence in enumerate(SEQUENCES):
        log_p = _log_p(model, sequence)
        tokens = torch.from_numpy(sequence.ids[sequence.start : sequence.stop].astype(np.int64))
        expected = log_p.gather(1, tokens[:, None]).sum()
        assert float(found.logps[i]) == pytest.approx(float(expected), abs=1e-4)
        total += log_p.exp().sum(0)
    assert found.tokens.tolist() == [3, 1, 0, 13]
    torch.testing.assert_close(found.total, total, atol=1e-5, rtol=1e-5)
    assert float(found.total.sum()) == pytest.approx(17)  # one for each scored position
    assert sum(done) == 3


@pytest.mark.parametrize("block", [1, 1 << 26])
def test_divergences_are_those_of_materialised_logits(
    model: torch.nn.Module, other: torch.nn.Module, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_BLOCK", block)
    found = divergences(model, other, SEQUENCES, batch_size=2)
    for i, sequence in enumerate(SEQUENCES):
        if sequence.start == sequence.stop:
            assert math.isnan(found[i])
            continue
        p, q = _log_p(model, sequence), _log_p(other, sequence)
        expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()
        assert float(found[i]) == pytest.approx(float(expected), rel=1e-4)
        assert float(expected) > 0.01


def test_a_model_has_no_divergence_from_itself(model: torch.nn.Module) -> None:
    found = divergences(model, model, SEQUENCES)
    assert found.nan_to_num(0.0).abs().max() < 1e-6


def test_the_mode_is_left_as_it_was(model: torch.nn.Module) -> None:
    model.train()
    score(model, SEQUENCES)
    assert model.training
    model.eval()


def test_an_overflowing_model_is_reported(tiny_llama: Path) -> None:
    broken = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(float("inf"))
    with pytest.raises(RunError, match="not finite"):
        score(broken, SEQUENCES)
