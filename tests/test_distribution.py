"""What `make dist` builds: the files in it, what PyPI shows, and that it works where nothing of the repository is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import tomllib

import plot_align

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "plot_align"
HOME = "https://github.com/plot-align/plot-align"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with wheel and sdist, built from a copy, so that builds leave nothing in the tree."""
    tree, dist = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, tree)
    for name in ("src", "tests", "examples"):  # the last two must not get in
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    build(["-m", "build", "--no-isolation", "--outdir", dist, tree])
    return dist


def build(arguments: list[str | Path]) -> str:
    return run([sys.executable, *arguments], ROOT)


def run(command: list[str | Path], folder: Path) -> str:
    """The output of a command that finds nothing of this repository but what it is given."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    names = zipfile.ZipFile(next(built.glob("*.whl"))).namelist()
    files = (path for path in SOURCE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    package = {path.relative_to(SOURCE.parent).as_posix() for path in files}
    own = {name for name in names if ".dist-info/" not in name}
    assert own == package
    assert "plot_align/py.typed" in own
    assert f"plot_align-{plot_align.__version__}.dist-info/licenses/LICENSE" in names


@pytest.mark.slow
def test_the_sdist_holds_what_builds_it(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    above = {name for name in names if not name.startswith("src/")}
    assert above == {
        "CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml",
        "setup.cfg", "setup.py",
    }  # fmt: skip
    assert "src/plot_align/py.typed" in names


@pytest.mark.slow
def test_pypi_takes_it_and_its_links_lead_somewhere(built: Path) -> None:
    build(["-m", "twine", "check", "--strict", *built.iterdir()])
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        text = wheel.read(f"plot_align-{plot_align.__version__}.dist-info/METADATA").decode()
    assert f"Project-URL: Repository, {HOME}\n" in text
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) == len(re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text()))
    assert all(link.startswith("https://") for link in links), links
    release = f"plot-align/plot-align/(?:blob/)?v{plot_align.__version__}/(.+)"
    inside = [found[1] for link in links if (found := re.search(release, link))]
    assert len(inside) > 15
    assert all((ROOT / path).exists() for path in inside)
    assert (
        f"](https://raw.githubusercontent.com/plot-align/plot-align/v{plot_align.__version__}/docs/demo.png)" in text
    )


@pytest.mark.slow
def test_it_works_where_nothing_of_the_repository_is(built: Path, tiny_base: Path, tmp_path: Path) -> None:
    """In an environment of its own, into which only the dependencies are lent."""
    home = tmp_path / "env"
    run([sys.executable, "-m", "venv", "--without-pip", home], tmp_path)
    python = home / "bin" / "python"
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path).strip())
    lent = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *filter(is_site, sys.path)}
    (site / "lent.pth").write_text("\n".join(sorted(lent)) + "\n")
    wheel = next(built.glob("*.whl"))
    run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel], tmp_path)

    place = run([python, "-c", "import plot_align; print(plot_align.__file__)"], tmp_path)
    assert Path(place.strip()).is_relative_to(home)
    command = home / "bin" / "plot-align"
    assert run([command, "--help"], tmp_path).startswith("usage: plot-align ")
    assert run([command, "--version"], tmp_path) == f"plot-align {plot_align.__version__}\n"
    assert "training can run here" in run([command, "doctor"], tmp_path)

    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    shown = run([python, "examples/dpo.py", "--steps", "1", "--model", tiny_base], tmp_path)
    assert "plot/loss" in shown


def is_site(path: str) -> bool:
    return Path(path).name in ("site-packages", "dist-packages")


def test_the_changelog_keeps_its_form() -> None:
    """Keep a Changelog: versions from the newest down, each with its link, and its six kinds of changes."""
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"(?m)^## \[(.+?)\](.*)$", text)
    assert versions[0] == ("Unreleased", "")
    assert all(re.fullmatch(r" - \d{4}-\d{2}-\d{2}", date) for _, date in versions[1:])
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"(?m)^### (.*)$", text)) <= kinds
    for name, _ in versions:
        assert f"\n[{name}]: {HOME}/" in text


def test_everything_points_home() -> None:
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    assert urls["Homepage"] == urls["Repository"] == HOME
    assert f'\nrepository-code: "{HOME}"\n' in (ROOT / "CITATION.cff").read_text()
