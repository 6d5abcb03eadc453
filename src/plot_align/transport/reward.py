"""DEFT's distribution reward over probabilities (arXiv 2604.01787): a divergence linear in p, without a target."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plot_align.errors import InputError
from plot_align.transport.base import SUM_TOLERANCE, Divergence, widest_dtype


class DistributionReward(Divergence):
    """−R over probabilities, as a cost: ``L + ω·value`` is DEFT's loss.

        value = -(difference * p).sum()    # the naive line

    The potential is −d everywhere. This is a divergence without a target; a target given with the call is ignored.
    R = Σ_v d_v p_v lies between min d and max d.

    Source: arXiv 2604.01787; that the reward is over probabilities is the other of our two readings.

    Args:
        difference: (V,) d, finite, sum 0 within 1e-6; rows of the head beyond the tokenizer have d = 0. Any float
            dtype and device; kept in float64.

    Raises:
        InputError: it is not a vector that sums to zero.
    """

    difference: Tensor  # (V,)

    def __init__(self, difference: Tensor) -> None:
        nn.Module.__init__(self)  # skips Divergence.__init__, which needs a target
        self._constant("difference", _check_difference(difference))

    @property
    def vocab_size(self) -> int:
        """V, the number of rows of the head that the preference covers."""
        return self.difference.numel()

    @torch.no_grad()
    def value_and_potential(self, p: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Divergence.value_and_potential`; ``target`` is ignored."""
        p = self._prepare(p)  # (..., V)
        cost = -self.difference.to(p.dtype)  # (V,)
        # Callers may change the potential in place, so it must not be an expanded view.
        return p @ cost, cost.expand_as(p).clone()


def _check_difference(difference: Tensor) -> Tensor:
    """(V,) → (V,) in float64 (float32 on MPS), its own copy; refuses what does not sum to zero."""
    if difference.ndim != 1 or not difference.is_floating_point():
        raise InputError(
            f"difference is a {difference.dtype} tensor of shape {tuple(difference.shape)}, but a floating-point "
            "tensor of shape (V,) is needed: pass PreferenceDistribution.difference()."
        )
    difference = difference.detach().to(widest_dtype(difference.device), copy=True)  # (V,)
    total = float(difference.sum())
    if not abs(total) <= SUM_TOLERANCE:  # NaN and infinite entries compare false
        raise InputError(
            f"difference sums to {total:.3g}, but the difference of two distributions is needed (finite, sum 0 within "
            "1e-6): pass PreferenceDistribution.difference()."
        )
    return difference
