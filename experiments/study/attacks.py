"""Attacks on a tuned model, each at a stated budget, by the command that users have."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from plot_align.demo import data as ours
from plot_align.environment import fast_bf16
from plot_align.io import write_json
from plot_align.records import read_record
from plot_align.redteam import write_behaviors

REQUESTS = 20
BUDGETS: dict[str, dict[str, Any]] = {
    "prefill": {"tokens": 8},
    "best_of_n": {"n": 8},
    "gcg": {"steps": 10, "search_width": 32},
    "pez": {"steps": 30},
}


def attacked(model: Any, tokenizer: Any, folder: Path, seed: int) -> dict[str, list[float]]:
    """Success of each attack on each of 20 of our harmful requests, by the default judge.

    The weights are written for the command and deleted after it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    behaviors = ours.behaviors()[:: max(1, len(ours.behaviors()) // REQUESTS)][:REQUESTS]
    write_behaviors(folder / "behaviors.csv", behaviors)
    write_json(folder / "targets.json", {b.id: ours.targets()[b.id] for b in behaviors})
    (folder / "attacks.yaml").write_text(yaml.safe_dump(BUDGETS))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    command = ["redteam", f"model={folder / 'model'}", "--behaviors", str(folder / "behaviors.csv")]
    command += ["--targets", str(folder / "targets.json"), "--attacks", ",".join(BUDGETS), "--cases", "1"]
    command += ["--options", str(folder / "attacks.yaml"), "--max_new_tokens", "24", "--seed", str(seed)]
    command += ["--dtype", "bfloat16"] if fast_bf16() else []
    # In a process of its own: what the attacks held of memory is free again before the next arm trains.
    code = subprocess.run(
        [sys.executable, "-m", "plot_align", *command, "--output", str(folder / "redteam")]
    ).returncode
    shutil.rmtree(folder / "model")
    if code != 0:
        raise SystemExit(f"the attacks on {folder} failed; mend what is said above, and run the same command again")
    (record,) = (path for path in (folder / "redteam").rglob("*.json") if _is_record(path))
    (of_model,) = read_record(record, "redteam")["results"]["models"].values()
    found = {name: [of[b.id] for b in behaviors] for name, of in of_model["attacks"].items()}
    return {f"attack/{name}": values for name, values in found.items()}


def _is_record(path: Path) -> bool:
    return '"kind": "redteam"' in path.read_text(encoding="utf-8")
