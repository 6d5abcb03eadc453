"""The arms of the study: a method, its loss, the term on it, and what is only tried."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from plot_align.config import PlotConfig

SFT = {"loss_type": ["sigmoid", "sft"]}


@dataclass(frozen=True)
class Arm:
    """One way to tune the model.

    Args:
        method: TRL's trainer, or ours for PRO.
        options: of the trainer's config, beside what all arms share.
        plot: the PLOT term; ``None``: without it.
        contexts: a term by context (:class:`study.terms.Contexts`), and how many clusters.
        rejected: the term on the rejected positions.
        beside: ``(kind, weight)`` of a loss on rows beside the pairs: benign answers or recovery data.
        compare: the arm that it is compared with, one thing changed.
    """

    method: Literal["dpo", "sft", "pro"] = "dpo"
    options: Mapping[str, Any] = field(default_factory=dict)
    plot: PlotConfig | None = None
    contexts: tuple[str, int] | None = None
    rejected: bool = False
    beside: tuple[str, float] | None = None
    compare: str = "DPO"


PLOT, BATCH = PlotConfig(), {"target": "anchored", "target_scope": "batch"}


def by_context(kind: str, clusters: int = 0, ratio: float = 0.5, strength: float = 0.1) -> Arm:
    config = PlotConfig.from_options(**BATCH, balance_ratio=ratio, target_strength=strength)
    return Arm(plot=config, contexts=(kind, clusters), compare="DPO+PLOT")


ARMS: dict[str, Arm] = {
    # rivals without PLOT
    "DPO": Arm(compare="base"),
    "DPO β 0.05": Arm(options={"beta": 0.05}),
    "DPO β 0.5": Arm(options={"beta": 0.5}),
    "DPO+SFT": Arm(options=SFT),
    "DPO+SFT 0.2": Arm(options={**SFT, "loss_weights": [1.0, 0.2]}),
    "APO-zero": Arm(options={"loss_type": ["apo_zero"]}),
    "AOT": Arm(options={"loss_type": ["aot"]}),
    "SFT": Arm("sft", compare="base"),
    "PRO": Arm("pro", compare="base"),
    "DPO, recovery data": Arm(beside=("recovery", 0.2)),
    # (a) our reading of the paper
    "DPO+PLOT, the paper's, α 0.01": Arm(plot=PlotConfig.paper(alpha=0.01)),
    "DPO+PLOT, the paper's, α 0.1": Arm(plot=PlotConfig.paper(alpha=0.1)),
    "DPO+PLOT, the paper's, α 1": Arm(plot=PlotConfig.paper(alpha=1.0)),
    "DPO+PLOT, the paper's, α 10": Arm(plot=PlotConfig.paper(alpha=10.0)),
    "DPO+DEFT ω 0.01": Arm(plot=PlotConfig.from_options(divergence="deft_prob", alpha=0.01)),
    "DPO+DEFT ω 0.1": Arm(plot=PlotConfig.from_options(divergence="deft_prob", alpha=0.1)),
    "DPO+DEFT ω 1": Arm(plot=PlotConfig.from_options(divergence="deft_prob", alpha=1.0)),
    "DPO+DEFT ω 10": Arm(plot=PlotConfig.from_options(divergence="deft_prob", alpha=10.0)),
    # (b) the default
    "DPO+PLOT": Arm(plot=PLOT),
    "DPO+PLOT ρ 0.1": Arm(plot=PlotConfig(balance_ratio=0.1)),
    "DPO+PLOT ρ 0.25": Arm(plot=PlotConfig(balance_ratio=0.25)),
    "DPO+PLOT ρ 1": Arm(plot=PlotConfig(balance_ratio=1.0)),
    "DPO+SFT+PLOT": Arm(options=SFT, plot=PLOT, compare="DPO+SFT"),
    "SFT+PLOT": Arm("sft", plot=PLOT, compare="SFT"),
    "AOT+PLOT": Arm(options={"loss_type": ["aot"]}, plot=PLOT, compare="AOT"),
    "PRO+PLOT": Arm("pro", plot=PLOT, compare="PRO"),
    # (c) to (f), which are only tried
    "by place": by_context("place"),
    "on rejected": Arm(
        plot=PlotConfig.from_options(**BATCH, positions="rejected"), rejected=True, compare="DPO+PLOT"
    ),
    "by answer, K 16": by_context("answer", 16),
    "by answer, λ 1": by_context("answer", 16, strength=1.0),
    "by request, K 4": by_context("request", 4),
    "by request and place, K 4": by_context("request and place", 4),
    "by request and place, λ 1": by_context("request and place", 4, strength=1.0),
    "benign held by KL": Arm(beside=("kl", 1.0)),
    "benign held by W1": Arm(beside=("w1", 10.0)),
    "DPO+PLOT, benign held by KL": Arm(plot=PLOT, beside=("kl", 1.0), compare="benign held by KL"),
    # ablations of the default
    "0-1 cost": Arm(plot=PlotConfig.from_options(divergence="tv"), compare="DPO+PLOT"),
    "JS": Arm(plot=PlotConfig.from_options(divergence="js"), compare="DPO+PLOT"),
    "JS on DPO+SFT": Arm(options=SFT, plot=PlotConfig.from_options(divergence="js"), compare="DPO+SFT+PLOT"),
    "KL": Arm(plot=PlotConfig.from_options(divergence="kl", target_strength=0.0), compare="DPO+PLOT"),
    "no embeddings": Arm(plot=PlotConfig.from_options(geometry="vocabulary"), compare="DPO+PLOT"),
    "norm": Arm(plot=PlotConfig.from_options(geometry="norm"), compare="DPO+PLOT"),
    "no preference, λ 0": Arm(plot=PlotConfig(target_strength=0.0), compare="DPO+PLOT"),
}  # fmt: skip
