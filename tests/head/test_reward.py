"""DEFT's distribution reward: the linear form against materialised log-probabilities, values by hand, gradcheck."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles.deft import materialised_log_reward
from plot_align.errors import InputError
from plot_align.head.reward import log_reward, reward_scale
from plot_align.preference.distribution import PreferenceDistribution
from plot_align.transport import Divergence
from plot_align.transport.reward import DistributionReward


def difference_of(generator, vocab, zeros=0.4):
    """d of two random count vectors, with tokens that neither side uses."""
    counts = torch.randint(0, 20, (2, vocab), generator=generator).double()
    counts[:, torch.rand(vocab, generator=generator) < zeros] = 0
    counts[:, 0] += 1
    chosen, rejected = counts / counts.sum(-1, keepdim=True)
    return chosen - rejected


def problem(seed, n=7, vocab=11, size=5, segments=3, dtype=torch.float64, bias=True):
    """Hidden states, head, d, and the weights of positions in segments, one of which has none."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    where = torch.randint(0, segments, (n,), generator=generator).sort().values
    where[where == 1] = 0  # segment 1 is empty
    weights = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    weights = weights / torch.zeros(segments, dtype=torch.float64).index_add(0, where, weights)[where]
    inputs = normal(n, size), normal(vocab, size), normal(vocab) if bias else None
    return inputs, difference_of(generator, vocab), {"weights": weights, "segments": where, "num_segments": segments}


def gradients(function, inputs, *args, **options):
    """R, and the gradient of a weighted sum of its segments in every input."""
    leaves = [x for x in inputs if x is not None]
    value = function(*inputs, *args, **options)
    mixed = (value * torch.arange(1, len(value) + 1, dtype=value.dtype)).sum()
    return value.detach(), torch.autograd.grad(mixed, leaves)


def test_by_hand():
    """Two tokens, H = 1: logits (h, 0), so log p = h − log(1 + e^h), −log(1 + e^h); with d = (a, −a): R = a·h.

    Two positions, h = 1 and 5, weighted 3/4 and 1/4: R = a·(3/4 + 5/4) = 2a, twice that at scale 2. A bias of 10 on
    the first token adds 10a.
    """
    hidden = torch.tensor([[1.0], [5.0]], dtype=torch.float64)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    d = torch.tensor([0.3, -0.3], dtype=torch.float64)
    weights = torch.tensor([0.75, 0.25], dtype=torch.float64)
    assert log_reward(hidden, weight, None, d, weights=weights).tolist() == pytest.approx([0.6], rel=1e-15)
    assert log_reward(hidden, weight, None, d, weights=weights, scale=2.0).tolist() == pytest.approx([1.2], rel=1e-15)
    bias = torch.tensor([10.0, 0.0], dtype=torch.float64)
    assert log_reward(hidden, weight, bias, d, weights=weights).tolist() == pytest.approx([3.6], rel=1e-15)
    log_p = [h - math.log1p(math.exp(h)) for h in (1.0, 5.0)]
    log_q = [-math.log1p(math.exp(h)) for h in (1.0, 5.0)]
    by_definition = 0.3 * (0.75 * log_p[0] + 0.25 * log_p[1]) - 0.3 * (0.75 * log_q[0] + 0.25 * log_q[1])
    assert by_definition == pytest.approx(0.6, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(0, 9),
    vocab=st.integers(2, 40),
    segments=st.integers(2, 4),
    bias=st.booleans(),
    scale=st.floats(0.05, 20.0),
)
def test_equals_materialised_log_probabilities(seed, n, vocab, segments, bias, scale):
    inputs, d, where = problem(seed, n=n, vocab=vocab, segments=segments, bias=bias)
    value, grads = gradients(log_reward, inputs, d, scale=scale, **where)
    expected, expected_grads = gradients(materialised_log_reward, inputs, d, scale=scale, **where)
    assert value.shape == (segments,)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12 * scale)
    for found, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12 * scale)
    assert value[1] == 0  # the segment without positions


def test_the_specification_is_the_definition():
    """The materialised form, which the linear one is compared with, against a plain loop over tokens and positions."""
    (hidden, weight, bias), d, where = problem(3)
    hidden, weight, bias = hidden.detach(), weight.detach(), bias.detach()
    expected = [0.0] * where["num_segments"]
    for t in range(len(hidden)):
        z = [0.5 * float(weight[v] @ hidden[t] + bias[v]) for v in range(len(weight))]
        log_sum = math.log(sum(math.exp(x) for x in z))
        reward = sum(float(d[v]) * (z[v] - log_sum) for v in range(len(weight)))
        expected[int(where["segments"][t])] += float(where["weights"][t]) * reward
    assert materialised_log_reward(hidden, weight, bias, d, scale=0.5, **where).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias):
    inputs, d, where = problem(1, bias=bias)
    leaves = [x for x in inputs if x is not None]

    def reward(*leaves):
        hidden, weight, *rest = leaves
        return log_reward(hidden, weight, rest[0] if rest else None, d, scale=0.7, **where)

    assert torch.autograd.gradcheck(reward, leaves)


