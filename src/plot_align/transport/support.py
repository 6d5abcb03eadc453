"""Statistics of the embeddings for transport on a small support: mean token, mean cost, k-means clusters."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from plot_align.errors import InputError
from plot_align.transport.geometry import chunks

PAIRS_SAMPLE = 2048  # tokens whose pairs give the mean cost: 2 million pairs
CLUSTER_SAMPLE = 64  # tokens per cluster from which the centroids are found
LLOYD_ITERATIONS = 10


def mean_token(embeddings: Tensor, valid: int) -> Tensor:
    """(V, H) → (H,) float64: the mean of the first ``valid`` rows."""
    total = torch.zeros(())
    for rows in chunks(embeddings[:valid]):
        total = total.to(rows) + rows.sum(dim=0)  # (H,)
    return total / valid


def mean_cost(embeddings: Tensor, valid: int, seed: int) -> float:
    """Mean of ``||e_i - e_j||_2`` over all pairs i != j of tokens; of a sample if there are more than 2,048 tokens.

    Raises:
        InputError: it is zero.
    """
    rows = sample(embeddings, min(valid, PAIRS_SAMPLE), valid, seed)  # (n, H)
    mean = float(distances(rows - rows.mean(0)).sum()) / (len(rows) * (len(rows) - 1))
    if not mean > 0:
        raise InputError(
            f"embeddings are the same for all {len(rows)} tokens looked at, but at least two different ones are "
            "needed for a distance: use the embeddings of another layer."
        )
    return mean


def sample(embeddings: Tensor, count: int, valid: int, seed: int) -> Tensor:
    """(count, H) float64: different rows among the first ``valid``, drawn on the CPU."""
    index = torch.randperm(valid, generator=torch.Generator().manual_seed(seed))[:count].sort().values  # (count,)
    return next(iter(chunks(embeddings[index.to(embeddings.device)].reshape(1, -1)))).reshape(count, -1)


def distances(rows: Tensor) -> Tensor:
    """(..., n, H) float64 → (..., n, n) Euclidean distances with an exact zero diagonal.

    By the matrix product: absolute error about 1e-8 of the rows' norm, so centre them first.
    """
    cost = torch.cdist(rows, rows, compute_mode="use_mm_for_euclid_dist")  # (..., n, n)
    cost.diagonal(dim1=-2, dim2=-1).zero_()
    return cost


def k_means(embeddings: Tensor, size: int, *, valid: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clusters of the embeddings: SciPy's k-means on a sample of tokens, then every row to its nearest centroid.

    Starts from ``size`` random tokens; runs 10 iterations on at most 64 tokens per cluster, on the CPU. A cluster that
    loses its tokens keeps its centroid. Rows from ``valid`` on (padding) do not move the centroids. Centroids and
    assignments are found in float32 (the radii are not): a token at the same distance from two centroids may go to
    either.

    Returns:
        labels (V,) int64, centroids (size, H) float64, radii (V,) float64: each row's distance to its centroid.
    """
    from scipy.cluster.vq import kmeans2  # half a second, and nothing else needs it

    rows = sample(embeddings, min(valid, CLUSTER_SAMPLE * size), valid, seed)  # (n, H)
    centre = rows.mean(0)  # (H,); not centred, float32 would lose the differences between the rows
    points = (rows - centre).float().cpu().numpy()
    start = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:size].numpy()  # (size,)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "One of the clusters is empty")
        book, _ = kmeans2(points, points[start], iter=LLOYD_ITERATIONS, minit="matrix")
    centroids = torch.from_numpy(book).to(embeddings.device)  # (size, H)
    found, radii = [], []
    for block in chunks(embeddings):
        block = block - centre  # (n, H)
        labels = _nearest(block.float(), centroids)
        found.append(labels)
        radii.append(torch.linalg.vector_norm(block - centroids[labels], dim=1))
    return torch.cat(found), centroids + centre, torch.cat(radii)


def _nearest(rows: Tensor, centroids: Tensor) -> Tensor:
    """(n, H), (k, H) → (n,) int64: the nearest centroid, from ``|c|^2 - 2 <e, c>``."""
    scores = torch.addmm(centroids.square().sum(1), rows, centroids.T, alpha=-2.0)  # (n, k)
    return scores.argmin(1)
