"""DPO with PLOT: the drop-in trainer counts the preference in the pairs that it trains on."""

from __future__ import annotations

from common import arguments, report, settings
from trl import DPOConfig

from plot_align import PlotConfig, PlotDPOTrainer
from plot_align.sandbox import pairs

options = arguments(__doc__)
trainer = PlotDPOTrainer(
    model=options.model,
    args=DPOConfig(**settings(options.steps)),
    train_dataset=pairs(),
    plot=PlotConfig(alpha=options.alpha),
)
trainer.train()
report(trainer)
