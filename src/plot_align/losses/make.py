"""The divergences by name."""

from __future__ import annotations

from torch import Tensor

from plot_align.errors import InputError
from plot_align.geometry import Geometry
from plot_align.losses.base import Divergence
from plot_align.losses.divergences import JensenShannon, KullbackLeibler, TotalVariation
from plot_align.losses.wasserstein import Wasserstein1

DIVERGENCES = ("w1", "kl", "js", "tv")


def make_divergence(name: str, target: Tensor, geometry: Geometry | None = None) -> Divergence:
    """The divergence called ``name`` from a distribution to ``target``.

    Args:
        name: ``"w1"`` (needs a geometry), ``"kl"`` (p against the target), ``"js"`` or ``"tv"``.
        target: (V,) a distribution.
        geometry: coordinates (V,); the divergences without geometry do not look at it.

    Raises:
        InputError: an unknown name, ``w1`` without a geometry, a target that is no distribution, sizes that differ.
    """
    match name:
        case "w1":
            if geometry is None:
                raise InputError(
                    'geometry is None with divergence "w1", but W1 needs a coordinate per token: pass '
                    'plot_align.geometry.line(embeddings), or choose "tv", "js" or "kl".'
                )
            return Wasserstein1(target, geometry)
        case "kl":
            return KullbackLeibler(target)
        case "js":
            return JensenShannon(target)
        case "tv":
            return TotalVariation(target)
        case _:
            raise InputError(f'divergence is {name!r}, but "w1", "kl", "js" or "tv" is needed: choose one of them.')
