"""Everything that touches TRL's internals: how the policy's head pass also yields its output distribution.

TRL patches ``model.forward`` so that ``model(..., labels=…, fused_lm_head=True)`` scores labels without building
logits, through ``_ChunkedLogProbFunction``. :class:`FusedBackend` replaces that forward, on this one model object, by
a copy of the same code in which the name ``_ChunkedLogProbFunction`` means ours; TRL's soft cap, temperature, MoE,
ZeRO and compaction logic stays as it is, and nothing global is patched. :class:`SeparateBackend` leaves the head alone
and makes a second head pass from the backbone's output: slower, but it depends on no private name of TRL.
:class:`LogitsBackend` reads the logits that CPO and ORPO build anyway.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import inspect
import types
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import InputError, RunError
from ..fused import HeadOutput, HeadSpec, fused_head, output_distribution, target_log_probs
from .batches import PolicyBatch
from .term import PlotTerm, Shares

TESTED_TRL = "1.16"
_KERNEL_ARGUMENTS = (
    "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale",
    "outputs",
)  # fmt: skip
_OUTPUT_FIELDS = (
    "loss", "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask", "aux_loss",
)  # fmt: skip


@dataclass
class Captured:
    """What the policy's head pass left behind.

    ``hidden`` is the head's input, the place where gradient norms are compared; ``log_probs (N,)`` and ``rows (N,)``
    (places in the flattened ``(B, T − 1)`` batch) name the row of a NaN.
    """

    head: HeadOutput
    shares: Shares
    hidden: Tensor
    rows: Tensor


class HeadBackend(ABC):
    """Waits for the policy's forward inside ``compute_loss`` and captures its head pass, once."""

    def __init__(self, model: nn.Module, term: PlotTerm) -> None:
        self.model = model
        self.term = term
        self._pending: PolicyBatch | None = None
        self._captured: Captured | None = None

    @contextmanager
    def capture(self, batch: PolicyBatch) -> Iterator[None]:
        """While open, the first head pass over ``batch`` by the policy is captured; read it with :meth:`take`."""
        self._pending, self._captured = batch, None
        try:
            yield
        finally:
            self._pending = None

    def take(self) -> Captured | None:
        """The captured pass, which is forgotten here so that its graph lives no longer than the step."""
        captured, self._captured = self._captured, None
        return captured

    @abstractmethod
    def remove(self) -> None:
        """Takes the backend off the model again."""

    def _wants(self, labels: Tensor | None) -> bool:
        """Whether this forward is the policy's: it can be differentiated while training, and its labels are ours.

        That tells it from the reference's forward and from KTO's mismatched KL forward, both without gradient.
        """
        if self._pending is None or self._captured is not None:
            return False
        if self.model.training:
            return torch.is_grad_enabled()
        return labels is None or self._same_labels(labels)

    def _same_labels(self, labels: Tensor) -> bool:
        expected = self._pending.labels if self._pending is not None else None
        if expected is None or labels.size(0) != expected.size(0) or labels.size(1) < expected.size(1):
            return False
        return torch.equal(labels[:, -expected.size(1) :].to(expected.device), expected)

    def _same_tokens(self, ids: Tensor | None) -> bool:
        """Whether the forward's tokens are the pending batch's: KTO's evaluation begins with another forward."""
        if ids is None or self._pending is None:  # prompt-learning PEFT passes embeddings
            return True
        labels = self._pending.labels.to(ids.device)
        return ids.shape == labels.shape and bool(((labels == -100) | (labels == ids)).all())

    def _pass(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor, spec: HeadSpec
    ) -> HeadOutput:
        """Runs our head over ``rows`` of the pending batch and keeps the result, ``hidden`` among it."""
        if self._pending is None:
            raise RuntimeError("no batch is pending")
        shares = self.term.shares(self._pending, rows.to(self._pending.labels.device))
        self.term.to(hidden.device)
        head = fused_head(
            hidden,
            weight,
            bias,
            targets,
            spec,
            weights=shares.weights.to(hidden.device),
            segments=None if shares.segments is None else shares.segments.to(hidden.device),
            num_segments=shares.counts.numel(),
            divergence=self.term.head_divergence(),
        )
        self._captured = Captured(head, shares, hidden, rows)
        return head


