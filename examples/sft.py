"""SFT on the preferred answers with PLOT: the preference comes from the pairs, rejected answers included."""

from __future__ import annotations

from common import arguments, pairs, report, settings
from transformers import AutoTokenizer

from plot_align import PlotConfig, PlotSFTTrainer, estimate
from trl import SFTConfig

options = arguments(__doc__)
data = pairs()
trainer = PlotSFTTrainer(
    model=options.model,
    args=SFTConfig(**settings(options.steps)),
    train_dataset=data.rename_column("chosen", "completion").select_columns(["prompt", "completion"]),
    preference=estimate(data, AutoTokenizer.from_pretrained(options.model)),
    plot=PlotConfig(alpha=options.alpha),
)
trainer.train()
report(trainer)
