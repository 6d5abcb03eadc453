"""The method's own page against the oracle: value and gradient, for every distance, geometry, target and scope."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from oracles import term
from plot_align.config import PlotConfig
from plot_align.errors import InputError
from plot_align.plot import BalancedAlpha, PlotLoss, output_distributions, wasserstein1
from plot_align.preference.distribution import PreferenceDistribution
from plot_align.transport import Geometry, Wasserstein1

B, T, V, H, PADDING = 4, 6, 17, 5, 2
GRANULARITIES = ("batch", "sequence", "token")


def preference(seed=0, size=V):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 40, (2, size), generator=generator)
    return PreferenceDistribution(counts[0], counts[1], {"sources": [{"rows": 1}]})


class Case:
    """Logits of both models, labels behind prompts of different lengths, two rows of each role, padded head."""

    def __init__(self, seed=0, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)
        self.logits = (2 * torch.randn(B, T, V + PADDING, generator=generator, dtype=torch.float64)).to(dtype)
        self.reference = (2 * torch.randn(B, T, V + PADDING, generator=generator, dtype=torch.float64)).to(dtype)
        self.labels = torch.randint(0, V, (B, T), generator=generator)
        for row, prompt in enumerate((2, 1, 3, 2)):
            self.labels[row, :prompt] = -100
        self.labels[1, -1] = -100
        self.roles = torch.tensor([1, 1, -1, -1])
        self.embeddings = torch.randn(V + PADDING, H, generator=generator, dtype=torch.float64)
        self.preference = preference(seed)

    def loss(self, config=None, *, logits=None, reference=True, mean=None):
        plot = PlotLoss(self.preference, self.embeddings, config, reference=mean)
        given = {"reference_logits": self.reference} if reference else {}
        return plot(self.logits if logits is None else logits, self.labels, self.roles, **given)

    def oracle(self, config=None, *, logits=None, reference=True, mean=None):
        logits = self.logits if logits is None else logits
        scored = self.labels[:, 1:] != -100
        world = term.World(
            p=logits[:, :-1].double().softmax(-1),
            q=self.reference[:, :-1].double().softmax(-1) if reference else None,
            tokens=self.labels[:, 1:],
            masks={
                "chosen": scored & (self.roles > 0)[:, None],
                "rejected": scored & (self.roles < 0)[:, None],
                "all": scored,
            },
            sequences=torch.arange(B)[:, None].expand(B, T - 1),
            embeddings=self.embeddings,
            chosen=self.preference.chosen_counts,
            rejected=self.preference.rejected_counts,
            reference=mean,
        )
        return term.plot_loss(config or PlotConfig(), world)

    def check(self, config=None, **given):
        ours, theirs = (self.logits.clone().requires_grad_() for _ in range(2))
        got, want = self.loss(config, logits=ours, **given), self.oracle(config, logits=theirs, **given)
        got.backward()
        want.backward()
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-12)
        assert ours.grad.abs().max() > 0


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("reference", [True, False])
def test_the_default(granularity, reference):
    Case().check(PlotConfig(granularity=granularity), reference=reference)


GEOMETRIES = [
    {"geometry": "norm"}, {"geometry": "norm", "norm_order": 1.0}, {"geometry": "norm", "norm_order": math.inf},
    {"geometry": "principal"}, {"geometry": "vocabulary"}, {"geometry": "sliced", "slices": 5, "geometry_seed": 3},
    {"geometry": "max_sliced", "slices": 5}, {"geometry": "sliced", "scaled": False},
]  # fmt: skip


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("options", GEOMETRIES)
def test_every_geometry(options, granularity):
    Case(1).check(PlotConfig.from_options(granularity=granularity, **options))


@pytest.mark.parametrize("positions", ["chosen", "rejected", "all"])
@pytest.mark.parametrize("scope", ["batch", "dataset"])
@pytest.mark.parametrize("target", ["relu", "shift", "softmax", "chosen", "anchored"])
@pytest.mark.parametrize("granularity", ["batch", "sequence"])
def test_every_target_and_scope(target, scope, positions, granularity):
    if (target, scope, positions) == ("chosen", "batch", "rejected"):
        pytest.skip("refused: rejected answers would be held to the tokens of others")
    mean = None
    if (target, scope) == ("anchored", "dataset"):
        mean = torch.rand(V + PADDING, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        mean[V:] = 0
        mean /= mean.sum()
    config = PlotConfig.from_options(
        target=target, target_scope=scope, positions=positions, granularity=granularity, target_strength=0.7,
        target_temperature=0.8,
    )  # fmt: skip
    Case(2).check(config, mean=mean)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("divergence", ["emo", "js", "tv", "deft_prob"])
def test_every_other_distance(divergence, granularity):
    Case(3).check(PlotConfig.from_options(divergence=divergence, granularity=granularity))


def test_kl_to_a_target_of_full_support():
    case = Case(4)
    case.logits[..., V:] = -math.inf  # padding rows have no target mass
    case.check(PlotConfig.from_options(divergence="kl", target="softmax"))


def test_one_target_for_all_at_a_reference():
    mean = Case(6).reference[0, 0].softmax(-1)
    mean[V:] = 0
    Case(5).check(PlotConfig(), mean=mean / mean.sum())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradcheck(granularity):
    case = Case(7)
    plot = PlotLoss(case.preference, case.embeddings, PlotConfig(granularity=granularity))
    assert torch.autograd.gradcheck(
        lambda z: plot(z, case.labels, case.roles, reference_logits=case.reference), (case.logits.requires_grad_(),)
    )


def test_by_hand():
    """Two tokens at 0 and 1, d = (1/4, −1/4), target relu = (1, 0); W1 of (a, 1 − a) is 1 − a.

    Logits (log 3, 0) give p = (3/4, 1/4); (0, log 7) gives (1/8, 7/8). Sequence 1 holds both, sequence 2 the first.
    batch: a = (3/4 + 1/8 + 3/4)/3 = 13/24, so 11/24. sequence: (1 − 7/16 + 1 − 3/4)/2 = 13/32. token: as batch, since
    W1 to a point mass is linear.
    """
    first, second = [math.log(3), 0.0], [0.0, math.log(7)]
    logits = torch.tensor([[first, second, first], [first, first, first]], dtype=torch.float64)
    labels = torch.tensor([[-100, 0, 1], [-100, 0, -100]])
    counts = PreferenceDistribution(torch.tensor([3, 1]), torch.tensor([2, 2]), {})
    got = []
    for granularity in GRANULARITIES:
        config = PlotConfig.from_options(
            target="relu", geometry="norm", granularity=granularity, alpha=1.0, scaled=False
        )
        got.append(float(PlotLoss(counts, torch.tensor([[0.0], [1.0]]), config)(logits, labels)))
    assert got == pytest.approx([11 / 24, 13 / 32, 11 / 24], rel=1e-12)


def test_policy_equal_to_the_reference_is_at_its_target_when_nothing_is_preferred():
    """λ = 0 anchors the target on the reference itself: no pull at p = p_ref, to the last bit of a float32 softmax."""
    case = Case(8, torch.float32)
    plot = PlotLoss(case.preference, case.embeddings[:V], PlotConfig(target_strength=0.0))
    logits = case.logits[..., :V].clone().requires_grad_()
    value = plot(logits, case.labels, case.roles, reference_logits=logits.detach().clone())
    value.backward()
    assert float(value.detach()) == 0.0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_logits(dtype, unit, granularity):
    """Nothing after the logits is done in half precision: the loss is float64's of the same logits within 1e-6, and
    each gradient entry is rounded once, within the dtype's unit roundoff."""
    case = Case(9)
    narrow = case.logits.to(dtype).requires_grad_()
    same = narrow.detach().double().requires_grad_()
    case.reference = case.reference.to(dtype)
    value = case.loss(PlotConfig(granularity=granularity), logits=narrow)
    case.reference = case.reference.double()
    exact = case.loss(PlotConfig(granularity=granularity), logits=same)
    value.backward()
    exact.backward()
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(float(exact.detach()), rel=1e-6)
    assert ((narrow.grad.double() - same.grad).abs() <= 1.01 * unit * same.grad.abs() + 2**-22).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("rows", [B, 0])
