"""The term on the hardest numbers: right by the oracle, or named; never a NaN that nobody sees."""

from __future__ import annotations

import contextlib
import itertools
import math
import time

import pytest
import torch

from oracles import term
from plot_align.config import PlotConfig
from plot_align.errors import InputError
from plot_align.head import HeadSpec, fused_head
from plot_align.head.logits import output_distribution
from plot_align.plot import BalancedAlpha, PlotLoss
from plot_align.preference.distribution import PreferenceDistribution
from plot_align.transport import DIVERGENCES, SinkhornConvergenceWarning, line, make_divergence, slices

GRANULARITIES = ("batch", "sequence", "token")
LARGE = 262_144  # ids, as Gemma 3 has them


def preference(chosen: list[int], rejected: list[int]) -> PreferenceDistribution:
    return PreferenceDistribution(torch.tensor(chosen), torch.tensor(rejected), {"sources": [{"rows": 1}]})


def counts(size: int, seed: int = 0) -> PreferenceDistribution:
    drawn = torch.randint(0, 40, (2, size), generator=torch.Generator().manual_seed(seed))
    return preference(drawn[0].tolist(), drawn[1].tolist())


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    reference: torch.Tensor | None = None,
    roles: torch.Tensor | None = None,
    config: PlotConfig | None = None,
    tolerance: float = 1e-10,
) -> float:
    """The value and the gradient against the oracle's, both in float64 of the same numbers."""
    size, config = logits.size(-1), config or PlotConfig()
    embeddings, counted = noise(size, 3, seed=1), counts(size)
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got = PlotLoss(counted, embeddings, config)(ours, labels, roles, reference_logits=reference)
    roles = torch.ones(len(labels)) if roles is None else roles
    scored = labels[:, 1:] != -100
    want = term.plot_loss(
        config,
        term.World(
            p=theirs[:, :-1].softmax(-1),
            q=None if reference is None else reference[:, :-1].double().softmax(-1),
            tokens=labels[:, 1:],
            masks={"chosen": scored & (roles > 0)[:, None], "rejected": scored & (roles < 0)[:, None], "all": scored},
            sequences=torch.arange(len(labels))[:, None].expand(scored.shape),
            embeddings=embeddings,
            chosen=counted.chosen_counts,
            rejected=counted.rejected_counts,
        ),
    )
    got.backward()
    want.backward()
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=max(tolerance, 1e-8), atol=max(tolerance, 1e-12))
    return float(got.detach())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("batch", "length"), [(1, 2), (1, 7), (3, 2)])
def test_a_batch_of_one_and_a_single_scored_token(granularity: str, batch: int, length: int) -> None:
    labels = torch.randint(0, 11, (batch, length), generator=torch.Generator().manual_seed(3))
    config = PlotConfig(granularity=granularity)
    value = check(noise(batch, length, 11), labels, reference=noise(batch, length, 11, seed=2), config=config)
    assert value > 0


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_sequence_of_one_token_predicts_nothing(granularity: str) -> None:
    logits = noise(2, 1, 11).requires_grad_()
    value = PlotLoss(counts(11), noise(11, 3), PlotConfig(granularity=granularity))(logits, torch.zeros(2, 1).long())
    value.backward()
    assert float(value.detach()) == 0.0
    assert not logits.grad.any()


