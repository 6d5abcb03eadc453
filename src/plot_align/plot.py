"""PLOT on one page: ``L = L_vanilla + α·L_PLOT`` (arXiv 2604.01837), in plain torch.

    p_t = softmax(z_t)                             what the model says at each position
    p̄ = Σ_t w_t p_t                                its mean over the completions: :func:`output_distributions`
    P ∝ max(p̄_ref + λ·d, 0),  d = Q⁺ − Q⁻          where people want it, counted in tokens: :meth:`PlotLoss.targets`
    L_PLOT = W1(p̄, P)                              transport along lines through the embeddings: :func:`wasserstein1`
    α = ρ·‖∇L_vanilla‖ / ‖∇L_PLOT‖                 how much it weighs: :class:`BalancedAlpha`

Training runs this module. Two of its steps have a faster version, which the tests hold to the one here: the fused head
(``plot_align.head``) sweeps p̄ without keeping logits, and ``plot_align.transport`` sorts the tokens only once.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from plot_align.config import PlotConfig
from plot_align.errors import InputError
from plot_align.preference.batch import Batch, Pooling
from plot_align.preference.distribution import PreferenceDistribution
from plot_align.preference.target import anchored, counted
from plot_align.transport.base import Constants, Divergence, widest_dtype
from plot_align.transport.make import distance_of
from plot_align.transport.reward import DistributionReward


def output_distributions(logits: Tensor, weights: Tensor, segments: Tensor | None = None, count: int = 1) -> Tensor:
    """``p̄_s = Σ_{t in s} w_t·softmax(z_t)``: logits ``(N, V)``, weights ``(N,)``, segments ``(N,)`` → ``(S, V)``.

    Rows of weight 0 are not read, so padding may hold anything. The softmax is taken in float32 at least.
    """
    used = weights > 0  # (N,)
    p = torch.softmax(logits[used], dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))  # (n, V)
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

        plot, alpha = PlotLoss(preference, model.get_input_embeddings().weight), BalancedAlpha()
        term = plot(outputs.logits, labels, roles, reference_logits=reference_logits)
        loss = vanilla + alpha(vanilla, term, outputs.hidden_states[-1]) * term

    ``batch``: D(p̄, P) with p̄ the mean output over all selected positions; ``sequence``: the mean of D(p̄_s, P) over
    the sequences; ``token``: the mean of D(p_t, P) over the positions. Where nothing is selected, or a micro-batch has
    no target, the term is zero: D(0, P) would be a constant that no model can change. Its gradient in the logits is
    ``w_t·p_t ⊙ (s − ⟨p_t, s⟩)``, s the potential of D.

    Args:
        preference: token counts of preferred and rejected answers, or the file of them.
        embeddings: ``(V, H)`` the reference model's input embeddings, which place the tokens on the lines.
        config: the options; the defaults are those of :func:`plot_align.attach`.
        tokenizer: the model's, to refuse a preference that was counted with another; ``None``: not checked.
        reference: ``(V,)`` the reference model's mean output, for one ``anchored`` target of the whole data set.
        rows: rows of the head, where they are not those of the embeddings.

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
        config = config or PlotConfig()
        self.config = config.resolve_auto(reference_forward=None, reference=reference is not None)
        self.valid = preference.vocab_size
        self._constant("difference", preference.difference(size=rows).cpu())
        if self.config.is_reward:
            self.divergence = DistributionReward(self.difference)
            return
        target = preference.target(
            "chosen"
            if self.config.has_batch_target
            else self.config.target,  # never used where each batch has its own
            temperature=self.config.ablations.target_temperature,
            strength=self.config.target_strength,
            reference=reference,
            size=rows,
        )
        ids = min(self.valid, embeddings.size(0))
        self.divergence = distance_of(self.config.ablations, target, embeddings, valid=ids)

    def forward(
        self, logits: Tensor, labels: Tensor, roles: Tensor | None = None, *, reference_logits: Tensor | None = None
    ) -> Tensor:
        """The term from logits ``(B, T, V)`` and labels ``(B, T)`` of a causal model: not shifted, −100 outside the
        completions.

        Args:
            roles: ``(B,)`` +1 for a preferred answer, −1 for a rejected one, 0 for neither; ``None``: all preferred.
            reference_logits: ``(B, T, V)`` of the reference model, from which the default makes the target. Without
                them it is made of the micro-batch's own preferred tokens.

        Returns:
            A scalar in float32 at least; exactly 0, with a graph, where nothing is selected.

        Raises:
            InputError: shapes that do not fit, reference logits that ``target="anchored"`` needs, ``deft_log``.
        """
        self._check(logits, labels, reference_logits)
        self.to(logits.device)
        ones = torch.ones(labels.size(0), dtype=torch.int8, device=labels.device)
        batch = Batch(labels.to(logits.device), (ones if roles is None else roles).to(logits.device))
        pooling = self.pooling(batch)
        where = (pooling.weights, pooling.segments, pooling.counts.numel())
        z = logits[:, :-1].flatten(0, 1)  # (N, V): position t predicts token t + 1
        with torch.autocast(logits.device.type, enabled=False):
            if self.config.granularity == "token":
                used = pooling.weights > 0  # (N,)
                p = torch.softmax(z[used], -1, dtype=torch.promote_types(z.dtype, torch.float32))  # (n, V)
                return (self.divergence.value(p) * pooling.weights[used].to(p)).sum()
            outputs = output_distributions(z, *where)  # (S, V)
            reference = None
            if reference_logits is not None:
                reference = output_distributions(reference_logits[:, :-1].flatten(0, 1).detach(), *where)  # (S, V)
            return self.compare(outputs, pooling.counts, *self.targets(batch, outputs, reference)).to(outputs.dtype)

    def pooling(self, batch: Batch, rows: Tensor | None = None) -> Pooling:
        """How the selected positions are pooled; ``rows (N,)``: see :meth:`Batch.pooling`."""
        return batch.pooling(self.config.positions, self.config.granularity, rows)

    @torch.no_grad()
    def targets(self, batch: Batch, outputs: Tensor, reference: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """P of this micro-batch, ``(S or 1, V)``, and which have one; ``None`` where all share the data set's.

        What is compared with the target has its target from the same positions: ``anchored`` on the reference's output
        distributions ``(S, V)`` there, or counted in the micro-batch's own tokens.
        """
        if not self.config.has_batch_target:
            return None, None
        kind = self.config.target
        if kind == "auto":
            kind = "chosen" if reference is None else "anchored"
        if kind != "anchored":
            weights = self._counted(kind, batch).unsqueeze(0)  # (1, V)
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
        found = ~(total.squeeze(-1) <= 0)  # a NaN of the reference is no missing target: it must reach the loss
        return weights * (mass / total.clamp(min=torch.finfo(weights.dtype).tiny)), found

    def _counted(self, kind: str, batch: Batch) -> Tensor:
        """φ of the micro-batch's own tokens, ``(V,)``; zero where a side is missing or both sides are equal."""
        if kind == "chosen" and self.config.positions == "rejected":
            raise InputError(
                "target is 'chosen' with positions='rejected', expected 'chosen' or 'all': correct either"
            )
        counts = self.token_counts(batch)  # (2, V)
        totals = counts.sum(-1, keepdim=True)  # (2, 1)
        chosen, rejected = counts / totals.clamp(min=1)  # (V,), (V,)
        needs_both = kind != "chosen"
        if totals[0] == 0 or (needs_both and (totals[1] == 0 or torch.equal(chosen, rejected))):
            return torch.zeros_like(chosen)
        ids = slice(self.valid)
        weights = counted(kind, chosen[ids], rejected[ids], temperature=self.config.ablations.target_temperature)
        return torch.cat([weights, chosen.new_zeros(chosen.numel() - self.valid)])

    def token_counts(self, batch: Batch) -> Tensor:
        """How often each token is preferred and rejected in the micro-batch, ``(2, V)``."""
        # Where all positions are compared, the tokens of all of them are the preferred ones.
        first = "all" if self.config.target in ("auto", "chosen") and self.config.positions == "all" else "chosen"
        labels = batch.labels[:, 1:]  # (B, T-1)
        sides = [labels[batch.selected(role)].to(self.difference.device) for role in (first, "rejected")]
        return torch.stack([torch.bincount(side, minlength=self.difference.numel()) for side in sides]).to(
            self.difference
        )

    def compare(self, outputs: Tensor, counts: Tensor, target: Tensor | None, found: Tensor | None) -> Tensor:
        """The mean of D over the output distributions ``(S, V)`` that have a selected position and a target."""
        outputs = outputs.to(
            widest_dtype(outputs.device)
        )  # a handful of V-vectors: exact cumulative sums cost nothing
        counts = counts.to(outputs.device)  # (S,)
        if found is not None:
            counts = counts * found
        values = torch.where(counts > 0, self.divergence.value(outputs, target), outputs.sum(-1) * 0)  # (S,)
        return values.sum() / (counts > 0).sum().clamp(min=1)

    def _check(self, logits: Tensor, labels: Tensor, reference_logits: Tensor | None) -> None:
        rows = self.difference.numel()
        if logits.ndim != 3 or not logits.is_floating_point() or logits.size(-1) != rows:
            raise InputError(
                f"logits is {logits.dtype} of shape {tuple(logits.shape)}, expected (B, T, {rows}), one a row of "
                "the head: pass the model's output logits, and rows= to PlotLoss where the head has more rows than "
                "the embeddings."
            )
        if labels.shape != logits.shape[:2]:
            raise InputError(
                f"labels has shape {tuple(labels.shape)}, expected {tuple(logits.shape[:2])} as the logits: pass the "
                "labels as the model takes them, not shifted."
            )
        if reference_logits is not None and reference_logits.shape != logits.shape:
            raise InputError(
                f"reference_logits has shape {tuple(reference_logits.shape)}, expected {tuple(logits.shape)}: run the "
                "reference model on the same batch."
            )
        if self.config.ablations.divergence == "deft_log":
            raise InputError(
                "divergence is 'deft_log', which reads the head's input and no logits; expected 'deft_prob', or "
                "plot_align.attach."
            )


