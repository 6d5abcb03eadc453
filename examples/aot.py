"""AOT, TRL's distributional DPO loss, with PLOT: one compares sorted rewards of a micro-batch, the other tokens.

AOT sorts within a micro-batch: the larger it is, the more there is to sort, and gradient accumulation does not help.
"""

from __future__ import annotations

from common import arguments, pairs, report, settings

from plot_align import PlotConfig, PlotDPOTrainer
from trl import DPOConfig

options = arguments(__doc__, loss_type=["aot", "aot_unpaired"])
trainer = PlotDPOTrainer(
    model=options.model,
    args=DPOConfig(loss_type=[options.loss_type], **settings(options.steps)),
    train_dataset=pairs(),
    plot=PlotConfig(alpha=options.alpha),
)
trainer.train()
report(trainer)
