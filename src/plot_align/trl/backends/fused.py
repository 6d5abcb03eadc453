"""The output distributions from inside TRL's own head pass, which builds no logits.

TRL 1.15 and later patch ``model.forward`` so that ``model(..., labels=…, fused_lm_head=True)`` scores labels through
``_ChunkedLogProbFunction``; SFT in TRL 1.4 to 1.14 (``loss_type="chunked_nll"``) patches it so that
``model(..., labels=…)`` sums their loss in ``_chunked_cross_entropy_loss``. Both forwards are replaced, on this one
model object, by a copy of the same code in which that one function is ours. TRL's soft cap, temperature, MoE, ZeRO and
compaction logic does not change, and nothing global is patched.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import inspect
import types
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from plot_align.errors import InputError, RunError
from plot_align.head import HeadOutput, HeadSpec
from plot_align.trl.backends.base import HeadBackend
from plot_align.trl.reference import gathered_again
from plot_align.trl.term import PlotTerm

NEWEST_TRL = "1.16"  # that was tested
_KERNEL_ARGUMENTS = (
    "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale",
    "outputs",
)  # fmt: skip
_OUTPUT_FIELDS = (
    "loss", "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask", "aux_loss",
)  # fmt: skip
_CHUNKED_LOSS_ARGUMENTS = (
    "hidden_states", "lm_head_weight", "chunk_size", "labels", "shift_labels", "num_items_in_batch", "logit_scale",
    "final_logit_softcapping", "lm_head_bias",
)  # fmt: skip


class FusedBackend(HeadBackend):
    """Computes the output distributions inside TRL's head, with no further matrix product.

    Args:
        model: the policy.
        term: the PLOT term.
        reference: the model whose forward inside ``compute_loss`` yields the reference's output distributions: the
            trainer's own reference model, or the policy itself if PEFT runs it without its adapters.
        autocast: the context in which accelerate has wrapped the trainer's own reference model.
        called: the module that the trainer calls: ``model`` itself (``None``), or the PEFT wrapper around it.
        chunked: the forward is that of ``loss_type="chunked_nll"``, which knows no reference.

    Raises:
        InputError: an untested TRL version, or a head that differs from the tested one.
    """

    def __init__(
        self,
        model: nn.Module,
        term: PlotTerm,
        reference: nn.Module | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        called: nn.Module | None = None,
        *,
        chunked: bool = False,
    ) -> None:
        super().__init__(model, term, wants_reference=reference is not None)
        self.called = called
        self._heads: list[_Forward] = [_ChunkedLoss(model, self) if chunked else _FusedHead(model, self)]
        if reference is not None and reference is not model:
            self._heads.append(_FusedHead(reference, self, autocast))

    def remove(self) -> None:
        for head in self._heads:
            head.remove()


class _Forward(ABC):
    """Replaces one model's forward, so that the function of TRL that reads its head is ours while a batch is pending.

    ``forward_name``, ``function_name``: what TRL calls its forward, and that function.
    ``autocast``: for a model that accelerate has already prepared. Its forward is wrapped for mixed precision then,
    and the wrapped function cannot be exchanged. So our copy runs beside the wrapper, in the same context.
    """

    forward_name: str
    function_name: str

    def __init__(
        self,
        model: nn.Module,
        backend: FusedBackend,
        autocast: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self.model = model
        self.backend = backend
        before = model.forward
        original = self._trl_forward(before if autocast is None else getattr(model, "_original_forward", before))
        self._theirs = original.__globals__[self.function_name]
        self._mask: Tensor | None = None
        self._run_head: Callable[..., HeadOutput] | None = None
        rebuilt = types.FunctionType(
            original.__code__,
            {**original.__globals__, self.function_name: self._replacement()},
            original.__name__,
            original.__defaults__,
            original.__closure__,
        )
        rebuilt.__kwdefaults__ = original.__kwdefaults__
        self._before = before
        context = nullcontext if autocast is None else autocast

        @functools.wraps(original)
        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            labels = kwargs.get("labels")
            if not self._scores(kwargs):
                return before(*args, **kwargs)
            if module is backend.model and backend.is_policy_forward(labels):
                self._refuse_unsupported(kwargs)
                self._run_head = backend.run_head
            elif labels is not None and backend.is_reference_forward() and backend.same_labels(labels):
                self._run_head = backend.run_reference_head
            else:
                return before(*args, **kwargs)
            self._mask = kwargs["labels"][:, 1:] != -100  # (B, T-1)
            try:
                with context():
                    output = rebuilt(module, *args, **kwargs)
            finally:
                self._mask = self._run_head = None
            if module is backend.model and backend.result is not None:
                fields = (getattr(output, field.name) for field in dataclasses.fields(output))
                backend.result.outputs = tuple(x for x in fields if isinstance(x, Tensor) and x.requires_grad)
            return output

        # `setattr`, because a type checker refuses to assign to a method.
        self._forward = types.MethodType(forward, model)
        setattr(model, "forward", self._forward)  # noqa: B010

    def remove(self) -> None:
        # Accelerate wraps `forward` for mixed precision when training starts, and our forward cannot be removed from
        # that wrapper. It need not be: without a pending batch it is TRL's own head to the bit.
        if self.model.forward is self._forward:
            setattr(self.model, "forward", self._before)  # noqa: B010

    @staticmethod
    def _refuse_unsupported(kwargs: dict[str, Any]) -> None:
        if kwargs.get("shift_labels") is not None:
            raise InputError(
                "the batch carries shift_labels, as under context or sequence parallelism, where no rank sees a whole "
                "sequence; PLOT expects whole sequences: set the parallelism's size to 1."
            )

    def _gathered(self, *parameters: Tensor | None) -> AbstractContextManager[None]:
        """Gathers parameters of the head, as TRL does under ZeRO-3, and when the gradient norms are measured."""
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        return gathered_again((head, self.model, self.backend.called), *parameters)

    @abstractmethod
    def _scores(self, kwargs: dict[str, Any]) -> bool:
        """Whether a call goes through TRL's function."""

    @abstractmethod
    def _replacement(self) -> Any:
        """What stands in that function's place."""

    @abstractmethod
    def _is_as_tested(self, names: dict[str, Any]) -> bool:
        """Whether the globals of TRL's forward hold its function and what it returns as they were tested."""

    def _refuse_sharded_head(self) -> None:
        own = self.model.get_output_embeddings().weight  # type: ignore[operator]
        if isinstance(own, DTensor) and own.requires_grad:
            raise InputError(
                "the LM head is sharded on its own (a trainable DTensor when its logits are due), and TRL's fused "
                "head computes a wrong gradient for it; expected it whole by then: leave it in the FSDP group of the "
                "root or of the final norm, as accelerate does, or freeze it."
            )

    def _batch_rows(self, scored: Tensor) -> Tensor:
        """Positions in the trainer's batch: prompt-learning PEFT prepends virtual tokens to those of the forward."""
        pending = self.backend.pending
        if self._mask is None or pending is None:
            raise RuntimeError("no forward is under way")
        width = pending.labels.size(1) - 1
        virtual = self._mask.size(1) - width
        if virtual == 0:
            return scored
        row, column = scored // self._mask.size(1), scored % self._mask.size(1)
        # Virtual tokens have the label −100 and are never scored. The first real token now has a predecessor and is
        # scored: it has no position of its own in the trainer's batch, so it gets the first one.
        return row * width + (column - virtual).clamp(min=0)

    def _trl_forward(self, bound: Any) -> types.FunctionType:
        """The function behind ``bound``, which TRL installed, checked by name and signature."""
        version = importlib.metadata.version("trl")
        if Version(version).release[:2] > Version(NEWEST_TRL).release:
            raise InputError(
                f"trl {version} is installed; plot_backend='fused' reaches into TRL's head and was tested up to "
                f"{NEWEST_TRL}.x only: pip install 'trl<{_next_minor(NEWEST_TRL)}', or set plot_backend='separate', "
                "which costs a second head pass."
            )
        forward = getattr(bound, "__func__", None)
        if not isinstance(forward, types.FunctionType) or forward.__code__.co_name != self.forward_name:
            raise InputError(
                f"the forward of {type(self.model).__name__} is not the one TRL installs; expected a trainer that was "
                "just built: call attach() before train() and before anything else replaces model.forward (Liger's "
                "fused loss, a compiled model), or set plot_backend='separate'."
            )
        if not self._is_as_tested(forward.__globals__):
            raise InputError(
                f"trl {version} lacks the tested signature of {self.function_name}, which plot_backend='fused' builds "
                f"on; expected TRL up to {NEWEST_TRL}.x as released: reinstall it, or set plot_backend='separate'."
            )
        return forward


