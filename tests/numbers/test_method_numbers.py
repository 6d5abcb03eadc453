"""PRO, filters and the scores of answers on the hardest numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from oracles.pro import naive_pro_loss
from plot_align.errors import InputError, RunError
from plot_align.inference.scoring import divergences, score
from plot_align.methods.filter import keep_pairs, length_ratio, pair_scores
from plot_align.methods.pro_loss import pro_loss
from plot_align.methods.ranked import ranked_row
from plot_align.preference.estimation import ScoredSequence


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


@pytest.fixture
def other(tiny_llama: Path) -> Any:
    found = AutoModelForCausalLM.from_pretrained(tiny_llama)
    found.lm_head.weight.data.mul_(3)
    return found


def sequence(*ids: int, start: int = 1) -> ScoredSequence:
    return ScoredSequence(np.array(ids, np.int32), start, len(ids))


# --- PRO -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rewards", [[3e38, -3e38], [1e31, 0.0], [1e300, -1e300]])
def test_rewards_too_far_apart_are_named(rewards: list[float]) -> None:
    """Their difference, or its product with a log-probability, is infinite in float32: the loss would be NaN."""
    dtype = torch.float64 if abs(rewards[0]) > 3.4e38 else torch.float32
    with pytest.raises(InputError, match=r"rewards differ by up to .*scale them"):
        pro_loss(torch.tensor([[-5.0, -9.0]], dtype=dtype), torch.ones(1, 2), torch.tensor([rewards], dtype=dtype))


def test_the_widest_rewards_that_are_taken() -> None:
    """s = (−100, −200), Δ = 10³⁰: the right order costs nothing, the wrong one 10³²."""
    for rewards, expected in (([1e30, 0.0], 0.0), ([0.0, 1e30], 1e32)):
        logps = torch.tensor([[-100.0, -200.0]], requires_grad=True)
        found = pro_loss(logps, torch.ones(1, 2), torch.tensor([rewards]), sft_weight=0)
        found.loss.backward()
        assert float(found.loss.detach()) == pytest.approx(expected, rel=1e-6)
        assert logps.grad is not None
        assert logps.grad.isfinite().all()


def test_a_completion_of_no_tokens_counts_as_one() -> None:
    found = pro_loss(torch.tensor([[0.0, -4.0]]), torch.tensor([[0, 2]]), torch.tensor([[1.0, 0.0]]))
    ranking, sft = naive_pro_loss([0.0, -4.0], [1, 2], [1.0, 0.0])
    assert float(found.loss) == pytest.approx(ranking + sft, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, "8", None, 10**400, [1.0]])
def test_a_reward_that_is_no_number_is_named(bad: Any) -> None:
    row = {"prompt": "p", "completions": ["a", "b"], "rewards": [1.0, bad]}
    with pytest.raises(InputError, match=r"data row 3: a reward is .*expected a finite number"):
        ranked_row(row, "data row 3")
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 1.0, "score_rejected": bad}
    with pytest.raises(InputError, match=r"data row 3: a reward is .*expected a finite number"):
        ranked_row(pair, "data row 3")


# --- filters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["highest", "lowest"])
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-320, 1e308, -7.5])
def test_equal_scores_keep_the_first_rows(value: float, direction: str) -> None:
    kept = keep_pairs(torch.full((7,), value, dtype=torch.float64), 0.4, direction)
    assert kept.tolist() == [True] * 3 + [False] * 4


def test_a_margin_that_overflows_is_no_score() -> None:
    """1e308 − (−1e308) is infinite: such a pair is never kept, in either direction."""
    scores = torch.tensor([[1e308, -1e308], [1.0, 0.0], [-1e308, 1e308]], dtype=torch.float64)
    for direction in ("highest", "lowest"):
        assert keep_pairs(pair_scores(scores, "margin"), 1.0, direction).tolist() == [False, True, False]


def test_no_score_at_all_is_named() -> None:
    with pytest.raises(InputError, match="none of the 3 pairs has a scored token"):
        keep_pairs(torch.full((3,), math.nan, dtype=torch.float64), 0.5)
    assert length_ratio(torch.tensor([[math.nan, 3.0], [2.0, 6.0]])).isnan().tolist() == [True, False]


# --- log-probabilities and KL ----------------------------------------------------------------------------------------


def test_kl_where_the_model_masks_a_token(model: Any, other: Any) -> None:
    """p = 0 contributes 0·log 0 = 0, against the sum over the other tokens in float64."""
    model.lm_head.weight.data[7] = 0
    bias = torch.zeros(model.config.vocab_size)
    bias[7] = -math.inf
    model.lm_head.bias = torch.nn.Parameter(bias)
    one = sequence(5, 9, 17, 40)
    ids = torch.from_numpy(one.ids.astype(np.int64))[None]
    with torch.no_grad():
        p, q = (m(input_ids=ids).logits[0, :-1].double().log_softmax(-1) for m in (model, other))
    rest = torch.arange(p.size(-1)) != 7
    expected = (p[:, rest].exp() * (p[:, rest] - q[:, rest])).sum(-1).mean()
    assert float(divergences(model, other, [one])[0]) == pytest.approx(float(expected), rel=1e-5)


def test_kl_is_infinite_where_the_reference_masks_a_token(model: Any, other: Any) -> None:
    bias = torch.zeros(other.config.vocab_size)
    bias[7] = -math.inf
    other.lm_head.bias = torch.nn.Parameter(bias)
    assert divergences(model, other, [sequence(5, 9, 17)]).tolist() == [math.inf]


@pytest.mark.parametrize("which", ["model", "reference"])
def test_kl_of_a_broken_model_is_named_and_not_left_out(model: Any, other: Any, which: str) -> None:
    """NaN stands for an answer without tokens, so a NaN of the logits must not pass as one."""
    (model if which == "model" else other).lm_head.weight.data[3] = math.nan
    with pytest.raises(RunError, match="logits that are not finite"):
        divergences(model, other, [sequence(5, 9, 17)])


def test_one_token_that_nothing_predicts(model: Any, other: Any) -> None:
    empty = ScoredSequence(np.array([5], np.int32), 1, 1)
    assert divergences(model, other, [empty]).isnan().all()
    found = score(model, [empty, sequence(5, 9)], batch_size=1)
    assert (found.logps[0], found.tokens.tolist()) == (0.0, [0, 1])


def test_half_precision_that_overflows_is_named(model: Any) -> None:
    """Hidden states times a head of thousands: logits beyond 65504, infinite in float16 and fine in float32."""
    model.lm_head.weight.data.mul_(1e6)
    assert score(model, [sequence(5, 9, 17)]).logps.isfinite().all()
    with pytest.raises(RunError, match=r"not finite.*use bfloat16 or float32"):
        score(model.half(), [sequence(5, 9, 17)])
