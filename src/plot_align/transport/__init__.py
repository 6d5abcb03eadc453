"""Distances from an output distribution to a target: transport on lines and small supports, divergences."""

from plot_align.transport.base import Divergence
from plot_align.transport.divergences import JensenShannon, KullbackLeibler, TotalVariation
from plot_align.transport.expected_cost import ExpectedCost
from plot_align.transport.geometry import Geometry, line, slices
from plot_align.transport.make import DIVERGENCES, make_divergence
from plot_align.transport.sinkhorn import Sinkhorn, SinkhornClusters, SinkhornConvergenceWarning, SinkhornTopK
from plot_align.transport.wasserstein import MaxSlicedWasserstein, SlicedWasserstein, SortedLine, Wasserstein1

__all__ = [
    "DIVERGENCES",
    "Divergence",
    "ExpectedCost",
    "Geometry",
    "JensenShannon",
    "KullbackLeibler",
    "MaxSlicedWasserstein",
    "Sinkhorn",
    "SinkhornClusters",
    "SinkhornConvergenceWarning",
    "SinkhornTopK",
    "SlicedWasserstein",
    "SortedLine",
    "TotalVariation",
    "Wasserstein1",
    "line",
    "make_divergence",
    "slices",
]
