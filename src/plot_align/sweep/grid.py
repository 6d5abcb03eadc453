"""Keys and values of a sweep's grid, and the runs they make."""

from __future__ import annotations

import itertools
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from plot_align.config import PlotAblations, PlotConfig
from plot_align.errors import InputError, did_you_mean

Method = Literal["dpo", "sft", "pro"]  # the training commands of plot-align
METHODS: tuple[str, ...] = get_args(Method)
# Of TRL 1.16's DPOConfig, which lists them only in its help text.
LOSS_TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
# Methods that have an option; for the others, its values would repeat the same run.
_APPLIES = {"loss_type": ("dpo",), "beta": ("dpo",)}
_MOST = 100_000  # combinations; years of training, and memory for the list of them
_POSITIVE = ("steps", "learning_rate", "beta", "batch_size")
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")


@dataclass(frozen=True)
class Key:
    """One axis of the grid.

    Args:
        name: as a flag and in YAML.
        group: ``run`` (method and seed), ``setting`` or ``plot``.
        hint: type of its values.
        default: used if the grid leaves the key out.
        help: one sentence.
    """

    name: str
    group: Literal["run", "setting", "plot"]
    hint: Any
    default: Any
    help: str

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed values if they can be listed; else empty."""
        return get_args(self.hint) if get_origin(self.hint) is Literal else ()


@dataclass(frozen=True)
class Cell:
    """One point of the grid, for all seeds.

    Args:
        method: which trainer.
        setting: (key, value) of the training's options, without those of the term.
        plot: (option, value) of the term; None for the vanilla arm.
    """

    method: str
    setting: tuple[tuple[str, Any], ...] = ()
    plot: tuple[tuple[str, Any], ...] | None = None

    @property
    def vanilla(self) -> Cell:
        """The same cell without PLOT."""
        return Cell(self.method, self.setting)

    def __str__(self) -> str:
        options = [*self.setting, *(self.plot if self.plot is not None else (("without", "PLOT"),))]
        return ", ".join([self.method, *(f"{name} {value_text(value)}" for name, value in options)])


@dataclass(frozen=True)
class Job:
    """One run: a cell with a seed."""

    cell: Cell
    seed: int

    def __str__(self) -> str:
        return f"{self.cell}, seed {self.seed}"


def keys() -> dict[str, Key]:
    """Every key of the grid: method, seed, options of the training, and all of PlotConfig."""
    found = [
        Key("method", "run", Method, "dpo", "Training command."),
        Key("seed", "run", int, None, "Of the training, the order of its data included."),
        Key("loss_type", "setting", str, None, "Of method=dpo, as in TRL's DPOConfig; join several with +."),
        Key("steps", "setting", int, None, "Optimiser steps."),
        Key("learning_rate", "setting", float, None, "Peak learning rate."),
        Key("beta", "setting", float, None, "Of method=dpo, as in TRL's DPOConfig."),
        Key("batch_size", "setting", int, None, "Rows a step on each device."),
        *_options_of(PlotConfig),
        *_options_of(PlotAblations),
    ]
    return {key.name: key for key in found}


def _options_of(cls: type[PlotConfig | PlotAblations]) -> Iterator[Key]:
    hints = get_type_hints(cls)
    for option in fields(cls):
        if option.init and option.name != "ablations":
            default = None if option.default is MISSING else option.default
            yield Key(option.name, "plot", hints[option.name], default, option.metadata.get("help", ""))


def coerce(key: Key, value: Any) -> Any:
    """Convert one value of ``key``, from a flag's text or from YAML, to the key's type.

    Raises:
        InputError: it is not one of the choices, or has another type.
    """
    if key.name == "loss_type":
        return _loss_type(value)
    if key.choices:
        if value not in key.choices:
            advice = did_you_mean(str(value), key.choices, f"expected one of {', '.join(key.choices)}")
            raise InputError(f"{key.name} is {value!r}; {advice}")
        return value
    kinds = get_args(key.hint) if get_origin(key.hint) in (Union, types.UnionType) else (key.hint,)
    for kind in kinds:
        converted = _convert(kind, value)
        if converted is not MISSING:
            return converted
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "none"}
    expected = " or ".join(names.get(kind) or ", ".join(map(str, get_args(kind))) for kind in kinds)
    raise InputError(f"{key.name} is {value!r}, expected {expected}; correct the value")


def _convert(kind: Any, value: Any) -> Any:
    """``value`` as a ``kind``; MISSING if it cannot be one. YAML reads ``1e-3`` and a quoted number as text."""
    text = value.strip().lower() if isinstance(value, str) else None
    if get_origin(kind) is Literal:
        return value if value in get_args(kind) else MISSING
    if kind is type(None):
        return None if value is None or text in ("none", "null") else MISSING
    if kind is bool:
        if text is not None:
            return True if text in _TRUE else False if text in _FALSE else MISSING
        return value if isinstance(value, bool) else MISSING
    if kind is str:
        return value if text is not None else MISSING
    if isinstance(value, bool) or kind not in (int, float):
        return MISSING
    try:
        if kind is float:
            return float(text.removeprefix(".") if text in (".inf", ".nan") else value)  # as in YAML
        return int(value) if text is not None or isinstance(value, int) else MISSING
    except (TypeError, ValueError, OverflowError):  # the latter of a whole number beyond any float
        return MISSING


def _loss_type(value: Any) -> str:
    parts = value if isinstance(value, list) else str(value).split("+")
    for part in parts or [""]:
        if part not in LOSS_TYPES:
            advice = did_you_mean(str(part), LOSS_TYPES, f"expected one of {', '.join(LOSS_TYPES)}")
            raise InputError(f"loss_type is {value!r}; {advice}")
    return "+".join(parts)


def expand(grid: Mapping[str, Sequence[Any]], *, base: Mapping[str, Any] | None = None) -> list[Job]:
    """The runs of a grid, seed by seed, so that an interrupted sweep leaves complete comparisons.

    Within a seed every method and setting begins with its vanilla arm, which always runs and is also what α = 0 means.
    Options that a method lacks are left out for it, and no run appears twice.

    Args:
        grid: key to values, see :func:`keys`, each as :func:`coerce` returns it. Of the omitted keys only the method,
            the seed (0) and α take part, with their defaults.
        base: options of the term that every cell starts from, for the check.

    Raises:
        InputError: an unknown key, a key without a value, more combinations than anyone runs, one that
            PlotConfig refuses (both are named), a loss type without a method that has one.
    """
    known, base = keys(), dict(base or {})
    if any(seed < 0 for seed in grid.get("seed", [])):
        raise InputError(f"seed is {min(grid['seed'])}, expected 0 or more; correct it")
    for name, values in grid.items():
        if name not in known:
            raise InputError(f"unknown key {name!r} in the grid; {did_you_mean(name, known, 'see --help-all')}")
        if not values:
            raise InputError(f"{name} has no value in the grid, expected one or more; add one or drop the key")
        for value in values if name in _POSITIVE else []:
            if not value > 0:
                raise InputError(f"{name} is {value}, expected a positive number; correct it")
    methods = grid.get("method", [known["method"].default])
    for name in set(_APPLIES) & set(grid):
        if not set(methods) & set(_APPLIES[name]):
            raise InputError(
                f"{name} is given and method is {', '.join(methods)}, which has none; expected one of "
                f"{', '.join(_APPLIES[name])} among the methods, or no {name}"
            )
    count = math.prod(map(len, grid.values()))
    if count > _MOST:
        raise InputError(
            f"the grid has {count:,} combinations, expected at most {_MOST:,}; sweep fewer options at once"
        )
    alpha = {"alpha": [base.get("alpha", known["alpha"].default)]}
    options = [name for name, key in known.items() if key.group == "plot"]
    terms = [None, *(_term(options, base) for options in _combinations(alpha | dict(grid), options))]
    names = [name for name, key in known.items() if key.group == "setting"]
    jobs = (
        Job(Cell(method, setting, term), seed)
        for seed in grid.get("seed", [0])
        for method in methods
        for setting in _combinations(grid, [name for name in names if method in _APPLIES.get(name, METHODS)])
        for term in terms
    )
    return list(dict.fromkeys(jobs))


def _combinations(grid: Mapping[str, Sequence[Any]], names: Sequence[str]) -> list[tuple[tuple[str, Any], ...]]:
    axes = [[(name, value) for value in grid[name]] for name in names if name in grid]
    return list(itertools.product(*axes))


def _term(options: tuple[tuple[str, Any], ...], base: Mapping[str, Any]) -> tuple[tuple[str, Any], ...] | None:
    """The options that change something; None if the term never has any weight."""
    try:
        config = PlotConfig.from_options(**{**base, **dict(options)})
    except InputError as error:
        combination = ", ".join(f"{name} {value_text(value)}" for name, value in options)
        raise InputError(f"the grid's combination {combination} is refused: {error}") from None
    return None if config.is_off else tuple((name, value) for name, value in options if name not in config.unused)


def value_text(value: Any) -> str:
    """A value as a user would write it."""
    match value:
        case bool():
            return "on" if value else "off"
        case None:
            return "auto"
        case float() if math.isfinite(value):
            return f"{value:g}"
        case _:
            return str(value)
