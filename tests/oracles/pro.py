"""PRO's loss as the paper writes it."""

from __future__ import annotations

import math
from collections.abc import Sequence


def naive_pro_loss(
    logps: Sequence[float], lengths: Sequence[float], rewards: Sequence[float], *, sft_weight: float = 0.05
) -> tuple[float, float]:
    """The formula of ``pro_loss`` as it is written, for one prompt, in float64: (Σ L_k, w·(n − 1)²·NLL(y_1)).

    ``exp`` may underflow here.
    """
    order = sorted(range(len(rewards)), key=lambda i: -rewards[i])  # stable: of a tie the first stays first
    scores = [logps[i] / lengths[i] for i in order]
    ranked = [rewards[i] for i in order]
    n = len(order)
    ranking = 0.0
    for k in range(n - 1):
        widest = max(ranked[k] - ranked[i] for i in range(k + 1, n))
        rivals = sum(math.exp(scores[i] * (ranked[k] - ranked[i])) for i in range(k + 1, n))
        ranking += -scores[k] * widest + math.log(math.exp(scores[k] * widest) + rivals)
    return ranking, sft_weight * (n - 1) ** 2 * -logps[order[0]]
