"""The documentation as a site: it builds without a warning, and what Markdown on GitHub says is there."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import plot_align

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def links(page: Path) -> list[str]:
    return re.findall(r'(?:href|src)="([^"]+)"', page.read_text())


@pytest.mark.slow
def test_every_page_is_there_and_can_be_reached(site: Path) -> None:
    home = {(site / link.partition("#")[0]).resolve() for link in links(site / "index.html") if "://" not in link}
    log = {(site / link.partition("#")[0]).resolve() for link in links(site / "LOG.html") if "://" not in link}
    pages = [path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")]
    assert len(pages) > 15
    for page in pages:
        assert (site / page).exists(), page
        assert (site / page).resolve() in (log if page.parts[0] == "log" else home), page


@pytest.mark.slow
def test_links_out_of_the_documents_lead_into_the_repository(site: Path) -> None:
    base = "https://github.com/plot-align/plot-align/blob/main/"
    found = {link.removeprefix(base) for page in site.rglob("*.html") for link in links(page) if link.startswith(base)}
    assert {"examples/loop.py", "CONTRIBUTING.md", "src/plot_align/accelerate_configs"} <= found
    assert all((ROOT / html.unescape(path)).exists() for path in found)


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    """Scripts, styles, fonts and pictures; links may lead away. (A diagram of Mermaid's fetches its script itself.)"""
    for page in site.rglob("*.html"):
        text = page.read_text()
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]*rel="(?:stylesheet|preconnect|icon)"[^>]*href="([^"]+)"', text)
        assert loaded
        assert not [link for link in loaded if "//" in link], page


@pytest.mark.slow
def test_the_api_has_every_name(site: Path) -> None:
    text = (site / "api.html").read_text()
    for name in set(plot_align.__all__) - {"__version__", "errors"}:
        assert re.search(rf'<h3 id="plot_align\.[\w.]*{name}" ', text), name
    assert ":class:" not in text
    assert ">_option<" not in text
    assert len(re.findall(r"<strong>Parameters:</strong>|Parameters:", text)) > 10


@pytest.mark.slow
def test_a_bar_in_a_table_is_a_bar(site: Path) -> None:
    text = (site / "mathematics.html").read_text()
    assert "max|d|" in text
    assert "\\|" not in text
