"""W1 on the line against SciPy, POT's 1-D solver, POT's exact cost, hand-derived values and Kantorovich duality."""

import copy
import math

import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from oracles.transport import cost_matrix, exact_cost
from plot_align.errors import InputError
from plot_align.transport import MaxSlicedWasserstein, SlicedWasserstein, Wasserstein1, wasserstein
from plot_align.transport.geometry import Geometry, directions, line, slices


def on_line(coordinates):
    return Geometry(coordinates=torch.as_tensor(coordinates, dtype=torch.float64), kind="test")


def normalised(weights):
    weights = torch.as_tensor(weights, dtype=torch.float64)
    return weights / weights.sum(-1, keepdim=True)


def random_distributions(seed, count, n, zeros=0.3):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(count, n, generator=generator, dtype=torch.float64)
    weights[torch.rand(count, n, generator=generator) < zeros] = 0.0
    weights[:, seed % n] += 0.1  # never all zero
    return normalised(weights)


@st.composite
def problems(draw, count=2):
    """Coordinates (with ties, or not) and ``count`` distributions (with zeros) on up to 12 tokens."""
    n = draw(st.integers(2, 12))
    x = draw(st.lists(st.one_of(st.integers(-3, 3), st.floats(-10, 10)), min_size=n, max_size=n))
    return torch.tensor(x, dtype=torch.float64), random_distributions(draw(st.integers(0, 10**6)), count, n)


