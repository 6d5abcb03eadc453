"""The options of the PLOT term: :class:`PlotConfig` for users, :class:`PlotAblations` for experiments."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from numbers import Integral
from typing import Any, Literal, get_args, get_origin, get_type_hints

from plot_align.errors import InputError, did_you_mean


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class PlotAblations:
    """Other distances, targets and implementations, for experiments; a training run needs none of them.

    Raises:
        InputError: an option outside its range; the message names it.
    """

    _argument_group_name = "ablations"  # where HfArgumentParser lists them

    target_scope: Literal["auto", "dataset", "batch"] = _option(
        "auto",
        "auto: batch if target=auto and granularity is not token, else dataset. batch: a target for each micro-batch, "
        "anchored on the reference model's output at the same positions or counted in the micro-batch's own tokens. "
        "dataset: one target for the whole training set.",
    )
    target_temperature: float = _option(1.0, "Temperature of target=softmax, in units of max|d| / ln V.")
    reference_rows: int = _option(
        512, "Training rows from which target=anchored estimates the reference model's output."
    )
    divergence: Literal["w1", "sinkhorn", "emo", "kl", "js", "tv", "deft_log", "deft_prob"] = _option(
        "w1",
        "w1: optimal transport on lines. sinkhorn: entropy-regularised transport on a small support. emo: expected "
        "cosine cost. kl, js, tv: these ignore the embeddings. deft_log, deft_prob: DEFT's distribution reward "
        "instead of a distance, in its two readings.",
    )
    geometry: Literal["norm", "principal", "vocabulary", "sliced", "max_sliced"] = _option(
        "sliced",
        "With divergence=w1: a token's coordinate. sliced, max_sliced: its place on random directions, whose "
        "distances are averaged or the largest taken. norm: the norm of its embedding, our reading of the paper. "
        "principal: its place on the first principal axis. vocabulary: its id.",
    )
    norm_order: float = _option(2.0, "With geometry=norm: the order of the norm, 1 or more, or inf.")
    slices: int = _option(16, "With geometry=sliced or max_sliced: how many random directions.")
    geometry_seed: int = _option(0, "Seed of the random directions and of sinkhorn's clusters.")
    scaled: bool = _option(True, "Scale coordinates so that two random tokens are at distance 1 on average.")
    sinkhorn_support: Literal["topk", "clusters"] = _option(
        "topk", "topk: the largest tokens of both sides, and one for the rest. clusters: k-means clusters of tokens."
    )
    sinkhorn_size: int | None = _option(None, "Tokens of each side, or clusters. Default: 96 tokens, 256 clusters.")
    sinkhorn_epsilon: float = _option(0.1, "Strength of the entropy, relative to the cost of a random move.")
    sinkhorn_iterations: int = _option(100, "Most iterations. A warning says if they were too few.")
    plot_backend: Literal["fused", "separate"] = _option(
        "fused",
        "fused: in the trainer's own head pass: inside TRL's fused head, or from the logits that it builds. separate: "
        "a head pass of its own, where that one cannot be reached.",
    )
    plot_impl: Literal["auto", "torch", "triton"] = _option(
        "auto", "Elementwise work in the head. auto: Triton's kernels on a GPU that has them, else torch."
    )
    plot_block_mib: int | None = _option(
        None,
        "MiB of logits in memory at a time. Default: as much as is free, but no more than TRL's head or the head's "
        "gradient takes anyway.",
    )

    def __post_init__(self) -> None:
        if self.norm_order == "inf":  # as JSON and YAML have it
            self.norm_order = math.inf
        _check_types(self)
        _check_number(self, "target_temperature", lambda x: 0 < x < math.inf, "a positive number")
        _check_number(self, "sinkhorn_epsilon", lambda x: 0 < x < math.inf, "a positive number")
        _check_number(self, "norm_order", lambda x: x >= 1, "a number of 1 or more, or infinity")
        for name in ("reference_rows", "slices", "sinkhorn_iterations"):
            _check_number(self, name, lambda x: x >= 1, "1 or more")
        for name in ("sinkhorn_size", "plot_block_mib"):
            _check_number(self, name, lambda x: x >= 1, "1 or more, or none", optional=True)


@dataclass
class PlotConfig:
    """The term of ``L = L_vanilla + α·L_PLOT`` and its weight.

    Raises:
        InputError: an option outside its range, or options that exclude each other; the message names them.
    """

    _argument_group_name = "PLOT"  # where HfArgumentParser lists them

    alpha: float | None = _option(
        None,
        "Weight of the PLOT term. 0 trains exactly as TRL does without it. Default: balanced, see alpha_schedule.",
    )
    balance_ratio: float | None = _option(
        None,
        "With alpha_schedule=balance: norm of PLOT's gradient divided by that of the vanilla loss, at the head. "
        "Default: 0.5, or 0.1 for DEFT's reward, which pulls the same way at every step.",
    )
    alpha_schedule: Literal["constant", "linear", "cosine", "balance"] | None = _option(
        None,
        "constant: alpha throughout. linear, cosine: from alpha to alpha_end over the run. balance: alpha is set "
        "during training so that PLOT's gradient is balance_ratio times the vanilla one. Default: constant if alpha "
        "is given, else balance.",
    )
    alpha_end: float = _option(0.0, "With alpha_schedule=linear or cosine: weight after the last step.")
    target: Literal["auto", "relu", "shift", "softmax", "chosen", "anchored"] = _option(
        "auto",
        "How token preferences become a target distribution. auto: anchored if training runs the reference model "
        "(DPO, KTO), else chosen; relu if granularity=token. anchored: the reference model's own output, shifted by "
        "the preferences. chosen: frequencies in the preferred completions. relu: our reading of the paper. shift, "
        "softmax: variants of it.",
    )
    target_strength: float = _option(
        0.1, "With target=anchored: how far the preferences shift the reference model's output."
    )
    granularity: Literal["batch", "sequence", "token"] = _option(
        "batch",
        "What is compared with the target: the mean output of a micro-batch, that of each sequence, or each position.",
    )
    positions: Literal["chosen", "rejected", "all"] = _option(
        "chosen",
        "Completions whose positions count. Online methods tell chosen from rejected by the sign of the advantage.",
    )
    pool: bool = _option(False, "Average the output distribution over all ranks before it is compared.")
    grad_ratio_steps: int = _option(
        50, "Log the ratio of PLOT's gradient to the vanilla one every this many steps. 0: never."
    )
    ablations: PlotAblations = field(default_factory=PlotAblations)

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("alpha", "alpha_end"):
            _check_number(
                self, name, lambda x: 0 <= x < math.inf, "a finite number, 0 or more", optional=name == "alpha"
            )
        _check_number(self, "balance_ratio", lambda x: 0 < x < math.inf, "a positive number", optional=True)
        _check_number(self, "target_strength", lambda x: 0 <= x < math.inf, "a finite number, 0 or more")
        _check_number(self, "grad_ratio_steps", lambda x: x >= 0, "0 (never) or a number of steps")
        self._check_alpha()
        self._check_combinations()

    def _check_alpha(self) -> None:
        if self.alpha is None and self.schedule != "balance":
            raise InputError(
                f"alpha is missing with alpha_schedule={self.alpha_schedule!r}; expected the weight it starts from: "
                "give alpha, or set alpha_schedule='balance'."
            )
        if self.alpha_end != 0 and self.schedule not in ("linear", "cosine"):
            raise InputError(
                f"alpha_end is {self.alpha_end:g} with alpha_schedule={self.schedule!r}, which has no end; expected "
                "alpha_schedule='linear' or 'cosine', or no alpha_end."
            )

    def _check_combinations(self) -> None:
        scope = self.ablations.target_scope
        if self.pool and self.granularity != "batch":
            raise InputError(
                f"pool is on with granularity={self.granularity!r}; only granularity='batch' has one distribution "
                "to average over the ranks: set granularity='batch' or leave pool off."
            )
        if self.pool and self.ablations.divergence == "deft_log":
            raise InputError(
                "pool is on with divergence='deft_log', which reads hidden states and no output distribution that "
                "could be averaged; leave pool off."
            )
        if scope == "batch" and self.granularity == "token" and not self.is_reward:
            raise InputError(
                "target_scope is 'batch' with granularity='token'; a single position has no distribution of its own "
                "to be compared with: expected granularity='batch' or 'sequence', or target_scope='dataset'."
            )

    @classmethod
    def from_options(cls, **options: Any) -> PlotConfig:
        """Builds a config from the options of both classes by name, as in YAML files, flags and saved models.

        Raises:
            InputError: as the constructors do.
        """
        names = {f.name for f in dataclasses.fields(PlotAblations)}
        known = names | {f.name for f in dataclasses.fields(cls)} - {"ablations"}
        for name in options:
            if name not in known:
                raise InputError(f"unknown option {name!r}; {did_you_mean(name, known, 'see docs/options.md')}")
        ablations = PlotAblations(**{name: value for name, value in options.items() if name in names})
        return cls(**{name: value for name, value in options.items() if name not in names}, ablations=ablations)

    @classmethod
    def paper(cls, **options: Any) -> PlotConfig:
        """Our reading of the paper: a constant α (0.1 by default), the ``relu`` target of the whole data set, W1 of
        embedding norms, the mean output of a micro-batch. ``options`` of either class override it."""
        reading = {"alpha": 0.1, "target": "relu", "target_scope": "dataset", "geometry": "norm"}
        return cls.from_options(**{**reading, **options})

    def replace(self, **options: Any) -> PlotConfig:
        """A copy with changed ``options`` of either class."""
        return self.from_options(**{**self._flat(), **options})

    def resolve_auto(self, *, reference_forward: bool | None, reference: bool = False) -> PlotConfig:
        """The options with ``auto`` resolved.

        ``target="auto"`` becomes, for a target of the micro-batch, ``anchored`` if the training step runs the
        reference model, else ``chosen``. For a target of the data set (``granularity="token"``,
        ``target_scope="dataset"``, or a given ``reference`` distribution), it becomes ``anchored`` on that
        distribution, else ``relu``. With any other target, ``target_scope="auto"`` becomes ``dataset``.

        Args:
            reference_forward: whether the step yields the reference's output; ``None``: not known before the call, so
                a target of the micro-batch stays ``auto``.
            reference: whether the reference's mean output over the data set is given.
        """
        scope = self.ablations.target_scope
        if self.is_reward:
            return self
        if self.target != "auto":
            return self.replace(target_scope="dataset" if scope == "auto" else scope)
        if scope == "auto":
            scope = "dataset" if self.granularity == "token" or reference else "batch"
        if scope == "dataset":
            return self.replace(target="anchored" if reference else "relu", target_scope=scope)
        if reference_forward is None:
            return self.replace(target_scope=scope)
        return self.replace(target="anchored" if reference_forward else "chosen", target_scope=scope)

    @property
    def has_batch_target(self) -> bool:
        """Whether every micro-batch has its own target."""
        return self.ablations.target_scope == "batch" and not self.is_reward

    @property
    def needs_reference(self) -> bool:
        """Whether every micro-batch's target is anchored on the reference model's output at its positions."""
        return self.target == "anchored" and self.has_batch_target

    @property
    def head_options(self) -> dict[str, Any]:
        """The arguments of :class:`plot_align.head.HeadSpec` that these options set."""
        block = self.ablations.plot_block_mib
        return {"impl": self.ablations.plot_impl, "block_bytes": block and block << 20}

    @property
    def is_reward(self) -> bool:
        """Whether the term is DEFT's distribution reward, which has no target."""
        return self.ablations.divergence.startswith("deft_")

    @property
    def is_off(self) -> bool:
        """Whether α is 0 throughout."""
        return self.alpha == 0 and (self.schedule not in ("linear", "cosine") or self.alpha_end == 0)

    @property
    def schedule(self) -> str:
        """``alpha_schedule``; if not given, ``balance`` without an ``alpha``, else ``constant``."""
        return self.alpha_schedule or ("balance" if self.alpha is None else "constant")

    @property
    def ratio(self) -> float:
        """``balance_ratio``; if not given, 0.5, or 0.1 for DEFT's reward."""
        return self.balance_ratio if self.balance_ratio is not None else 0.1 if self.is_reward else 0.5

    @property
    def unused(self) -> frozenset[str]:
        """Names of the options that have no effect, given the others."""
        divergence, geometry = self.ablations.divergence, self.ablations.geometry
        on_lines = divergence == "w1"
        on_directions = on_lines and geometry in ("sliced", "max_sliced")
        sinkhorn = divergence == "sinkhorn"
        names: set[str] = set()
        for used, options in (
            (on_lines, ("geometry", "scaled")),
            (on_lines and geometry == "norm", ("norm_order",)),
            (on_directions, ("slices",)),
            (on_directions or sinkhorn, ("geometry_seed",)),
            (sinkhorn, ("sinkhorn_support", "sinkhorn_size", "sinkhorn_epsilon", "sinkhorn_iterations")),
            (not self.is_reward, ("target", "target_scope")),
            (not self.is_reward and self.target == "softmax", ("target_temperature",)),
            (not self.is_reward and self.target in ("auto", "anchored"), ("target_strength", "reference_rows")),
            (self.schedule == "balance", ("balance_ratio",)),
            (self.schedule in ("linear", "cosine"), ("alpha_end",)),
        ):
            if not used:
                names.update(options)
        return frozenset(names)

    def to_dict(self) -> dict[str, Any]:
        """The options of both classes by name, JSON-able, with the resolved schedule and ratio; an infinite
        ``norm_order`` becomes ``"inf"``."""
        options = {**self._flat(), "alpha_schedule": self.schedule, "balance_ratio": self.ratio}
        if math.isinf(self.ablations.norm_order):
            options["norm_order"] = "inf"
        return options

    def _flat(self) -> dict[str, Any]:
        options = asdict(self)
        ablations = options.pop("ablations")
        return {**options, **ablations}


