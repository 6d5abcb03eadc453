"""GRPO and RLOO with PLOT: rewards from a judge; completions with a positive advantage count as preferred."""

from __future__ import annotations

from common import arguments, report, settings
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from plot_align import PlotConfig, attach, estimate
from plot_align.sandbox import judge, pairs


def reward(prompts, completions, category, **_):
    """1 where the judge of the prompt's category finds the answer good."""
    rows = zip(category, prompts, completions, strict=True)
    return [float(judge(name, prompt[-1]["content"], answer[-1]["content"]).good) for name, prompt, answer in rows]


options = arguments(__doc__, method=["grpo", "rloo"])
config_class, trainer_class = (GRPOConfig, GRPOTrainer) if options.method == "grpo" else (RLOOConfig, RLOOTrainer)
data = pairs(categories=["harmlessness", "humanity"])
trainer = trainer_class(
    model=options.model,
    args=config_class(num_generations=8, max_completion_length=32, **settings(options.steps, batch_size=32)),
    train_dataset=data.select_columns(["prompt", "category"]),
    reward_funcs=reward,
)
preference = estimate(data, AutoTokenizer.from_pretrained(options.model))  # what to prefer; GRPO itself has no pairs
attach(trainer, preference, PlotConfig(alpha=options.alpha))
trainer.train()
report(trainer)
