"""The tests' oracle of the head, for scripts: Python puts only their own folder on its path."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from oracles.head import reference_head

__all__ = ["reference_head"]
