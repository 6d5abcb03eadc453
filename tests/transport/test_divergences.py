"""KL, JS and total variation against SciPy, POT's 0-1 cost, closed forms; zeros and infinities included."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr

from oracles.transport import exact_cost
from plot_align.transport import JensenShannon, KullbackLeibler, TotalVariation, make_divergence


@st.composite
def pairs(draw, zeros=True):
    """Two distributions on the same 2 to 10 tokens; with ``zeros`` some entries are exactly 0."""
    n = draw(st.integers(2, 10))
    weight = st.floats(0.01, 1.0)
    if zeros:
        weight = st.one_of(st.just(0.0), weight)
    rows = [draw(st.lists(weight, min_size=n, max_size=n).filter(any)) for _ in range(2)]
    p, target = torch.tensor(rows, dtype=torch.float64)
    return p / p.sum(), target / target.sum()


def test_by_hand():
    """p = (1/2, 1/2, 0), P = (1/4, 1/2, 1/4).

    KL = 1/2 log 2; TV = (1/4 + 0 + 1/4) / 2 = 1/4; m = (3/8, 1/2, 1/8), so
    JS = (1/2 log 4/3 + 1/4 log 2/3 + 1/4 log 2) / 2 = (3/4 log 4/3) / 2, because log 2/3 + log 2 = log 4/3.
    """
    p = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    target = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    assert float(KullbackLeibler(target).value(p)) == pytest.approx(0.5 * math.log(2), rel=1e-14)
    assert float(JensenShannon(target).value(p)) == pytest.approx(0.375 * math.log(4 / 3), rel=1e-14)
    assert float(TotalVariation(target).value(p)) == 0.25
    assert KullbackLeibler(target).potential(p)[:2].tolist() == pytest.approx([math.log(2) + 1, 1.0])
    assert JensenShannon(target).potential(p)[:2].tolist() == pytest.approx([0.5 * math.log(4 / 3), 0.0])
    assert TotalVariation(target).potential(p).tolist() == [0.5, 0.0, -0.5]


@settings(max_examples=80, deadline=None)
@given(pairs())
def test_equal_scipy_and_pot(pair):
    p, target = pair
    kl = rel_entr(p.numpy(), target.numpy()).sum()  # inf where the target lacks support
    assert float(KullbackLeibler(target).value(p)) == pytest.approx(kl, abs=1e-12)
    js = float(JensenShannon(target).value(p))
    assert js == pytest.approx(jensenshannon(p.numpy(), target.numpy()) ** 2, abs=1e-12)
    assert js <= math.log(2) + 1e-12
    tv = float(TotalVariation(target).value(p))
    assert tv == pytest.approx(exact_cost(p, target, 1.0 - torch.eye(len(p), dtype=torch.float64)), abs=1e-9)
    assert kl >= 2 * tv**2 - 1e-12  # Pinsker


@settings(max_examples=40, deadline=None)
@given(pairs(), st.randoms(use_true_random=False))
def test_identity_symmetry_permutation(pair, random):
    p, target = pair
    order = list(range(len(p)))
    random.shuffle(order)
    for make in (KullbackLeibler, JensenShannon, TotalVariation):
        assert float(make(p).value(p)) == 0.0
        value = float(make(target).value(p))
        assert float(make(target[order]).value(p[order])) == pytest.approx(value, abs=1e-14)
        if make is not KullbackLeibler:
            assert float(make(p).value(target)) == pytest.approx(value, abs=1e-14)


def test_disjoint_supports():
    """The extremes: KL infinite, JS log 2, TV 1."""
    p = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64)
    target = torch.tensor([0.0, 0.0, 0.5, 0.5], dtype=torch.float64)
    assert float(KullbackLeibler(target).value(p)) == math.inf
    assert float(JensenShannon(target).value(p)) == pytest.approx(math.log(2), rel=1e-15)
    assert float(TotalVariation(target).value(p)) == 1.0


def test_kl_reports_what_is_infinite_and_nothing_else():
    """Rows: support missing in P; p zero where P is not; zero in both."""
    target = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    p = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]], dtype=torch.float64)
    value, potential = KullbackLeibler(target).value_and_potential(p)
    assert value.tolist() == pytest.approx([math.inf, math.log(2), 0.0])
    assert potential[0, 2] == math.inf
    assert potential[1:].isfinite().all()  # finite, so that p_t * s is 0 and not NaN where p_t = 0
    assert potential[1, 1] < -700
    assert potential[2].tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("name", ["kl", "js"])
def test_a_token_masked_by_the_model_gets_no_gradient(name):
    """A logit of -inf has p = 0 exactly: its gradient is the limit 0 and the others' are those without the token."""
    target = torch.tensor([0.3, 0.2, 0.5], dtype=torch.float64)
    logits = torch.tensor([0.1, -0.4, -math.inf], dtype=torch.float64, requires_grad=True)
    make_divergence(name, target).value(logits.softmax(-1)).backward()
    tiny = torch.tensor([0.1, -0.4, -200.0], dtype=torch.float64, requires_grad=True)
    make_divergence(name, target).value(tiny.softmax(-1)).backward()
    assert logits.grad is not None
    assert logits.grad[2] == 0.0
    torch.testing.assert_close(logits.grad, tiny.grad, rtol=1e-12, atol=1e-15)


def test_float32_does_not_invent_missing_support():
    """P = 1e-60 is zero in float32, yet KL is finite: log P = -138.2 is kept in float64 until the end."""
    target = torch.tensor([1.0, 1e-60], dtype=torch.float64)
    value = KullbackLeibler(target).value(torch.tensor([0.5, 0.5]))
    assert float(value) == pytest.approx(math.log(0.5) - 0.5 * math.log(1e-60), rel=1e-6)


@pytest.mark.parametrize("name", ["kl", "js", "tv"])
def test_gradcheck(name):
    generator = torch.Generator().manual_seed(0)
    p = (torch.rand(2, 3, 8, generator=generator, dtype=torch.float64) + 0.1).requires_grad_()
    target = torch.rand(8, generator=generator, dtype=torch.float64)
    divergence = make_divergence(name, target / target.sum())
    assert torch.autograd.gradcheck(divergence.value, (p,))


@pytest.mark.parametrize("name", ["kl", "js", "tv"])
def test_equal_distributions_give_no_gradient(name):
    """At p = P the potential is constant, so the gradient in the logits is zero."""
    logits = torch.randn(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    p = logits.softmax(-1)
    make_divergence(name, p).value(p).backward()
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-16


@pytest.mark.parametrize("name", ["kl", "js", "tv"])
def test_rows_and_narrow_dtypes(name):
    generator = torch.Generator().manual_seed(2)
    p, target = torch.randn(2, 4, 25, generator=generator, dtype=torch.float64).softmax(-1)
    divergence, before = make_divergence(name, target[0]), p.clone()
    value, potential = divergence.value_and_potential(p)
    assert value.shape == (4,)
    for row in range(4):
        torch.testing.assert_close(value[row], divergence.value(p[row]))
        torch.testing.assert_close(potential[row], divergence.potential(p[row]))
    assert torch.equal(p, before)
    for narrow in (torch.float32, torch.bfloat16, torch.float16):
        got = divergence.value(p.to(narrow))
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), divergence.value(p.to(narrow).double()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["kl", "js", "tv"])
def test_conversion_keeps_the_constants(name):
    target = torch.rand(20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    divergence = make_divergence(name, target / target.sum())
    p = torch.full((20,), 0.05, dtype=torch.float64)
    before = divergence.value(p)
    assert torch.equal(divergence.to(torch.bfloat16).value(p), before)
