"""PRO's loss against the formula as it is written, values derived by hand, and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles.pro import naive_pro_loss
from plot_align.errors import InputError
from plot_align.methods.pro_loss import pro_loss


def tensors(*rows: list[float], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [torch.tensor([row], dtype=dtype) for row in rows]


def test_two_completions_by_hand() -> None:
    """s = (−4/2, −9/3) = (−2, −3), Δ = 1: L_1 = 2 + log(e^−2 + e^−3) = log(1 + e^−1) = 0.3132616875;
    NLL(y_1) = 4, so 0.05·1²·4 = 0.2."""
    found = pro_loss(*tensors([-4.0, -9.0], [2.0, 3.0], [1.0, 0.0]))
    assert found.ranking.item() == pytest.approx(0.3132616875182228, rel=1e-14)
    assert found.sft.item() == pytest.approx(0.2, rel=1e-14)
    assert found.loss.item() == pytest.approx(0.5132616875182228, rel=1e-14)


def test_three_completions_by_hand() -> None:
    """s = (−1, −2, −1) with r = (3, 2, 0): Δ_1 = 3, Δ_2 = 2.
    L_1 = 3 + log(e^−3 + e^(−2·1) + e^(−1·3)) = log(1 + e + 1) = log(4.718281828) = 1.5514447139.
    L_2 = 4 + log(e^−4 + e^(−1·2)) = log(1 + e²) = 2.1269280110. Sum 3.6783727249.
    NLL(y_1) = 5, so 0.05·2²·5 = 1."""
    found = pro_loss(*tensors([-5.0, -4.0, -6.0], [5.0, 2.0, 6.0], [3.0, 2.0, 0.0]))
    assert found.ranking.item() == pytest.approx(math.log(2 + math.e) + math.log(1 + math.e**2), rel=1e-14)
    assert found.ranking.item() == pytest.approx(3.6783727249, abs=1e-9)
    assert found.sft.item() == pytest.approx(1.0, rel=1e-14)


def lists(tied: bool = False) -> st.SearchStrategy[list[tuple[float, int, float]]]:
    """(summed log-probability, length, reward) of 2 to 6 completions."""
    reward = st.integers(-3, 3).map(float) if tied else st.floats(-4, 4).map(lambda x: round(x, 3))
    one = st.tuples(st.floats(-40, 0), st.integers(1, 30), reward)
    return st.lists(one, min_size=2, max_size=6, unique_by=None if tied else lambda c: c[2])


def batch(rows: list[list[tuple[float, int, float]]], filler: float) -> list[torch.Tensor]:
    """Lists of different length as padded tensors, with rubbish in the padding."""
    widest = max(map(len, rows))
    padded = [[*row, *[(filler, 0, filler)] * (widest - len(row))] for row in rows]
    columns = [torch.tensor([[c[i] for c in row] for row in padded], dtype=torch.float64) for i in range(3)]
    return [*columns, torch.tensor([[i < len(row) for i in range(widest)] for row in rows])]


@settings(deadline=None)
@given(rows=st.lists(st.one_of(lists(), lists(tied=True)), min_size=1, max_size=4), weight=st.floats(0, 2))
def test_the_formula_on_ragged_lists_with_ties(rows: list, weight: float) -> None:
    found = pro_loss(*batch(rows, filler=math.nan), sft_weight=weight)
    for index, row in enumerate(rows):
        ranking, sft = naive_pro_loss(*zip(*row, strict=True), sft_weight=weight)
        assert found.ranking[index].item() == pytest.approx(ranking, rel=1e-10, abs=1e-10)
        assert found.sft[index].item() == pytest.approx(sft, rel=1e-12, abs=1e-12)
    assert found.loss.item() == pytest.approx((found.ranking + found.sft).mean().item(), rel=1e-12)


@settings(deadline=None)
@given(row=lists(), shift=st.floats(-100, 100), data=st.data())
def test_order_and_offset_of_rewards_change_nothing(row: list, shift: float, data: st.DataObject) -> None:
    permuted = [(logp, length, reward + shift) for logp, length, reward in data.draw(st.permutations(row))]
    one, other = pro_loss(*batch([row], 0)), pro_loss(*batch([permuted], 0))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_gradients_by_finite_differences() -> None:
    """Three lists of 4, 2 and 3 with a tie in the middle, a tie at the end, and NaN in the padding."""
    rows = [
        [(-9.0, 3, 2.0), (-7.0, 4, 1.0), (-5.0, 5, 1.0), (-3.0, 2, -1.0)],
        [(-4.0, 2, 0.5), (-8.0, 3, 1.5)],
        [(-6.0, 6, 3.0), (-2.0, 1, 0.0), (-5.0, 2, 0.0)],
    ]
    logps, lengths, rewards, present = batch(rows, filler=0.0)
    logps = logps.masked_fill(~present, math.nan)
    inside = logps[present].requires_grad_()

    def loss(values: torch.Tensor) -> torch.Tensor:
        return pro_loss(logps.masked_scatter(present, values), lengths, rewards, present).loss

    assert torch.autograd.gradcheck(loss, inside)


def test_a_tail_of_ties_is_a_constant() -> None:
    """Δ_2 = Δ_3 = 0: L_2 = log 3, L_3 = log 2 whatever the model says; only L_1 and the best's NLL have a gradient."""
    logps = torch.tensor([[-4.0, -3.0, -2.0, -1.0]], dtype=torch.float64, requires_grad=True)
    lengths, rewards = tensors([2.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0])
    first = math.log(math.exp(-2) + math.exp(-3) + math.exp(-2) + math.exp(-1)) + 2
    found = pro_loss(logps, lengths, rewards, sft_weight=0)
    assert found.loss.item() == pytest.approx(first + math.log(3) + math.log(2), rel=1e-12)
    (gradient,) = torch.autograd.grad(found.loss, logps)
    share = torch.tensor([-2.0, -3.0, -2.0, -1.0], dtype=torch.float64).softmax(0)  # of L_1 alone
    expected = (share - torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)) / lengths[0]
    torch.testing.assert_close(gradient[0], expected)


