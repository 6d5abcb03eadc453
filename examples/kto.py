"""KTO with PLOT: attached to a trainer that is already built, which unpaired the pairs itself."""

from __future__ import annotations

from common import arguments, pairs, report, settings

from plot_align import PlotConfig, attach
from trl import KTOConfig, KTOTrainer

options = arguments(__doc__)
trainer = KTOTrainer(model=options.model, args=KTOConfig(**settings(options.steps)), train_dataset=pairs())
attach(trainer, config=PlotConfig(alpha=options.alpha))
trainer.train()
report(trainer)
