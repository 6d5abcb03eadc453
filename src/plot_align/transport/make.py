"""Make a divergence from its name or from the options of the term."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from plot_align.errors import InputError
from plot_align.transport.base import Divergence
from plot_align.transport.divergences import JensenShannon, KullbackLeibler, TotalVariation
from plot_align.transport.expected_cost import ExpectedCost
from plot_align.transport.geometry import Geometry, line, slices
from plot_align.transport.sinkhorn import SinkhornClusters, SinkhornTopK
from plot_align.transport.wasserstein import MaxSlicedWasserstein, SlicedWasserstein, Wasserstein1

if TYPE_CHECKING:
    from plot_align.config import PlotAblations

DIVERGENCES = ("w1", "max_w1", "sinkhorn", "emo", "kl", "js", "tv")


def divergence_from_options(options: PlotAblations, target: Tensor, embeddings: Tensor, *, valid: int) -> Divergence:
    """The divergence that ``options`` describe, to ``target (V,)``, with the geometry of ``embeddings (V, H)``.

    Args:
        valid: leading rows that are token ids; the rest is padding of the head.

    Raises:
        InputError: as :func:`make_divergence`, or embeddings that give no geometry.
    """
    name: str = options.divergence
    geometry: Geometry | list[Geometry] | None = None
    if name == "w1" and options.geometry in ("sliced", "max_sliced"):
        name = "max_w1" if options.geometry == "max_sliced" else "w1"
        geometry = slices(embeddings, options.slices, seed=options.geometry_seed, scaled=options.scaled, valid=valid)
    elif name == "w1":
        geometry = line(
            embeddings, options.geometry, norm_order=options.norm_order, scaled=options.scaled, valid=valid
        )
    return make_divergence(
        name,
        target,
        geometry,
        embeddings=embeddings,
        sinkhorn_support=options.sinkhorn_support,
        sinkhorn_size=options.sinkhorn_size,
        sinkhorn_epsilon=options.sinkhorn_epsilon,
        sinkhorn_iterations=options.sinkhorn_iterations,
        valid=valid,
        seed=options.geometry_seed,
    )


def make_divergence(
    name: str,
    target: Tensor,
    geometry: Geometry | Sequence[Geometry] | None = None,
    *,
    embeddings: Tensor | None = None,
    sinkhorn_support: str = "topk",
    sinkhorn_size: int | None = None,
    sinkhorn_epsilon: float = 0.1,
    sinkhorn_iterations: int = 100,
    valid: int | None = None,
    seed: int = 0,
) -> Divergence:
    """The divergence called ``name`` from a distribution to ``target``.

    Each divergence uses only the arguments it needs.

    Args:
        name: ``"w1"`` (transport on a line; on several lines their mean), ``"max_w1"`` (the largest over several
            lines), ``"sinkhorn"`` (entropy-regularised transport), ``"emo"`` (expected cosine cost), ``"kl"`` (p
            against the target), ``"js"`` or ``"tv"``.
        target: (V,) a distribution.
        geometry: for ``w1`` one line or several; for ``max_w1`` several, as :func:`~geometry.slices` makes.
        embeddings: (V, H), for ``sinkhorn`` and ``emo``.
        sinkhorn_support: ``"topk"`` (the largest tokens of both sides) or ``"clusters"`` (k-means).
        sinkhorn_size: tokens of each side, or clusters; None: 96 tokens, 256 clusters.
        sinkhorn_epsilon: strength of the entropy, relative to the cost of a random move.
        sinkhorn_iterations: at most.
        valid: for ``sinkhorn``: number of tokenizer ids; None: V.
        seed: for ``sinkhorn``: seed of its samples and clusters.

    Raises:
        InputError: an unknown name, a geometry or embeddings missing, a target that is no distribution, sizes that
            differ, an option out of range.
    """
    match name:
        case "w1":
            if geometry is None:
                raise InputError(
                    'geometry is None with divergence "w1", but W1 needs a coordinate per token: pass '
                    'plot_align.transport.line(embeddings), or choose "tv", "js" or "kl".'
                )
            return (
                Wasserstein1(target, geometry)
                if isinstance(geometry, Geometry)
                else SlicedWasserstein(target, geometry)
            )
        case "max_w1":
            if geometry is None or isinstance(geometry, Geometry):
                raise InputError(
                    f'geometry is {"None" if geometry is None else "one line"} with divergence "max_w1", but several '
                    'lines are needed: pass plot_align.transport.slices(embeddings, 50), or choose "w1" for one line.'
                )
            return MaxSlicedWasserstein(target, geometry)
        case "emo":
            return ExpectedCost(target, _needed(embeddings, name))
        case "sinkhorn":
            options: dict[str, Any] = {
                "epsilon": sinkhorn_epsilon,
                "max_iterations": sinkhorn_iterations,
                "valid": valid,
                "seed": seed,
            }
            if sinkhorn_size is not None:
                options["size"] = sinkhorn_size
            match sinkhorn_support:
                case "topk":
                    return SinkhornTopK(target, _needed(embeddings, name), **options)
                case "clusters":
                    return SinkhornClusters(target, _needed(embeddings, name), **options)
                case _:
                    raise InputError(
                        f'sinkhorn_support is {sinkhorn_support!r}, but "topk" or "clusters" is needed: choose one.'
                    )
        case "kl":
            return KullbackLeibler(target)
        case "js":
            return JensenShannon(target)
        case "tv":
            return TotalVariation(target)
        case _:
            raise InputError(
                f'divergence is {name!r}, but "w1", "max_w1", "sinkhorn", "emo", "kl", "js" or "tv" is needed: '
                "choose one of them."
            )


def _needed(embeddings: Tensor | None, name: str) -> Tensor:
    if embeddings is None:
        raise InputError(
            f'embeddings is None with divergence "{name}", but its cost is made from them: pass the weight of the '
            "reference model's input embedding."
        )
    return embeddings
