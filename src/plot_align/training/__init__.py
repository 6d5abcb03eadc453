"""The PLOT term on Hugging Face TRL's trainers.

``config.py`` options; ``batches.py`` which positions count; ``head.py`` the only file that touches TRL's internals;
``term.py`` the loss; ``attach.py`` puts them on a trainer; ``trainers.py`` drop-in classes; ``artifacts.py`` what a
saved model carries; ``marginal.py`` mean output distributions of a data set.
"""

from .attach import PlotHandle, attach
from .config import PlotConfig
from .trainers import PlotDPOTrainer, PlotSFTTrainer

__all__ = ["PlotConfig", "PlotDPOTrainer", "PlotHandle", "PlotSFTTrainer", "attach"]
