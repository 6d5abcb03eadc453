"""A grid over the options of PLOT, the methods and the seeds: run it, aggregate it, draw it.

``grid.py`` keys, values and the runs they make; ``workloads.py`` what a run is: the sandbox, or the user's own
training; ``summary.py`` means, standard errors and paired differences; ``figures.py`` a metric against α;
``run.py`` puts them together.
"""

from plot_align.sweep.grid import Cell, Job, Key, coerce, expand, keys
from plot_align.sweep.summary import Metric, markdown, summarise

__all__ = ["Cell", "Job", "Key", "Metric", "coerce", "expand", "keys", "markdown", "summarise"]