def test_equal_rewards_rank_nothing() -> None:
    logps = torch.tensor([[-4.0, -3.0, -2.0]], requires_grad=True)
    found = pro_loss(logps, torch.ones(1, 3), torch.full((1, 3), 7.0), sft_weight=0)
    assert found.loss.item() == pytest.approx(math.log(6), rel=1e-6)
    assert torch.equal(torch.autograd.grad(found.loss, logps)[0], torch.zeros(1, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_rewards_neither_overflow_nor_vanish(dtype: torch.dtype) -> None:
    """s = (−1, −2), Δ = 10⁴: the margin is s_1Δ − s_2Δ = ±10⁴, so L = 0 or 10⁴ and the gradient 0 or ∓Δ/length."""
    for rewards, expected, slope in (([1e4, 0.0], 0.0, 0.0), ([0.0, 1e4], 1e4, -1e4)):
        logps = torch.tensor([[-1.0, -2.0]], dtype=dtype, requires_grad=True)
        found = pro_loss(logps, torch.ones(1, 2), torch.tensor([rewards], dtype=dtype), sft_weight=0)
        assert found.loss.item() == pytest.approx(expected, rel=1e-6)
        gradient = torch.autograd.grad(found.loss, logps)[0][0]
        assert gradient[rewards.index(1e4)].item() == pytest.approx(slope, rel=1e-6)
    small = pro_loss(torch.tensor([[-1.0, -2.0]], dtype=dtype), torch.ones(1, 2), torch.tensor([[60.0, 0.0]]))
    assert small.ranking.item() == pytest.approx(math.exp(-60), rel=1e-5)  # log1p(e^−60), not rounded to 0


def test_bfloat16_is_widened() -> None:
    logps = torch.tensor([[-3.0, -5.0]], dtype=torch.bfloat16)
    found = pro_loss(logps, torch.tensor([[3, 7]]), torch.tensor([[1, 0]]))
    assert found.loss.dtype == torch.float32
    ranking, sft = naive_pro_loss([-3.0, -5.0], [3, 7], [1, 0])
    assert found.loss.item() == pytest.approx(ranking + sft, rel=1e-6)


def test_refusals() -> None:
    with pytest.raises(InputError, match=r"shapes \(1, 2\), \(1, 2\), \(1, 3\)"):
        pro_loss(torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1, 3))
    for bad in (math.nan, math.inf):
        with pytest.raises(InputError, match="rewards has a NaN or infinite entry"):
            pro_loss(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([[1.0, bad]]))
