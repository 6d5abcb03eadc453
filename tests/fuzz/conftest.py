"""The scripts of fuzz/ stand beside src/, as a package of the checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
