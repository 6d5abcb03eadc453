"""The loss of Preference Ranking Optimization on ranked lists of completions."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from plot_align.errors import InputError

_WIDEST = 1e30  # differences of rewards: times the mean log-probability of a token still far inside float32


class ProLoss(NamedTuple):
    """PRO's loss ``()``, and its two terms ``(P,)`` per prompt without gradient."""

    loss: Tensor
    ranking: Tensor
    sft: Tensor


def pro_loss(
    logps: Tensor, lengths: Tensor, rewards: Tensor, present: Tensor | None = None, *, sft_weight: float = 0.05
) -> ProLoss:
    """For one list, best first: ``s = logps / lengths``,
    ``sum(logsumexp(cat([(s[k] * (r[k] - r[-1]))[None], s[k+1:] * (r[k] - r[k+1:])])) - s[k] * (r[k] - r[-1])
    for k in range(n - 1)) + w * (n - 1)**2 * -logps[0]``; the mean over prompts.

    Song et al., *Preference Ranking Optimization for Human Alignment* (AAAI 2024, arXiv 2306.17492): every completion
    is contrasted with all below it, each at a temperature given by the difference of their rewards,

        L_k = −log( exp(s_k·Δ_k) / (exp(s_k·Δ_k) + Σ_{i>k} exp(s_i·(r_k − r_i))) ),    Δ_k = max_{i>k} (r_k − r_i),

    and the best one is imitated as well: ``L = Σ_{k<n} L_k + w·(n − 1)²·NLL(y_1)``. The NLL is a sum over tokens, not
    a mean. Completions may come in any order; of two with equal rewards, the first counts as the better. Such a tie
    adds the constant exp(0) to the denominator of L_k; if all completions below k are ties, L_k is the constant
    log(1 + their number), without gradient. Only differences of rewards matter.

    Args:
        logps: ``(P, n)`` log p(y|x) summed over the tokens of each completion, in nats.
        lengths: ``(P, n)`` their number of tokens; 0 counts as 1.
        rewards: ``(P, n)`` any unit.
        present: ``(P, n)`` bool, False in the padding of shorter lists, which is not read.
        sft_weight: w.

    Returns:
        The loss, in float32 or the wider dtype of ``logps``, and its terms for each prompt.

    Raises:
        InputError: shapes that differ, a reward that is NaN or infinite, or rewards too far apart.
    """
    if present is None:
        present = torch.ones_like(rewards, dtype=torch.bool)
    if not (logps.dim() == 2 and logps.shape == lengths.shape == rewards.shape == present.shape):
        raise InputError(
            f"logps, lengths, rewards and present have the shapes {tuple(logps.shape)}, {tuple(lengths.shape)}, "
            f"{tuple(rewards.shape)} and {tuple(present.shape)}; expected one shape (prompts, completions): pad "
            "shorter lists and mask them with present."
        )
    dtype = torch.promote_types(logps.dtype, torch.float32)
    logps = logps.to(dtype).masked_fill(~present, 0)  # (P, n)
    rewards = rewards.to(dtype).masked_fill(~present, 0)  # (P, n)
    if not torch.isfinite(rewards).all():
        raise InputError("rewards has a NaN or infinite entry; expected finite numbers: remove that completion.")
    scores = logps / lengths.to(dtype).masked_fill(~present, 1).clamp(min=1)  # (P, n)

    gaps = rewards.unsqueeze(2) - rewards.unsqueeze(1)  # (P, n, n): r_k − r_i at [k, i]
    if bool((gaps > _WIDEST).any()):
        raise InputError(
            f"rewards differ by up to {float(gaps.max()):.3g}, expected at most {_WIDEST:.0e}, where the loss "
            "still fits: scale them."
        )
    later = torch.ones_like(gaps, dtype=torch.bool).triu(1)  # (P, n, n)
    below = (gaps > 0) | ((gaps == 0) & later)  # (P, n, n): i is ranked below k
    below = below & present.unsqueeze(2) & present.unsqueeze(1)
    widest = gaps.masked_fill(~below, 0).amax(2)  # (P, n): Δ_k
    rivals = (scores.unsqueeze(1) * gaps).masked_fill(~below, -math.inf)  # (P, n, n): s_i·(r_k − r_i)
    # log(e^a + Σe^b) − a as a softplus of logsumexp(b) − a: nothing overflows, and a loss near 0 keeps its digits.
    # If no completion is below, the margin is infinite: no loss, no gradient.
    margins = scores * widest - rivals.logsumexp(2)  # (P, n)
    ranking = -logsigmoid(margins).sum(1)  # (P,)

    best = present & ~below.any(1)  # (P, n): no completion is above
    pairs = (present.sum(1) - 1).to(dtype).square()  # (P,): (n − 1)²
    sft = -sft_weight * pairs * logps.masked_fill(~best, 0).sum(1)  # (P,)
    return ProLoss((ranking + sft).mean(), ranking.detach(), sft.detach())
