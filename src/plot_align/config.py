"""The options of the PLOT term, as a dataclass that the command line and YAML files share."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from plot_align.errors import InputError


@dataclass
class PlotConfig:
    """``L = L_vanilla + α·L_PLOT``: how the term is built, and how much it weighs.

    Raises:
        InputError: an option outside its range; the message names it.
    """

    alpha: float | None = field(
        default=None,
        metadata={"help": "Weight of the PLOT term; 0 trains exactly as TRL does without it. Default: balanced."},
    )
    alpha_schedule: Literal["constant", "linear", "cosine", "balance"] | None = field(
        default=None,
        metadata={"help": "linear, cosine: from alpha to alpha_end over the run. balance: alpha is chosen as training "
                          "goes, so that PLOT's gradient is balance_ratio times the vanilla loss's. Default: constant "
                          "where alpha is given, else balance."},
    )  # fmt: skip
    alpha_end: float = field(default=0.0, metadata={"help": "Weight after the last step of linear and cosine."})
    balance_ratio: float | None = field(
        default=None,
        metadata={"help": "Of alpha_schedule=balance: norm of PLOT's gradient over the vanilla one's, at the head. "
                          "Default: 0.5; 0.1 for DEFT's reward, which pulls the same way at every step."},
    )  # fmt: skip
    target: Literal["auto", "relu", "shift", "softmax", "chosen", "anchored"] = field(
        default="auto",
        metadata={"help": "How token preferences become a target distribution. anchored: the reference model's own "
                          "output, shifted by them. chosen: the preferred tokens' own frequencies. relu: our reading "
                          "of the paper. auto: anchored where the training step runs the reference model (DPO, KTO), "
                          "else chosen."},
    )  # fmt: skip
    target_scope: Literal["auto", "dataset", "batch"] = field(
        default="auto",
        metadata={"help": "batch: one target a micro-batch, anchored on the reference's own output at the same "
                          "positions, or counted in the micro-batch's own tokens. auto: batch with target=auto, else "
                          "dataset."},
    )  # fmt: skip
    target_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of target=softmax, in units of max|d| / ln V."}
    )
    target_strength: float = field(
        default=0.1, metadata={"help": "How far target=anchored shifts the reference distribution by the preferences."}
    )
    reference_rows: int = field(
        default=512, metadata={"help": "Training rows from which target=anchored estimates the reference."}
    )
    divergence: Literal["w1", "sinkhorn", "emo", "kl", "js", "tv", "deft_log", "deft_prob"] = field(
        default="w1",
        metadata={"help": "w1: optimal transport on lines. sinkhorn: entropy-regularised, on a small support. emo: "
                          "expected cosine cost. kl, js, tv (the 0-1 cost) ignore the embeddings. deft_log, "
                          "deft_prob: DEFT's distribution reward in the distance's place, in its two readings."},
    )  # fmt: skip
    geometry: Literal["norm", "principal", "vocabulary", "sliced", "max_sliced"] = field(
        default="sliced",
        metadata={"help": "Of divergence=w1, a token's coordinate: its place on random directions (mean or largest "
                          "distance), norm of its embedding (our reading of the paper), its place on the first "
                          "principal axis, or its bare id (ablation)."},
    )  # fmt: skip
    norm_order: float = field(default=2.0, metadata={"help": "The l of geometry=norm, 1 or more; .inf is allowed."})
    slices: int = field(default=16, metadata={"help": "Random directions of geometry=sliced and max_sliced."})
    geometry_seed: int = field(default=0, metadata={"help": "Of the random directions, and of sinkhorn's clusters."})
    sinkhorn_support: Literal["topk", "clusters"] = field(
        default="topk", metadata={"help": "The largest tokens of both sides and a rest, or k-means clusters."}
    )
    sinkhorn_size: int | None = field(
        default=None, metadata={"help": "Tokens of each side, or clusters; default 96 tokens, 256 clusters."}
    )
    sinkhorn_epsilon: float = field(
        default=0.1, metadata={"help": "Strength of the entropy, relative to the cost of a random move."}
    )
    sinkhorn_iterations: int = field(default=100, metadata={"help": "At most; a warning says where it was too few."})
    scaled: bool = field(
        default=True, metadata={"help": "Scale coordinates so that two random tokens are at distance 1 on average."}
    )
    granularity: Literal["batch", "sequence", "token"] = field(
        default="batch", metadata={"help": "What is compared with the target: the mean output of a micro-batch, of a "
                                           "sequence, or each position."}
    )  # fmt: skip
    positions: Literal["chosen", "rejected", "all"] = field(
        default="chosen",
        metadata={"help": "Completions whose positions count; online methods choose by the sign of the advantage."},
    )
    pool: bool = field(
        default=False, metadata={"help": "Average the output distribution over all ranks before comparing it."}
    )
    grad_ratio_steps: int = field(
        default=50, metadata={"help": "Log the ratio of PLOT's to the vanilla gradient every so many steps; 0: never."}
    )
    plot_backend: Literal["fused", "separate"] = field(
        default="fused",
        metadata={"help": "fused: inside TRL's head, or from the logits that CPO and ORPO build anyway; free. "
                          "separate: a head pass of its own, for other TRL versions."},
    )  # fmt: skip
    plot_impl: Literal["auto", "torch", "triton"] = field(
        default="auto",
        metadata={"help": "Elementwise work in the head. auto: Triton's kernels on a GPU that has them, else torch."},
    )
    plot_block_mib: int | None = field(
        default=None,
        metadata={"help": "MiB of logits in memory at a time. Default: by what is free, and no more than TRL's "
                          "head or the head's gradient takes anyway."},
    )  # fmt: skip

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name, value in asdict(self).items():
            choices = _choices(hints[name])
            if choices and value not in choices and not (value is None and name == "alpha_schedule"):
                raise InputError(f"{name} is {value!r}; expected one of {', '.join(choices)}.")
        if self.alpha is None and self.schedule != "balance":
            raise InputError(
                f"alpha is missing with alpha_schedule={self.alpha_schedule!r}; expected the weight it starts from: "
                "give alpha, or set alpha_schedule='balance'."
            )
        numbers = (
            "alpha", "alpha_end", "balance_ratio", "norm_order", "target_temperature", "target_strength",
            "sinkhorn_epsilon",
        )  # fmt: skip
        for name in numbers:
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            self._require(name, is_number or (name in ("alpha", "balance_ratio") and value is None), "a number")
        for name in ("alpha", "alpha_end"):
            value = getattr(self, name)
            self._require(name, value is None or (value >= 0 and math.isfinite(value)), "a finite number, 0 or more")
        self._require("norm_order", self.norm_order >= 1, "a number of 1 or more, or infinity")
        for name in ("balance_ratio", "target_temperature", "sinkhorn_epsilon"):
            value = getattr(self, name)
            self._require(name, value is None or (value > 0 and math.isfinite(value)), "a positive number")
        strength = self.target_strength
        self._require("target_strength", strength >= 0 and math.isfinite(strength), "a finite number, 0 or more")
        self._require("reference_rows", self.reference_rows >= 1, "a positive number of rows")
        for name in ("slices", "sinkhorn_iterations"):
            self._require(name, getattr(self, name) >= 1, "1 or more")
        self._require("sinkhorn_size", self.sinkhorn_size is None or self.sinkhorn_size >= 1, "1 or more, or none")
        self._require("plot_block_mib", self.plot_block_mib is None or self.plot_block_mib >= 1, "1 or more, or none")
        self._require("grad_ratio_steps", self.grad_ratio_steps >= 0, "0 (never) or a number of steps")
        if self.alpha_end != 0 and self.schedule not in ("linear", "cosine"):
            raise InputError(
                f"alpha_end is {self.alpha_end:g} with alpha_schedule={self.schedule!r}, which has no end; expected "
                "alpha_schedule='linear' or 'cosine', or no alpha_end."
            )
        if self.pool and self.granularity != "batch":
            raise InputError(
                f"pool is on with granularity={self.granularity!r}; only granularity='batch' has one distribution "
                "to average over the ranks: set granularity='batch' or leave pool off."
            )

        if self.pool and self.divergence == "deft_log":
            raise InputError(
                "pool is on with divergence='deft_log', which reads hidden states and no output distribution that "
                "could be averaged; leave pool off."
            )
        if self.target_scope == "batch" and self.granularity == "token" and not self.is_reward:
            raise InputError(
                "target_scope is 'batch' with granularity='token'; a single position has no distribution of its own "
                "to be compared with: expected granularity='batch' or 'sequence', or target_scope='dataset'."
            )
        if self.needs_reference and self.plot_backend != "fused":
            raise InputError(
                f"target_scope is 'batch' with target='anchored' and plot_backend={self.plot_backend!r}; the "
                "reference's output is taken in TRL's fused head: expected plot_backend='fused' or "
                "target_scope='dataset'."
            )

    @property
    def needs_reference(self) -> bool:
        """Whether every step's target is anchored on the reference model's output over the same positions."""
        return self.target == "anchored" and self.target_scope == "batch" and not self.is_reward

    @property
    def head_options(self) -> dict[str, Any]:
        """What these options say of :class:`plot_align.head.HeadSpec`."""
        return {"impl": self.plot_impl, "block_bytes": self.plot_block_mib and self.plot_block_mib << 20}

    @property
    def is_reward(self) -> bool:
        """Whether the term is DEFT's distribution reward, which has no target."""
        return self.divergence.startswith("deft_")

    @property
    def is_off(self) -> bool:
        """Whether the term never weighs anything: α is 0 and no schedule raises it."""
        return self.alpha == 0 and (self.schedule not in ("linear", "cosine") or self.alpha_end == 0)

    @property
    def schedule(self) -> str:
        """``alpha_schedule``; where none is given ``balance`` without an ``alpha``, else ``constant``."""
        return self.alpha_schedule or ("balance" if self.alpha is None else "constant")

    @property
    def ratio(self) -> float:
        """``balance_ratio``; where none is given 0.5, and 0.1 for DEFT's reward."""
        return self.balance_ratio if self.balance_ratio is not None else 0.1 if self.is_reward else 0.5

    @property
    def unused(self) -> frozenset[str]:
        """Names of the options that change nothing with the others as they are."""
        names: set[str] = set()
        on_lines = self.divergence == "w1"
        on_directions = on_lines and self.geometry in ("sliced", "max_sliced")
        for used, options in (
            (on_lines, ("geometry", "scaled")),
            (on_lines and self.geometry == "norm", ("norm_order",)),
            (on_directions, ("slices",)),
            (on_directions or self.divergence == "sinkhorn", ("geometry_seed",)),
            (
                self.divergence == "sinkhorn",
                ("sinkhorn_support", "sinkhorn_size", "sinkhorn_epsilon", "sinkhorn_iterations"),
            ),
            (not self.is_reward, ("target", "target_scope")),
            (not self.is_reward and self.target == "softmax", ("target_temperature",)),
            (not self.is_reward and self.target in ("auto", "anchored"), ("target_strength", "reference_rows")),
            (self.schedule == "balance", ("balance_ratio",)),
            (self.schedule in ("linear", "cosine"), ("alpha_end",)),
        ):
            if not used:
                names.update(options)
        return frozenset(names)

    @classmethod
    def paper(cls, **options: Any) -> PlotConfig:
        """Our reading of the paper: a constant α (0.1 unless given), the ``relu`` target of the whole data set, W1 of
        embedding norms, the mean output of a micro-batch. ``options`` go over it."""
        reading: dict[str, Any] = {"alpha": 0.1, "target": "relu", "target_scope": "dataset", "geometry": "norm"}
        return cls(**{**reading, **options})

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InputError(f"{name} is {getattr(self, name)!r}; expected {expected}.")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with the schedule and ratio that apply; an infinite ``norm_order`` becomes ``"inf"``."""
        options = {**asdict(self), "alpha_schedule": self.schedule, "balance_ratio": self.ratio}
        if math.isinf(self.norm_order):
            options["norm_order"] = "inf"
        return options


def _choices(hint: Any) -> tuple[str, ...]:
    """The values of a ``Literal``, also of one that may be ``None``; else empty."""
    for kind in (hint, *get_args(hint)):
        if get_origin(kind) is Literal:
            return get_args(kind)
    return ()
