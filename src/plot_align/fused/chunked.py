"""Log-probabilities and output distribution from hidden states in one sweep and one backward, without the logits.

TRL's fused head (``trl.kernels.ChunkedLogProbFunction``) sweeps tiles over tokens *and* vocabulary, so that a token's
log-sum-exp is known only after its last tile: too late to sum its softmax into the output distribution. Here a block
holds a few tokens and the *whole* vocabulary. The log-sum-exp is then known before the column sums, ⟨p_t, s⟩ before
the gradient, and PLOT needs no matrix product that the head does not make anyway:

    forward    z = h W^T                                   p̄ += w_t · softmax(z_t)
    backward   z = h W^T (recomputed)                      ∂/∂z_t = g_t·(1[target] − p_t) + w_t·p_t ⊙ (s − ⟨p_t, s⟩)
               ∂h = ∂z W,   ∂W += ∂z^T h

with g_t the gradient of the log-probability and s = ∂L/∂p̄ (``docs/mathematics.md``). Four products of 2·N·V·H, with
or without PLOT.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..losses import Divergence

OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

# One block of logits, `(rows, V)` in the compute dtype. On a CPU a block four times as large is no faster; a GPU
# wants more rows a matrix product.
_BLOCK_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
# Elementwise work runs on slices of a block, so that its fp32 temporaries stay in a CPU's cache.
_SLICE_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 27}
# Where the head must be cast (fp32 master weights under bf16 autocast, or bf16 products that accumulate in fp32 on a
# device without `out_dtype`), it is cast this many vocabulary rows at a time, never as a whole.
_CAST_ROWS = 32768


class Gather(Protocol):
    """Makes sharded parameters whole for the duration of a ``with`` block (TRL's ``maybe_gather_lm_head_ctx``)."""

    def __call__(self, *parameters: Tensor | None) -> AbstractContextManager[Any]: ...


def _whole(*parameters: Tensor | None) -> AbstractContextManager[Any]:
    return nullcontext()


@dataclass(frozen=True)
class HeadSpec:
    """What a model does to its logits, and what a caller wants to know of them.

    Args:
        temperature: the logits are divided by it.
        softcap: ``z → softcap · tanh(z / softcap)`` (Gemma 2), before the temperature.
        logit_scale: factor on the raw logits, before the soft cap (Cohere, Granite).
        outputs: which of :data:`OPTIONAL_OUTPUTS` to compute.
        block_bytes: bound on the one block of logits; ``None`` takes 256 MiB on a CPU and 1 GiB on a GPU.
        gather: see :class:`Gather`.
        frozen: the caller wants no gradient of weight and bias, whatever they ask for: spares a matrix product.
    """

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    outputs: tuple[str, ...] = ()
    block_bytes: int | None = None
    gather: Gather = _whole
    frozen: bool = False


@dataclass(frozen=True)
class HeadOutput:
    """Per-token statistics, each ``(N,)``, and what PLOT needs; fields that were not asked for are ``None``.

    ``marginals (S, V)``: ``Σ_t weights[t]·p_t`` of every segment, in fp32 (fp64 for fp64 inputs). ``values (N,)``: the
    divergence of each position with a positive weight (the ``token`` granularity), 0 elsewhere; the marginals carry
    no gradient then.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    marginals: Tensor | None = None
    values: Tensor | None = None


def fused_head(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,) int64
    spec: HeadSpec | None = None,
    *,
    weights: Tensor | None = None,  # (N,)
    segments: Tensor | None = None,  # (N,) int64, non-decreasing
    num_segments: int = 1,
    divergence: Divergence | None = None,
) -> HeadOutput:
    """Log-probabilities of ``targets`` and the output distribution, differentiable in hidden, weight and bias.

    Args:
        hidden: last hidden states of the positions to score.
        weight: rows of the LM head.
        bias: the head's bias, or ``None``.
        targets: the next token of each position.
        spec: temperature, soft cap, scale and optional outputs.
        weights: share of each position in its segment's distribution; ``None`` leaves PLOT out altogether. A
            distribution results where the weights of a segment sum to one.
        segments: which marginal a position belongs to, e.g. its sequence. Rows of one segment must be adjacent.
        num_segments: number of marginals S.
        divergence: asks for its value at every position instead of a gradient through the marginals.

    The matrix products run in the autocast dtype where autocast is on, else in ``hidden``'s dtype; every statistic
    and every accumulation is fp32, or fp64 for fp64 inputs.
    """
    outputs = _FusedHead.apply(
        hidden, weight, bias, targets, weights, segments, num_segments, divergence, spec or HeadSpec()
    )
    return HeadOutput(*outputs)


def _runs(weights: Tensor, segments: Tensor | None) -> list[tuple[int, int, int]]:
    """``(start, end, segment)`` of the stretches of positive weight: what is not selected costs nothing."""
    selected = weights > 0  # (N,)
    label = torch.where(selected, 0 if segments is None else segments, -1)  # (N,)
    values, counts = torch.unique_consecutive(label, return_counts=True)
    runs, start = [], 0
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        if value >= 0:
            runs.append((start, start + count, value))
        start += count
    return runs


def _overlaps(runs: list[tuple[int, int, int]], start: int, end: int) -> Iterator[tuple[slice, slice, int]]:
    """The parts of ``runs`` within rows [start, end): as rows of all, as rows of the slice, and their segment."""
    for run_start, run_end, segment in runs:
        low, high = max(run_start, start), min(run_end, end)
        if low < high:
            yield slice(low, high), slice(low - start, high - start), segment


def _addmm(out: Tensor, a: Tensor, b: Tensor, *, beta: float) -> None:
    """``out = beta·out + a @ b`` accumulated in ``out``'s fp32 (or fp64), without rounding the product first."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif a.device.type == "cuda":
        torch.addmm(out, a, b, beta=beta, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)


class _Sweep:
    """The blocks and slices of one pass over the logits; shared by forward and backward so that they agree."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, spec: HeadSpec):
        self.spec = spec
        self.dtype = dtype
        self.stat = torch.promote_types(dtype, torch.float32)
        self.hidden = hidden
        self.weight = weight
        self.bias = None if bias is None else bias.to(self.stat)  # (V,)
        cast = weight.dtype != dtype or (dtype.itemsize < 4 and weight.device.type != "cuda")
        self.columns = _CAST_ROWS if cast else weight.size(0)
        rows, vocab = hidden.size(0), weight.size(0)
        budget = spec.block_bytes or _BLOCK_BYTES.get(hidden.device.type, _BLOCK_BYTES["cuda"])
        most = max(1, budget // (vocab * dtype.itemsize))
        blocks = -(-rows // most)
        # Equal blocks: a last block of three rows would read the whole head for three rows.
        self.block = -(-rows // blocks) if blocks else 0
        self.slice = max(1, _SLICE_ELEMENTS.get(hidden.device.type, _SLICE_ELEMENTS["cuda"]) // vocab)
        self.tile = torch.empty(self.block, vocab, device=hidden.device, dtype=dtype)

    def head(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields the head in the compute dtype: once where it has that dtype, else a group of rows at a time."""
        for start in range(0, self.weight.size(0), self.columns):
            columns = slice(start, start + self.columns)
            yield columns, self.weight[columns].to(self.dtype)

    def blocks(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields the block's first row, its hidden states (T, H) and the raw products h W^T (T, V)."""
        for start in range(0, self.hidden.size(0), self.block or 1):
            hidden = self.hidden[start : start + self.block].to(self.dtype)  # (T, H)
            tile = self.tile[: hidden.size(0)]  # (T, V)
            for columns, weight in self.head():
                torch.mm(hidden, weight.T, out=tile[:, columns])
            yield start, hidden, tile

    def slices(self, tile: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yields the first row of each slice and the slice itself, a view of ``tile`` (R, V)."""
        for start in range(0, tile.size(0), self.slice):
            yield start, tile[start : start + self.slice]

    def logits(self, raw: Tensor, *, keep: bool) -> tuple[Tensor, Tensor | None]:
        """(R, V) final logits in the statistics' dtype, over ``raw`` unless ``keep``; and 1 − tanh² where capped."""
        spec = self.spec
        z = raw.to(self.stat, copy=keep)
        if self.bias is not None:
            z = z.add_(self.bias)  # here and not in the compute dtype, where it would be rounded a second time
        if spec.logit_scale != 1.0:
            z = z.mul_(spec.logit_scale)
        slope = None
        if spec.softcap is not None:
            z = z.div_(spec.softcap).tanh_()
            slope = 1 - z.square()
            z = z.mul_(spec.softcap)
        if spec.temperature != 1.0:
            z = z.div_(spec.temperature)
        return z, slope


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        weights: Tensor | None,  # (N,)
        segments: Tensor | None,  # (N,)
        num_segments: int,
        divergence: Divergence | None,
        spec: HeadSpec,
    ) -> tuple[Tensor | None, ...]:
        # Entropy and marginals are often asked for without anything flowing back: spare their zero gradients.
        ctx.set_materialize_grads(False)
        device = hidden.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden.dtype
        rows = hidden.size(0)
        # The Function runs under the caller's autocast; the products are cast by hand, so it must not interfere.
        with spec.gather(weight, bias), torch.autocast(device.type, enabled=False):
            vocab = weight.size(0)
            sweep = _Sweep(hidden, weight, bias, dtype, spec)

            def per_token(wanted: bool, dtype: torch.dtype = sweep.stat) -> Tensor | None:
                return torch.zeros(rows, device=device, dtype=dtype) if wanted else None

            log_z = torch.zeros(rows, device=device, dtype=sweep.stat)
            target_logit = torch.zeros_like(log_z)
            entropy = per_token("entropy" in spec.outputs)
            sum_sq = per_token("log_sum_sq_probs" in spec.outputs)
            mean = per_token("mean_logits" in spec.outputs)
            top1 = per_token("is_top1" in spec.outputs, torch.bool)
            values = per_token(divergence is not None)
            runs = [] if weights is None else _runs(weights, segments)
            share = None if weights is None else weights.to(sweep.stat)  # (N,)
            marginals = None
            if weights is not None:
                marginals = torch.zeros(num_segments, vocab, device=device, dtype=sweep.stat)  # (S, V)

            for block_start, _, tile in sweep.blocks():
                for slice_start, raw in sweep.slices(tile):
                    first = block_start + slice_start
                    r = slice(first, first + raw.size(0))
                    z, _ = sweep.logits(raw, keep=False)  # (R, V)
                    top, index = z.max(-1)  # the first maximum, as argmax: a tie with an earlier token is no hit
                    if top1 is not None:
                        top1[r] = index == targets[r]
                    target_logit[r] = z.gather(-1, targets[r].unsqueeze(-1)).squeeze(-1)
                    if mean is not None:
                        mean[r] = z.mean(-1)
                    e = torch.sub(z, top.unsqueeze(-1)).exp_()  # (R, V)
                    total = e.sum(-1)  # (R,)
                    log_z[r] = top + total.log()
                    if entropy is not None:
                        entropy[r] = log_z[r] - z.mul_(e).sum(-1) / total
                    if sum_sq is not None:
                        sum_sq[r] = torch.mul(e, e, out=z).sum(-1).log() - 2 * total.log()
                    if share is None or marginals is None:
                        continue
                    for everywhere, here, segment in _overlaps(runs, first, r.stop):
                        # `addmv` is a sweep over e, not a product of the head's size.
                        torch.addmv(
                            marginals[segment], e[here].T, share[everywhere] / total[here], out=marginals[segment]
                        )
                        if divergence is not None and values is not None:
                            p = e[here] / total[here].unsqueeze(-1)  # (R', V)
                            values[everywhere] = divergence.value(p).to(values.dtype)

        log_probs = target_logit - log_z
        ctx.save_for_backward(hidden, weight, bias, targets, weights, log_z, entropy)
        ctx.spec, ctx.dtype, ctx.runs, ctx.divergence = spec, dtype, runs, divergence
        fixed = [sum_sq, mean, top1] + ([marginals] if divergence is not None else [])
        ctx.mark_non_differentiable(*(x for x in fixed if x is not None))
        return log_probs, entropy, sum_sq, mean, top1, marginals, values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        g_log_prob, g_entropy, _, _, _, potential, g_value = grads
        hidden, weight, bias, targets, weights, log_z, entropy = ctx.saved_tensors
        spec, runs, divergence = ctx.spec, ctx.runs, ctx.divergence
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if spec.frozen:
            needs_weight = needs_bias = False
        if potential is None and g_value is None:
            runs = []
        with spec.gather(weight, bias), torch.autocast(hidden.device.type, enabled=False):
            sweep = _Sweep(hidden, weight, bias, ctx.dtype, spec)
            stat = sweep.stat
            grad_hidden = torch.empty_like(hidden, dtype=stat) if needs_hidden else None  # (N, H)
            grad_weight = torch.zeros_like(weight, dtype=stat) if needs_weight else None  # (V, H)
            grad_bias = torch.zeros_like(bias, dtype=stat) if needs_bias else None  # (V,)
            zero = torch.zeros_like(log_z)
            g_log_prob = zero if g_log_prob is None else g_log_prob.to(stat)  # (N,)
            share = zero if weights is None else weights.to(stat)  # (N,)
            outer = spec.logit_scale / spec.temperature

            for block_start, hidden_block, tile in sweep.blocks():
                for slice_start, raw in sweep.slices(tile):
                    first = block_start + slice_start
                    r = slice(first, first + raw.size(0))
                    z, slope = sweep.logits(raw, keep=g_entropy is not None)  # (R, V)
                    p = z.sub_(log_z[r].unsqueeze(-1)).exp_() if g_entropy is None else None
                    log_p = None
                    if p is None:
                        log_p = z.sub_(log_z[r].unsqueeze(-1))
                        p = log_p.exp()
                    from_entropy = None
                    if log_p is not None and g_entropy is not None and entropy is not None:
                        # ∂H/∂z_j = −p_j·(log p_j + H)
                        from_entropy = log_p.add_(entropy[r].unsqueeze(-1)).mul_(p)
                        from_entropy.mul_(g_entropy[r].to(stat).unsqueeze(-1))
                    # The gradient of the logits is p ⊙ factor + g·1[target]: a number a row where PLOT has no share.
                    done = 0
                    for everywhere, here, segment in _overlaps(runs, first, r.stop):
                        p[done : here.start].mul_(-g_log_prob[first + done : everywhere.start].unsqueeze(-1))
                        _times_plot_factor(
                            p[here],
                            -g_log_prob[everywhere],
                            share[everywhere],
                            None if potential is None else potential[segment].to(stat),
                            None if g_value is None else g_value[everywhere].to(stat),
                            divergence,
                        )
                        done = here.stop
                    p[done:].mul_(-g_log_prob[first + done : r.stop].unsqueeze(-1))
                    if from_entropy is not None:
                        p.sub_(from_entropy)
                    p.scatter_add_(-1, targets[r].unsqueeze(-1), g_log_prob[r].unsqueeze(-1))
                    if slope is not None:
                        p.mul_(slope)
                    if outer != 1.0:
                        p.mul_(outer)
                    if p.data_ptr() != raw.data_ptr():
                        raw.copy_(p)
                rows = slice(block_start, block_start + tile.size(0))
                for columns, head in sweep.head():
                    if grad_hidden is not None:
                        _addmm(grad_hidden[rows], tile[:, columns], head, beta=0.0 if columns.start == 0 else 1.0)
                    if grad_weight is not None:
                        _addmm(grad_weight[columns], tile[:, columns].T, hidden_block, beta=1.0)
                if grad_bias is not None:
                    grad_bias += tile.sum(0, dtype=stat)

        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None,) * 6,
        )


def _times_plot_factor(
    p: Tensor,  # (R, V), changed in place
    row: Tensor,  # (R,) the rest of the factor
    share: Tensor,  # (R,)
    potential: Tensor | None,  # (V,) gradient of the loss with respect to this segment's marginal
    g_value: Tensor | None,  # (R,) gradient of the loss with respect to each position's value
    divergence: Divergence | None,
) -> None:
    """``p ⊙ (row + w_t·(s − ⟨p_t, s⟩))``, s the potential shared by a segment or the position's own."""
    if g_value is not None and divergence is not None:
        factor = divergence.potential(p).to(p.dtype)  # (R, V)
        mean = torch.linalg.vecdot(p, factor)  # (R,)
        factor.mul_(g_value.unsqueeze(-1)).add_((row - g_value * mean).unsqueeze(-1))
        p.mul_(factor)
    elif potential is not None:
        row = row - share * torch.mv(p, potential)  # (R,)
        p.mul_(torch.addr(row.unsqueeze(-1), share, potential))  # one pass builds the factor, one applies it
