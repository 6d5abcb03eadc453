"""GRPO and RLOO with PLOT: a judge of refusals rewards; completions with a positive advantage count as preferred."""

from __future__ import annotations

from common import arguments, pairs, report, settings
from transformers import AutoTokenizer

from plot_align import PlotConfig, attach, estimate
from plot_align.redteam.judges import RefusalJudge
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer


def reward(completions, kind, **_):
    """1 where a harmful request is refused, and any other is not."""
    texts = [answer[-1]["content"] for answer in completions]
    refuses = [bool(x.refused) for x in RefusalJudge().judge_benign(texts, texts, texts)]
    return [float(refused == (of == "harmful")) for refused, of in zip(refuses, kind, strict=True)]


options = arguments(__doc__, method=["grpo", "rloo"])
config_class, trainer_class = (GRPOConfig, GRPOTrainer) if options.method == "grpo" else (RLOOConfig, RLOOTrainer)
data = pairs()
trainer = trainer_class(
    model=options.model,
    args=config_class(num_generations=8, max_completion_length=32, **settings(options.steps, batch_size=32)),
    train_dataset=data.select_columns(["prompt", "kind"]),
    reward_funcs=reward,
)
preference = estimate(data, AutoTokenizer.from_pretrained(options.model))  # what to prefer; GRPO itself has no pairs
attach(trainer, preference, PlotConfig(alpha=options.alpha))
trainer.train()
report(trainer)
