"""What every backend does: wait for the policy's forward inside ``compute_loss``, and keep what its head yields."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from plot_align.head import HeadOutput, HeadSpec, Workspace, fused_head
from plot_align.preference.batch import Batch
from plot_align.trl.term import HeadResult, PlotTerm


class HeadBackend(ABC):
    """Catches the policy's forward inside ``compute_loss`` and keeps the result of its head pass."""

    def __init__(self, model: nn.Module, term: PlotTerm, *, wants_reference: bool = False) -> None:
        self.model = model
        self.term = term
        self.wants_reference = wants_reference
        self.head_options = term.config.head_options if isinstance(term, PlotTerm) else {}
        self.pending: Batch | None = None
        self.result: HeadResult | None = None
        self.reference: Tensor | None = None
        self.workspace: Workspace | None = None
        self.other_shape: tuple[int, ...] | None = None  # of a forward on other tokens than the batch's

    @contextmanager
    def capture(self, batch: Batch) -> Iterator[None]:
        """Within this context, keeps the policy's first head pass over ``batch``; read it with :meth:`take`."""
        self.pending, self.result, self.reference, self.other_shape = batch, None, None, None
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

    @property
    def _batch(self) -> Batch:
        if self.pending is None:
            raise RuntimeError("no batch is pending")
        return self.pending

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

    def is_reference_forward(self) -> bool:
        """Whether this may be the reference's forward on the pending batch: it follows the policy's, gradients off."""
        if not self.wants_reference or self.pending is None or torch.is_grad_enabled():
            return False
        return self.result is not None and self.reference is None

    def same_labels(self, labels: Tensor) -> bool:
        """Whether ``labels (B, T)`` are the pending batch's, perhaps behind prompt-learning's virtual tokens."""
        expected = self.pending.labels if self.pending is not None else None
        if expected is None or labels.size(0) != expected.size(0) or labels.size(1) < expected.size(1):
            return False
        return torch.equal(labels[:, -expected.size(1) :].to(expected.device), expected)

    def same_tokens(self, ids: Tensor | None) -> bool:
        """Whether the forward's tokens are the pending batch's: KTO runs other forwards beside it."""
        if ids is None or self.pending is None:  # prompt-learning PEFT passes embeddings
            return True
        labels = self.pending.labels.to(ids.device)
        same = ids.shape == labels.shape and bool(((labels == -100) | (labels == ids)).all())
        if not same:
            self.other_shape = tuple(ids.shape)
        return same

    def run_head(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor, spec: HeadSpec
    ) -> HeadOutput:
        """Runs our head over ``rows`` of the pending batch and keeps the result."""
        pooling = self.term.pooling(self._batch, rows.to(self._batch.labels.device))
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
        pooling = self.term.pooling(self._batch, rows.to(self._batch.labels.device))
        spec = dataclasses.replace(spec, workspace=self.workspace)
        head = fused_head(hidden, weight, bias, targets, spec, **pooling.arguments(hidden.device))
        self.reference = head.distributions
        return head