def test_nothing_selected_is_zero_with_a_graph(granularity, rows):
    case = Case(10)
    logits = case.logits[:rows].clone()
    logits[..., 0] = math.nan  # not selected: must not leak
    logits.requires_grad_()
    plot = PlotLoss(case.preference, case.embeddings, PlotConfig(granularity=granularity))
    value = plot(logits, torch.full((rows, T), -100))
    value.backward()
    assert float(value.detach()) == 0.0
    assert (logits.grad == 0).all()


def test_positions_not_selected_may_hold_anything():
    case = Case(11)
    want = case.loss()
    outside = torch.ones(B, T, dtype=torch.bool)
    outside[:, :-1] = (case.labels[:, 1:] == -100) | (case.roles < 0)[:, None]
    case.logits[outside], case.reference[outside] = math.nan, math.nan
    logits = case.logits.requires_grad_()
    got = case.loss(logits=logits)
    got.backward()
    assert torch.equal(got.detach(), want)
    assert logits.grad.isfinite().all()


def test_nan_is_not_hidden():
    case = Case(12)
    case.logits[0, 2, 3] = math.nan
    assert case.loss().isnan()
    case = Case(12)
    case.reference[0, 2, 3] = math.nan
    assert case.loss().isnan()


def test_autocast_and_casting_do_not_lower_the_precision():
    case = Case(13, torch.float32)
    plot = PlotLoss(case.preference, case.embeddings)
    given = (case.logits, case.labels, case.roles)
    want = plot(*given, reference_logits=case.reference)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(plot(*given, reference_logits=case.reference), want)
    assert torch.equal(plot.to(torch.bfloat16)(*given, reference_logits=case.reference), want)
    assert plot.state_dict() == {}


