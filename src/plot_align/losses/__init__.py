"""The distances between output distribution and target, and the PLOT term, in plain torch: the specification."""

from plot_align.losses.base import Divergence
from plot_align.losses.divergences import JensenShannon, KullbackLeibler, TotalVariation
from plot_align.losses.expected_cost import ExpectedCost
from plot_align.losses.make import DIVERGENCES, make_divergence
from plot_align.losses.plot_loss import GRANULARITIES, PlotLoss
from plot_align.losses.sinkhorn import (
    Sinkhorn,
    SinkhornClusters,
    SinkhornConvergenceWarning,
    SinkhornTopK,
)
from plot_align.losses.wasserstein import MaxSlicedWasserstein, SlicedWasserstein, Wasserstein1

__all__ = [
    "DIVERGENCES",
    "GRANULARITIES",
    "Divergence",
    "ExpectedCost",
    "JensenShannon",
    "KullbackLeibler",
    "MaxSlicedWasserstein",
    "PlotLoss",
    "Sinkhorn",
    "SinkhornClusters",
    "SinkhornConvergenceWarning",
    "SinkhornTopK",
    "SlicedWasserstein",
    "TotalVariation",
    "Wasserstein1",
    "make_divergence",
]
