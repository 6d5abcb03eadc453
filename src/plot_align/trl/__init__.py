"""The PLOT term on Hugging Face TRL's trainers: everything that touches TRL."""

from plot_align.trl.attach import PlotHandle, attach
from plot_align.trl.trainers import PlotDPOTrainer, PlotSFTTrainer

__all__ = ["PlotDPOTrainer", "PlotHandle", "PlotSFTTrainer", "attach"]
