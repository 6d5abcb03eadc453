"""What pyproject.toml cannot say: the README as PyPI shows it, its links leading into the repository."""

import re
from pathlib import Path

from setuptools import setup

HOME = "plot-align/plot-align"
here = Path(__file__).parent
version = re.search(r'"(.+)"', (here / "src/plot_align/_version.py").read_text(encoding="utf-8"))[1]


def to_the_repository(found: re.Match) -> str:
    """An image's bytes, or the page of a file or folder, of the released version."""
    base = "https://raw.githubusercontent.com/{}/v{}/" if found[1] else "https://github.com/{}/blob/v{}/"
    return f"{found[1]}[{found[2]}]({base.format(HOME, version)}{found[3]})"


readme = (here / "README.md").read_text(encoding="utf-8")
setup(
    long_description=re.sub(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)]+)\)", to_the_repository, readme),
    long_description_content_type="text/markdown",
)