@pytest.mark.parametrize("granularity", ["batch", "sequence"])
@pytest.mark.parametrize("target", ["chosen", "relu", "shift", "softmax"])
def test_one_token_throughout(granularity: str, target: str) -> None:
    """Every label is token 4: a target of one point, or none where both sides are that point."""
    config = PlotConfig.from_options(granularity=granularity, target=target, target_scope="batch", positions="all")
    labels, roles = torch.full((2, 5), 4), torch.tensor([1, -1])
    if target == "chosen":
        assert check(noise(2, 5, 11), labels, roles=roles, config=config) > 0
    else:
        assert check(noise(2, 5, 11), labels, roles=roles, config=config) == 0.0


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_all_chosen_tokens_are_masked(granularity: str) -> None:
    labels = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(3))
    labels[:2] = -100
    roles = torch.tensor([1, 1, -1, -1])
    assert check(noise(4, 6, 11), labels, roles=roles, config=PlotConfig(granularity=granularity)) == 0.0


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("size", [1e4, 65504.0, 3e38])
def test_logits_as_large_as_they_get(granularity: str, size: float) -> None:
    """Each position is certain of one token; 65504 is float16's largest number, 3.4e38 float32's."""
    dtype = torch.float16 if size == 65504.0 else torch.float32
    logits = (noise(2, 4, 11).sign() * 0 - size).to(dtype)
    winners = torch.tensor([[1, 4, 4, 9], [0, 2, 10, 5]])
    logits.scatter_(-1, winners.unsqueeze(-1), size)
    labels = torch.tensor([[-100, 3, 4, 5], [-100, 1, 2, 8]])
    assert check(logits, labels, config=PlotConfig(granularity=granularity), tolerance=1e-6) > 0


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_tokens_that_the_model_masks(granularity: str) -> None:
    """A logit of −inf is a probability of 0, not a NaN."""
    logits = noise(2, 4, 11)
    logits[..., 3:6] = -math.inf
    labels = torch.tensor([[-100, 1, 2, 7], [-100, 9, 10, 8]])
    ours = logits.clone().requires_grad_()
    plot = PlotLoss(counts(11), noise(11, 3, seed=1), PlotConfig(granularity=granularity))
    plot(ours, labels).backward()
    assert not ours.grad[..., 3:6].any()
    finite = logits.clone()
    finite[..., 3:6] = -1e9
    assert float(plot(logits, labels)) == pytest.approx(float(plot(finite, labels)), rel=1e-12)
    assert ours.grad.isfinite().all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_bad_logit_is_never_hidden(granularity: str, bad: float, divergence: str) -> None:
    """Whatever the distance, a position whose output is not a distribution makes the loss NaN, which trainers name."""
    name = {"max_w1": "w1"}.get(divergence, divergence)
    options = {"geometry": "max_sliced"} if divergence == "max_w1" else {}
    logits, labels = noise(2, 4, 11), torch.tensor([[-100, 1, 2, 7], [-100, 9, 10, 8]])
    logits[1, 1, 4] = bad
    config = PlotConfig.from_options(granularity=granularity, divergence=name, target="softmax", **options)
    with pytest.warns(SinkhornConvergenceWarning) if name == "sinkhorn" else contextlib.nullcontext():
        value = PlotLoss(counts(11), noise(11, 3, seed=1), config)(logits, labels)
    assert math.isnan(float(value))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("fused", [True, False])