class _FusedHead(_Forward):
    """That of ``add_fused_lm_head`` (TRL 1.15 and later)."""

    forward_name = "_fused_forward"
    function_name = "_ChunkedLogProbFunction"

    def _scores(self, kwargs: dict[str, Any]) -> bool:
        return bool(kwargs.get("fused_lm_head"))

    def _replacement(self) -> Any:
        return self

    def _is_as_tested(self, names: dict[str, Any]) -> bool:
        kernel, output = names.get(self.function_name), names.get("FusedCausalLMOutput")
        if kernel is None or output is None:  # the kernel of TRL 1.15 needs Triton
            return False
        arguments = tuple(inspect.signature(kernel.forward).parameters)[1:]
        return arguments == _KERNEL_ARGUMENTS and tuple(f.name for f in dataclasses.fields(output)) == _OUTPUT_FIELDS

    def apply(
        self,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,
        targets: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        """Replaces ``_ChunkedLogProbFunction.apply``: same arguments, same five results."""
        mask, run_head = self._mask, self._run_head
        if mask is None or run_head is None:
            return self._theirs.apply(
                hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs
            )
        scored = mask.flatten().nonzero().squeeze(-1).to(hidden.device)  # (M,) places in the forward's (B, T-1)
        dense = hidden.size(0) == mask.numel()
        if not dense and hidden.size(0) != scored.numel():
            raise RunError(
                f"TRL's head scored {hidden.size(0)} positions where {scored.numel()} labels of {mask.numel()} were "
                "expected; this TRL version lays them out in an unknown way: use plot_backend='separate'."
            )
        self._refuse_sharded_head()
        options = self.backend.head_options
        spec = HeadSpec(temperature, softcap, logit_scale, tuple(outputs), gather=self._gathered, **options)
        if dense:
            # On devices without Triton TRL scores every position and masks afterwards. Prompts are most of a batch:
            # skip them and fill in zeros.
            head = run_head(hidden[scored], weight, bias, targets[scored], self._batch_rows(scored), spec)
        else:
            head = run_head(hidden, weight, bias, targets, self._batch_rows(scored), spec)
        results = (head.log_probs, head.entropy, head.log_sum_sq_probs, head.mean_logits, head.is_top1)
        if not dense:
            return results
        return tuple(None if x is None else x.new_zeros(mask.numel()).index_put((scored,), x) for x in results)


class _ChunkedLoss(_Forward):
    """That of SFT with ``loss_type="chunked_nll"`` (TRL 1.4 to 1.14, the default from 1.8 on)."""

    forward_name = "_chunked_ce_forward"
    function_name = "_chunked_cross_entropy_loss"

    def _scores(self, kwargs: dict[str, Any]) -> bool:
        return kwargs.get("labels") is not None or kwargs.get("shift_labels") is not None

    def _replacement(self) -> Any:
        return self._loss

    def _is_as_tested(self, names: dict[str, Any]) -> bool:
        function = names.get(self.function_name)
        return function is not None and tuple(inspect.signature(function).parameters) == _CHUNKED_LOSS_ARGUMENTS

    def _loss(
        self,
        hidden_states: Tensor,  # (B, T, H)
        lm_head_weight: Tensor,  # (V, H)
        chunk_size: int,
        labels: Tensor | None = None,  # (B, T)
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logit_scale: float = 1.0,
        final_logit_softcapping: float | None = None,
        lm_head_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Replaces ``_chunked_cross_entropy_loss``: same arguments, same four results (the loss, then correct tokens,
        summed entropy and number of all that were scored)."""
        mask, run_head = self._mask, self._run_head
        if mask is None or run_head is None or labels is None:
            return self._theirs(
                hidden_states, lm_head_weight, chunk_size, labels, shift_labels, num_items_in_batch, logit_scale,
                final_logit_softcapping, lm_head_bias,
            )  # fmt: skip
        self._refuse_sharded_head()
        scored = mask.flatten().nonzero().squeeze(-1).to(hidden_states.device)  # (M,) places in the forward's (B, T-1)
        targets = labels[:, 1:].flatten().to(scored.device)[scored]  # (M,)
        hidden = hidden_states[:, :-1].flatten(0, 1)[scored]  # (M, H)
        options = self.backend.head_options
        spec = HeadSpec(
            1.0, final_logit_softcapping, logit_scale, ("entropy", "is_top1"), gather=self._gathered, **options
        )
        head = run_head(hidden, lm_head_weight, lm_head_bias, targets, self._batch_rows(scored), spec)
        if head.entropy is None or head.is_top1 is None:
            raise RuntimeError("the head was asked for both")
        divisor = max(scored.numel(), 1) if num_items_in_batch is None else num_items_in_batch
        count = torch.tensor(scored.numel(), device=scored.device)
        return -head.log_probs.sum() / divisor, head.is_top1.sum().float(), head.entropy.detach().sum(), count


def _next_minor(version: str) -> str:
    parsed = Version(version)
    return f"{parsed.major}.{parsed.minor + 1}"
