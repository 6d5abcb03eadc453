"""What the tests of all plug-ins share: a tiny chat model, pairs as messages, and plain TRL to compare with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from plot_align.config import PlotConfig
from plot_align.preference.distribution import PreferenceDistribution
from plot_align.trl import attach

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = (
    "{%- for message in messages -%}{{- message['role'] + ': ' + message['content'] + eos_token -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'assistant: ' -}}{%- endif -%}"
)
PLOT = {"alpha": 0.5, "geometry": "norm"}  # the lines that a test adds to a framework's configuration


def needs(package: str, name: str) -> pytest.MarkDecorator:
    """Skips a module where a framework is not installed."""
    reason = f"{name} is not installed here; `make plugins` makes an environment that has it"
    return pytest.mark.skipif(find_spec(package) is None, reason=reason)


def chat_model(base: Path, folder: Path) -> Path:
    """A copy of the tiny model whose tokenizer has a chat template."""
    from transformers import AutoModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder)
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A JSON object on each line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(*command: str, folder: Path, **environment: str) -> str:
    """Runs a Python module of a framework, or a script, in ``folder``, as its own command does; what it printed."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **environment}
    start = [sys.executable, *(() if command[0].endswith(".py") else ("-m",))]
    done = subprocess.run([*start, *command], cwd=folder, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def history(checkpoint: Path) -> list[dict[str, float]]:
    """What a run logged at each step."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry for entry in state["log_history"] if "loss" in entry]


def check_sum(entries: list[dict[str, float]]) -> None:
    """At every step the loss is the vanilla loss plus the weighted term, and the term is there."""
    for entry in entries:
        assert entry["plot/alpha"] == PLOT["alpha"]
        assert entry["plot/loss"] > 1e-3
        assert entry["loss"] == pytest.approx(
            entry["plot/vanilla_loss"] + PLOT["alpha"] * entry["plot/loss"], rel=1e-4
        )


def plain_history(trainer: Any, preference: PreferenceDistribution | None = None) -> list[dict[str, float]]:
    """Trains a trainer of TRL's with ``attach``; what it logged at each step."""
    attach(trainer, preference, PlotConfig.from_options(**PLOT))
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def check_same(ours: list[dict[str, float]], plain: list[dict[str, float]]) -> None:
    """Both runs logged the same losses, each step."""
    assert len(ours) == len(plain) > 0
    for name in ("loss", "plot/vanilla_loss", "plot/loss", "plot/preferred_mass", "grad_norm"):
        assert [entry[name] for entry in ours] == pytest.approx([entry[name] for entry in plain], rel=1e-6), name
