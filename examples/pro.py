"""PRO with PLOT on ranked lists: the best completion of each prompt counts as preferred, all others as rejected."""

from __future__ import annotations

from common import arguments, pairs, report, settings

from plot_align import PlotConfig, PlotPROTrainer, PROConfig

options = arguments(__doc__)


def ranked(row):
    """A list of any length, with a reward for each; our pairs have two answers to a prompt."""
    return {"completions": [row["chosen"], row["rejected"]], "rewards": [1.0, 0.0]}


data = pairs()
trainer = PlotPROTrainer(
    model=options.model,
    args=PROConfig(**settings(options.steps)),
    train_dataset=data.map(ranked).select_columns(["prompt", "completions", "rewards"]),
    plot=PlotConfig(alpha=options.alpha),
)
trainer.train()
report(trainer)
