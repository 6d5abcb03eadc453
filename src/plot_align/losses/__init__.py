"""The distances between output distribution and target, the PLOT term, and PRO's loss, in plain torch."""

from plot_align.losses.base import Divergence
from plot_align.losses.deft import DistributionReward, log_reward
from plot_align.losses.divergences import JensenShannon, KullbackLeibler, TotalVariation
from plot_align.losses.expected_cost import ExpectedCost
from plot_align.losses.make import DIVERGENCES, make_divergence
from plot_align.losses.plot_loss import GRANULARITIES, PlotLoss
from plot_align.losses.pro import ProLoss, naive_pro_loss, pro_loss
from plot_align.losses.sinkhorn import (
    Sinkhorn,
    SinkhornClusters,
    SinkhornConvergenceWarning,
    SinkhornTopK,
)
from plot_align.losses.wasserstein import MaxSlicedWasserstein, SlicedWasserstein, SortedLine, Wasserstein1

__all__ = [
    "DIVERGENCES",
    "GRANULARITIES",
    "DistributionReward",
    "Divergence",
    "ExpectedCost",
    "JensenShannon",
    "KullbackLeibler",
    "MaxSlicedWasserstein",
    "PlotLoss",
    "ProLoss",
    "Sinkhorn",
    "SinkhornClusters",
    "SinkhornConvergenceWarning",
    "SinkhornTopK",
    "SlicedWasserstein",
    "SortedLine",
    "TotalVariation",
    "Wasserstein1",
    "log_reward",
    "make_divergence",
    "naive_pro_loss",
    "pro_loss",
]