def test_descending_the_gradient_reaches_the_target():
    """200 steps on free logits bring the mean output to the target: no sign is wrong."""
    case = Case(14)
    plot = PlotLoss(case.preference, case.embeddings, PlotConfig(target_strength=0.5))
    logits = torch.zeros_like(case.logits, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=0.1)
    values = []
    for _ in range(200):
        optimiser.zero_grad()
        value = plot(logits, case.labels, case.roles, reference_logits=case.reference)
        value.backward()
        optimiser.step()
        values.append(float(value.detach()))
    assert values[-1] < 0.1 * values[0]


@pytest.mark.parametrize(
    ("change", "named", "got"),
    [
        ({"logits": torch.zeros(T, V + PADDING)}, "logits", "(6, 19)"),
        ({"logits": torch.zeros(B, T, V + PADDING, dtype=torch.int64)}, "logits", "int64"),
        ({"logits": torch.zeros(B, T, V)}, "logits", "(4, 6, 17)"),
        ({"labels": torch.zeros(B, T - 1, dtype=torch.int64)}, "labels", "(4, 5)"),
        ({"reference_logits": torch.zeros(B, T, V)}, "reference_logits", "(4, 6, 17)"),
        ({"labels": torch.zeros(B, T)}, "labels", "float32"),
        ({"roles": torch.tensor([1])}, "roles", "(1,)"),
        ({"roles": [1, 1, -1, -1]}, "roles", "list"),
    ],
)
def test_wrong_batches_are_named(change, named, got):
    case = Case()
    given = {"logits": case.logits, "labels": case.labels, "reference_logits": case.reference, **change}
    with pytest.raises(InputError) as refused:
        PlotLoss(case.preference, case.embeddings)(given.pop("logits"), given.pop("labels"), **given)
    assert str(refused.value).startswith(named)
    assert got in str(refused.value)


