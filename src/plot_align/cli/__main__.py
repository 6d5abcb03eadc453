"""``python -m plot_align.cli`` is ``plot-align``: launchers start modules, not commands."""

import sys

from plot_align.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