def test_by_hand():
    """Tokens at 3, 0, 1; in sorted order (token 1, 2, 0) p = (0, 1, 0) and P = (1/2, 0, 1/2).

    F_p - F_P = (-1/2, 1/2, 0) and the gaps are (1, 2), so W1 = 1/2 + 1 = 3/2: half the mass moves by 1, half by 2.
    s = (-1 + 2, 2, 0) = (1, 2, 0) in sorted order, (0, 1, 2) in token order.
    """
    w1 = Wasserstein1(normalised([0.5, 0.5, 0.0]), on_line([3.0, 0.0, 1.0]))
    value, potential = w1.value_and_potential(torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    assert float(value) == 1.5
    assert potential.tolist() == [0.0, 1.0, 2.0]


@settings(max_examples=100, deadline=None)
@given(problems())
def test_equals_scipy_and_pot(problem):
    x, (p, target) = problem
    value = float(Wasserstein1(target, on_line(x)).value(p))
    assert value == pytest.approx(wasserstein_distance(x.numpy(), x.numpy(), p.numpy(), target.numpy()), abs=1e-12)
    pot = ot.emd2_1d(x.numpy(), x.numpy(), p.numpy(), target.numpy(), metric="euclidean")
    assert value == pytest.approx(float(pot), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(problems())
def test_potential_solves_the_dual(problem):
    """Feasible (1-Lipschitz) and attaining SciPy's value: such an s is optimal, whatever formula made it."""
    x, (p, target) = problem
    s = Wasserstein1(target, on_line(x)).potential(p)
    assert ((s[:, None] - s[None, :]).abs() <= (x[:, None] - x[None, :]).abs() + 1e-12).all()
    oracle = wasserstein_distance(x.numpy(), x.numpy(), p.numpy(), target.numpy())
    assert float(s @ (p - target)) == pytest.approx(oracle, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(problems(count=3))
def test_potential_is_a_subgradient_everywhere(problem):
    """value(q) >= value(p) + <s, q - p> for every q, at ties and zeros too; q = P and p = P included."""
    x, (p, target, q) = problem
    w1 = Wasserstein1(target, on_line(x))
    for a, b in ((p, q), (p, target), (target, q)):
        value, s = w1.value_and_potential(a)
        assert float(w1.value(b)) >= float(value + s @ (b - a)) - 1e-12


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("kind", "order"), [("norm", 1), ("norm", 1.5), ("norm", 2), ("norm", 3), ("norm", math.inf), ("principal", 2)]
)
def test_never_exceeds_the_exact_cost(kind, order, seed):
    e = torch.randn(24, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    p, target = random_distributions(seed, 2, 24)
    bound = float(Wasserstein1(target, line(e, kind, norm_order=order, scaled=False)).value(p))
    scaled = line(e, kind, norm_order=order)
    exact = exact_cost(p, target, cost_matrix(e, norm_order=order))
    assert 0 < bound <= exact * (1 + 1e-9)
    assert scaled.unit * float(Wasserstein1(target, scaled).value(p)) == pytest.approx(bound, rel=1e-12)


@pytest.mark.parametrize("kind", ["norm", "principal"])
def test_equals_the_exact_cost_on_a_ray(kind):
    """All embeddings on one ray from the origin: norm and projection keep every distance, so the bound is tight."""
    ray = (
        torch.tensor([[0.6, 0.8]], dtype=torch.float64) * torch.linspace(0.5, 4, 9, dtype=torch.float64)[:, None] ** 2
    )
    p, target = random_distributions(5, 2, 9)
    bound = float(Wasserstein1(target, line(ray, kind, scaled=False)).value(p))
    assert bound == pytest.approx(exact_cost(p, target, cost_matrix(ray)), rel=1e-10)


def test_gradcheck():
    """Random distributions: every |F_p - F_P| is far above the step of 1e-6, so no kink is near."""
    p = random_distributions(0, 6, 9, zeros=0.0).reshape(2, 3, 9)
    target = random_distributions(1, 1, 9, zeros=0.0)[0]
    w1 = Wasserstein1(target, on_line(torch.randn(9, generator=torch.Generator().manual_seed(2))))
    distance = (p[..., w1.order] - target[w1.order]).cumsum(-1)[..., :-1].abs().min()
    assert distance > 1e-4
    assert torch.autograd.gradcheck(w1.value, (p.requires_grad_(),))


def test_equal_distributions():
    """At p = P the value is 0, and the potential 0: the subgradient of least norm; also through autograd."""
    target = random_distributions(3, 1, 50)[0]
    w1 = Wasserstein1(target, on_line(torch.randn(50, generator=torch.Generator().manual_seed(4))))
    p = target.clone().requires_grad_()
    value = w1.value(p)
    value.backward()
    assert float(value.detach()) == 0.0
    assert p.grad is not None
    assert torch.equal(p.grad, torch.zeros(50, dtype=torch.float64))


def test_partly_equal_cdfs_by_hand():
    """Tokens at 0, 1, 2, 3; P = (1/4, 1/4, 1/4, 1/4), p = (1/4, 1/2, 0, 1/4): F_p - F_P = (0, 1/4, 0, 0).

    Only the middle gap counts: W1 = 1/4 and s = (1, 1, 0, 0), as sign(0) = 0 on the tied gaps.
    """
    w1 = Wasserstein1(torch.full((4,), 0.25), on_line([0.0, 1.0, 2.0, 3.0]))
    value, potential = w1.value_and_potential(torch.tensor([0.25, 0.5, 0.0, 0.25]))
    assert float(value) == 0.25
    assert potential.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_tied_coordinates_share_a_potential():
    """Mass moved between tokens at the same place is free, in any order of the tokens."""
    x = [1.0, 0.0, 1.0, 1.0, 2.0]
    w1 = Wasserstein1(normalised([0.2, 0.2, 0.2, 0.2, 0.2]), on_line(x))
    value, s = w1.value_and_potential(normalised([[0.6, 0.2, 0.0, 0.0, 0.2], [0.0, 0.3, 0.5, 0.1, 0.1]]))
    torch.testing.assert_close(value, torch.tensor([0.0, 0.2], dtype=torch.float64))  # second: F - F_P = .1, .1
    assert (s[:, 0] == s[:, 2]).all()
    assert (s[:, 0] == s[:, 3]).all()


@settings(max_examples=60, deadline=None)
@given(problems(count=3), st.floats(0.1, 10), st.floats(-5, 5), st.randoms(use_true_random=False))
def test_metric_properties(problem, scale, shift, random):
    """Identity, symmetry, triangle inequality, scaling and translation of the line, permutation of the tokens."""
    x, (a, b, c) = problem
    distance = lambda p, target, points=x: float(Wasserstein1(target, on_line(points)).value(p))  # noqa: E731
    ab = distance(a, b)
    tolerance = 1e-11 * (1 + ab)
    assert distance(a, a) == 0.0
    assert ab == pytest.approx(distance(b, a), abs=tolerance)
    assert distance(a, c) <= ab + distance(b, c) + tolerance
    assert distance(a, b, scale * x + shift) == pytest.approx(scale * ab, abs=1e-10 * (1 + ab))
    order = list(range(len(x)))
    random.shuffle(order)
    assert distance(a[order], b[order], x[order]) == pytest.approx(ab, abs=tolerance)


def test_batch_dimensions_and_input_untouched():
    p = random_distributions(6, 6, 20).reshape(3, 2, 20)
    before = p.clone()
    target = random_distributions(7, 1, 20)[0]
    w1 = Wasserstein1(target, on_line(torch.randn(20, generator=torch.Generator().manual_seed(8))))
    value, potential = w1.value_and_potential(p)
    assert value.shape == (3, 2)
    assert potential.shape == (3, 2, 20)
    for i in range(3):
        for j in range(2):
            one_value, one_potential = w1.value_and_potential(p[i, j])
            torch.testing.assert_close(value[i, j], one_value, rtol=1e-14, atol=1e-15)
            torch.testing.assert_close(potential[i, j], one_potential, rtol=1e-14, atol=1e-14)
    assert torch.equal(p, before)
    torch.testing.assert_close(w1.potential(p), potential)


def test_float32_over_a_real_vocabulary():
    """32,000 tokens in float32: the value within 1e-5 of float64's; bfloat16 input is computed in float32."""
    generator = torch.Generator().manual_seed(9)
    p, target = torch.randn(2, 32_000, generator=generator, dtype=torch.float64).mul(2).softmax(-1)
    w1 = Wasserstein1(target, line(torch.randn(32_000, 8, generator=generator)))
    exact = float(w1.value(p))
    assert float(w1.value(p.float())) == pytest.approx(exact, rel=1e-5)
    assert w1.value(p.bfloat16()).dtype == torch.float32
    assert w1.potential(p.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("convert", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu")])
def test_conversion_keeps_the_constants(convert):
    """A model cast to bfloat16 must not round the target it carries."""
    target = random_distributions(10, 1, 30)[0]
    w1 = Wasserstein1(target, on_line(torch.randn(30, generator=torch.Generator().manual_seed(11))))
    p = random_distributions(12, 1, 30)[0]
    before = w1.value(p)
    converted = convert(copy.deepcopy(w1))
    assert converted.target.dtype == torch.float64
    assert torch.equal(converted.value(p), before)
    assert converted.state_dict() == {}
    assert w1.to("meta").line.gaps.device.type == "meta"


def test_target_is_copied():
    target = torch.full((4,), 0.25, dtype=torch.float64)
    w1 = Wasserstein1(target, on_line([0.0, 1.0, 2.0, 3.0]))
    target.zero_()
    assert float(w1.target.sum()) == 1.0


def test_only_one_derivative():
    w1 = Wasserstein1(torch.full((3,), 1 / 3, dtype=torch.float64), on_line([0.0, 1.0, 2.0]))
    p = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64, requires_grad=True)
    with pytest.raises(InputError, match="create_graph is True, but a divergence can be differentiated only once"):
        torch.autograd.grad(w1(p), p, create_graph=True)


def test_sizes_that_differ_are_named():
    target = torch.full((3,), 1 / 3)
    with pytest.raises(InputError, match="geometry has 2 tokens and target 3"):
        Wasserstein1(target, on_line([0.0, 1.0]))
    w1 = Wasserstein1(target, on_line([0.0, 1.0, 2.0]))
    for p in (torch.zeros(4), torch.zeros(3, 1), torch.zeros(())):
        with pytest.raises(InputError, match=r"p has shape .* last dimension must be the target's 3 tokens"):
            w1.value(p)


@pytest.mark.parametrize(
    "target",
    [
        torch.tensor([0.5, 0.6]),
        torch.tensor([0.5, 0.4]),
        torch.tensor([1.5, -0.5]),
        torch.tensor([math.nan, 1.0]),
        torch.tensor([math.inf, 0.0]),
        torch.tensor([[0.5, 0.5]]),
        torch.tensor([1, 0]),
        torch.full((2000,), 1 / 2000).bfloat16(),
        [0.5, 0.5],
    ],
)
def test_targets_that_are_no_distribution(target):
    with pytest.raises(InputError, match=r"target (sums to|is) .* needed"):
        Wasserstein1(target, on_line([0.0, 1.0]))


SLICED = [SlicedWasserstein, MaxSlicedWasserstein]


def test_slices_by_hand():
    """Two tokens at 0 and 1 on one line, 0 and 3 on the other; p = (1, 0), P = (1/2, 1/2): W1 is 1/2 and 3/2.

    Potentials are (1, 0) and (3, 0). Mean: 1 and (2, 0); largest: 3/2 and (3, 0).
    """
    lines = [on_line([0.0, 1.0]), on_line([0.0, 3.0])]
    p, target = torch.tensor([1.0, 0.0], dtype=torch.float64), normalised([0.5, 0.5])
    value, potential = SlicedWasserstein(target, lines).value_and_potential(p)
    assert (float(value), potential.tolist()) == (1.0, [2.0, 0.0])
    value, potential = MaxSlicedWasserstein(target, lines).value_and_potential(p)
    assert (float(value), potential.tolist()) == (1.5, [3.0, 0.0])


@pytest.mark.parametrize("seed", range(5))
def test_slices_equal_pot(seed):
    e = torch.randn(20, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    p, target = random_distributions(seed, 2, 20)
    lines = slices(e, 30, seed=seed, scaled=False)
    arguments = (e.numpy(), e.numpy(), p.numpy(), target.numpy())
    axes = directions(4, 30, seed).numpy()
    mean = ot.sliced_wasserstein_distance(*arguments, p=1, projections=axes)
    largest = ot.max_sliced_wasserstein_distance(*arguments, p=1, projections=axes)
    assert float(SlicedWasserstein(target, lines).value(p)) == pytest.approx(mean, rel=1e-12)
    assert float(MaxSlicedWasserstein(target, lines).value(p)) == pytest.approx(largest, rel=1e-12)
    exact = exact_cost(p, target, cost_matrix(e))
    assert 0 < mean < largest <= exact * (1 + 1e-9)
    scaled = slices(e, 30, seed=seed)
    bound = scaled[0].unit * float(MaxSlicedWasserstein(target, scaled).value(p))
    assert bound == pytest.approx(largest, rel=1e-12)


@pytest.mark.parametrize("make", SLICED)
def test_slices_gradcheck(make):
    p = random_distributions(0, 6, 9, zeros=0.0).reshape(2, 3, 9)
    target = random_distributions(1, 1, 9, zeros=0.0)[0]
    e = torch.randn(9, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.autograd.gradcheck(make(target, slices(e, 5)).value, (p.requires_grad_(),))


def test_the_largest_slice_is_chosen_for_each_row():
    """Two lines that see different moves: row 0 moves mass along the first, row 1 along the second."""
    lines = [on_line([0.0, 1.0, 0.0]), on_line([0.0, 0.0, 1.0])]
    target = normalised([1.0, 0.0, 0.0])
    p = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5], [0.3, 0.3, 0.4]], dtype=torch.float64)
    value, potential = MaxSlicedWasserstein(target, lines).value_and_potential(p)
    torch.testing.assert_close(value, torch.tensor([0.5, 0.5, 0.4], dtype=torch.float64))
    assert (potential[0] - potential[0, 0]).tolist() == [0.0, 1.0, 0.0]
    assert (potential[1:] - potential[1:, :1]).tolist() == [[0.0, 0.0, 1.0]] * 2


@settings(max_examples=50, deadline=None)
@given(problems(count=3))
def test_slices_are_metrics_with_subgradients(problem):
    x, (p, target, q) = problem
    lines = [on_line(x), on_line(x.flip(0)), on_line(x.square())]
    for make in SLICED:
        divergence = make(target, lines)
        value, s = divergence.value_and_potential(p)
        assert float(make(p, lines).value(target)) == pytest.approx(float(value), abs=1e-10)
        assert float(divergence.value(q)) >= float(value + s @ (q - p)) - 1e-9 * (1 + float(value))
        assert float(make(p, lines).value(p)) == 0.0


@pytest.mark.parametrize("make", SLICED)
def test_slices_keep_rows_and_constants(make):
    e = torch.randn(20, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    p, target = random_distributions(6, 6, 20).reshape(3, 2, 20), random_distributions(7, 1, 20)[0]
    divergence, before = make(target, slices(e, 6)), p.clone()
    value, potential = divergence.value_and_potential(p)
    for i in range(3):
        for j in range(2):
            alone = divergence.value_and_potential(p[i, j])
            torch.testing.assert_close(value[i, j], alone[0], rtol=1e-14, atol=1e-15)
            torch.testing.assert_close(potential[i, j], alone[1], rtol=1e-14, atol=1e-14)
    assert torch.equal(p, before)
    assert torch.equal(copy.deepcopy(divergence).to(torch.bfloat16).value(p), value)
    assert divergence.value(p.bfloat16()).dtype == torch.float32
    assert divergence.state_dict() == {}


@pytest.mark.parametrize("make", SLICED)
def test_slices_refuse_what_does_not_fit(make):
    target = torch.full((3,), 1 / 3, dtype=torch.float64)
    with pytest.raises(InputError, match="geometries is empty"):
        make(target, [])
    with pytest.raises(InputError, match="geometry has 2 tokens and target 3"):
        make(target, [on_line([0.0, 1.0, 2.0]), on_line([0.0, 1.0])])


def test_sorted_form_is_the_same_distance():
    """What the head asks per token, its rows permuted once: value and potential of p[order], without a gather."""
    p = random_distributions(3, 5, 40)
    target = random_distributions(4, 1, 40)[0]
    w1 = Wasserstein1(target, on_line(torch.randn(40, generator=torch.Generator().manual_seed(5))))
    order, line_ = w1.sorted_form()
    torch.testing.assert_close(line_.value(p[:, order]), w1.value(p), rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(line_.potential(p[:, order]), w1.potential(p)[:, order], rtol=0, atol=0)
    leaf = p[:, order].clone().requires_grad_()
    torch.testing.assert_close(line_.value(leaf), line_.value(leaf.detach()), rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(line_.value(p[:, order], p[0, order])[0], torch.tensor(0.0, dtype=p.dtype))


@pytest.mark.parametrize("together", [1, 40 * 8 * 3, 1 << 30])
@pytest.mark.parametrize("kind", [SlicedWasserstein, MaxSlicedWasserstein])
def test_lines_at_a_time_make_no_difference(monkeypatch, kind, together):
    """One line, three rows' worth, all: values and potentials are those of a loop over single lines."""
    monkeypatch.setitem(wasserstein._TOGETHER, "cpu", together)
    target = random_distributions(1, 1, 40)[0]
    generator = torch.Generator().manual_seed(2)
    lines = [on_line(torch.randn(40, generator=generator)) for _ in range(7)]
    single = [Wasserstein1(target, line_) for line_ in lines]
    for p in (random_distributions(3, 1, 40)[0], random_distributions(4, 3, 40)):
        values = torch.stack([w1.value(p) for w1 in single], -1)  # (..., 7)
        potentials = torch.stack([w1.potential(p) for w1 in single], -2)  # (..., 7, V)
        value, potential = kind(target, lines).value_and_potential(p)
        if kind is SlicedWasserstein:
            torch.testing.assert_close(value, values.mean(-1))
            torch.testing.assert_close(potential, potentials.mean(-2))
        else:
            largest = values.argmax(-1)
            torch.testing.assert_close(value, values.amax(-1))
            index = largest[..., None, None].expand(*largest.shape, 1, 40)
            torch.testing.assert_close(potential, potentials.gather(-2, index).squeeze(-2))


@pytest.mark.parametrize("size", [1, 4, 5, 16, 17, 1000])
def test_cumulative_sums_by_products(size):
    """What deterministic algorithms take on a GPU, where torch's own cumulative sum is refused."""
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    torch.testing.assert_close(wasserstein.cumulative_sums_by_products(x, block=4), x.cumsum(-1))
    zeros = torch.zeros(2, size)
    assert torch.equal(wasserstein.cumulative_sums_by_products(zeros, block=4), zeros)
