"""Divergences that know no geometry: Kullback-Leibler, Jensen-Shannon, total variation. Natural logarithms.

Infinite values are returned as inf: KL to a target without some of p's support *is* infinite, and a clipped number
would hide that the ``relu`` target and a softmax output never share their support.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plot_align.transport.base import Divergence


class KullbackLeibler(Divergence):
    """KL(p || P).

        value = (p * (p / P).log()).sum()    # the naive line, with 0 * log 0 = 0

    Potential ``log(p / P) + 1``; inf, like the value, where P = 0 < p (the gradient in the logits is then NaN: such a
    target cannot be trained on). Where p = 0 < P the derivative is -inf; p is replaced by the smallest normal number
    there, so that ``p_t * s`` is 0, its limit, and not NaN. Where both are 0 it is 0.
    """

    log_target: Tensor  # (V,), -inf where P = 0

    def __init__(self, target: Tensor) -> None:
        super().__init__(target)
        self._constant("log_target", self.target.log())  # in float64: P below 1e-45 is not zero

    @torch.no_grad()
    def value_and_potential(self, p: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Divergence.value_and_potential`; in nats."""
        p = self._prepare(p)  # (..., V)
        log_target = self.log_target if target is None else self._target_for(p, target).log()  # (V,) or (..., V)
        log_ratio = _log(p).sub_(log_target.to(p.dtype))  # (..., V)
        log_ratio.masked_fill_((p == 0) & (log_target == -torch.inf), -1.0)  # neither has it: value and potential 0
        value = (p * log_ratio).sum(-1)  # (...)
        return value, log_ratio.add_(1.0)


class JensenShannon(Divergence):
    """JS(p, P) = (KL(p || m) + KL(P || m)) / 2 with m = (p + P) / 2; between 0 and log 2.

        m = (p + P) / 2;  value = (p * (p / m).log() + P * (P / m).log()).sum() / 2    # the naive line

    Potential ``log(p / m) / 2`` (the derivative of m cancels), with the same convention at p = 0 as
    :class:`KullbackLeibler`. Source: J. Lin, "Divergence measures based on the Shannon entropy" (1991).
    """

    @torch.no_grad()
    def value_and_potential(self, p: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Divergence.value_and_potential`; in nats."""
        p = self._prepare(p)  # (..., V)
        target = self._target_for(p, target).to(p.dtype)  # (V,) or (..., V)
        log_mean = _log((p + target).mul_(0.5))  # (..., V)
        potential = _log(p).sub_(log_mean)  # (..., V) log p/m
        value = (p * potential).sum(-1)  # (...)
        value += (_log(target) - log_mean).mul_(target).sum(-1)  # (...)
        return value.mul_(0.5), potential.mul_(0.5)


class TotalVariation(Divergence):
    """Total variation: optimal transport under the 0-1 cost; between 0 and 1.

        value = (p - P).abs().sum() / 2    # the naive line

    Potential ``sign(p - P) / 2`` with sign(0) = 0.
    """

    @torch.no_grad()
    def value_and_potential(self, p: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Divergence.value_and_potential`; in mass."""
        p = self._prepare(p)  # (..., V)
        difference = p - self._target_for(p, target).to(p.dtype)  # (..., V)
        value = difference.abs().sum(-1).mul_(0.5)  # (...)
        return value, difference.sign_().mul_(0.5)


def _log(p: Tensor) -> Tensor:
    """log p with 0 replaced by the smallest normal number: finite, so that 0 * log 0 = 0; a new tensor."""
    return torch.where(p == 0, torch.finfo(p.dtype).tiny, p).log_()
