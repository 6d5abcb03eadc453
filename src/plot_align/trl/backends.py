"""Three ways to get the output distribution out of a TRL training step. All code that touches TRL's internals is here.

TRL patches ``model.forward`` so that ``model(..., labels=…, fused_lm_head=True)`` scores labels without building
logits, through ``_ChunkedLogProbFunction``. :class:`FusedBackend` replaces that forward, on this one model object, by
a copy of the same code in which ``_ChunkedLogProbFunction`` is ours. TRL's soft cap, temperature, MoE, ZeRO and
compaction logic does not change, and nothing global is patched. :class:`SeparateBackend` makes a second head pass from
the backbone's output: slower, but it depends on no private name of TRL. :class:`LogitsBackend` reads the logits that
CPO and ORPO build anyway.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import inspect
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from plot_align.errors import InputError, RunError
from plot_align.head import (
    HeadOutput,
    HeadSpec,
    Workspace,
    fused_head,
    head_spec,
    output_distribution,
    target_log_probs,
)
from plot_align.preference.batch import Batch
from plot_align.trl.term import HeadResult, PlotTerm

TESTED_TRL = "1.16"
_KERNEL_ARGUMENTS = (
    "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale",
    "outputs",
)  # fmt: skip
_OUTPUT_FIELDS = (
    "loss", "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask", "aux_loss",
)  # fmt: skip


class HeadBackend(ABC):
    """Catches the policy's forward inside ``compute_loss`` and keeps the result of its head pass."""

    def __init__(self, model: nn.Module, term: PlotTerm) -> None:
        self.model = model
        self.term = term
        self.head_options = term.config.head_options if isinstance(term, PlotTerm) else {}
        self.pending: Batch | None = None
        self.result: HeadResult | None = None
        self.reference: Tensor | None = None
        self.workspace: Workspace | None = None

    @contextmanager
    def capture(self, batch: Batch) -> Iterator[None]:
        """Within this context, keeps the policy's first head pass over ``batch``; read it with :meth:`take`."""
        self.pending, self.result, self.reference = batch, None, None
        self.workspace = Workspace()  # the graph keeps it until the backward
        try:
            yield
        finally:
            self.pending = self.workspace = None

    def take(self) -> HeadResult | None:
        """Returns the captured head pass and forgets it, so that its graph lives no longer than the step."""
        result, self.result = self.result, None
        if result is not None:
            result.reference, self.reference = self.reference, None
        return result

    @abstractmethod
    def remove(self) -> None:
        """Restores the model."""

    def is_policy_forward(self, labels: Tensor | None) -> bool:
        """Whether this is the policy's forward on the pending batch.

        In training it is the one with gradients: the reference's forward and KTO's mismatched KL forward have none. In
        evaluation it is the one with the batch's labels.
        """
        if self.pending is None or self.result is not None:
            return False
        if self.model.training:
            return torch.is_grad_enabled()
        return labels is None or self.same_labels(labels)

    def same_labels(self, labels: Tensor) -> bool:
        """Whether ``labels (B, T)`` are the pending batch's, perhaps behind prompt-learning's virtual tokens."""
        expected = self.pending.labels if self.pending is not None else None
        if expected is None or labels.size(0) != expected.size(0) or labels.size(1) < expected.size(1):
            return False
        return torch.equal(labels[:, -expected.size(1) :].to(expected.device), expected)

    def same_tokens(self, ids: Tensor | None) -> bool:
        """Whether the forward's tokens are the pending batch's: KTO's evaluation begins with another forward."""
        if ids is None or self.pending is None:  # prompt-learning PEFT passes embeddings
            return True
        labels = self.pending.labels.to(ids.device)
        return ids.shape == labels.shape and bool(((labels == -100) | (labels == ids)).all())

    def run_head(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor, spec: HeadSpec
    ) -> HeadOutput:
        """Runs our head over ``rows`` of the pending batch and keeps the result."""
        if self.pending is None:
            raise RuntimeError("no batch is pending")
        pooling = self.term.pooling(self.pending, rows.to(self.pending.labels.device))
        self.term.to(hidden.device)
        spec = dataclasses.replace(spec, workspace=self.workspace)
        whole = pooling.arguments(hidden.device)

        def run(hidden: Tensor, spec: HeadSpec, some: slice | Tensor = slice(None)) -> HeadOutput:
            of_rows = {name: x[some] for name, x in whole.items() if isinstance(x, Tensor)}
            parts = {**whole, **of_rows}
            divergence = self.term.head_divergence()
            head = fused_head(hidden, weight, bias, targets[some], spec, divergence=divergence, **parts)
            own = (weight.detach(), None if bias is None else bias.detach()) if spec.frozen else (weight, bias)
            return dataclasses.replace(head, reward=self.term.reward(hidden, *own, spec, **parts))

        def recompute_rows(some: Tensor) -> tuple[Tensor, HeadOutput]:
            sampled = hidden.detach()[some].requires_grad_()
            return sampled, run(sampled, dataclasses.replace(spec, frozen=True), some)

        head = run(hidden, spec)
        self.result = HeadResult(head, pooling, hidden, rows, recompute_rows=recompute_rows)
        return head

    def run_reference_head(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor, spec: HeadSpec
    ) -> HeadOutput:
        """The same for the reference model's forward, of which only the output distributions are kept."""
        if self.pending is None:
            raise RuntimeError("no batch is pending")
        pooling = self.term.pooling(self.pending, rows.to(self.pending.labels.device))
        spec = dataclasses.replace(spec, workspace=self.workspace)
        head = fused_head(hidden, weight, bias, targets, spec, **pooling.arguments(hidden.device))
        self.reference = head.distributions
        return head


