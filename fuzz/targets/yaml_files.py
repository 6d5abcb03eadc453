"""Options as YAML: of a training, a sweep, a suite of measures, the attacks."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import yaml
from hypothesis import strategies as st

from fuzz.guard import Wrong
from fuzz.spoil import as_bytes, junk, spoilt
from fuzz.targets import joined, write
from plot_align.config import PlotConfig
from plot_align.sweep import keys

_TRAINING = {
    "model_name_or_path": "m", "dataset_name": "pairs.jsonl", "output_dir": "out", "alpha": 0.1, "target": "relu",
    "granularity": "batch", "learning_rate": 1e-5, "max_steps": 3, "report_to": "none", "use_cpu": True, "bf16": False,
    "env": {"PLOT_ALIGN_FUZZ": "1"},
}  # fmt: skip
_SWEEP = {
    "train": "dpo.yaml", "output": "runs", "workers": 2, "alpha": [0.1, 1], "divergence": ["w1", "tv"], "seed": [0, 1],
    "method": "dpo", "loss_type": ["sigmoid", "ipo"], "learning_rate": [1e-5], "norm_order": 2,
}  # fmt: skip
_SUITE = {
    "mathematics": {"gsm8k": {"kind": "preference_accuracy", "pairs": "pairs", "split": "test", "limit": 3}},
    "guards": {
        "over_refusal": {"kind": "over_refusal", "max_new_tokens": 8, "limit": 2},
        "diversity": {"kind": "diversity", "max_new_tokens": 8},
        "kl": {"kind": "kl", "max_new_tokens": 8},
    },
}
_ATTACKS = {
    "gcg": {"steps": 5, "search_width": 8},
    "prefill": {"tokens": 8},
    "best_of_n": {"n": 4},
    "direct": {},
}
_SEEDS = (_TRAINING, _SWEEP, _SUITE, _ATTACKS)
_SCALARS = (
    "2001-99-99", "2001-01-01", "1_000", "0x", "0x_", "0b2", "1:99", "1e5", ".inf", ".nan", "~",
    "<<", "=", "yes", "off",
    "!!int x", "!!float x", "!!timestamp x", "!!binary é", "!!python/object/apply:os.getcwd []", "!!set {a}", "!!str",
    "!!null x", "!!bool x", "!!omap [a]", "!!pairs [a]", "!x y", "&a [*a]", "&a {b: *a}", "*a", "{a: 1}", "[", "{",
    "'", '"',     "|\n  x", "- a", "? a", "!!int " + "9" * 5000, "9" * 5000, "0x" + "f" * 5000,
    "0o7", "08", "12:30:45",
    "+", "-.inf", "\t", "# x",
)  # fmt: skip
_MARK = "@@{}@@"


def _to_yaml(value: Any, flow: bool) -> str:
    try:
        return json.dumps(value) if flow else yaml.safe_dump(value, allow_unicode=True, sort_keys=False)
    except (yaml.YAMLError, UnicodeError):  # a key that stands twice, half an emoji
        return json.dumps(value)


@st.composite
def _cases(draw: Any) -> bytes:
    variant = draw(st.sampled_from((0, *(1, 2, 3) * 3)))  # a training's parser takes 0.1 s, the others little
    marks = st.sampled_from([_MARK.format(i) for i in range(len(_SCALARS))])
    values = st.sampled_from([1, -1, 0, 0.5, True, None, "x", [1, "x"], {"x": 1}, [], 10**30])
    scalars = st.one_of(marks, values.map(copy.deepcopy), junk)
    value = draw(spoilt(_SEEDS[variant], 3, scalars))
    text = _to_yaml(value, draw(st.booleans()))
    for i, scalar in enumerate(_SCALARS):
        mark = _MARK.format(i)
        text = text.replace(f"'{mark}'", scalar).replace(f'"{mark}"', scalar).replace(mark, scalar)
    return joined(variant, draw(as_bytes(text)))


class Yaml:
    name = "yaml"
    names = ("case.yaml", "grid", "options were refused", "workers is", "argument --", *keys())  # a file, or an option
    seeds: ClassVar[list[bytes]] = [joined(i, yaml.safe_dump(value).encode()) for i, value in enumerate(_SEEDS)]
    cases = _cases()

    def run(self, data: bytes, folder: Path) -> None:
        path = str(write(folder, "case.yaml", data[1:]))
        (self._training, self._sweep, self._suite, self._attacks)[data[0] % 4 if data else 0](path)

    def _training(self, path: str) -> None:
        from plot_align.cli.options import make_parser, parse, set_environment
        from plot_align.io import read_yaml

        content = read_yaml(path)
        before = dict(os.environ)
        try:
            set_environment(content.pop("env", None), path)
        finally:
            os.environ.clear()
            os.environ.update(before)
        given = dict(content)
        (_, training, _, _, _, plot, _), _ = parse(make_parser("dpo"), content, [], path)
        alpha = given.get("alpha")
        if isinstance(alpha, int | float) and not math.isclose(plot.alpha, alpha):
            raise Wrong(f"alpha is {plot.alpha}, the file has {alpha}")
        if "max_steps" in given and isinstance(given["max_steps"], int) and training.max_steps != given["max_steps"]:
            raise Wrong(f"max_steps is {training.max_steps}, the file has {given['max_steps']}")

    def _sweep(self, path: str) -> None:
        from plot_align.cli.sweep import _read, _workers, read_grid
        from plot_align.sweep import expand

        content = _read(path)
        for name in ("train", "output"):
            content.pop(name, None)
        _workers(content.pop("workers", None))
        grid = read_grid(content)
        jobs = expand({"seed": [0], **grid}, base={})
        if len(set(jobs)) != len(jobs):
            raise Wrong("a run appears twice")
        for job in jobs:
            if job.cell.plot is not None:
                PlotConfig.from_options(**dict(job.cell.plot))
            if job.seed not in grid.get("seed", [0]):
                raise Wrong(f"seed {job.seed} is not in the grid")
        wanted = {(m, s) for m in grid.get("method", ["dpo"]) for s in grid.get("seed", [0])}
        if {(job.cell.method, job.seed) for job in jobs} != wanted:
            raise Wrong("a method or a seed is missing")

    def _suite(self, path: str) -> None:
        from plot_align.evaluation.suite import Given, read_suite

        suite = read_suite(path, Given(reference=True))
        names = [entry.name for entry in suite.entries] + list(suite.left_out)
        if len(set(names)) != len(names):
            raise Wrong("two measures of one name")
        json.dumps(
            [entry.measure.options() for entry in suite.entries if hasattr(entry.measure, "options")], default=str
        )

    def _attacks(self, path: str) -> None:
        from plot_align.cli.redteam import _attacks

        wanted = "gcg,prefill,best_of_n,direct"
        for attack in _attacks(SimpleNamespace(attacks=wanted, options=path, transfer_from=None, attacker=None)):
            for value in vars(attack).values():
                if isinstance(value, float) and not math.isfinite(value):
                    raise Wrong(f"{attack.name} took {value}")
