"""What a command shows: the run and the data, on lines that fit a terminal, and nothing of the libraries' future."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from plot_align.cli import output, progress


def warn(module: str, category: type[Warning]) -> None:
    """A warning that belongs to ``module``."""
    place = types.ModuleType(module)
    exec("import warnings\ndef warn(category): warnings.warn('this will change', category)", vars(place))
    place.warn(category)


@pytest.mark.parametrize(
    ("module", "category", "is_shown"),
    [
        ("transformers.training_args", FutureWarning, False),
        ("trl.trainer.dpo_config", FutureWarning, False),
        ("trl.trainer.dpo_config", DeprecationWarning, False),
        ("plot_align.methods.pro", FutureWarning, False),  # a library below, on how we call it
        ("trl.trainer.dpo_config", UserWarning, True),  # on the options or the data
        ("plot_align.trl.attach", UserWarning, True),
        ("transformers_of_the_user", FutureWarning, True),
        ("reward", FutureWarning, True),
    ],
)
def test_only_the_libraries_own_future_is_left_out(module: str, category: type[Warning], is_shown: bool) -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with output.readable():
            warn(module, category)
    assert bool(shown) == is_shown


def test_python_w_shows_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    with pytest.warns(FutureWarning), output.readable():
        warn("transformers.training_args", FutureWarning)


def test_the_filters_end_with_the_command() -> None:
    with output.readable():
        pass
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        warn("transformers.training_args", FutureWarning)
    assert shown


def test_transformers_log_loses_its_deprecations(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [handler])
    output.drop_deprecations()
    logger = logging.getLogger("transformers.modeling_utils")
    logger.warning("`torch_dtype` is deprecated! Use `dtype` instead!")
    logger.warning("Token indices sequence length is longer than the specified maximum")
    assert said == ["Token indices sequence length is longer than the specified maximum"]


DPO = {
    "loss": 1.52391, "grad_norm": 2.1, "plot/vanilla_loss": 0.693147, "plot/loss": 0.02757123, "plot/alpha": 30.1416,
    "rewards/accuracies": 0.75, "rewards/margins": 0.00014321, "mean_token_accuracy": 0.5,
}  # fmt: skip


def test_a_log_is_one_line() -> None:
    shown = "  4/120  loss 1.524  vanilla 0.6931  plot 0.0276  α 30.1  accuracy 0.750"
    assert progress.line(DPO, 4, 120) == shown
    evaluated = {f"eval_{name}": value for name, value in DPO.items()} | {"eval_runtime": 2.0}
    assert progress.line(evaluated, 4, 120).startswith("  4/120  evaluation  loss 1.524  vanilla 0.6931")
    assert progress.line({"loss": 1.0, "mean_token_accuracy": 0.5}, 7, 9) == "7/9  loss 1.000  token accuracy 0.500"
    assert progress.line({"train_runtime": 3723.4, "train_steps_per_second": 0.03222}, 120, 120) == (
        "120 steps in 1:02:03, 0.0322 a second"
    )


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("prefix", ["", "eval_"])
def test_it_fits_a_terminal(size: float, prefix: str) -> None:
    text = progress.line({prefix + name: -value * size for name, value in DPO.items()}, 12345, 123456)
    assert 40 < len(text) <= 80


def test_the_trainer_s_own_progress_goes(make_trainer: Any) -> None:
    trainer = make_trainer("dpo", disable_tqdm=False)
    progress.use(trainer)
    shown = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ProgressCallback)]
    assert [type(callback) for callback in shown] == [progress.Progress]


def test_without_bars_the_trainer_prints_its_dictionaries(make_trainer: Any) -> None:
    trainer = make_trainer("dpo", disable_tqdm=True)
    progress.use(trainer)
    assert trainer.pop_callback(PrinterCallback) is not None
    assert trainer.pop_callback(ProgressCallback) is None


@pytest.mark.slow
@pytest.mark.parametrize("command", ["dpo", "sft"])
def test_a_training_says_what_it_does_and_no_more(
    command: str, tiny_llama: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """As a user sees it through a pipe: two lines of log, the summary, where the model is, and bars to their end."""
    arguments = {"model_name_or_path": tiny_llama, "dataset_name": pairs_file, "output_dir": tmp_path / "out"}
    arguments |= {"max_steps": 4, "logging_steps": 2, "bf16": "false", "report_to": "none"}
    if command == "sft":
        good = tmp_path / "good.jsonl"
        good.write_text(pairs_file.read_text().replace('"chosen"', '"completion"'))
        arguments |= {"dataset_name": good, "preference_dataset": pairs_file}
    flags = [str(part) for name, value in arguments.items() for part in (f"--{name}", value)]
    done = subprocess.run(
        [sys.executable, "-m", "plot_align.cli", command, *flags, "--use_cpu"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    first, second, summary, saved = done.stdout.splitlines()
    assert first.startswith("2/4  loss ")
    assert second.startswith("4/4  loss ")
    assert re.search(r"  vanilla \d.*  plot 0\.\d+  α \d", first)
    assert summary.startswith("4 steps in 0:00:")
    assert saved.startswith(f"model saved to {tmp_path / 'out'}, record in ")
    bars = ("/s]", "/s]\x1b[A", "rows 0:00:00")
    assert not [row for row in done.stderr.splitlines() if row.strip() and not row.rstrip().endswith(bars)]
