"""Units and clusters of the embeddings against brute force."""

import warnings

import pytest
import torch

from plot_align.errors import InputError
from plot_align.transport import geometry, support
from plot_align.transport.support import distances, k_means, mean_cost, mean_token, sample


def embeddings(seed=0, rows=60, width=4, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64) + offset


def brute_distances(a, b):
    return (a[:, None] - b[None]).square().sum(-1).sqrt()


def test_mean_token_and_distances(monkeypatch):
    e = embeddings()
    monkeypatch.setattr(geometry, "_CHUNK_ELEMENTS", 7 * e.shape[1])
    torch.testing.assert_close(mean_token(e, 45), e[:45].mean(0), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(distances(e), brute_distances(e, e), rtol=1e-9, atol=1e-9)
    assert (distances(e).diagonal() == 0).all()


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_mean_cost_is_over_all_pairs_of_tokens(offset):
    e = embeddings(1, offset=offset)
    pairs = brute_distances(e[:45], e[:45])
    assert mean_cost(e, 45, seed=0) == pytest.approx(float(pairs.sum()) / (45 * 44), rel=1e-9)


def test_mean_cost_of_a_sample(monkeypatch):
    """4,000 points on which the standard deviation of a distance is about a third of its mean: 1 % is many sigmas."""
    e = embeddings(2, rows=4000)
    exact = mean_cost(e[:2048], 2048, seed=0)
    assert mean_cost(e, 4000, seed=0) == pytest.approx(exact, rel=0.03)
    monkeypatch.setattr(support, "PAIRS_SAMPLE", 20)
    assert mean_cost(e, 4000, seed=0) != mean_cost(e, 4000, seed=1)
    assert mean_cost(e, 4000, seed=1) == mean_cost(e, 4000, seed=1)


def test_equal_embeddings_have_no_cost():
    with pytest.raises(InputError, match="embeddings are the same for all 5 tokens"):
        mean_cost(torch.zeros(5, 3), 5, seed=0)


def test_sample_takes_different_tokens():
    e = torch.arange(30.0).reshape(30, 1)
    rows = sample(e, 10, 20, seed=3)
    assert rows.dtype == torch.float64
    assert rows.unique().numel() == 10
    assert rows.max() < 20
    assert torch.equal(sample(e, 20, 20, seed=0), e[:20].double())


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_every_row_goes_to_its_nearest_centroid(offset, monkeypatch):
    e = embeddings(4, offset=offset)
    monkeypatch.setattr(geometry, "_CHUNK_ELEMENTS", 7 * e.shape[1])
    labels, centroids, radii = k_means(e, 6, valid=45, seed=0)
    far = brute_distances(e, centroids)
    assert torch.equal(labels, far.argmin(1))
    torch.testing.assert_close(radii, far.amin(1), rtol=1e-6, atol=1e-6)
    assert labels.unique().numel() == 6


def test_converged_centroids_are_the_means_of_their_tokens():
    e = embeddings(5, rows=20)
    labels, centroids, _ = k_means(e, 2, valid=20, seed=1)
    for k in range(2):
        torch.testing.assert_close(centroids[k], e[labels == k].mean(0), rtol=1e-5, atol=1e-5)


def test_padding_does_not_move_the_centroids():
    e = embeddings(6)
    padded = torch.cat([e, 100.0 + embeddings(7, rows=9)])
    plain, found = k_means(e, 5, valid=60, seed=2), k_means(padded, 5, valid=60, seed=2)
    assert torch.equal(found[0][:60], plain[0])
    assert torch.equal(found[1], plain[1])


def test_equal_tokens_leave_clusters_empty():
    """Two different embeddings and three clusters: one stays empty, nothing becomes NaN, and SciPy does not warn."""
    e = torch.tensor([[0.0, 0.0], [1.0, 0.0]]).repeat(4, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels, centroids, radii = k_means(e, 3, valid=8, seed=0)
    assert labels.unique().numel() <= 2
    assert centroids.isfinite().all()
    assert radii.isfinite().all()
