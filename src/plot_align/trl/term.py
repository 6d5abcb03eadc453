"""L_PLOT of a TRL trainer: :class:`plot_align.plot.PlotLoss` on the output distributions of a head pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from plot_align.head import HeadOutput, HeadSpec
from plot_align.head.reward import log_reward, reward_scale
from plot_align.plot import PlotLoss
from plot_align.preference.batch import Batch, Pooling
from plot_align.transport import Divergence


@dataclass
class HeadResult:
    """The result of the policy's head pass over a micro-batch.

    Attributes:
        head: log-probabilities and output distributions, with their graph.
        pooling: how the rows are pooled into the distributions.
        hidden: the head's input, where gradient norms are compared.
        rows: ``(N,)`` indices of the rows in the flattened ``(B, T − 1)`` batch.
        reference: ``(S, V)`` the reference model's output distributions over the same positions, if requested.
        recompute_rows: runs the head again on some rows, given their indices, with its weights held fixed; returns its
            input and output. ``None`` if the vanilla loss does not come from this pass.
        outputs: the model's outputs that have a graph, on which FSDP2 and DeepSpeed put hooks.
        gather: a context in which the head's weights are whole, for a backward through the head by itself.
    """

    head: HeadOutput
    pooling: Pooling
    hidden: Tensor
    rows: Tensor
    reference: Tensor | None = None
    recompute_rows: Callable[[Tensor], tuple[Tensor, HeadOutput]] | None = None
    outputs: tuple[Tensor, ...] = ()
    gather: Callable[[], AbstractContextManager[None]] = nullcontext


class PlotTerm(PlotLoss):
    """``L_PLOT`` from a head pass. With ``pool``, output distributions and token counts are taken over all ranks. With
    ``divergence="deft_log"`` or ``"deft_prob"``, DEFT's −R replaces the distance, and α is its ω."""

    def loss(self, result: HeadResult, batch: Batch) -> Tensor:
        """The scalar L_PLOT, with a graph; exactly zero if nothing is selected."""
        head, pooling = result.head, result.pooling
        if head.distributions is None:
            raise ValueError("the head was run without weights")
        if head.values is not None:
            return (head.values * pooling.weights.to(head.values)).sum()
        if head.reward is not None:
            selected = pooling.counts.to(head.reward.device) > 0  # (S,)
            return -(head.reward * selected).sum() / selected.sum().clamp(min=1)
        outputs, counts, reference = head.distributions, pooling.counts.to(head.distributions.device), result.reference
        if self.config.pool and _ranks() > 1:
            reference = None if reference is None else _over_ranks(reference, counts)[0]
            outputs, counts = _over_ranks(outputs, counts)
        return self.mean_divergence(outputs, counts, *self.targets(batch, outputs, reference))

    def token_counts(self, batch: Batch) -> Tensor:
        """See :meth:`PlotLoss.token_counts`; with ``pool`` over all ranks."""
        counts = super().token_counts(batch)  # (2, V)
        if self.config.pool and _ranks() > 1:
            dist.all_reduce(counts)
        return counts

    def head_divergence(self) -> Divergence | None:
        """The divergence for the head to evaluate at every position, which only the ``token`` granularity needs."""
        is_needed = self.config.granularity == "token" and self.config.ablations.divergence != "deft_log"
        return self.divergence if is_needed else None

    def reward(
        self,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        spec: HeadSpec,
        *,
        weights: Tensor,  # (N,)
        segments: Tensor | None,  # (N,)
        num_segments: int,
    ) -> Tensor | None:
        """``(S,)`` DEFT's reward over log-probabilities, from the head's input; ``None`` for any other divergence."""
        if self.config.ablations.divergence != "deft_log":
            return None
        scale = reward_scale(logit_scale=spec.logit_scale, temperature=spec.temperature, softcap=spec.softcap)
        with spec.gather(weight, bias):
            return log_reward(
                hidden,
                weight,
                bias,
                self.difference,
                weights=weights,
                segments=segments,
                num_segments=num_segments,
                scale=scale,
            )

    @torch.no_grad()
    def masses(self, result: HeadResult) -> Tensor:
        """``(2,)`` mass of the selected positions' mean output on preferred and on rejected tokens."""
        distributions = result.head.distributions
        if distributions is None:
            raise ValueError("the head was run without weights")
        counts = result.pooling.counts.to(distributions)  # (S,)
        output = counts / counts.sum().clamp(min=1) @ distributions  # (V,)
        masses = torch.stack([output[self.difference > 0].sum(), output[self.difference < 0].sum()])
        return torch.where(counts.sum() > 0, masses, torch.nan)


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _over_ranks(output: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The mean distribution (1, V) over all ranks, weighted by their token counts (1,): one all-reduce of a V-vector.

    Each rank's own part keeps its graph, scaled by the number of ranks: DDP divides the summed gradients by that
    number, which leaves the gradient of the pooled value.
    """
    packed = torch.cat([output.detach() * tokens, tokens.to(output.dtype).unsqueeze(-1)], dim=-1)  # (1, V + 1)
    dist.all_reduce(packed)
    total = packed[:, -1:].clamp(min=1)  # (1, 1)
    own = output * (tokens * _ranks() / total)  # (1, V)
    return packed[:, :-1] / total + (own - own.detach()), packed[:, -1]
