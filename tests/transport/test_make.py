"""Every divergence by its name, with what it needs and nothing else."""

import pytest
import torch

from plot_align.errors import InputError
from plot_align.transport import (
    DIVERGENCES,
    ExpectedCost,
    JensenShannon,
    KullbackLeibler,
    MaxSlicedWasserstein,
    SinkhornClusters,
    SinkhornTopK,
    SlicedWasserstein,
    TotalVariation,
    Wasserstein1,
    make_divergence,
)
from plot_align.transport.geometry import line, slices

EMBEDDINGS = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
TARGET = torch.full((8,), 0.125)
NEEDS = {
    "w1": (Wasserstein1, {"geometry": line(EMBEDDINGS)}),
    "max_w1": (MaxSlicedWasserstein, {"geometry": slices(EMBEDDINGS, 3)}),
    "sinkhorn": (SinkhornTopK, {"embeddings": EMBEDDINGS, "sinkhorn_epsilon": 0.5}),
    "emo": (ExpectedCost, {"embeddings": EMBEDDINGS}),
    "kl": (KullbackLeibler, {}),
    "js": (JensenShannon, {}),
    "tv": (TotalVariation, {}),
}


def test_every_name_is_made():
    assert tuple(NEEDS) == DIVERGENCES
    for name, (cls, needs) in NEEDS.items():
        assert type(make_divergence(name, TARGET, **needs)) is cls


def test_several_lines_mean_their_mean():
    assert type(make_divergence("w1", TARGET, slices(EMBEDDINGS, 3))) is SlicedWasserstein


def test_sinkhorn_options_arrive():
    made = make_divergence(
        "sinkhorn",
        TARGET,
        embeddings=EMBEDDINGS,
        sinkhorn_support="clusters",
        sinkhorn_size=5,
        sinkhorn_epsilon=0.3,
        sinkhorn_iterations=7,
        valid=6,
        seed=4,
    )
    want = SinkhornClusters(TARGET, EMBEDDINGS, size=5, epsilon=0.3, max_iterations=7, valid=6, seed=4)
    assert type(made) is SinkhornClusters
    assert (made.size, made.epsilon, made.max_iterations, made.valid) == (5, 0.3, 7, 6)
    assert torch.equal(made.labels, want.labels)
    assert make_divergence("sinkhorn", TARGET, embeddings=EMBEDDINGS, sinkhorn_size=2).size == 2


@pytest.mark.parametrize(
    ("name", "needs", "message"),
    [
        ("W1", {}, r'divergence is .W1..*"w1", "max_w1", "sinkhorn", "emo", "kl", "js" or "tv"'),
        ("w1", {}, 'geometry is None with divergence "w1"'),
        ("max_w1", {}, 'geometry is None with divergence "max_w1"'),
        ("max_w1", {"geometry": line(EMBEDDINGS)}, 'geometry is one line with divergence "max_w1"'),
        ("emo", {}, 'embeddings is None with divergence "emo"'),
        ("sinkhorn", {}, 'embeddings is None with divergence "sinkhorn"'),
        ("sinkhorn", {"embeddings": EMBEDDINGS, "sinkhorn_support": "all"}, 'sinkhorn_support is .all.*"topk"'),
    ],
)
def test_what_is_missing_is_named(name, needs, message):
    with pytest.raises(InputError, match=message):
        make_divergence(name, TARGET, **needs)
