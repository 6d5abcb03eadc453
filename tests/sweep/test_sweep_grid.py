"""The grid: every combination once, the vanilla arm always, and what PlotConfig refuses before anything runs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plot_align.config import PlotAblations, PlotConfig
from plot_align.errors import InputError
from plot_align.sweep import Cell, Job, coerce, expand, keys
from plot_align.sweep.grid import LOSS_TYPES, METHODS


def axis(values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(values, min_size=1, max_size=3)


GRIDS = st.fixed_dictionaries(
    {},
    optional={
        "method": axis(st.sampled_from(METHODS)).filter(lambda methods: "dpo" in methods),
        "seed": axis(st.integers(0, 3)),
        "loss_type": axis(st.sampled_from(["sigmoid", "aot", "sigmoid+sft"])),
        "steps": axis(st.integers(1, 3)),
        "beta": axis(st.sampled_from([0.1, 0.5])),
        "alpha": axis(st.sampled_from([0.0, 0.1, 1.0])),
        "divergence": axis(st.sampled_from(["w1", "tv"])),
        "positions": axis(st.sampled_from(["chosen", "all"])),
    },
)


@settings(deadline=None)
@given(grid=GRIDS)
def test_the_grid_is_the_product_less_what_collapses(grid: dict[str, list[Any]]) -> None:
    """The oracle loops over everything and keeps what differs as a set."""
    full = {
        "method": ["dpo"], "seed": [0], "loss_type": [None], "steps": [None], "beta": [None], "alpha": [None],
        "divergence": [None], "positions": [None], **grid,
    }  # fmt: skip
    expected = set()
    for values in itertools.product(*full.values()):
        run = dict(zip(full, values, strict=True))
        if run["method"] != "dpo":
            run["loss_type"] = None
        if run["method"] in ("sft", "pro"):
            run["beta"] = None
        vanilla = {**run, "alpha": 0.0, "divergence": None, "positions": None}
        expected.add(tuple((vanilla if run["alpha"] == 0 else run).items()))
        expected.add(tuple(vanilla.items()))

    jobs = expand(grid)
    found = [
        tuple(
            {
                **dict.fromkeys(full),
                "method": job.cell.method,
                "seed": job.seed,
                **dict(job.cell.setting),
                **dict(job.cell.plot or (("alpha", 0.0),)),
            }.items()
        )
        for job in jobs
    ]
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert expand(grid) == jobs


def test_the_order_is_by_seed_and_vanilla_first() -> None:
    """By hand: an interrupted sweep must have whole comparisons."""
    jobs = expand({"seed": [1, 0], "method": ["dpo", "sft"], "alpha": [1.0, 0.0], "divergence": ["w1", "tv"]})
    assert [str(job) for job in jobs] == [
        f"{method}, {term}, seed {seed}"
        for seed in (1, 0)
        for method in ("dpo", "sft")
        for term in ("without PLOT", "alpha 1, divergence w1", "alpha 1, divergence tv")
    ]
    assert jobs[1].cell.vanilla == jobs[0].cell == Cell("dpo")


def test_alpha_alone_is_its_default() -> None:
    assert expand({}) == [Job(Cell("dpo"), 0), Job(Cell("dpo", (), (("alpha", PlotConfig().alpha),)), 0)]
    assert expand({}, base={"alpha": 3.0})[1].cell.plot == (("alpha", 3.0),)
    assert expand({}, base={"alpha": 0.0}) == [Job(Cell("dpo"), 0)]


@pytest.mark.parametrize(
    ("grid", "base", "said"),
    [
        (
            {"granularity": ["batch", "token"], "pool": [True]},
            {},
            "the grid's combination alpha auto, granularity token, pool on is refused: pool is on with granularity",
        ),
        (
            {"granularity": ["token"]},
            {"pool": True},
            "the grid's combination alpha auto, granularity token is refused: pool is on with granularity='token'",
        ),
        ({"alpha": [1.0, -1.0]}, {}, "the grid's combination alpha -1 is refused: alpha is -1.0; expected a finite"),
        ({"alhpa": [1.0]}, {}, "unknown key 'alhpa' in the grid; did you mean 'alpha'?"),
        ({"alpha": []}, {}, "alpha has no value in the grid"),
        ({"batch_size": [4, 0]}, {}, "batch_size is 0, expected a positive number"),
        ({"beta": [float("nan")]}, {}, "beta is nan, expected a positive number"),
        ({"method": ["sft"], "loss_type": ["aot"]}, {}, "loss_type is given and method is sft, which has none"),
    ],
)
def test_a_grid_that_cannot_run_is_refused(grid: dict[str, list[Any]], base: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        expand(grid, base=base)
    assert str(caught.value).startswith(said)


def test_the_keys_are_those_of_the_dataclasses() -> None:
    """None hard-coded, none shadowed by another of the same name."""
    found = keys()
    plot = {field.name for options in (PlotConfig, PlotAblations) for field in dataclasses.fields(options)} - {
        "ablations"
    }
    assert set(found) - plot == {"method", "seed", "loss_type", "steps", "learning_rate", "beta", "batch_size"}
    assert {name for name, key in found.items() if key.group == "plot"} == plot
    assert found["divergence"].choices[0] == "w1"
    assert all(key.help for key in found.values())


def test_the_loss_types_are_trls() -> None:
    import re

    from trl import DPOConfig

    prose = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert re.findall(r"`'(\w+)'`", prose) == list(LOSS_TYPES)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("alpha", "1e-3", 1e-3),  # YAML reads it as text
        ("alpha", 1, 1.0),
        ("norm_order", ".inf", math.inf),
        ("norm_order", "inf", math.inf),
        ("steps", "60", 60),
        ("pool", "true", True),
        ("pool", "No", False),
        ("pool", False, False),
        ("divergence", "tv", "tv"),
        ("loss_type", "sigmoid+sft", "sigmoid+sft"),
        ("loss_type", ["sigmoid", "sft"], "sigmoid+sft"),
    ],
)
def test_values_come_in_the_keys_type(name: str, value: object, expected: object) -> None:
    found = coerce(keys()[name], value)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("divergence", "w2", "divergence is 'w2'; expected one of w1, sinkhorn"),
        ("method", "ppo", "method is 'ppo'; did you mean"),
        ("alpha", "much", "alpha is 'much', expected a number"),
        ("alpha", True, "alpha is True, expected a number"),
        ("beta", None, "beta is None, expected a number"),
        ("steps", 1.5, "steps is 1.5, expected a whole number"),
        ("steps", "1.5", "steps is '1.5', expected a whole number"),
        ("pool", 1, "pool is 1, expected true or false"),
        ("loss_type", "sigmod", "loss_type is 'sigmod'; did you mean 'sigmoid'?"),
    ],
)
def test_values_of_another_type_are_refused(name: str, value: object, said: str) -> None:
    with pytest.raises(InputError) as caught:
        coerce(keys()[name], value)
    assert str(caught.value).startswith(said)


def test_an_optional_number_may_be_none() -> None:
    key = dataclasses.replace(keys()["alpha"], hint=float | None)
    assert coerce(key, "none") is None
    assert coerce(key, None) is None
    assert coerce(key, "2") == 2.0
    with pytest.raises(InputError, match="expected a number or none"):
        coerce(key, "two")
