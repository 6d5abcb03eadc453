"""Aggregation by hand and by SciPy; the table and the figures say what the cells hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import sem, ttest_rel

from plot_align.sweep import Cell, Job, Metric, expand, markdown, summarise
from plot_align.sweep.figures import draw
from plot_align.sweep.summary import entry_text, line_name, varying

ACCURACY = Metric("accuracy", "accuracy (share)", True)
PLOT = Cell("dpo", (("loss_type", "aot"),), (("alpha", 1.0),))
RUNS = {
    Job(PLOT.vanilla, 0): {"accuracy": 0.5, "only_vanilla": 1.0},
    Job(PLOT, 0): {"accuracy": 0.7},
    Job(PLOT.vanilla, 1): {"accuracy": 0.4},
    Job(PLOT, 1): {"accuracy": 0.75, "only_plot": 2.0},
    Job(PLOT.vanilla, 2): {"accuracy": 0.6},
    Job(PLOT, 2): {"accuracy": 0.65},
    Job(PLOT, 3): {"accuracy": 0.99},  # its vanilla arm failed: in the mean, not in the difference
    Job(Cell("sft"), 0): {"accuracy": 0.1},
}


def test_means_errors_and_paired_differences() -> None:
    vanilla, plot, sft = summarise(RUNS)
    assert [cell["method"] for cell in (vanilla, plot, sft)] == ["dpo", "dpo", "sft"]
    assert plot["setting"] == {"loss_type": "aot"}
    assert plot["plot"] == {"alpha": 1.0}
    assert plot["seeds"] == [0, 1, 2, 3]
    with_plot, without = [0.7, 0.75, 0.65], [0.5, 0.4, 0.6]
    entry = plot["metrics"]["accuracy"]
    assert (entry["n"], entry["value"]) == (4, pytest.approx(np.mean([*with_plot, 0.99])))
    assert entry["error"] == pytest.approx(sem([*with_plot, 0.99]))
    difference = plot["minus_vanilla"]["accuracy"]
    assert difference["n"] == 3
    assert difference["value"] == pytest.approx((0.2 + 0.35 + 0.05) / 3)
    assert difference["value"] / difference["error"] == pytest.approx(ttest_rel(with_plot, without).statistic)
    assert set(plot["minus_vanilla"]) == {"accuracy"}
    assert plot["metrics"]["only_plot"]["n"] == 1
    assert vanilla["plot"] is None
    assert vanilla["minus_vanilla"] == sft["minus_vanilla"] == {}
    assert "error" not in sft["metrics"]["accuracy"]  # one seed says nothing of its spread


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"value": 0.5, "n": 3, "error": 0.012345}, "0.500 ± 0.012"),
        ({"value": 0.5, "n": 1}, "0.500"),
        ({"value": -31.26, "n": 3, "error": 1.0}, "-31.26 ± 1.00"),
        ({"value": 2e-6, "n": 3, "error": 1e-7}, "2.00e-06 ± 1.0e-07"),
        ({"value": 0.0, "n": 3, "error": 0.0}, "0.000 ± 0.000"),
        ({"value": float("nan"), "n": 0}, "–"),
        (None, "–"),
    ],
)
def test_entries_as_text(entry: dict[str, Any] | None, text: str) -> None:
    assert entry_text(entry) == text


def test_the_table_has_every_cell_and_the_differences() -> None:
    text = markdown(summarise(RUNS), [ACCURACY], "Sweep")
    assert "| method | loss_type | alpha | seeds | accuracy (share) ↑ |" not in text  # sft has no loss type to differ
    assert "| method | alpha | seeds | accuracy (share) ↑ |" in text
    assert "| dpo | none | 3 | 0.500 ± 0.058 |" in text
    assert "| sft | none | 1 | 0.100 |" in text
    assert "| 1 | 4 | 0.200 ± 0.087 |" in text.split("paired by seed")[1]
    assert "Seeds: 0, 1, 2, 3." in text


def fake(grid: dict[str, list[Any]]) -> list[dict[str, Any]]:
    runs = {}
    for job in expand(grid):
        alpha = dict(job.cell.plot or ()).get("alpha", 0.0)
        runs[job] = {"accuracy": 0.5 + 0.1 * np.log1p(alpha) + 0.01 * job.seed}
    return summarise(runs)


def drawn(monkeypatch: pytest.MonkeyPatch, cells: list[dict[str, Any]], path: Path) -> Any:
    """The figure behind the file."""
    from matplotlib.figure import Figure

    figures: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    assert draw(cells, ACCURACY, path)
    return figures[0]


def test_a_figure_shows_the_means_the_bands_and_the_vanilla_level(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    grid = {"method": ["dpo", "sft"], "alpha": [0.1, 1.0, 10.0], "divergence": ["w1", "tv"], "seed": [0, 1, 2]}
    path = tmp_path / "accuracy.png"
    figure = drawn(monkeypatch, fake(grid), path)
    assert path.stat().st_size > 10_000
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [axes.get_title() for axes in figure.axes] == ["DPO", "SFT"]
    for axes in figure.axes:
        assert axes.get_xscale() == "log"
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.1", "1", "10"]
        level, *lines = axes.lines
        assert level.get_linestyle() == "--"
        assert level.get_ydata()[0] == pytest.approx(0.51)
        assert len(lines) == 2
        for line in lines:
            np.testing.assert_allclose(line.get_xdata(), [0.1, 1, 10])
            np.testing.assert_allclose(line.get_ydata(), 0.51 + 0.1 * np.log1p([0.1, 1, 10]))
        band = axes.collections[0].get_paths()[0].vertices
        assert np.ptp(band[np.isclose(band[:, 0], 1.0), 1]) == pytest.approx(2 * sem([0.0, 0.01, 0.02]))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["without PLOT", "divergence w1", "divergence tv"]
    figure.draw_without_rendering()
    assert not any(legend.get_window_extent().overlaps(axes.get_window_extent()) for axes in figure.axes)


@pytest.mark.parametrize("lines", [1, 12])
def test_a_figure_of_one_point_and_one_of_many_lines(
    lines: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cells = fake({"alpha": [1.0], "reference_rows": list(range(1, lines + 1))})
    figure = drawn(monkeypatch, cells, tmp_path / "a.png")
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == [
        "without PLOT",
        *(["with PLOT"] if lines == 1 else [f"reference rows {i + 1}" for i in range(12)]),
    ]
    figure.draw_without_rendering()
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert not box.overlaps(figure.axes[0].get_window_extent())


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert not draw(fake({"alpha": [0.0]}), ACCURACY, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_deft_stands_beside_plot() -> None:
    """Its cells carry the divergence's name; no PlotConfig is asked."""
    cells = [
        {"method": "dpo", "setting": {}, "plot": {"alpha": 1.0, "divergence": name, "target": target}}
        for name in ("w1", "deft_log", "deft_prob")
        for target in ("relu", "shift")
    ]
    axes = varying(cells)
    assert [line_name(cell, axes, beside_deft=True) for cell in cells] == [
        "PLOT, divergence w1, target relu",
        "PLOT, divergence w1, target shift",
        "DEFT, log-probabilities, target relu",
        "DEFT, log-probabilities, target shift",
        "DEFT, probabilities, target relu",
        "DEFT, probabilities, target shift",
    ]
