"""The notebook: stripped of outputs, and it runs from its first cell to its last on a tiny model."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "plot_align.ipynb"


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_outputs_are_stripped(notebook: nbformat.NotebookNode) -> None:
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None), cell.id


@pytest.mark.slow
def test_it_runs(
    notebook: nbformat.NotebookNode, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a user runs it, but for what its parameters say and the installation."""
    from nbclient import NotebookClient

    tagged = {tag: cell for cell in notebook.cells for tag in cell.metadata.get("tags", [])}
    assert tagged["install"].source == "%pip install -q plot-align ipywidgets"
    tagged["install"].source = ""
    small = {"MODEL": repr(str(tiny_base)), "STEPS": 2, "ITEMS": 4, "ROUNDS": 2}
    for name, value in small.items():
        tagged["parameters"].source, found = re.subn(
            rf"(?m)^{name} = .*$", f"{name} = {value}", tagged["parameters"].source
        )
        assert found == 1, name

    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    assert shutil.which("plot-align")
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()

    said = {cell.id: text(cell) for cell in notebook.cells if cell.cell_type == "code"}
    assert re.search(r"DPO 0\.\d+   PLOT 0\.\d+ x \d", said["log"])
    assert re.search(r"moved \d+\.\d\d times as far", said["kl"])
    assert re.search(r"takes \d\.\d{3} times as long as without \(\d\.\d{3} to \d\.\d{3}\)", said["ratio"])
    assert not [cell.id for cell in notebook.cells if len(cell.get("outputs", ())) > 50]  # a bar that moves
    assert "FutureWarning" not in "".join(said.values())


def text(cell: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)
