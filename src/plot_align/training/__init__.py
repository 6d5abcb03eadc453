"""The PLOT term on Hugging Face TRL's trainers.

``config.py`` options; ``batches.py`` which positions count; ``head.py`` the only file that touches TRL's internals;
``term.py`` the loss; ``attach.py`` puts them on a trainer; ``pro.py`` a trainer for ranked lists; ``trainers.py``
drop-in classes; ``artifacts.py`` what a saved model carries; ``marginal.py`` mean output distributions of a data set.
"""

from .attach import PlotHandle, attach
from .config import PlotConfig
from .pro import PROConfig, PROTrainer
from .trainers import PlotDPOTrainer, PlotPROTrainer, PlotSFTTrainer

__all__ = [
    "PROConfig",
    "PROTrainer",
    "PlotConfig",
    "PlotDPOTrainer",
    "PlotHandle",
    "PlotPROTrainer",
    "PlotSFTTrainer",
    "attach",
]