def test_second_derivatives_are_refused():
    (hidden, weight, _), d, where = problem(0, bias=False)
    value = log_reward(hidden, weight, None, d, **where).sum()
    with pytest.raises(InputError, match="create_graph is True"):
        torch.autograd.grad(value, hidden, create_graph=True)


def test_one_segment_is_the_default():
    (hidden, weight, bias), d, where = problem(5)
    weights = where["weights"] / where["weights"].sum()
    value = log_reward(hidden, weight, bias, d, weights=weights)
    expected = weights @ ((hidden @ weight.T + bias).log_softmax(-1) @ d)
    torch.testing.assert_close(value, expected.unsqueeze(0))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), shift=st.floats(-50, 50))
def test_shift_invariance(seed, shift):
    """Adding a constant to all logits, through the bias or through every row of the head, changes nothing."""
    (hidden, weight, bias), d, where = problem(seed)
    value = log_reward(hidden, weight, bias, d, **where)
    direction = torch.full((weight.size(1),), shift, dtype=torch.float64)
    for moved in (
        log_reward(hidden, weight, bias + shift, d, **where),
        log_reward(hidden, weight + direction, bias, d, **where),
    ):
        torch.testing.assert_close(moved, value, rtol=0, atol=1e-12 * (1 + abs(shift)))


def test_linear_and_antisymmetric_in_d():
    (hidden, weight, bias), d, where = problem(2)
    _, other, _ = problem(8)
    one, two, both, flipped = (log_reward(hidden, weight, bias, x, **where) for x in (d, other, 2 * d + 3 * other, -d))
    torch.testing.assert_close(both, 2 * one + 3 * two)
    assert torch.equal(flipped, -one)
    assert torch.equal(log_reward(hidden, weight, bias, torch.zeros_like(d), **where), torch.zeros_like(one))


def test_padding_rows_change_nothing():
    """Rows of the head beyond the tokenizer, whatever they hold: d is 0 there, so they get no gradient either."""
    preference = PreferenceDistribution(torch.tensor([3, 0, 5, 2]), torch.tensor([1, 4, 0, 2]), {})
    d, padded = preference.difference(), preference.difference(size=6)
    assert torch.equal(padded, torch.cat([d, torch.zeros(2, dtype=torch.float64)]))
    with pytest.raises(InputError, match="head has 3 rows"):
        preference.difference(size=3)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    weight[4:] *= 100
    weight.requires_grad_()
    weights = torch.full((5,), 0.2, dtype=torch.float64)
    value = log_reward(hidden, weight, None, padded, weights=weights)
    torch.testing.assert_close(value, log_reward(hidden, weight[:4], None, d, weights=weights))
    torch.testing.assert_close(value, materialised_log_reward(hidden, weight, None, padded, weights=weights))
    value.sum().backward()
    assert weight.grad[4:].abs().max() == 0
    assert weight.grad[:4].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    """Given the rounded inputs, R is within 1e-6·Σ|d|·max|z| of float64's, cancellation included, over 40,000 tokens
    (more than one block of rows) that share a large mean; gradients are rounded once to the inputs' dtype.

    The materialised form in the same dtype rounds its logits first: it must not be the more accurate one.
    """
    generator = torch.Generator().manual_seed(4)
    n, vocab, size = 24, 40_000, 16
    hidden = torch.randn(n, size, generator=generator).to(dtype)
    weight = (torch.randn(vocab, size, generator=generator) + 3).to(dtype)  # d sums to zero: the 3 must drop out
    d = difference_of(generator, vocab)
    weights = torch.full((n,), 1 / n)
    inputs = hidden.requires_grad_(), weight.requires_grad_(), None
    exact_inputs = [x if x is None else x.detach().double().requires_grad_() for x in inputs]
    value, grads = gradients(log_reward, inputs, d, weights=weights)
    exact, exact_grads = gradients(materialised_log_reward, exact_inputs, d, weights=weights.double())
    largest = float((exact_inputs[0] @ exact_inputs[1].T).detach().abs().max())
    error = float((value.double() - exact).abs())
    assert value.dtype == torch.float32
    assert error < 1e-6 * float(d.abs().sum()) * largest
    eager = float((materialised_log_reward(*inputs, d, weights=weights).double() - exact).abs())
    assert error <= eager + 1e-7 * largest
    rounding = torch.finfo(dtype).eps
    for found, wanted in zip(grads, exact_grads, strict=True):
        assert found.dtype == dtype
        scale = float(wanted.abs().max())
        torch.testing.assert_close(found.double(), wanted, rtol=rounding, atol=1e-5 * scale + 2.0**-24)


def test_autocast_does_not_interfere():
    (hidden, weight, bias), d, where = problem(6, dtype=torch.float32)
    value = log_reward(hidden, weight, bias, d, **where)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = log_reward(hidden, weight, bias, d, **where)
        inside.sum().backward()
    assert torch.equal(inside, value)
    torch.testing.assert_close(hidden.grad, torch.autograd.grad(value.sum(), hidden)[0], rtol=0, atol=0)


