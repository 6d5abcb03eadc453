"""``python -m plot_align`` is ``plot-align``."""

import sys

from plot_align.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
