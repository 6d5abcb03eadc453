"""The logits that a trainer builds anyway: TRL's before 1.15, and CPO's and ORPO's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from plot_align.errors import InputError
from plot_align.head import HeadOutput, head_spec, output_distribution, target_log_probs
from plot_align.preference.batch import Pooling
from plot_align.trl.backends.base import HeadBackend
from plot_align.trl.reference import gathered_again
from plot_align.trl.term import HeadResult, PlotTerm


class LogitsBackend(HeadBackend):
    """Reads the logits of trainers whose loss needs them anyway, without a head pass; the reference's are only read.

    Args:
        model: the causal language model; gradient norms are compared at the input of its head.
        term: the PLOT term.
        called: the module that the trainer calls: ``model`` itself, or the PEFT wrapper around it.
        reference: the module that it calls for the reference's output, if the target needs that: the trainer's own
            reference model, or ``called`` itself if PEFT runs it without its adapters.
    """

    def __init__(self, model: Any, term: PlotTerm, called: nn.Module, reference: nn.Module | None = None) -> None:
        super().__init__(model, term, wants_reference=reference is not None)
        self._called = called
        self._hidden: Tensor | None = None
        self._gather: Callable[[], AbstractContextManager[None]] = nullcontext
        modules = [called] if reference is None or reference is called else [called, reference]
        self._hooks = [
            model.get_output_embeddings().register_forward_pre_hook(self._before_head),
            *(x.register_forward_hook(self._after_model, with_kwargs=True) for x in modules),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before_head(self, module: Any, args: Any) -> None:
        if self.is_policy_forward(None):
            self._hidden = args[0]  # (B, T, H)
            weights = module.weight, module.bias  # whole, which under FSDP2 they are within the forward only
            self._gather = partial(gathered_again, (module, self.model, self._called), *weights)

    def _after_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        hidden, self._hidden = self._hidden, None
        if self.pending is None or not self.same_tokens(args[0] if args else kwargs.get("input_ids")):
            return
        if module is self._called and self.is_policy_forward(None):
            self._read_policy(self._logits(output), hidden)
            if self.result is not None:
                fields = (output.logits, getattr(output, "loss", None))
                self.result.outputs = tuple(x for x in fields if x is not None and x.requires_grad)
        elif self.is_reference_forward():
            with torch.no_grad():
                pooling, _, places = self._places(self._logits(output))
                self.reference, _ = self._distributions(output.logits, pooling, places)

    def _logits(self, output: Any) -> Tensor:
        """``(B, T', V)``; its last position is that of the batch."""
        logits = getattr(output, "logits", None)
        if logits is None:
            raise InputError(
                f"the forward of {type(self.model).__name__} returned no logits, as Liger's fused losses do; PLOT "
                "reads them: turn use_liger_kernel and use_liger_loss off, or set plot_backend='separate', which "
                "costs a second head pass."
            )
        return logits

    def _read_policy(self, logits: Tensor, hidden: Tensor | None) -> None:
        pooling, rows, places = self._places(logits)
        if hidden is None:
            raise InputError(
                f"the LM head of {type(self.model).__name__} is not called as a module, so the gradients at its input "
                "cannot be compared; expected get_output_embeddings() to be called in the forward: use "
                "plot_backend='separate'."
            )
        distributions, values = self._distributions(logits, pooling, places, by_position=True)
        log_probs = target_log_probs(logits, places, self._targets(rows).to(logits.device))
        values = None if values is None else values.flatten()[places]  # (M,)
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        reward = self.term.reward(
            hidden.flatten(0, 1)[places],
            head.weight,
            head.bias,
            head_spec(self.model),
            **pooling.arguments(hidden.device),
        )
        output = HeadOutput(log_probs, distributions=distributions, values=values, reward=reward)
        self.result = HeadResult(output, pooling, hidden, rows, gather=self._gather)

    def _targets(self, rows: Tensor) -> Tensor:
        return self._batch.labels[:, 1:].flatten()[rows]

    def _places(self, logits: Tensor) -> tuple[Pooling, Tensor, Tensor]:
        """How the M labels are pooled; their positions in the flattened ``(B, T − 1)`` batch, ``(M,)``, and in the
        flattened ``(B, T')`` logits, ``(M,)`` on their device.

        ``logits_to_keep`` leaves out the first positions of a row, and prompt-learning PEFT puts virtual ones before
        them: both ends are the batch's.
        """
        labels = self._batch.labels  # (B, T)
        rows = (labels[:, 1:].flatten() != -100).nonzero().squeeze(-1)  # (M,)
        row, column = rows // (labels.size(1) - 1), rows % (labels.size(1) - 1)
        column = column + logits.size(1) - labels.size(1)
        if logits.size(0) != labels.size(0) or bool((column < 0).any()):
            raise InputError(
                f"the model returned logits of shape {tuple(logits.shape)} for labels of shape "
                f"{tuple(labels.shape)}; expected one row each, and logits from the first label on: turn off what "
                "flattens or shortens the batch (padding_free, packing)."
            )
        return self.term.pooling(self._batch, rows), rows, (row * logits.size(1) + column).to(logits.device)

    def _distributions(
        self, logits: Tensor, pooling: Pooling, places: Tensor, *, by_position: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Output distributions ``(S, V)``; with ``by_position`` also each position's own divergence, if it is asked
        for."""
        self.term.to(logits.device)
        shape, size = logits.shape[:2], logits.size(0) * logits.size(1)
        at = places.to(pooling.weights.device)
        weights = pooling.weights.new_zeros(size).index_put((at,), pooling.weights).view(shape)
        segments = None
        if pooling.segments is not None:
            segments = pooling.segments.new_zeros(size).index_put((at,), pooling.segments).view(shape)
        divergence = self.term.head_divergence() if by_position else None
        return output_distribution(logits, weights, segments, pooling.counts.numel(), divergence)
