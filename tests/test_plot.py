"""PlotLoss against the naive line, the gradient formula, float64, and hand-derived values."""

import math

import pytest
import torch

from plot_align.errors import InputError
from plot_align.plot import GRANULARITIES, PlotLoss
from plot_align.transport import make_divergence
from plot_align.transport.geometry import Geometry, line

B, T, V = 3, 5, 17
NAMES = ("w1", "kl", "js", "tv")  # least at p = P; test_make.py sends every divergence through the loss


def world(seed=0, dtype=torch.float64):
    """Logits (B, T, V), a target (V,), a geometry, and weights (B, T) with a gap in each sequence."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(B, T, V, generator=generator, dtype=torch.float64)
    target = torch.rand(V, generator=generator, dtype=torch.float64) + 0.01
    weights = torch.rand(B, T, generator=generator, dtype=torch.float64) + 0.1
    weights[0, 0] = weights[1, 2:] = weights[2, 3] = 0.0
    return logits.to(dtype), target / target.sum(), line(torch.randn(V, 4, generator=generator)), weights


def naive(logits, mask, target, geometry, divergence, granularity):
    """The definition, with loops and autograd all the way, W1 as |cumsum| times the gaps."""
    mask = mask.to(logits.dtype)
    p = logits.softmax(-1)
    target = target.to(logits.dtype)

    def distance(q):
        if divergence == "w1":
            x, order = geometry.coordinates.to(logits.dtype).sort()
            return ((q[order].cumsum(0) - target[order].cumsum(0)).abs()[:-1] * x.diff()).sum()
        if divergence == "kl":
            return (q * (q / target).log()).sum()
        if divergence == "js":
            m = (q + target) / 2
            return ((q * (q / m).log()).sum() + (target * (target / m).log()).sum()) / 2
        return (q - target).abs().sum() / 2

    if granularity == "batch":
        return distance((mask[..., None] * p).sum((0, 1)) / mask.sum())
    if granularity == "sequence":
        kept = [b for b in range(len(mask)) if mask[b].sum() > 0]
        return sum(distance((mask[b][:, None] * p[b]).sum(0) / mask[b].sum()) for b in kept) / len(kept)
    each = [mask[b, t] * distance(p[b, t]) for b in range(len(mask)) for t in range(mask.shape[1])]
    return sum(each) / mask.sum()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("divergence", NAMES)
@pytest.mark.parametrize("boolean", [True, False])
def test_equals_the_naive_line_and_its_autograd(divergence, granularity, boolean):
    logits, target, geometry, weights = world()
    mask = weights > 0 if boolean else weights
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = PlotLoss(target, geometry, divergence=divergence, granularity=granularity)(a, mask)
    expected = naive(b, mask, target, geometry, divergence, granularity)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("divergence", NAMES)
def test_gradient_formula(divergence):
    """d/dz_t = w_t / sum w * p_t * (s - <p_t, s>) with s the potential at the pooled distribution."""
    logits, target, geometry, weights = world(1)
    logits.requires_grad_()
    PlotLoss(target, geometry, divergence=divergence)(logits, weights).backward()
    p = logits.detach().softmax(-1)  # (B, T, V)
    pooled = (weights[..., None] * p).sum((0, 1)) / weights.sum()  # (V,)
    s = make_divergence(divergence, target, geometry).potential(pooled)  # (V,)
    share = (weights / weights.sum())[..., None]  # (B, T, 1)
    expected = share * p * (s - (p * s).sum(-1, keepdim=True))
    torch.testing.assert_close(logits.grad, expected, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("divergence", NAMES)
def test_gradcheck(divergence, granularity):
    logits, target, geometry, weights = world(2)
    loss = PlotLoss(target, geometry, divergence=divergence, granularity=granularity)
    assert torch.autograd.gradcheck(lambda z: loss(z, weights), (logits.requires_grad_(),))


def test_by_hand():
    """Two tokens at 0 and 1, target (1/2, 1/2); W1 of (a, 1 - a) is |a - 1/2|.

    Logits (log 3, 0) give p = (3/4, 1/4); (0, log 7) gives (1/8, 7/8). Sequence 1 holds both, sequence 2 the first.
    batch:    a = (3/4 + 1/8 + 3/4) / 3 = 13/24, so 1/24.
    sequence: (|7/16 - 1/2| + |3/4 - 1/2|) / 2 = (1/16 + 4/16) / 2 = 5/32.
    token:    (1/4 + 3/8 + 1/4) / 3 = 7/24.
    """
    first, second = [math.log(3), 0.0], [0.0, math.log(7)]
    logits = torch.tensor([[first, second], [first, first]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])
    geometry = Geometry(coordinates=torch.tensor([0.0, 1.0]), kind="test")
    got = [float(PlotLoss(torch.tensor([0.5, 0.5]), geometry, granularity=g)(logits, mask)) for g in GRANULARITIES]
    assert got == pytest.approx([1 / 24, 5 / 32, 7 / 24], rel=1e-12)


def test_finer_granularity_costs_at_least_as_much():
    """Jensen: distances are convex, so with equal weights token >= sequence >= batch."""
    for divergence in NAMES:
        logits, target, geometry, _ = world(3)
        losses = [
            float(PlotLoss(target, geometry, divergence=divergence, granularity=g)(logits, torch.ones(B, T)))
            for g in GRANULARITIES
        ]
        assert losses[0] < losses[1] < losses[2]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_logits(dtype, unit, granularity):
    """The stated errors, u being the dtype's unit roundoff (2^-8 for bfloat16, 2^-11 for float16):

    1. arithmetic: given the rounded logits, the loss is within 1e-6 (relative) of float64's, because nothing after
       the logits is done in half precision; each gradient entry is its float32 value rounded once, so within u of it
       (or within float16's smallest subnormal, 2^-24).
    2. rounding of the logits: to first order the loss moves by at most u * sum |g| |z|; twice that is allowed.
    """
    logits, target, geometry, weights = world(4)
    loss = PlotLoss(target, geometry, granularity=granularity)
    narrow = logits.to(dtype).requires_grad_()
    same = narrow.detach().double().requires_grad_()
    exact = logits.clone().requires_grad_()
    values = [loss(z, weights) for z in (narrow, same, exact)]
    for value in values:
        value.backward()
    assert values[0].dtype == torch.float32
    assert float(values[0].detach()) == pytest.approx(float(values[1].detach()), rel=1e-6)
    assert narrow.grad is not None
    assert narrow.grad.dtype == dtype
    error = (narrow.grad.double() - same.grad).abs()
    assert (error <= 1.01 * unit * same.grad.abs() + 2**-24).all()
    bound = unit * float((exact.grad.abs() * logits.abs()).sum())
    assert abs(float(values[0].detach()) - float(values[2].detach())) <= 2 * bound


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_padded_head_rows(granularity):
    """Rows without target mass that the model never produces change nothing; mass on them is pulled back."""
    logits, target, geometry, weights = world(5)
    wide = Geometry(coordinates=torch.cat([geometry.coordinates, torch.tensor([9.0, -7.0])]), kind="test", valid=V)
    padded = torch.cat([target, torch.zeros(2, dtype=torch.float64)])
    silent = torch.cat([logits, torch.full((B, T, 2), -math.inf, dtype=torch.float64)], dim=-1).requires_grad_()
    loud = torch.cat([logits, torch.zeros(B, T, 2, dtype=torch.float64)], dim=-1).requires_grad_()
    loss = PlotLoss(padded, wide, granularity=granularity)
    plain = PlotLoss(target, geometry, granularity=granularity)(logits, weights)
    value = loss(silent, weights)
    torch.testing.assert_close(value, plain, rtol=1e-12, atol=1e-14)
    value.backward()
    assert silent.grad.isfinite().all()
    assert (silent.grad[..., V:] == 0).all()
    loss(loud, weights).backward()
    assert (loud.grad[..., V:][weights > 0] > 0).all()  # descending the gradient lowers these logits


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [B, 0])
def test_empty_selection_is_zero_with_a_graph(granularity, dtype, rows):
    logits, target, geometry, _ = world(6, dtype)
    logits = logits[:rows].clone().requires_grad_()
    with torch.no_grad():
        logits[..., 0] = math.nan  # not selected: must not leak
    value = PlotLoss(target, geometry, granularity=granularity)(logits, torch.zeros(rows, T, dtype=torch.bool))
    value.backward()
    assert float(value.detach()) == 0.0
    assert value.dtype == torch.float32
    assert logits.grad is not None
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_positions_not_selected_may_hold_anything(granularity):
    logits, target, geometry, weights = world(7)
    loss = PlotLoss(target, geometry, granularity=granularity)
    expected = loss(logits, weights)
    logits[weights == 0] = math.nan
    logits.requires_grad_()
    value = loss(logits, weights)
    value.backward()
    assert torch.equal(value, expected)
    assert logits.grad.isfinite().all()


def test_a_sequence_without_selection_does_not_count():
    logits, target, geometry, weights = world(8)
    weights[1] = 0.0
    loss = PlotLoss(target, geometry, granularity="sequence")
    torch.testing.assert_close(loss(logits, weights), loss(logits[[0, 2]], weights[[0, 2]]))


def test_nan_logits_are_not_hidden():
    logits, target, geometry, weights = world(9)
    logits[2, 0, 3] = math.nan
    assert PlotLoss(target, geometry)(logits, weights).isnan()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_autocast_does_not_lower_the_precision(granularity):
    logits, target, geometry, weights = world(10, torch.float32)
    loss = PlotLoss(target, geometry, granularity=granularity)
    expected = loss(logits, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(logits, weights), expected)


def test_casting_the_module_does_not_round_the_target():
    logits, target, geometry, weights = world(11)
    loss = PlotLoss(target, geometry)
    expected = loss(logits, weights)
    assert torch.equal(torch.nn.Sequential(loss).to(torch.bfloat16)[0](logits, weights), expected)
    assert loss.state_dict() == {}


def test_weights_are_constants():
    logits, target, geometry, weights = world(12)
    weights.requires_grad_()
    PlotLoss(target, geometry)(logits.requires_grad_(), weights).backward()
    assert weights.grad is None
    assert logits.grad is not None


def test_follows_the_logits_to_their_device():
    logits, target, geometry, weights = world(13)
    loss = PlotLoss(target, geometry)
    with pytest.raises(RuntimeError, match="meta"):  # the only other device that is everywhere holds no numbers
        loss(logits.to("meta"), weights)
    assert all(buffer.is_meta for buffer in loss.buffers())


def test_descending_the_gradient_reaches_the_target():
    """200 steps on one position's logits bring the output to the target: no sign is wrong."""
    _, target, geometry, _ = world(14)
    for divergence in NAMES:
        loss = PlotLoss(target, geometry, divergence=divergence)
        logits = torch.zeros(1, 1, V, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.Adam([logits], lr=0.1)
        start = float(loss(logits, torch.ones(1, 1)).detach())
        for _ in range(200):
            optimiser.zero_grad()
            value = loss(logits, torch.ones(1, 1))
            value.backward()
            optimiser.step()
        assert float(value.detach()) < 0.1 * start


@pytest.mark.parametrize(
    ("logits", "mask", "message"),
    [
        (torch.zeros(T, V), torch.ones(T), r"logits is a .* tensor of shape \(5, 17\).*\(B, T, V\)"),
        (torch.zeros(B, T, V, dtype=torch.int64), torch.ones(B, T), "logits is a torch.int64"),
        (torch.zeros(B, T, V + 1), torch.ones(B, T), "logits has 18 tokens and target 17"),
        (torch.zeros(B, T, V), torch.ones(B, T + 1), r"mask has shape \(3, 6\).*shape \(3, 5\)"),
        (torch.zeros(B, T, V), -torch.ones(B, T), "mask has a negative"),
        (torch.zeros(B, T, V), torch.full((B, T), math.nan), "mask has a negative, NaN"),
        (torch.zeros(B, T, V), torch.full((B, T), math.inf), "mask has a negative, NaN or infinite"),
    ],
)
def test_wrong_batches_are_named(logits, mask, message):
    _, target, geometry, _ = world()
    with pytest.raises(InputError, match=message):
        PlotLoss(target, geometry)(logits, mask)


def test_wrong_settings_are_named():
    _, target, geometry, _ = world()
    with pytest.raises(InputError, match="granularity is 'word'"):
        PlotLoss(target, geometry, granularity="word")
    with pytest.raises(InputError, match="divergence is 'w2'"):
        PlotLoss(target, geometry, divergence="w2")
    with pytest.raises(InputError, match="geometry is None"):
        PlotLoss(target)
    with pytest.raises(InputError, match="geometry has 17 tokens and target 4"):
        PlotLoss(torch.full((4,), 0.25), geometry)
