"""φ: turns token preferences into the weights of a target distribution. The callers divide them by their sum."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from plot_align.errors import InputError

COUNTED = ("relu", "shift", "softmax", "chosen")
TRANSFORMS = (*COUNTED, "anchored")


def anchored(reference: Tensor, difference: Tensor, strength: float) -> Tensor:
    """``max(p_ref + λ·d, 0)``, (..., V): the reference model's own output, shifted by the preferences.

    Raises:
        InputError: λ is negative or not finite.
    """
    if not (math.isfinite(strength) and strength >= 0):
        raise InputError(f"strength is {strength}, expected a finite number of 0 or more, e.g. 1.0")
    return (reference + strength * difference).clamp(min=0)


def counted(kind: str, chosen: Tensor, rejected: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Weights (V,) from the token frequencies in the preferred and in the rejected answers, (V,) each, summing to one.

    With ``d = chosen − rejected``: ``relu`` is ``max(d, 0)``, ``shift`` is ``d − min d``, ``softmax`` is
    ``exp(d / (temperature · max|d| / ln V))``, ``chosen`` is the preferred answers' own frequencies.

    Raises:
        InputError: an unknown kind, or a temperature out of range.
    """
    difference = chosen - rejected  # (V,)
    match kind:
        case "relu":
            return difference.clamp(min=0)
        case "shift":
            return difference - difference.min()
        case "softmax":
            if not (math.isfinite(temperature) and temperature > 0):
                raise InputError(f"temperature is {temperature}, expected a finite number above 0, e.g. 1.0")
            unit = difference.abs().max() / math.log(difference.numel())
            return torch.softmax(difference / (temperature * unit), dim=0)
        case "chosen":
            return chosen
    raise InputError(f"target is {kind!r}, expected one of {', '.join(COUNTED)} where tokens are counted")


def counted_in_batch(kind: str, counts: Tensor, *, valid: int, temperature: float = 1.0) -> Tensor:
    """:func:`counted` for one micro-batch; all zero if a side has no token or both sides are equal.

    Args:
        counts: (2, V) how often each token is preferred and rejected; rows from ``valid`` on are padding of the head.

    Returns:
        (1, V) weights.
    """
    totals = counts.sum(-1, keepdim=True)  # (2, 1)
    chosen, rejected = counts / totals.clamp(min=1)  # (V,), (V,)
    weights = torch.zeros_like(chosen)  # (V,)
    if totals[0] > 0 and (kind == "chosen" or (totals[1] > 0 and not torch.equal(chosen, rejected))):
        weights[:valid] = counted(kind, chosen[:valid], rejected[:valid], temperature=temperature)
    return weights.unsqueeze(0)