def test_a_sequence_without_a_selected_position_has_no_gradient(divergence: str, fused: bool) -> None:
    """Its output distribution is zero, which no distance is defined for: it must not reach the others as NaN."""
    size, rows, width = 11, 6, 4
    weights = torch.tensor([0.5, 0.5, 0.0, 0.0, 0.25, 0.75], dtype=torch.float64)
    segments = torch.tensor([0, 0, 1, 1, 2, 2])
    embeddings, target = noise(size, 3, seed=1), noise(size, seed=4).softmax(0)
    geometry = slices(embeddings, 3) if divergence == "max_w1" else line(embeddings)
    distance = make_divergence(divergence, target, geometry, embeddings=embeddings, sinkhorn_size=5)

    def loss(selected: list[int], count: int, of: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = noise(rows, width)[selected].requires_grad_()
        head = noise(size, width, seed=2)
        if fused:
            found = fused_head(hidden, head, None, torch.zeros(len(selected)).long(), HeadSpec(),
                               weights=weights[selected], segments=of, num_segments=count).distributions  # fmt: skip
        else:
            found, _ = output_distribution(hidden @ head.T, weights[selected], of, count)
        there = found.detach().sum(-1) > 0  # (S,)
        value = torch.where(there, distance.value(found), found.sum(-1) * 0).sum()
        value.backward()
        return value.detach(), hidden.grad

    value, gradient = loss(list(range(6)), 3, segments)
    expected, of_others = loss([0, 1, 4, 5], 2, torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient[[0, 1, 4, 5]], of_others, rtol=1e-12, atol=1e-14)
    assert not gradient[2:4].any()


def test_a_vocabulary_of_one_token_has_no_preference() -> None:
    with pytest.raises(InputError, match="has d = 0 for every token"):
        PlotLoss(preference([3], [5]), noise(1, 3))


def test_a_vocabulary_of_two_tokens() -> None:
    """d = (1/4, −1/4); W1 to (1, 0) from p = (1/2, 1/2) is half of the way, whose length is the unit."""
    config = PlotConfig.from_options(target="relu", target_scope="dataset")
    value = PlotLoss(preference([3, 1], [2, 2]), torch.tensor([[1.0], [5.0]]), config)(
        torch.zeros(1, 2, 2), torch.tensor([[-100, 0]])
    )
    assert float(value) == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("label", [11, 262_144, -1, -101])
def test_a_label_that_is_no_token_of_the_head_is_named(label: int) -> None:
    labels = torch.tensor([[-100, 3, label, 4]])
    with pytest.raises(InputError, match=rf"labels has {label}, expected token ids below 11"):
        PlotLoss(counts(11), noise(11, 3))(noise(1, 4, 11), labels)


@pytest.mark.parametrize(("vanilla", "plot"), itertools.product([1e-300, 1.0, 1e300], repeat=2))
def test_a_balanced_alpha_is_a_number_that_the_loss_can_be_multiplied_by(vanilla: float, plot: float) -> None:
    """A float32 loss times 1e300 would be infinite, and NaN where the loss is 0; where α is one, it is the ratio."""
    alpha = BalancedAlpha(0.5)
    if alpha.observe(vanilla, plot):
        assert alpha.value == pytest.approx(0.5 * vanilla / plot)
    else:
        assert alpha.value == 0.0
    assert (float(torch.ones(()) * alpha.value), alpha.observe(vanilla, plot)) == (
        pytest.approx(alpha.value), plot >= vanilla,
    )  # fmt: skip


def test_alpha_is_zero_until_something_can_be_measured() -> None:
    alpha = BalancedAlpha(0.5)
    hidden = torch.ones(3, requires_grad=True)
    for vanilla, plot in ((hidden.sum(), 0 * hidden.sum()), (0 * hidden.sum(), hidden.sum())):
        assert alpha(vanilla, plot, hidden) == 0.0
    assert alpha(hidden.sum(), 2 * hidden.sum(), hidden) == pytest.approx(0.25)


SETTINGS = [
    {}, {"granularity": "sequence"}, {"granularity": "token"}, {"geometry": "sliced"}, {"geometry": "max_sliced"},
    {"geometry": "principal"}, {"divergence": "tv"}, {"divergence": "js"}, {"divergence": "emo"},
    {"divergence": "sinkhorn"},
]  # fmt: skip


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_a_vocabulary_of_262144(options: dict[str, str]) -> None:
    """No table of pairs, which would be 275 GB in float32: seconds, and at most 60 rows of the vocabulary at once."""
    rows, width = 4, 2
    drawn = torch.zeros(2, LARGE, dtype=torch.int64)
    drawn[:, :50] = torch.randint(1, 9, (2, 50), generator=torch.Generator().manual_seed(0))
    counted = PreferenceDistribution(drawn[0], drawn[1], {"sources": [{"rows": 1}]})
    config = PlotConfig.from_options(slices=4, sinkhorn_size=16, **options)
    logits = torch.zeros(1, rows, LARGE)
    logits[..., 7] = 20.0  # nearly certain
    labels = torch.tensor([[-100, 3, 7, LARGE - 1]])
    start, before = time.process_time(), _resident()
    plot = PlotLoss(counted, noise(LARGE, width, seed=1).float(), config)
    logits.requires_grad_()
    value = plot(logits, labels)
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()
    assert time.process_time() - start < 60
    assert _resident() - before < 60 * 4 * LARGE * 8


def _resident() -> int:
    """Peak memory of this process in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_w1_over_262144_tokens_against_scipy() -> None:
    """A line as long as a large vocabulary: the cumulative sums stay exact to 1e-9 in float64."""
    from scipy.stats import wasserstein_distance

    geometry = line(noise(LARGE, 2, seed=1))
    p, target = noise(2, LARGE, seed=2).softmax(-1)
    found = make_divergence("w1", target, geometry).value(p)
    x = geometry.coordinates.numpy()
    assert float(found) == pytest.approx(wasserstein_distance(x, x, p.numpy(), target.numpy()), rel=1e-9)