def test_refused_shapes():
    (hidden, weight, bias), d, where = problem(0)
    with pytest.raises(InputError, match=r"difference has shape \(10,\), but \(11,\)"):
        log_reward(hidden, weight, bias, d[:-1], **where)
    with pytest.raises(InputError, match=r"weights has shape \(3,\), but \(7,\)"):
        log_reward(hidden, weight, bias, d, weights=torch.ones(3))


def test_reward_scale():
    assert reward_scale() == 1.0
    assert reward_scale(logit_scale=0.25, temperature=0.5) == 0.5
    with pytest.raises(InputError, match=r"final_logit_softcapping is 30\), .* use the prob reading"):
        reward_scale(softcap=30.0)


# --- the probability reading -----------------------------------------------------------------------------------------


def test_prob_by_hand():
    """d = (1/2, −1/4, −1/4), p = (1/2, 1/4, 1/4): R = 1/4 − 1/16 − 1/16 = 1/8, and the cost is its negative."""
    d = torch.tensor([0.5, -0.25, -0.25], dtype=torch.float64)
    reward = DistributionReward(d)
    p = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]], dtype=torch.float64)
    assert reward.value(p).tolist() == [-0.125, 0.25]
    assert torch.equal(reward.potential(p), torch.stack([-d, -d]))
    assert reward.vocab_size == 3
    assert isinstance(reward, Divergence)


def test_prob_gradient_through_a_softmax():
    """gradcheck, and equation (4) of docs/mathematics.md: ∂(−R)/∂z = −p ⊙ (d − ⟨p, d⟩)."""
    d = difference_of(torch.Generator().manual_seed(2), 9)
    reward = DistributionReward(d)
    z = torch.randn(4, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: reward.value(z.softmax(-1)), z)
    (grad,) = torch.autograd.grad(reward(z.softmax(-1)).sum(), z)
    p = z.detach().softmax(-1)
    torch.testing.assert_close(grad, -p * (d - (p @ d).unsqueeze(-1)))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(1, 6), vocab=st.integers(2, 30))
def test_prob_is_linear_and_bounded(seed, n, vocab):
    """R of the mean is the mean of R (so granularities agree), and lies between min d and max d."""
    generator = torch.Generator().manual_seed(seed)
    d = difference_of(generator, vocab)
    p = torch.randn(n, vocab, generator=generator, dtype=torch.float64).mul(3).softmax(-1)
    cost = DistributionReward(d).value(p)
    torch.testing.assert_close(DistributionReward(d).value(p.mean(0)), cost.mean())
    assert bool((-cost <= d.max() + 1e-12).all())
    assert bool((-cost >= d.min() - 1e-12).all())


def test_prob_takes_and_ignores_a_target():
    d = difference_of(torch.Generator().manual_seed(2), 9)
    p = torch.full((2, 9), 1 / 9)
    other = torch.full((9,), 1 / 9)
    value, potential = DistributionReward(d).value_and_potential(p)
    for found, wanted in zip(DistributionReward(d).value_and_potential(p, other), (value, potential), strict=True):
        assert torch.equal(found, wanted)
    potential.mul_(0)  # its own memory: the constants and the other rows are not touched
    assert float(DistributionReward(d).potential(p).abs().sum()) > 0


def test_prob_dtype_and_state():
    """Constants stay in float64 whatever .half() asks for, and out of the state dict."""
    d = difference_of(torch.Generator().manual_seed(2), 9)
    reward = DistributionReward(d.float()).half()
    assert reward.difference.dtype == torch.float64
    assert reward.state_dict() == {}
    assert reward.value(torch.full((9,), 1 / 9, dtype=torch.bfloat16)).dtype == torch.float32
    with pytest.raises(InputError, match="last dimension must be"):
        reward.value(torch.full((8,), 1 / 8))


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        (torch.tensor([0.5, -0.4]), "sums to 0.1"),
        (torch.tensor([math.nan, 0.0]), "sums to nan"),
        (torch.tensor([math.inf, -math.inf]), "sums to nan"),
        (torch.tensor([1, -1]), "torch.int64 tensor"),
        (torch.zeros(2, 2), r"shape \(2, 2\)"),
    ],
)
def test_prob_refuses(difference, said):
    with pytest.raises(InputError, match=said):
        DistributionReward(difference)


def test_both_readings_agree_on_the_sign():
    """Raising the logits of preferred tokens raises R in both readings."""
    d = difference_of(torch.Generator().manual_seed(7), 12)
    hidden, weight = torch.ones(1, 1, dtype=torch.float64), d.unsqueeze(-1)  # logits c·d
    rewards = []
    for strength in (0.0, 1.0, 5.0):
        p = (strength * d).softmax(-1)
        log = log_reward(strength * hidden, weight, None, d, weights=torch.ones(1, dtype=torch.float64))
        rewards.append((float(log), -float(DistributionReward(d).value(p))))
    assert rewards[0][0] == 0
    assert rewards[0] < rewards[1] < rewards[2]
    assert rewards[0][1] < rewards[1][1] < rewards[2][1]
