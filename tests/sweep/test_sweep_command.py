"""``plot-align sweep``: flags and YAML make the same grid, misspellings are named, a dry run runs nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from plot_align.cli import sweep
from plot_align.cli.main import main
from plot_align.sweep import keys


@pytest.fixture
def grid_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The grid and what else ``plot-align sweep`` reads from its arguments."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(sweep, "_sweep", lambda *given, dry_run: calls.append((*given, dry_run)) or 0)

    def read(*arguments: object) -> tuple[Any, ...]:
        assert main(["sweep", *map(str, arguments)]) == 0
        return calls.pop()

    return read


def test_flags_and_yaml_make_the_same_grid(grid_of: Any, tmp_path: Path) -> None:
    config = tmp_path / "sweep.yaml"
    config.write_text(
        "method: [dpo, sft]\nloss_type: [sigmoid, sigmoid+sft]\nalpha: [1e-2, 0.1, 1]\npool: true\nseed: 4\n"
        "output: there\nworkers: 2\nlearning_rate: '3e-4'\n"
    )
    flags = [
        *("--method", "dpo", "sft", "--loss_type", "sigmoid", "sigmoid+sft", "--alpha", "0.01", "0.1", "1", "0.10"),
        *("--pool", "yes", "--seed", "4", "--output", "there", "--workers", "2", "--learning_rate", "0.0003"),
    ]
    found = grid_of("--config", config)
    assert found == grid_of(*flags)
    grid, train, output, workers, dry_run = found
    assert grid == {
        "method": ["dpo", "sft"], "loss_type": ["sigmoid", "sigmoid+sft"], "alpha": [0.01, 0.1, 1.0], "pool": [True],
        "seed": [4], "learning_rate": [3e-4],
    }  # fmt: skip
    assert (train, output, workers, dry_run) == (None, Path("there"), 2, False)
    # Flags win, key by key.
    grid, *_ = grid_of("--config", config, "--alpha", "5", "--seed", "1", "2")
    assert (grid["alpha"], grid["seed"], grid["method"]) == ([5.0], [1, 2], ["dpo", "sft"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"alhpa": 1}, "unknown key 'alhpa' in {path}; did you mean 'alpha'?"),
        ({"alpha": []}, "alpha is an empty list, expected one value or more"),
        ({"alpha": {"a": 1}}, "alpha is {'a': 1}, expected a number"),
        ({"output": 3}, "output in {path} is 3, expected a path"),
        ({"workers": True}, "workers is True, expected how many runs at once"),
    ],
)
def test_a_file_that_is_no_grid_is_refused(
    content: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content))
    assert main(["sweep", "--config", str(path)]) == 2
    assert capsys.readouterr().err.startswith("plot-align: " + said.replace("{path}", str(path)))


def test_every_option_in_the_short_help_exists_and_the_long_one_has_them_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = {name.removeprefix("--") for name in sweep.make_parser()._option_string_actions}
    assert main(["sweep", "--help"]) == 0
    shown = set(re.findall(r"--([a-z_]+)", capsys.readouterr().out))
    assert shown <= known | {"help"}
    assert main(["sweep", "--help-all"]) == 0
    everything = set(re.findall(r"--([a-z_]+)", capsys.readouterr().out))
    assert set(keys()) <= everything


def test_a_dry_run_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The seed and the options of the term are the training file's, unless the grid has them."""
    output, train = tmp_path / "out", tmp_path / "dpo.yaml"
    train.write_text("seed: 5\nalpha: 2.0\n")
    common = ["sweep", "--train", str(train), "--output", str(output), "--dry_run"]
    assert main(common) == 0
    assert capsys.readouterr().out == (
        "dpo, without PLOT: seeds 5\ndpo, alpha 2: seeds 5\n2 runs, 0 finished (*), 2 to run\n"
    )
    assert main([*common, "--alpha", "0", "0.1", "--seed", "7", "8"]) == 0
    assert capsys.readouterr().out == (
        "dpo, without PLOT: seeds 7 8\ndpo, alpha 0.1: seeds 7 8\n4 runs, 0 finished (*), 4 to run\n"
    )
    assert not output.exists()
    assert main([*common, "--pool", "on", "--granularity", "batch", "token"]) == 2
    assert "the grid's combination alpha 2, granularity token" in capsys.readouterr().err


def test_without_a_training_file_it_says_what_to_give(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--alpha", "0.1", "1"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("plot-align: --train is missing")
    assert "plot-align dpo --config" in said
