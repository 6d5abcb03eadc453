"""Sinkhorn against POT, a closed form, exact transport and its own error bound; gradients by finite differences."""

import copy
import math
import warnings

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles.transport import cost_matrix, exact_cost
from plot_align.errors import InputError
from plot_align.transport import SinkhornClusters, SinkhornConvergenceWarning, SinkhornTopK
from plot_align.transport import sinkhorn as module
from plot_align.transport.sinkhorn import sinkhorn

EXACT = {"tolerance": 1e-12, "max_iterations": 5000}


def problem(seed=0, rows=14, width=4, count=2):
    generator = torch.Generator().manual_seed(seed)
    e = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return e, *torch.randn(count, rows, generator=generator, dtype=torch.float64).mul(1.5).softmax(-1)


def test_by_hand():
    """p = P = (1/2, 1/2) at distance 1. T = ((a, b), (b, a)) with b/a = exp(-1/eps) and 2a + 2b = 1.

    f + g is constant, (f + g) / eps = log(4 a), so the value is eps log(2 / (1 + exp(-1/eps))); <T, C> = 2 b.
    """
    half, cost, eps = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 0.3
    found = sinkhorn(half, half, cost.double(), eps)
    assert float(found.value) == pytest.approx(eps * math.log(2 / (1 + math.exp(-1 / eps))), rel=1e-12)
    assert float(found.transport_cost) == pytest.approx(1 / (1 + math.exp(1 / eps)), rel=1e-12)
    assert float(found.marginal_error) < 1e-12


