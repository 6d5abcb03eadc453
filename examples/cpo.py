"""CPO, SimPO and ORPO with PLOT: their loss reads the model's logits, and the term reads the same ones."""

from __future__ import annotations

from common import arguments, pairs, report, settings
from transformers import AutoTokenizer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from plot_align import PlotConfig, attach

options = arguments(__doc__, method=["cpo", "simpo", "orpo"])
shared = settings(options.steps)
match options.method:
    case "cpo":
        trainer_class, config = CPOTrainer, CPOConfig(**shared)
    case "simpo":
        trainer_class, config = CPOTrainer, CPOConfig(loss_type="simpo", cpo_alpha=0.0, beta=2.0, **shared)
    case "orpo":
        trainer_class, config = ORPOTrainer, ORPOConfig(**shared)
trainer = trainer_class(
    model=options.model,
    args=config,
    train_dataset=pairs(),
    processing_class=AutoTokenizer.from_pretrained(options.model),
)
attach(trainer, config=PlotConfig(alpha=options.alpha))
trainer.train()
report(trainer)