class FusedBackend(HeadBackend):
    """Computes the output distributions inside TRL's fused head, with no further matrix product.

    Args:
        model: the policy.
        term: the PLOT term.
        reference: the model whose forward inside ``compute_loss`` yields the reference's output distributions: the
            trainer's own reference model, or the policy itself if PEFT runs it without its adapters.
        autocast: the context in which accelerate has wrapped the trainer's own reference model.
        called: the module that the trainer calls: ``model`` itself (``None``), or the PEFT wrapper around it.

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
    ) -> None:
        super().__init__(model, term)
        self.called = called
        self.wants_reference = reference is not None
        self._heads = [_FusedForward(model, self)]
        if reference is not None and reference is not model:
            self._heads.append(_FusedForward(reference, self, autocast))

    def remove(self) -> None:
        for head in self._heads:
            head.remove()

    def is_reference_forward(self, labels: Tensor | None) -> bool:
        """Whether this is the reference's forward on the pending batch: it follows the policy's, without gradient."""
        if not self.wants_reference or self.result is None or self.reference is not None or labels is None:
            return False
        return self.pending is not None and not torch.is_grad_enabled() and self.same_labels(labels)


class _FusedForward:
    """Replaces one model's forward, so that TRL's head kernel is ours while a batch is pending.

    ``autocast``: for a model that accelerate has already prepared. Its forward is wrapped for mixed precision then,
    and the wrapped function cannot be exchanged. So our copy runs beside the wrapper, in the same context.
    """

    def __init__(
        self,
        model: nn.Module,
        backend: FusedBackend,
        autocast: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self.model = model
        self.backend = backend
        before = model.forward
        original = _trl_forward(model, before if autocast is None else getattr(model, "_original_forward", before))
        self._kernel = original.__globals__["_ChunkedLogProbFunction"]
        self._gather = original.__globals__["maybe_gather_lm_head_ctx"]
        self._mask: Tensor | None = None
        self._run_head: Callable[..., HeadOutput] | None = None
        rebuilt = types.FunctionType(
            original.__code__,
            {**original.__globals__, "_ChunkedLogProbFunction": self},
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
            if not kwargs.get("fused_lm_head"):
                return before(*args, **kwargs)
            if module is backend.model and backend.is_policy_forward(labels):
                self._refuse_unsupported(kwargs)
                self._run_head = backend.run_head
            elif backend.is_reference_forward(labels):
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
                fields = (getattr(output, name) for name in _OUTPUT_FIELDS)
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

    @contextmanager
    def _gathered(self, *parameters: Tensor | None) -> Iterator[None]:
        """Gathers parameters of the head; under ZeRO-3 as TRL does. FSDP2 frees them between forward and backward,
        when the gradient norms are measured, so they are gathered here again."""
        freed = any(x is not None and x.numel() > 0 and x.untyped_storage().size() == 0 for x in parameters)
        with self._gather(*parameters):
            if not freed:
                yield
                return
            head = self.model.get_output_embeddings()  # type: ignore[operator]
            group = next(x for x in (head, self.model, self.backend.called) if isinstance(x, FSDPModule))
            group.unshard()
            try:
                yield
            finally:
                group.reshard()

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
            return self._kernel.apply(
                hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs
            )
        scored = mask.flatten().nonzero().squeeze(-1).to(hidden.device)  # (M,) places in the forward's (B, T-1)
        dense = hidden.size(0) == mask.numel()
        if not dense and hidden.size(0) != scored.numel():
            raise RunError(
                f"TRL's head scored {hidden.size(0)} positions where {scored.numel()} labels of {mask.numel()} were "
                "expected; this TRL version lays them out in an unknown way: use plot_backend='separate'."
            )
        own = self.model.get_output_embeddings().weight  # type: ignore[operator]
        if isinstance(own, DTensor) and own.requires_grad:
            raise InputError(
                "the LM head is sharded on its own (a trainable DTensor when its logits are due), and TRL's fused "
                "head computes a wrong gradient for it; expected it whole by then: leave it in the FSDP group of the "
                "root or of the final norm, as accelerate does, or freeze it."
            )
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


class SeparateBackend(HeadBackend):
    """Makes a second head pass over the backbone's output, for other TRL versions than :class:`FusedBackend`'s."""

    def __init__(self, model: Any, term: PlotTerm, temperature: float = 1.0) -> None:
        super().__init__(model, term)
        self._spec = dataclasses.replace(head_spec(model, temperature), **self.head_options)
        self._hook = model.base_model.register_forward_hook(self._after_backbone, with_kwargs=True)

    def remove(self) -> None:
        self._hook.remove()

    def _after_backbone(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not self.is_policy_forward(None) or self.pending is None or not self.same_tokens(kwargs.get("input_ids")):
            return
        backbone = output.last_hidden_state  # (B, T + virtual, H)
        hidden = backbone[:, -self.pending.labels.size(1) :][:, :-1]  # (B, T-1, H)
        if hidden.shape[:2] != self.pending.labels[:, 1:].shape:
            return
        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        if isinstance(head.weight, DTensor) or hasattr(head.weight, "ds_id"):
            raise InputError(
                "the LM head is sharded (FSDP or ZeRO-3), which plot_backend='separate' cannot read; expected a "
                "whole one: use plot_backend='fused'."
            )
        rows = (self.pending.labels[:, 1:].flatten() != -100).nonzero().squeeze(-1)  # (M,)
        flat = hidden.reshape(-1, hidden.size(-1))[rows.to(hidden.device)]  # (M, H)
        targets = self.pending.labels[:, 1:].flatten()[rows].to(flat.device)
        self.run_head(flat, head.weight, head.bias, targets, rows, self._spec)
        if self.result is not None:
            # The vanilla loss does not depend on `flat`: compare gradients at the tensor that both losses depend on.
            self.result.hidden, self.result.recompute_rows = backbone, None


class LogitsBackend(HeadBackend):
    """Reads the logits of trainers whose loss needs them anyway (CPO, ORPO), without a head pass.

    Args:
        model: the causal language model; gradient norms are compared at the input of its head.
        term: the PLOT term.
        called: the module that the trainer calls: ``model`` itself, or the PEFT wrapper around it.
    """

    def __init__(self, model: Any, term: PlotTerm, called: nn.Module) -> None:
        super().__init__(model, term)
        self._hidden: Tensor | None = None
        self._hooks = [
            model.get_output_embeddings().register_forward_pre_hook(self._before_head),
            called.register_forward_hook(self._after_model, with_kwargs=True),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before_head(self, module: nn.Module, args: Any) -> None:
        if self.is_policy_forward(None):
            self._hidden = args[0]  # (B, T, H)

    def _after_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        hidden, self._hidden = self._hidden, None
        ids = args[0] if args else kwargs.get("input_ids")
        if not self.is_policy_forward(None) or self.pending is None or not self.same_tokens(ids):
            return
        logits, labels = output.logits, self.pending.labels  # (B, T, V), (B, T)
        if logits.shape[:2] != labels.shape:
            return
        if hidden is None:
            raise InputError(
                f"the LM head of {type(self.model).__name__} is not called as a module, so the gradients at its input "
                "cannot be compared; expected get_output_embeddings() to be called in the forward: use "
                "plot_backend='separate'."
            )
        rows = (labels[:, 1:].flatten() != -100).nonzero().squeeze(-1)  # (M,)
        pooling = self.term.pooling(self.pending, rows)
        self.term.to(logits.device)
        places = rows + rows // (labels.size(1) - 1)  # (M,) from the flattened (B, T-1) to the flattened (B, T)
        weights = pooling.weights.new_zeros(labels.numel()).index_put((places,), pooling.weights)  # (B*T,)
        segments = None
        if pooling.segments is not None:
            segments = (
                pooling.segments.new_zeros(labels.numel()).index_put((places,), pooling.segments).view_as(labels)
            )
        distributions, values = output_distribution(
            logits, weights.view_as(labels), segments, pooling.counts.numel(), self.term.head_divergence()
        )
        places = places.to(logits.device)
        log_probs = target_log_probs(logits, places, labels[:, 1:].flatten()[rows].to(logits.device))
        values = None if values is None else values.flatten()[places]  # (M,)
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        reward = self.term.reward(
            hidden.flatten(0, 1)[places],
            head.weight,
            head.bias,
            head_spec(self.model),
            **pooling.arguments(hidden.device),
        )
        head = HeadOutput(log_probs, distributions=distributions, values=values, reward=reward)
        self.result = HeadResult(head, pooling, hidden, rows, outputs=(logits,))


def _trl_forward(model: nn.Module, bound: Any) -> types.FunctionType:
    """The function behind ``bound``, which TRL's ``add_fused_lm_head`` installed, checked by name and signature."""
    version = importlib.metadata.version("trl")
    if not version.startswith(f"{TESTED_TRL}."):
        raise InputError(
            f"trl {version} is installed; plot_backend='fused' reaches into TRL's head and was tested with "
            f"{TESTED_TRL}.x only: pip install 'trl>={TESTED_TRL},<{_next_minor(TESTED_TRL)}', or set "
            "plot_backend='separate', which costs a second head pass."
        )
    forward = getattr(bound, "__func__", None)
    if not isinstance(forward, types.FunctionType) or forward.__code__.co_name != "_fused_forward":
        raise InputError(
            f"the forward of {type(model).__name__} is not the one TRL installs; expected a trainer that was just "
            "built: call attach() before train() and before anything else replaces model.forward (Liger's fused "
            "loss, a compiled model), or set plot_backend='separate'."
        )
    missing = [
        name for name in ("_ChunkedLogProbFunction", "maybe_gather_lm_head_ctx") if name not in forward.__globals__
    ]
    if not missing:
        arguments = tuple(inspect.signature(forward.__globals__["_ChunkedLogProbFunction"].forward).parameters)[1:]
        fields = tuple(f.name for f in dataclasses.fields(forward.__globals__["FusedCausalLMOutput"]))
        if arguments != _KERNEL_ARGUMENTS or fields != _OUTPUT_FIELDS:
            missing = ["the tested signature of _ChunkedLogProbFunction"]
    if missing:
        raise InputError(
            f"trl {version} lacks {', '.join(missing)}, which plot_backend='fused' builds on; expected TRL "
            f"{TESTED_TRL}.x as released: reinstall it, or set plot_backend='separate'."
        )
    return forward


def _next_minor(version: str) -> str:
    parsed = Version(version)
    return f"{parsed.major}.{parsed.minor + 1}"
