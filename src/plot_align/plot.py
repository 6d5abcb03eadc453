"""PLOT on one page: ``L = L_vanilla + α·L_PLOT`` (arXiv 2604.01837), in plain torch.

    p_t = softmax(z_t)                             the model's output at each position
    p̄ = Σ_t w_t p_t                                its mean over the completions: :func:`output_distributions`
    P ∝ max(p̄_ref + λ·d, 0),  d = Q⁺ − Q⁻          the target, from counts of preferred and rejected tokens:
                                                   :meth:`PlotLoss.targets`
    L_PLOT = W1(p̄, P)                              transport along lines through the embeddings: :func:`wasserstein1`
    α = ρ·‖∇L_vanilla‖ / ‖∇L_PLOT‖                 the weight of the term: :class:`BalancedAlpha`

Training runs this module. Two steps have faster versions, which the tests compare with the ones here: the fused head
(``plot_align.head``) computes p̄ without storing the logits, and ``plot_align.transport`` sorts the tokens only once.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from plot_align.config import PlotConfig
from plot_align.errors import InputError
from plot_align.preference.batch import Batch, Pooling, check_shapes
from plot_align.preference.distribution import PreferenceDistribution
from plot_align.preference.target import anchored, counted_in_batch
from plot_align.transport.base import Constants, Divergence, widest_dtype
from plot_align.transport.make import divergence_from_options
from plot_align.transport.reward import DistributionReward


def softmax(logits: Tensor) -> Tensor:
    """``(..., V)`` → ``(..., V)``, in float32 at least."""
    return torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def output_distributions(logits: Tensor, weights: Tensor, segments: Tensor | None = None, count: int = 1) -> Tensor:
    """``p̄_s = Σ_{t in s} w_t·softmax(z_t)``: logits ``(N, V)``, weights ``(N,)``, segments ``(N,)`` → ``(S, V)``.

    Rows of weight 0 are not read, so padding may hold anything.
    """
    used = weights > 0  # (N,)
    p = softmax(logits[used])  # (n, V)
    weighted = weights[used].to(p).unsqueeze(-1) * p  # (n, V)
    if segments is None:
        return weighted.sum(0, keepdim=True)
    return p.new_zeros(count, p.size(-1)).index_add(0, segments[used], weighted)  # (S, V)


def wasserstein1(p: Tensor, target: Tensor, coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """W1 of p to P for the cost ``|x_i − x_j|``, and its derivative in p: ``(..., V)`` → ``(...)``, ``(..., V)``.

    W1 = Σ_k |F_p(k) − F_P(k)|·(x_(k+1) − x_(k))        s_j = Σ_{k ≥ j} sign(F_p(k) − F_P(k))·(x_(k+1) − x_(k))
    """
    order = coordinates.argsort(stable=True)  # (V,) the tokens along the line
    gaps = torch.cat([coordinates[order].diff(), coordinates.new_zeros(1)])  # (V,)
    surplus = (p - target)[..., order].cumsum(-1)  # (..., V) F_p − F_P: the mass that has to cross each gap
    slope = surplus.sign() * gaps  # (..., V)
    potential = slope.flip(-1).cumsum(-1).flip(-1)  # (..., V)
    return (surplus.abs() * gaps).sum(-1), potential[..., order.argsort()]


class PlotLoss(Constants):
    """L_PLOT of one micro-batch.

        plot = PlotLoss(preference, model.get_input_embeddings().weight)
        alpha = BalancedAlpha(plot.config.ratio)
        term = plot(outputs.logits, labels, roles, reference_logits=reference_logits)
        loss = vanilla + alpha(vanilla, term, outputs.hidden_states[-1]) * term

    ``granularity`` says what is compared with the target. ``batch``: D(p̄, P), p̄ the mean output over all selected
    positions. ``sequence``: the mean of D(p̄_s, P) over the sequences. ``token``: the mean of D(p_t, P) over the
    positions. The term is zero if nothing is selected or the micro-batch has no target: D(0, P) would be a constant
    that no model can change. Its gradient in the logits is ``w_t·p_t ⊙ (s − ⟨p_t, s⟩)``, s the potential of D.

    Args:
        preference: token counts of preferred and rejected answers, or the file of them.
        embeddings: ``(V, H)`` the reference model's input embeddings, which place the tokens on the lines.
        config: the options; the defaults are those of :func:`plot_align.attach`.
        tokenizer: the model's, to refuse a preference that was counted with another; ``None``: not checked.
        reference: ``(V,)`` the reference model's mean output, for one ``anchored`` target of the whole data set.
        rows: rows of the head; ``None``: as many as the embeddings have.

    Raises:
        InputError: no such file, another tokenizer, d = 0, a head smaller than the vocabulary, equal embeddings.
    """

    difference: Tensor  # (V,) d, 0 on padding rows of the head
    divergence: Divergence

    def __init__(
        self,
        preference: PreferenceDistribution | str | os.PathLike[str],
        embeddings: Tensor,
        config: PlotConfig | None = None,
        *,
        tokenizer: Any = None,
        reference: Tensor | None = None,
        rows: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(preference, PreferenceDistribution):
            preference = PreferenceDistribution.load(preference)
        if tokenizer is not None:
            preference.check_tokenizer(tokenizer)
        self.preference = preference
        rows = embeddings.size(0) if rows is None else rows
        self.config = (config or PlotConfig()).resolve_auto(reference_forward=None, reference=reference is not None)
        self.valid = preference.vocab_size
        self._constant("difference", preference.difference(size=rows).cpu())
        if self.config.is_reward:
            self.divergence = DistributionReward(self.difference)
            return
        options = self.config.ablations
        target = preference.target(
            "chosen" if self.config.has_batch_target else self.config.target,  # the batches' own targets replace it
            temperature=options.target_temperature,
            strength=self.config.target_strength,
            reference=reference,
            size=rows,
        )
        valid = min(self.valid, embeddings.size(0))
        self.divergence = divergence_from_options(options, target, embeddings, valid=valid)

    def forward(
        self, logits: Tensor, labels: Tensor, roles: Tensor | None = None, *, reference_logits: Tensor | None = None
    ) -> Tensor:
        """L_PLOT from logits ``(B, T, V)`` and labels ``(B, T)`` of a causal model: not shifted, −100 outside the
        completions.

        Args:
            roles: ``(B,)`` +1 for a preferred answer, −1 for a rejected one, 0 for neither; ``None``: all preferred.
            reference_logits: ``(B, T, V)`` of the reference model. The default target is anchored on them; without
                them it is counted in the micro-batch's own preferred tokens.

        Returns:
            A scalar in float32 at least; exactly 0, with a graph, if nothing is selected.

        Raises:
            InputError: shapes that do not fit, no reference logits with ``target="anchored"``, or an option that needs
                a trainer: ``divergence="deft_log"``, ``pool``.
        """
        check_shapes(logits, labels, roles, reference_logits, rows=self.difference.numel())
        if self.config.ablations.divergence == "deft_log":
            raise InputError(
                "divergence is 'deft_log', which needs hidden states and not logits; use 'deft_prob', or attach()."
            )
        if self.config.pool:
            raise InputError("pool is on, expected off outside of a trainer: PlotLoss sees the batch of one process.")
        self.to(logits.device)
        if roles is None:
            roles = torch.ones(labels.size(0), dtype=torch.int8)
        batch = Batch(labels.to(logits.device), roles.to(logits.device))
        pooling = self.pooling(batch)
        weights, segments, counts = pooling.weights, pooling.segments, pooling.counts

        def mean_outputs(logits: Tensor) -> Tensor:  # (B, T, V) → (S, V); position t predicts token t + 1
            return output_distributions(logits[:, :-1].flatten(0, 1), weights, segments, counts.numel())

        with torch.autocast(logits.device.type, enabled=False):
            if self.config.granularity == "token":
                used = weights > 0  # (N,)
                p = softmax(logits[:, :-1].flatten(0, 1)[used])  # (n, V)
                return (self.divergence.value(p) * weights[used].to(p)).sum()
            outputs = mean_outputs(logits)  # (S, V)
            reference = None if reference_logits is None else mean_outputs(reference_logits.detach())  # (S, V)
            return self.mean_divergence(outputs, counts, *self.targets(batch, outputs, reference)).to(outputs.dtype)

    def pooling(self, batch: Batch, rows: Tensor | None = None) -> Pooling:
        """How the selected positions are pooled; ``rows (N,)``: see :meth:`Batch.pooling`."""
        return batch.pooling(self.config.positions, self.config.granularity, rows)

    @torch.no_grad()
    def targets(self, batch: Batch, outputs: Tensor, reference: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """P of this micro-batch ``(S or 1, V)``, and which of them exist, bool ``(S or 1,)``.

        Both are ``None`` if the whole data set has one target. A micro-batch's target comes from the positions that it
        is compared at: ``anchored`` on the reference's output distributions ``(S, V)`` there, or counted in the
        micro-batch's own tokens.
        """
        if not self.config.has_batch_target:
            return None, None
        kind = self.config.target
        if kind == "auto":
            kind = "chosen" if reference is None else "anchored"
        if kind == "chosen" and self.config.positions == "rejected":
            raise InputError(
                "target is 'chosen' with positions='rejected', expected 'chosen' or 'all': correct either"
            )
        if kind != "anchored":
            temperature = self.config.ablations.target_temperature
            weights = counted_in_batch(kind, self.token_counts(batch), valid=self.valid, temperature=temperature)
        elif reference is not None:
            weights = anchored(reference.to(self.difference), self.difference, self.config.target_strength)  # (S, V)
        else:
            raise InputError(
                "reference_logits is None, expected the reference model's with target='anchored': pass them"
            )
        weights[..., self.valid :] = 0  # padding rows of the head
        total = weights.sum(-1, keepdim=True)  # (S or 1, 1)
        # A sum of softmaxes is 1 but for rounding, which W1's sign would turn into a full-size gradient where policy
        # and target agree: the target gets the output's own sum.
        mass = outputs.detach().to(weights).sum(-1, keepdim=True)  # (S, 1)
        exists = ~(total.squeeze(-1) <= 0)  # a NaN of the reference must reach the loss, so it counts as a target
        return weights * (mass / total.clamp(min=torch.finfo(weights.dtype).tiny)), exists

    def token_counts(self, batch: Batch) -> Tensor:
        """How often each token is preferred and rejected in the micro-batch, ``(2, V)``."""
        # If all positions are compared with a target of preferred tokens, all of their tokens count as preferred.
        first = "all" if self.config.target in ("auto", "chosen") and self.config.positions == "all" else "chosen"
        counts = [batch.token_counts(side, self.difference.numel()) for side in (first, "rejected")]
        return torch.stack(counts).to(self.difference)

    def mean_divergence(self, outputs: Tensor, counts: Tensor, target: Tensor | None, exists: Tensor | None) -> Tensor:
        """The mean of D over the output distributions ``(S, V)`` that have a selected position and a target."""
        outputs = outputs.to(widest_dtype(outputs.device))  # a few V-vectors: exact cumulative sums cost nothing
        counts = counts.to(outputs.device)  # (S,)
        if exists is not None:
            counts = counts * exists
        values = torch.where(counts > 0, self.divergence.value(outputs, target), outputs.sum(-1) * 0)  # (S,)
        return values.sum() / (counts > 0).sum().clamp(min=1)


class BalancedAlpha:
    """Keeps the norm of PLOT's gradient at ρ times the vanilla loss's: ``α = ρ·‖∇L_vanilla‖ / ‖∇L_PLOT‖``.

    Both norms are taken at the input of the head, at each of the first ten steps and at every fifth step after that,
    and averaged over past measurements with decay 0.9. Correcting both averages for their start at zero would multiply
    them by the same factor, so their ratio needs no correction. α is 0 until the first measurement.

    It measures one process: in a distributed loop of your own, average α over the ranks before you use it.
    """

    FIRST, EVERY, DECAY = 10, 5, 0.9
    LEAST = 1e-20  # a gradient smaller than this part of the other is rounding; dividing by it would overflow

    def __init__(self, ratio: float = 0.5) -> None:
        self.ratio = ratio
        self.vanilla = self.plot = 0.0  # decayed sums of the measured norms
        self.step = 0  # counts the calls

    @property
    def value(self) -> float:
        """The current α."""
        return self.ratio * self.vanilla / self.plot if self.plot > 0 else 0.0

    def is_due(self, step: int) -> bool:
        """Whether to measure the gradients at this step."""
        return step < self.FIRST or step % self.EVERY == 0 or self.plot == 0

    def observe(self, vanilla: float, plot: float) -> bool:
        """Adds both norms of a step to the averages. If either is zero or not finite, or PLOT's nothing but rounding,
        returns False and adds none."""
        if not (0 < vanilla < math.inf and self.LEAST * vanilla < plot < math.inf):
            return False
        self.vanilla = self.DECAY * self.vanilla + (1 - self.DECAY) * vanilla
        self.plot = self.DECAY * self.plot + (1 - self.DECAY) * plot
        return True

    def __call__(self, vanilla: Tensor, plot: Tensor, hidden: Tensor) -> float:
        """α of the next step, for a training loop of your own; both losses keep their graphs.

        Args:
            vanilla: the loss without the term.
            plot: the term.
            hidden: the input of the head that both come from: ``outputs.hidden_states[-1]`` of a transformers model.

        Raises:
            InputError: a loss does not depend on ``hidden``.
        """
        if self.is_due(self.step):
            norms = []
            for name, loss in (("vanilla", vanilla), ("plot", plot)):
                (gradient,) = torch.autograd.grad(loss, hidden, retain_graph=True, allow_unused=True)
                if gradient is None:
                    raise InputError(f"hidden is no input of {name}, expected the head's input of the same forward.")
                norms.append(float(gradient.float().norm()))
            self.observe(*norms)
        self.step += 1
        return self.value
