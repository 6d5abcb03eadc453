"""Log-probabilities and output distribution from hidden states in one forward and one backward, without the logits.

TRL's fused head (``trl.kernels.ChunkedLogProbFunction``) works on tiles of tokens *and* vocabulary, so it knows a
token's log-sum-exp only after its last tile: too late to sum its softmax into the output distribution. Here a block
holds a few tokens and the *whole* vocabulary. The log-sum-exp is then known before the column sums, and ⟨p_t, s⟩
before the gradient, so PLOT needs no further matrix product:

    forward    z = h W^T                                   p̄ += w_t · softmax(z_t)
    backward   z = h W^T (recomputed)                      ∂/∂z_t = g_t·(1[target] − p_t) + w_t·p_t ⊙ (s − ⟨p_t, s⟩)
               ∂h = ∂z W,   ∂W += ∂z^T h

with g_t the gradient of the log-probability and s = ∂L/∂p̄ (``docs/mathematics.md``). Four products of 2·N·V·H, with
or without PLOT.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from plot_align.errors import InputError
from plot_align.head import block_torch
from plot_align.head.block import Gradients, Logits, Plot, Statistics
from plot_align.head.memory import Workspace, block_bytes
from plot_align.transport import Divergence

Impl = Literal["auto", "torch", "triton"]
OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

# Vocabulary rows that a GPU casts (fp32 master weights under bf16 autocast) or permutes (a frozen head) at a time. A
# CPU does it at once, because splitting its products would round more often: see `_HeadPass`.
_CAST_ROWS = {"cuda": 32768}
# Bytes of one product of the weight's gradient on a CPU: they stay in the cache until they are added up.
_PRODUCT_BYTES = 8 << 20
# Rows of a block begin at multiples of this many elements: an odd vocabulary would slow the matrix products down.
_ALIGN = 64


class Gather(Protocol):
    """Gathers sharded parameters for the duration of a ``with`` block (TRL's ``maybe_gather_lm_head_ctx``)."""

    def __call__(self, *parameters: Tensor | None) -> AbstractContextManager[Any]: ...


def _no_gather(*parameters: Tensor | None) -> AbstractContextManager[Any]:
    return nullcontext()


@dataclass(frozen=True)
class HeadSpec:
    """The model's transformation of its logits, the outputs to compute, and how to compute them.

    Args:
        temperature: the logits are divided by it.
        softcap: ``z → softcap · tanh(z / softcap)`` (Gemma 2), before the temperature.
        logit_scale: factor on the raw logits, before the soft cap (Cohere, Granite).
        outputs: which of :data:`OPTIONAL_OUTPUTS` to compute.
        block_bytes: bound on the one block of logits; ``None`` chooses it from the free memory
            (:func:`plot_align.head.memory.block_bytes`).
        gather: see :class:`Gather`.
        frozen: compute no gradient of weight and bias, even if they require one; saves a matrix product.
        impl: implementation of the elementwise work between the matrix products. ``auto``: Triton kernels on a GPU if
            Triton is installed, else torch.
        workspace: memory shared with other passes of the same step; ``None``: only between this pass and its backward.

    Raises:
        InputError: ``impl`` is none of these, or ``block_bytes`` below 1.
    """

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    outputs: tuple[str, ...] = ()
    block_bytes: int | None = None
    gather: Gather = _no_gather
    frozen: bool = False
    impl: Impl = "auto"
    workspace: Workspace | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.impl not in get_args(Impl):
            raise InputError(f"impl is {self.impl!r}; expected {', '.join(get_args(Impl))}.")
        if self.block_bytes is not None and self.block_bytes < 1:
            raise InputError(f"block_bytes is {self.block_bytes}; expected 1 or more, or None to have it chosen.")


@dataclass(frozen=True)
class HeadOutput:
    """Per-token statistics, each ``(N,)``, and the inputs of L_PLOT; fields that were not requested are ``None``.

    ``distributions (S, V)``: the output distribution ``Σ_t weights[t]·p_t`` of every segment, in fp32 (fp64 for fp64
    inputs). ``values (N,)``: the divergence at each position with a positive weight (the ``token`` granularity), 0
    elsewhere; no gradient flows through the distributions then. ``reward (S,)``: DEFT's reward of every segment over
    log-probabilities; :func:`fused_head` leaves it ``None``, :func:`plot_align.head.reward.log_reward` computes it.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    distributions: Tensor | None = None
    values: Tensor | None = None
    reward: Tensor | None = None


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
        weights: weight of each position in its segment; ``None``: no output distributions. The result is a
            distribution if the weights of a segment sum to one.
        segments: the segment of each position, e.g. its sequence. Rows of one segment must be adjacent.
        num_segments: number of segments S.
        divergence: if given, its value is computed at every position, and no gradient flows through the
            distributions.

    The matrix products run in the autocast dtype if autocast is on, else in ``hidden``'s dtype. Statistics and
    accumulation are in fp32, or in fp64 for fp64 inputs.
    """
    outputs = _FusedHead.apply(
        hidden, weight, bias, targets, weights, segments, num_segments, divergence, spec or HeadSpec()
    )
    return HeadOutput(*outputs)


def _implementation(spec: HeadSpec, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module for the elementwise work on ``device`` with statistics of ``dtype``.

    Raises:
        InputError: ``impl="triton"``, and its kernels cannot run.
    """
    if spec.impl == "torch" or (spec.impl == "auto" and (device.type != "cuda" or dtype != torch.float32)):
        return block_torch
    try:
        from plot_align.head import block_triton
    except ImportError as error:
        if spec.impl == "auto":
            return block_torch
        raise InputError(
            f"impl is 'triton', which cannot be imported here ({error}); pip install triton, or use impl='torch'."
        ) from error
    if dtype != torch.float32:
        raise InputError("impl is 'triton' with float64 inputs; expected float32 or narrower: use impl='torch'.")
    if device.type != "cuda" and not block_triton.INTERPRETED:
        raise InputError(
            f"impl is 'triton' with tensors on {device.type}; expected a GPU (or TRITON_INTERPRET=1, set before "
            "plot_align is imported, which is for tests): use impl='auto'."
        )
    return block_triton


class _HeadPass:
    """The blocks of one pass over the logits; forward and backward both use it, so that their logits agree.

    A GPU accumulates products of bf16 (or fp16) matrices into fp32. A CPU cannot, and copies in fp32 would take three
    times as long, so there each product is rounded once, as in eager mode: ∂h is one product over the vocabulary,
    ∂W one product per block, and the blocks are added up in fp32.

    Args:
        dtype: dtype of the matrix products.
        order: ``(V,)`` the token of each column of a block; ``None``: the vocabulary's own order.
        tile: ``(T, V)`` the memory of a block.
        group: vocabulary rows of the head that are cast or permuted at a time.
        cast: ``(group, H)`` the memory for cast rows, or ``None``.
    """

    def __init__(
        self,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        dtype: torch.dtype,
        *,
        order: Tensor | None,
        tile: Tensor,  # (T, V)
        group: int,
        cast: Tensor | None,  # (group, H)
    ) -> None:
        self.dtype = dtype
        self.hidden = hidden
        self.weight = weight
        self.order = order
        self.tile = tile
        self.group = group
        self.cast = cast

    @classmethod
    @contextmanager
    def over(
        cls,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        dtype: torch.dtype,
        spec: HeadSpec,
        workspace: Workspace,
        *,
        order: Tensor | None,
        trained: bool,
    ) -> Iterator[_HeadPass]:
        """A head pass that borrows its memory from ``workspace``; ``trained``: it needs the weight's gradient."""
        casts = weight.dtype != dtype
        if order is not None and trained and not casts:
            # Permute once for all blocks. The copy is as large as the weight's finished gradient and is freed before
            # that is made; without such a gradient, it would raise the peak.
            weight, order = weight[order], None
        rows, vocab, device = hidden.size(0), weight.size(0), hidden.device
        budget = spec.block_bytes or block_bytes(
            rows, vocab, weight.size(1), dtype.itemsize, device, converts_gradient=trained and not casts
        )
        width = -(-vocab // _ALIGN) * _ALIGN
        most = max(1, budget // (width * dtype.itemsize))
        blocks = -(-rows // most)
        # Equal blocks: a small last block would read the whole head for a few rows.
        block = -(-rows // blocks) if blocks else 0
        with ExitStack() as lent:
            padded = lent.enter_context(workspace.lend("block", block, width, dtype=dtype, device=device))
            # oneDNN's bf16 products on a CPU read a few columns past the last one and multiply them by zero: NaN, if
            # what happens to stand there is NaN.
            padded[:, vocab:] = 0
            tile = padded[:, :vocab]
            group, cast = vocab, None
            if casts or order is not None:
                group = min(_CAST_ROWS.get(device.type, vocab), vocab)
            if casts:
                cast = lent.enter_context(workspace.lend("head", group, weight.size(1), dtype=dtype, device=device))
            if cast is not None and group == vocab:  # once for all blocks
                weight, order, cast = cast.copy_(weight if order is None else weight[order]), None, None
            yield cls(hidden, weight, dtype, order=order, tile=tile, group=group, cast=cast)

    def head(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields the head in the compute dtype: at once if it has that dtype, else a group of rows at a time."""
        for start in range(0, self.weight.size(0), self.group):
            columns = slice(start, start + self.group)
            rows = self.weight[columns] if self.order is None else self.weight[self.order[columns]]
            yield columns, rows if self.cast is None else self.cast[: rows.size(0)].copy_(rows)

    def blocks(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields each block's first row, its hidden states (T, H) and its raw products h W^T (T, V)."""
        for start in range(0, self.hidden.size(0), self.tile.size(0) or 1):
            hidden = self.hidden[start : start + self.tile.size(0)].to(self.dtype)  # (T, H)
            tile = self.tile[: hidden.size(0)]  # (T, V)
            for columns, weight in self.head():
                torch.mm(hidden, weight.T, out=tile[:, columns])
            yield start, hidden, tile

    def add_gradients(
        self,
        tile: Tensor,  # (T, V) ∂z
        hidden: Tensor,  # (T, H)
        grad_hidden: Tensor | None,  # (T, H)
        grad_weight: Tensor | None,  # (V, H)
    ) -> None:
        """``grad_hidden = ∂z W``, ``grad_weight += ∂z^T h``."""
        for some, head in self.head():
            if grad_hidden is not None:
                _multiply(tile[:, some], head, grad_hidden, add=some.start > 0)
            if grad_weight is not None:
                _multiply(tile[:, some].T, hidden, grad_weight[some], add=True)


def _multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    """``out = a @ b``, or ``out += a @ b``, in ``out``'s fp32 (or fp64), rounded as :class:`_HeadPass` says."""
    beta = 1.0 if add else 0.0
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif a.device.type == "cuda":
        torch.addmm(out, a, b, beta=beta, out_dtype=out.dtype, out=out)
    else:
        step = max(1, _PRODUCT_BYTES // (b.size(1) * b.dtype.itemsize))
        products = b.new_empty(min(step, a.size(0)), b.size(1))
        for start in range(0, a.size(0), step):
            rows = out[start : start + step]
            product = torch.mm(a[start : start + step], b, out=products[: rows.size(0)])
            rows.add_(product) if add else rows.copy_(product)


@dataclass(frozen=True)
class _Columns:
    """The order of the vocabulary in a block: its own, or the one in which the divergence needs no gather."""

    order: Tensor | None = None  # (V,) token of each column
    rank: Tensor | None = None  # (V,) column of each token

    @classmethod
    def of(cls, divergence: Divergence | None) -> tuple[_Columns, Divergence | None]:
        """The order of ``divergence``, and the divergence for columns in that order."""
        sorted_form = None if divergence is None else divergence.sorted_form()
        if sorted_form is None:
            return cls(), divergence
        order, sorted_divergence = sorted_form
        return cls(order, order.argsort()), sorted_divergence

    def permute(self, vector: Tensor | None) -> Tensor | None:
        """(V,) by token → by column."""
        return vector if vector is None or self.order is None else vector[self.order]

    def of_tokens(self, targets: Tensor) -> Tensor:
        """(N,) tokens → (N,) columns."""
        return targets if self.rank is None else self.rank[targets]

    def restore(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """(V, …) by column → by token, in ``dtype``; makes no second copy in the wider dtype."""
        if self.rank is None:
            return rows.to(dtype)
        out = torch.empty_like(rows, dtype=dtype)
        step = _CAST_ROWS["cuda"]
        for start in range(0, rows.size(0), step):
            some = slice(start, start + step)
            out[some] = rows[self.rank[some]]
        return out


class _FusedHead(torch.autograd.Function):
    @staticmethod
    @record_function("plot_align/head_forward")
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
        # Entropy and distributions often receive no gradient: do not materialise zeros for them.
        ctx.set_materialize_grads(False)
        device = hidden.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden.dtype
        stat = torch.promote_types(dtype, torch.float32)
        rows = hidden.size(0)
        implementation = _implementation(spec, device, stat)
        columns = _Columns()
        if weights is None:
            divergence = None
        elif implementation.SORTS_COLUMNS:
            columns, divergence = _Columns.of(divergence)

        def per_token(wanted: bool, dtype: torch.dtype = stat) -> Tensor | None:
            return torch.zeros(rows, device=device, dtype=dtype) if wanted else None

        statistics = Statistics(
            log_z=torch.zeros(rows, device=device, dtype=stat),
            target_logit=torch.zeros(rows, device=device, dtype=stat),
            entropy=per_token("entropy" in spec.outputs),
            sum_sq=per_token("log_sum_sq_probs" in spec.outputs),
            mean=per_token("mean_logits" in spec.outputs),
            top1=per_token("is_top1" in spec.outputs, torch.bool),
            values=per_token(divergence is not None),
        )
        plot = None
        if weights is not None:
            runs = implementation.runs(weights, segments, num_segments, divergence)
            plot = Plot(weights.to(stat), segments, runs, divergence)
        # The products are cast by hand, so the caller's autocast must not interfere.
        with spec.gather(weight, bias), torch.autocast(device.type, enabled=False):
            distributions = None
            if weights is not None:
                distributions = torch.zeros(num_segments, weight.size(0), device=device, dtype=stat)  # (S, V)
            logits = _logits(bias, spec, stat, columns)
            trained = ctx.needs_input_grad[1] and not spec.frozen
            workspace = spec.workspace or Workspace()
            target_columns = columns.of_tokens(targets)
            with _HeadPass.over(
                hidden, weight, dtype, spec, workspace, order=columns.order, trained=trained
            ) as head_pass:
                for first, _, tile in head_pass.blocks():
                    implementation.forward(tile, first, logits, target_columns, statistics, plot, distributions)
        if distributions is not None and columns.rank is not None:
            distributions = distributions[:, columns.rank]
        # Entropy is an output: as an attribute of `ctx` it would hold its own graph, and never be freed.
        ctx.save_for_backward(hidden, weight, bias, targets, statistics.log_z, statistics.entropy)
        ctx.spec, ctx.dtype, ctx.plot, ctx.columns, ctx.workspace = spec, dtype, plot, columns, workspace
        constant = [statistics.sum_sq, statistics.mean, statistics.top1] + (
            [distributions] if divergence is not None else []
        )
        ctx.mark_non_differentiable(*(x for x in constant if x is not None))
        log_probs = statistics.target_logit - statistics.log_z
        return (
            log_probs,
            statistics.entropy,
            statistics.sum_sq,
            statistics.mean,
            statistics.top1,
            distributions,
            statistics.values,
        )

    @staticmethod
    @record_function("plot_align/head_backward")
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_z, entropy = ctx.saved_tensors
        spec, columns, plot = ctx.spec, ctx.columns, ctx.plot
        stat = log_z.dtype
        of_log_prob, of_entropy, _, _, _, potential, of_value = (None if g is None else g.to(stat) for g in grads)
        of_log_prob = torch.zeros_like(log_z) if of_log_prob is None else of_log_prob
        gradients = Gradients(log_z, entropy, of_log_prob, of_entropy, potential, of_value)
        if potential is None and of_value is None:
            plot = None
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if spec.frozen:
            needs_weight = needs_bias = False
        implementation = _implementation(spec, hidden.device, stat)
        with spec.gather(weight, bias), torch.autocast(hidden.device.type, enabled=False):
            grad_hidden = torch.empty_like(hidden, dtype=stat) if needs_hidden else None  # (N, H)
            grad_weight = torch.zeros_like(weight, dtype=stat) if needs_weight else None  # (V, H)
            grad_bias = torch.zeros_like(bias, dtype=stat) if needs_bias else None  # (V,)

            def run_blocks() -> None:
                # A function, so that the block is freed before the gradients are rounded.
                logits = _logits(bias, spec, stat, columns)
                target_columns = columns.of_tokens(targets)
                with _HeadPass.over(
                    hidden, weight, ctx.dtype, spec, ctx.workspace, order=columns.order, trained=needs_weight
                ) as head_pass:
                    for first, hidden_block, tile in head_pass.blocks():
                        implementation.backward(tile, first, logits, target_columns, gradients, plot)
                        of_block = None if grad_hidden is None else grad_hidden[first : first + tile.size(0)]
                        head_pass.add_gradients(tile, hidden_block, of_block, grad_weight)
                        if grad_bias is not None:
                            grad_bias.add_(tile.sum(0, dtype=stat))

            run_blocks()
            if not spec.frozen:  # a frozen pass repeats some rows in the middle of a step
                ctx.workspace.clear()
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else columns.restore(grad_weight, weight.dtype),
            None if grad_bias is None else columns.restore(grad_bias, bias.dtype),
            *(None,) * 6,
        )


def _logits(bias: Tensor | None, spec: HeadSpec, dtype: torch.dtype, columns: _Columns) -> Logits:
    bias = None if bias is None else columns.permute(bias.to(dtype))
    return Logits(bias, columns.order, spec.logit_scale, spec.softcap, spec.temperature, dtype)
