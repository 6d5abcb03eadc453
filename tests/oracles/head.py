"""The fused head as plain torch on materialised logits.

    z = softcap(logit_scale · (hidden @ weight.T + bias)) / temperature           # (N, V)
    p = softmax(z)                                                                # (N, V)
    distributions[s] = Σ_{t in segment s} weights[t] · p[t]                           # (S, V)

Slow and hungry on purpose; :func:`plot_align.head.fused_head` must match it in value and gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plot_align.head import HeadOutput, HeadSpec
from plot_align.transport import Divergence


def reference_head(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,) int64
    spec: HeadSpec | None = None,
    *,
    weights: Tensor | None = None,  # (N,)
    segments: Tensor | None = None,  # (N,) int64
    num_segments: int = 1,
    divergence: Divergence | None = None,
) -> HeadOutput:
    """Same arguments and same results as :func:`plot_align.head.fused_head`, one plain line each."""
    spec = spec or HeadSpec()
    z = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))  # (N, V)
    z = (z if bias is None else z + bias) * spec.logit_scale
    if spec.softcap is not None:
        z = spec.softcap * torch.tanh(z / spec.softcap)
    z = z / spec.temperature
    log_p = z.log_softmax(-1)  # (N, V)
    p = log_p.exp()  # (N, V)

    distributions = values = None
    if weights is not None:
        segments = torch.zeros_like(targets) if segments is None else segments
        weighted = weights.to(p.dtype).unsqueeze(-1) * p  # (N, V)
        distributions = p.new_zeros(num_segments, p.size(-1)).index_add(0, segments, weighted)  # (S, V)
        if divergence is not None:
            values = divergence.value(p) * (weights > 0)  # (N,)
            distributions = distributions.detach()
    wanted = spec.outputs
    return HeadOutput(
        log_probs=log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1),  # (N,)
        entropy=-(p * log_p).sum(-1) if "entropy" in wanted else None,
        log_sum_sq_probs=p.square().sum(-1).log().detach() if "log_sum_sq_probs" in wanted else None,
        mean_logits=z.mean(-1).detach() if "mean_logits" in wanted else None,
        is_top1=z.argmax(-1) == targets if "is_top1" in wanted else None,
        distributions=distributions,
        values=values,
    )