class BalancedAlpha:
    """α that holds PLOT's gradient to a share ρ of the vanilla loss's: ``α = ρ·‖∇L_vanilla‖ / ‖∇L_PLOT‖``.

    Both norms are taken at the input of the head, at each of the first ten steps and every fifth from then on, and
    averaged over past measurements with weight 0.9. The correction for the averages' start is the same factor for
    both, so their ratio needs none. α is 0 until something was measured.
    """

    FIRST, EVERY, DECAY = 10, 5, 0.9

    def __init__(self, ratio: float = 0.5) -> None:
        self.ratio = ratio
        self.vanilla = self.plot = 0.0  # decayed sums of the measured norms
        self.step = 0  # of a loop that calls this object once a step

    @property
    def value(self) -> float:
        """α from what was measured so far."""
        return self.ratio * self.vanilla / self.plot if self.plot > 0 else 0.0

    def is_due(self, step: int) -> bool:
        """Whether the gradients of this step are to be measured."""
        return step < self.FIRST or step % self.EVERY == 0 or self.plot == 0

    def observe(self, vanilla: float, plot: float) -> bool:
        """Take in both norms of a step; False where either was zero or not finite, which leaves it out."""
        if not (0 < vanilla < math.inf and 0 < plot < math.inf):
            return False
        self.vanilla = self.DECAY * self.vanilla + (1 - self.DECAY) * vanilla
        self.plot = self.DECAY * self.plot + (1 - self.DECAY) * plot
        return True

    def __call__(self, vanilla: Tensor, plot: Tensor, hidden: Tensor) -> float:
        """α of this step of a training loop of your own; both losses keep their graphs.

        Args:
            vanilla, plot: the two losses.
            hidden: the input of the head that both come from: ``outputs.hidden_states[-1]`` of a transformers model.
        """
        if self.is_due(self.step):
            norms = []
            for loss in (vanilla, plot):
                (gradient,) = torch.autograd.grad(loss, hidden, retain_graph=True, allow_unused=True)
                norms.append(0.0 if gradient is None else float(gradient.float().norm()))
            self.observe(*norms)
        self.step += 1
        return self.value