def test_wrong_settings_are_named():
    case = Case()
    with pytest.raises(InputError, match="deft_log"):
        case.loss(PlotConfig.from_options(divergence="deft_log"))
    with pytest.raises(InputError, match="reference_logits is None"):
        case.loss(PlotConfig.from_options(target="anchored", target_scope="batch"), reference=False)
    with pytest.raises(InputError, match="target is 'chosen' with positions='rejected'"):
        case.loss(PlotConfig(positions="rejected"), reference=False)
    with pytest.raises(InputError, match="rows"):
        PlotLoss(case.preference, case.embeddings[: V - 1])
    with pytest.raises(InputError, match="pool is on"):
        case.loss(PlotConfig(pool=True))


# ------------------------------------------------------------------------------------------- the functions of the page


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 40), st.integers(0, 2**31), st.booleans())
def test_wasserstein1_against_scipy_and_the_fast_version(size, seed, ties):
    generator = torch.Generator().manual_seed(seed)
    p, target = torch.rand(2, size, generator=generator, dtype=torch.float64).softmax(-1)
    x = torch.randn(size, generator=generator, dtype=torch.float64)
    if ties:
        x = x.round()
    value, potential = wasserstein1(p, target, x)
    assert float(value) == pytest.approx(wasserstein_distance(x, x, p, target), abs=1e-12)
    if float(x.max() - x.min()) > 0:
        fast = Wasserstein1(target, Geometry(coordinates=x, kind="test"))
        torch.testing.assert_close(fast.value(p), value, rtol=1e-10, atol=1e-14)
        free = p.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(fast.value(free), free)
        apart = potential - potential[0] - (gradient - gradient[0])  # potentials are the same up to a constant
        assert apart.abs().max() < 1e-9


def test_output_distributions_by_counting():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    weights = torch.tensor([0.5, 0.5, 0.0, 1.0, 0.0], dtype=torch.float64)
    segments = torch.tensor([0, 0, 0, 2, 2])
    got = output_distributions(logits, weights, segments, 3)
    p = logits.softmax(-1)
    torch.testing.assert_close(got, torch.stack([(p[0] + p[1]) / 2, torch.zeros(3).double(), p[3]]))


def test_balanced_alpha_is_the_ratio_of_decayed_norms():
    """One weight h, L_v = a·h and L_p = b·h: the norms are |a| and |b|. Measured at the first ten steps and every
    fifth, averaged with 0.9: α = ρ·Σ 0.9^(n−i) a_i / Σ 0.9^(n−i) b_i."""
    alpha = BalancedAlpha(0.5)
    h = torch.ones(1, requires_grad=True)
    seen = []
    for step in range(20):
        a, b = 2.0 + step, 5.0 - 0.2 * step
        if step < 10 or step % 5 == 0:
            seen.append((a, b))
        got = alpha(a * h.sum(), b * h.sum(), h)
        decay = [0.9 ** (len(seen) - 1 - i) for i in range(len(seen))]
        want = (
            0.5
            * sum(d * a for d, (a, _) in zip(decay, seen, strict=True))
            / sum(d * b for d, (_, b) in zip(decay, seen, strict=True))
        )
        assert got == pytest.approx(want, rel=1e-6), step


@pytest.mark.parametrize(("vanilla", "plot"), itertools.product([0.0, math.nan, math.inf], [1.0]))
def test_balanced_alpha_leaves_out_what_cannot_be_measured(vanilla, plot):
    alpha = BalancedAlpha()
    assert not alpha.observe(vanilla, plot)
    assert not alpha.observe(plot, vanilla)
    assert alpha.value == 0.0
    assert alpha.is_due(12)  # asks again until something was measured


def test_balanced_alpha_refuses_what_neither_loss_came_from():
    h, other = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    with pytest.raises(InputError, match="hidden is no input of vanilla"):
        BalancedAlpha()(h.sum(), h.sum(), other)
    with pytest.raises(InputError, match="hidden is no input of plot"):
        BalancedAlpha()(h.sum(), other.sum(), h)
