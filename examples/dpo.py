"""DPO with PLOT, with the SFT term or without: the drop-in trainer counts the preference in its own pairs."""

from __future__ import annotations

from common import arguments, pairs, report, settings

from plot_align import PlotConfig, PlotDPOTrainer
from trl import DPOConfig

options = arguments(__doc__, loss_type=["sigmoid", "sigmoid+sft"])
trainer = PlotDPOTrainer(
    model=options.model,
    args=DPOConfig(loss_type=options.loss_type.split("+"), **settings(options.steps)),
    train_dataset=pairs(),
    plot=PlotConfig(alpha=options.alpha),
)
trainer.train()
report(trainer)
