"""A grid over the options of PLOT, the methods and the seeds: run it, aggregate it, draw it.

``grid.py`` has the keys, values and the runs they make; ``training.py`` runs the user's own training for each of them;
``workers.py`` does so side by side; ``summary.py`` has means, standard errors and paired differences; ``figures.py``
draws a metric against α; ``run.py`` puts them together.
"""

from plot_align.sweep.grid import Cell, Job, Key, coerce, expand, keys
from plot_align.sweep.summary import Metric, markdown, summarise

__all__ = ["Cell", "Job", "Key", "Metric", "coerce", "expand", "keys", "markdown", "summarise"]