class FusedBackend(HeadBackend):
    """Rides on TRL's fused head: no extra matrix product.

    Raises:
        InputError: the TRL version is not one this was tested with, or its head does not look as it should.
    """

    def __init__(self, model: nn.Module, term: PlotTerm) -> None:
        super().__init__(model, term)
        original = _trl_forward(model)
        self._kernel = original.__globals__["_ChunkedLogProbFunction"]
        self._gather = original.__globals__["maybe_gather_lm_head_ctx"]
        self._mask: Tensor | None = None
        rebuilt = types.FunctionType(
            original.__code__,
            {**original.__globals__, "_ChunkedLogProbFunction": self},
            original.__name__,
            original.__defaults__,
            original.__closure__,
        )
        rebuilt.__kwdefaults__ = original.__kwdefaults__
        self._original = original

        @functools.wraps(original)
        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not kwargs.get("fused_lm_head") or not self._wants(kwargs.get("labels")):
                return rebuilt(module, *args, **kwargs)
            self._refuse_unsupported(module, kwargs)
            self._mask = kwargs["labels"][:, 1:] != -100  # (B, T-1)
            try:
                return rebuilt(module, *args, **kwargs)
            finally:
                self._mask = None

        # Through `setattr`: to a type checker `forward` is a method, and here it becomes an instance attribute.
        self._forward = types.MethodType(forward, model)
        setattr(model, "forward", self._forward)  # noqa: B010

    def remove(self) -> None:
        # Accelerate wraps `forward` for mixed precision when training starts. What it wrapped cannot be taken out
        # again, and need not be: with nothing pending it is TRL's own head to the bit.
        if self.model.forward is self._forward:
            setattr(self.model, "forward", types.MethodType(self._original, self.model))  # noqa: B010

    @staticmethod
    def _refuse_unsupported(module: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("shift_labels") is not None:
            raise InputError(
                "the batch carries shift_labels, as under context or sequence parallelism, where no rank sees a whole "
                "sequence; PLOT expects whole sequences: set the parallelism's size to 1."
            )
        weight = module.get_output_embeddings().weight
        if isinstance(weight, DTensor) and weight.requires_grad:
            raise InputError(
                "the LM head is sharded on its own (a trainable DTensor at the time of the forward), and TRL's fused "
                "head computes a wrong gradient for it; expected it whole: leave the head in the FSDP root group, as "
                "accelerate's auto wrap policy does, or freeze it."
            )

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
        """Stands in for ``_ChunkedLogProbFunction.apply``: same arguments, same five results."""
        mask = self._mask
        if mask is None:
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
        spec = HeadSpec(temperature, softcap, logit_scale, tuple(outputs), gather=self._gather)
        if dense:
            # Off Triton devices TRL scores every position and masks afterwards. Prompts are most of a batch: skip
            # them here, and put zeros where they were.
            head = self._pass(hidden[scored], weight, bias, targets[scored], self._batch_rows(scored), spec)
        else:
            head = self._pass(hidden, weight, bias, targets, self._batch_rows(scored), spec)
        results = (head.log_probs, head.entropy, head.log_sum_sq_probs, head.mean_logits, head.is_top1)
        if not dense:
            return results
        return tuple(None if x is None else x.new_zeros(mask.numel()).index_put((scored,), x) for x in results)

    def _batch_rows(self, scored: Tensor) -> Tensor:
        """Places in the batch of the trainer; prompt-learning PEFT prepends virtual tokens to the forward's."""
        if self._mask is None or self._pending is None:
            raise RuntimeError("no forward is under way")
        virtual = self._mask.size(1) - (self._pending.labels.size(1) - 1)
        if virtual == 0:
            return scored
        row, column = scored // self._mask.size(1), scored % self._mask.size(1)
        # PEFT's −100 labels of the virtual tokens are never scored, but the first real token now has a predecessor
        # and is: it belongs to no place of the batch where it is a label, and to the first otherwise.
        return row * (self._pending.labels.size(1) - 1) + (column - virtual).clamp(min=0)


class SeparateBackend(HeadBackend):
    """A head pass of its own over the backbone's output: for what :class:`FusedBackend` does not know."""

    def __init__(self, model: Any, term: PlotTerm, temperature: float = 1.0) -> None:
        super().__init__(model, term)
        self._spec = head_spec(model, temperature)
        self._hook = model.base_model.register_forward_hook(self._after_backbone, with_kwargs=True)

    def remove(self) -> None:
        self._hook.remove()

    def _after_backbone(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not self._wants(None) or self._pending is None or not self._same_tokens(kwargs.get("input_ids")):
            return
        backbone = output.last_hidden_state  # (B, T + virtual, H)
        hidden = backbone[:, -self._pending.labels.size(1) :][:, :-1]  # (B, T-1, H)
        if hidden.shape[:2] != self._pending.labels[:, 1:].shape:
            return
        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        if isinstance(head.weight, DTensor) or hasattr(head.weight, "ds_id"):
            raise InputError(
                "the LM head is sharded (FSDP or ZeRO-3), which plot_backend='separate' cannot read; expected a "
                "whole one: use plot_backend='fused'."
            )
        rows = (self._pending.labels[:, 1:].flatten() != -100).nonzero().squeeze(-1)  # (M,)
        flat = hidden.reshape(-1, hidden.size(-1))[rows.to(hidden.device)]  # (M, H)
        targets = self._pending.labels[:, 1:].flatten()[rows].to(flat.device)
        self._pass(flat, head.weight, head.bias, targets, rows, self._spec)
        if self._captured is not None:
            # The vanilla loss never sees `flat`: gradients are compared where both losses pass.
            self._captured.hidden = backbone


class LogitsBackend(HeadBackend):
    """Reads the logits of trainers whose loss needs them anyway (CPO, ORPO): no head pass at all.

    Args:
        model: the causal language model; gradient norms are compared at the input of its head.
        term: the PLOT term.
        called: what the trainer calls: ``model`` itself, or the PEFT wrapper around it.
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
        if self._wants(None):
            self._hidden = args[0]  # (B, T, H)

    def _after_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        hidden, self._hidden = self._hidden, None
        ids = args[0] if args else kwargs.get("input_ids")
        if not self._wants(None) or self._pending is None or not self._same_tokens(ids):
            return
        logits, labels = output.logits, self._pending.labels  # (B, T, V), (B, T)
        if logits.shape[:2] != labels.shape:
            return
        if hidden is None:
            raise InputError(
                f"the LM head of {type(self.model).__name__} is not called as a module, so the gradients at its input "
                "cannot be compared; expected get_output_embeddings() to be called in the forward: use "
                "plot_backend='separate'."
            )
        rows = (labels[:, 1:].flatten() != -100).nonzero().squeeze(-1)  # (M,)
        shares = self.term.shares(self._pending, rows)
        self.term.to(logits.device)
        places = rows + rows // (labels.size(1) - 1)  # (M,) from the flattened (B, T-1) to the flattened (B, T)
        weights = shares.weights.new_zeros(labels.numel()).index_put((places,), shares.weights)  # (B*T,)
        segments = None
        if shares.segments is not None:
            segments = shares.segments.new_zeros(labels.numel()).index_put((places,), shares.segments).view_as(labels)
        marginals, values = output_distribution(
            logits, weights.view_as(labels), segments, shares.counts.numel(), self.term.head_divergence()
        )
        places = places.to(logits.device)
        log_probs = target_log_probs(logits, places, labels[:, 1:].flatten()[rows].to(logits.device))
        values = None if values is None else values.flatten()[places]  # (M,)
        self._captured = Captured(HeadOutput(log_probs, marginals=marginals, values=values), shares, hidden, rows)


def head_spec(model: Any, temperature: float = 1.0) -> HeadSpec:
    """What the model's own forward does to its logits, read from its configuration as TRL reads it."""
    config = model.config.get_text_config()
    scale = None
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None) if scale is None else scale
    divisor = getattr(config, "logits_scaling", None)
    if scale is None and divisor is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    return HeadSpec(
        temperature=temperature,
        softcap=getattr(config, "final_logit_softcapping", None),
        logit_scale=1.0 if scale is None else scale,
    )


def _trl_forward(model: nn.Module) -> types.FunctionType:
    """The function behind ``model.forward`` that TRL's ``add_fused_lm_head`` installed, checked name by name."""
    version = importlib.metadata.version("trl")
    if not version.startswith(f"{TESTED_TRL}."):
        raise InputError(
            f"trl {version} is installed; plot_backend='fused' reaches into TRL's head and was tested with "
            f"{TESTED_TRL}.x only: pip install 'trl>={TESTED_TRL},<{_next_minor(TESTED_TRL)}', or set "
            "plot_backend='separate', which costs a second head pass."
        )
    forward = getattr(model.forward, "__func__", None)
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