@pytest.mark.parametrize("eps", [0.2, 0.5, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_equals_pot(seed, eps):
    """POT minimises <T, C> + eps sum T log T: the same plan; its potentials are ours up to a constant and log p."""
    e, p, target = problem(seed)
    cost = cost_matrix(e)
    arguments = (p.numpy(), target.numpy(), cost.numpy(), eps)
    options = {"method": "sinkhorn_log", "numItermax": 100_000, "stopThr": 1e-13}
    plan, log = ot.sinkhorn(*arguments, log=True, **options)
    divergence = (plan * np.log(plan / np.outer(p, target))).sum()
    found = sinkhorn(p, target, cost, eps, tolerance=1e-12, max_iterations=100_000)
    transport = ot.sinkhorn2(*arguments, **options)
    assert float(found.transport_cost) == pytest.approx(float(transport), rel=1e-9)
    assert float(found.value) == pytest.approx((plan * cost.numpy()).sum() + eps * divergence, rel=1e-9)
    theirs = torch.as_tensor(eps * log["log_u"]) - eps * p.log()
    torch.testing.assert_close(found.f - found.f[0], theirs - theirs[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_small_epsilon_gives_exact_transport(seed):
    """eps = 4e-3 puts max(C) / eps far beyond the scalings: log-sum-exps alone; the bias is at most eps log 14."""
    e, p, target = problem(seed)
    cost = cost_matrix(e)
    exact = ot.emd2(p.numpy(), target.numpy(), cost.numpy())
    found = sinkhorn(p, target, cost, 4e-3, tolerance=1e-3, max_iterations=20_000)
    assert float(cost.max()) / 4e-3 > 500
    assert float(found.marginal_error) <= 1e-3
    assert float(found.value) == pytest.approx(exact, abs=4e-3 * math.log(14) + 5e-3)
    assert float(found.transport_cost) == pytest.approx(exact, abs=4e-3 * math.log(14) + 5e-3)


@pytest.mark.parametrize("iterations", [10, 25, 40])
def test_scalings_and_log_sum_exps_are_the_same_iteration(iterations, monkeypatch):
    e, p, target = problem(3)
    fast = sinkhorn(p, target, cost_matrix(e), 0.1, tolerance=1e-15, max_iterations=iterations)
    monkeypatch.setattr(module, "_SAFE_RATIO", {torch.float64: 0.0})
    slow = sinkhorn(p, target, cost_matrix(e), 0.1, tolerance=1e-15, max_iterations=iterations)
    assert fast.iterations == slow.iterations == iterations
    torch.testing.assert_close(fast.f, slow.f, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(fast.g, slow.g, rtol=1e-10, atol=1e-11)
    f, cost = -0.1 * ((-cost_matrix(e) / 0.1).exp() @ target).log(), cost_matrix(e)
    for _ in range(iterations):
        g = -0.1 * (p @ ((f[:, None] - cost) / 0.1).exp()).log()
        f = -0.1 * (((g - cost) / 0.1).exp() @ target).log()
    torch.testing.assert_close(fast.f, f, rtol=1e-9, atol=1e-10)


def test_the_range_of_the_scalings_is_safe():
    """At max(C) / eps = 99, with an atom that only the costliest move can reach: everything stays finite."""
    cost = torch.tensor([[0.0, 99.0, 99.0], [99.0, 0.0, 99.0], [99.0, 99.0, 0.0]], dtype=torch.float64)
    p = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    found = sinkhorn(p, p.flip(0), cost, 1.0)
    assert float(found.transport_cost) == pytest.approx(99.0)
    assert found.f.isfinite().all()
    assert found.g.isfinite().all()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.1, 0.5, 3.0]))
def test_duality_and_the_entropic_bound(seed, eps):
    """exact - max(C) error <= value <= exact + eps min(H(p), H(P)), converged or not; T's rows are exact."""
    e, p, target = problem(seed, rows=8)
    p = torch.where(p < 0.05, 0.0, p)
    p = p / p.sum()
    cost = cost_matrix(e)
    exact = exact_cost(p, target, cost)
    entropy = min(float(torch.special.entr(x).sum()) for x in (p, target))
    for iterations in (1, 3, 300):
        found = sinkhorn(p, target, cost, eps, max_iterations=iterations, tolerance=1e-12)
        plan = p[:, None] * target * ((found.f[:, None] + found.g - cost) / eps).exp()
        torch.testing.assert_close(plan.sum(1), p, rtol=1e-10, atol=1e-14)
        assert float((plan.sum(0) - target).abs().sum()) == pytest.approx(float(found.marginal_error), abs=1e-12)
        assert float((plan * cost).sum()) == pytest.approx(float(found.transport_cost), rel=1e-10)
        slack = float(cost.max() * found.marginal_error) + 1e-9
        assert exact - slack <= float(found.value) <= exact + eps * entropy + 1e-9


def test_rows_do_not_depend_on_each_other():
    """Different rows converge after different numbers of iterations; each stops where it would alone."""
    e, *p = problem(4, count=5)
    rows, target, cost = torch.stack(p[:4]), p[4], cost_matrix(e)
    rows[0] = target
    together = sinkhorn(rows.reshape(2, 2, -1), target.expand(2, 2, -1), cost, 0.1, tolerance=1e-6)
    counts = set()
    for i in range(4):
        alone = sinkhorn(rows[i], target, cost, 0.1, tolerance=1e-6)
        counts.add(alone.iterations)
        torch.testing.assert_close(together.value[i // 2, i % 2], alone.value, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(together.f[i // 2, i % 2], alone.f, rtol=1e-11, atol=1e-12)
    assert len(counts) > 1
    assert together.iterations == max(counts)


def test_wrong_arguments_of_the_function():
    half, cost = torch.full((2,), 0.5), torch.zeros(2, 2)
    with pytest.raises(InputError, match=r"cost has shape \(2, 3\)"):
        sinkhorn(half, half, torch.zeros(2, 3), 0.1)
    for eps in (0.0, -1.0, math.nan, math.inf, "1"):
        with pytest.raises(InputError, match=r"epsilon is .*positive"):
            sinkhorn(half, half, cost, eps)


MAKERS = [
    lambda target, e, **options: SinkhornTopK(target, e, size=4, **options),
    lambda target, e, **options: SinkhornClusters(target, e, size=6, **options),
]


@pytest.mark.parametrize(
    "make", [lambda *a, **o: SinkhornTopK(*a, size=99, **o), lambda *a, **o: SinkhornClusters(*a, size=14, **o)]
)
def test_full_support_is_the_whole_problem(make):
    """All tokens their own atoms: the plain function on the (V, V) cost, in units of the mean over pairs."""
    e, p, target = problem(5)
    cost = cost_matrix(e)
    unit = float(cost.sum()) / (14 * 13)
    want = sinkhorn(p, target, cost / unit, 0.1, **EXACT)
    built = make(target, e, **EXACT)
    value, potential = built.value_and_potential(p)
    assert built.unit == pytest.approx(unit)
    assert float(value) == pytest.approx(float(want.value), rel=1e-6)
    torch.testing.assert_close(potential - potential[0], want.f - want.f[0], rtol=1e-5, atol=1e-6)
    below, above = built.error_bound(p)
    entropy = min(float(torch.special.entr(x).sum()) for x in (p, target))
    assert float(below) == pytest.approx(0.1 * entropy, rel=1e-4)
    assert float(above) < 1e-4


@pytest.mark.parametrize("make", MAKERS)
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 4, 100]), st.sampled_from([0.05, 0.3]))
def test_the_bound_holds(make, seed, iterations, eps):
    e, *p = problem(seed, count=4)
    e[-1] *= 3.0
    target, own = p[0], p[1]
    built = make(target, e, epsilon=eps, max_iterations=iterations, tolerance=1e-9, valid=12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SinkhornConvergenceWarning)
        for given_target in (None, own):
            rows = torch.stack(p[2:])
            value = built.value(rows, given_target)
            below, above = built.error_bound(rows, given_target)
            for i in range(2):
                exact = exact_cost(rows[i], target if given_target is None else own, cost_matrix(e)) / built.unit
                assert float(value[i] - below[i]) - 1e-9 <= exact <= float(value[i] + above[i]) + 1e-9


@pytest.mark.parametrize("make", MAKERS)
def test_potential_of_a_token_without_mass(make):
    """Differences along a move from a token with mass to one without: the potential is their limit, and finite."""
    e, p, target = problem(6)
    p[2] = p[9] = target[9] = 0.0
    p, target = p / p.sum(), target / target.sum()
    built = make(target, e, **EXACT)
    value, s = built.value_and_potential(p)
    assert s.isfinite().all()
    top = int(p.argmax())
    for empty in (2, 9):
        moved, step = p.clone(), 1e-6
        moved[top] -= step
        moved[empty] += step
        slope = float(built.value(moved) - value) / step
        assert slope == pytest.approx(float(s[empty] - s[top]), abs=1e-4)


def test_mass_moved_within_a_cluster_is_free():
    e, p, target = problem(7)
    built = SinkhornClusters(target, e, size=3)
    first, second = (built.labels == built.labels.mode().values).nonzero()[:2, 0].tolist()
    moved = p.clone()
    moved[first], moved[second] = p[first] + p[second], 0.0
    assert float(built.value(moved)) == pytest.approx(float(built.value(p)), rel=1e-12)
    assert built.potential(p)[first] == built.potential(p)[second]


def test_the_remainder_stands_at_the_mean_token():
    """Top 1 of p and of P, the rest pooled: POT on the three atoms by hand."""
    e, p, target = problem(8)
    built = SinkhornTopK(target, e, size=1, epsilon=0.2, **EXACT)
    a, b = int(p.argmax()), int(target.argmax())
    assert a != b
    atoms = torch.stack([e[a], e[b], e.mean(0)])
    masses = [torch.stack([x[a], x[b], 1 - x[a] - x[b]]).numpy() for x in (p, target)]
    cost = cost_matrix(atoms).numpy() / built.unit
    plan = ot.sinkhorn(*masses, cost, 0.2, method="sinkhorn_log", numItermax=10_000, stopThr=1e-13)
    want = (plan * cost).sum() + 0.2 * (plan * np.log(plan / np.outer(*masses))).sum()
    assert float(built.value(p)) == pytest.approx(want, rel=1e-7)
    rest = [j for j in range(14) if j not in (a, b)]
    assert built.potential(p)[rest].unique().numel() == 1


@pytest.mark.parametrize("make", MAKERS)
def test_rows_and_groups_of_rows(make, monkeypatch):
    e, *p = problem(9, count=7)
    rows, target = torch.stack(p[:6]).reshape(2, 3, -1), p[6]
    built = make(target, e)
    whole, before = built.value_and_potential(rows), rows.clone()
    monkeypatch.setattr(module, "_ROW_ELEMENTS", 1)
    one_by_one = built.value_and_potential(rows)
    torch.testing.assert_close(one_by_one[0], whole[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(one_by_one[1], whole[1], rtol=1e-11, atol=1e-11)
    assert whole[0].shape == (2, 3)
    assert torch.equal(rows, before)
    torch.testing.assert_close(built.error_bound(rows)[0], built.error_bound(rows.reshape(6, -1))[0].reshape(2, 3))


@pytest.mark.parametrize("make", MAKERS)
def test_the_past_does_not_matter_and_scale_does_not_either(make):
    e, p, target, other = problem(10, count=3)
    built = make(target, e)
    first = built.value_and_potential(p)
    built.value(other)
    again = built.value_and_potential(p)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert float(make(target, 1000.0 * e).value(p)) == pytest.approx(float(first[0]), rel=1e-5)
    doubled = built.value_and_potential(2 * p)  # of p / sum p, so the derivative halves
    torch.testing.assert_close(doubled[0], first[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(2 * doubled[1], first[1], rtol=1e-10, atol=1e-12)
    assert float(built.value(p.float())) == pytest.approx(float(first[0]), rel=1e-5)
    moved = copy.deepcopy(built).to(torch.bfloat16)
    assert torch.equal(moved.value(p), first[0])
    assert built.state_dict() == {}


@pytest.mark.parametrize("make", MAKERS)
def test_stopping_early_is_said_and_kept(make):
    e, p, target = problem(11)
    built = make(target, e, epsilon=0.01, max_iterations=2, tolerance=1e-6)
    with pytest.warns(
        SinkhornConvergenceWarning, match=r"after 2 iterations with a marginal error of .*raise epsilon"
    ):
        value = built.value(p)
    assert value.isfinite()
    assert built.last_error > 1e-6
    calm = make(target, e, epsilon=1.0, max_iterations=500, tolerance=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calm.value(p)
    assert 0 <= calm.last_error <= 1e-6


@pytest.mark.parametrize("make", MAKERS)
def test_wrong_options_are_named(make):
    e, _, target = problem(12)
    for option, value in [
        ("epsilon", 0),
        ("max_iterations", 0),
        ("max_iterations", 1.5),
        ("tolerance", 0.0),
        ("valid", 1),
    ]:
        with pytest.raises(InputError, match=f"{option} is {value}"):
            make(target, e, **{option: value})
    with pytest.raises(InputError, match="embeddings has 13 rows and target 14 tokens"):
        make(target, e[1:])
    with pytest.raises(InputError, match="embeddings are the same"):
        make(target, torch.ones_like(e))


def test_wrong_sizes_are_named():
    e, _, target = problem(13)
    for cls in (SinkhornTopK, SinkhornClusters):
        for size in (0, -1, 2.0, True):
            with pytest.raises(InputError, match=f"size is {size}"):
                cls(target, e, size=size)
    with pytest.raises(InputError, match="size is 13 for 12 tokens"):
        SinkhornClusters(target, e, size=13, valid=12)


def test_nan_is_not_hidden():
    e, p, target = problem(14)
    for make in MAKERS:
        assert make(target, e).value(p.index_fill(0, torch.tensor([3]), math.nan)).isnan()