def _check_types(options: Any) -> None:
    """Refuses a value that is none of the choices, a switch that is not on or off, a count that is not whole."""
    hints = get_type_hints(type(options))
    for entry in dataclasses.fields(options):
        hint, value = hints[entry.name], getattr(options, entry.name)
        if hint is bool and not isinstance(value, bool):
            raise InputError(f"{entry.name} is {value!r}; expected true or false.")
        if int in (hint, *get_args(hint)) and value is not None and not _is_whole(value):
            raise InputError(f"{entry.name} is {value!r}; expected a whole number.")
        choices = _choices(hint)
        if choices and value not in choices and not (value is None and entry.default is None):
            raise InputError(f"{entry.name} is {value!r}; expected one of {', '.join(choices)}.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _choices(hint: Any) -> tuple[str, ...]:
    """The values of a ``Literal`` or of an optional one; else empty."""
    for kind in (hint, *get_args(hint)):
        if get_origin(kind) is Literal:
            return get_args(kind)
    return ()


def _check_number(
    options: Any, name: str, holds: Callable[[float], bool], expected: str, *, optional: bool = False
) -> None:
    value = getattr(options, name)
    if value is None and optional:
        return
    if not isinstance(value, int | float) or isinstance(value, bool) or not holds(value):
        raise InputError(f"{name} is {value!r}; expected {expected}.")
