"""The baseline of the benchmark: TRL's own loss on our kernel, without the term."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from plot_align.config import PlotConfig
from plot_align.head import HeadOutput, HeadSpec, causal_lm, fused_head
from plot_align.preference.batch import Pooling
from plot_align.trl.backends import FusedBackend, own_pass
from plot_align.trl.batches import policy_batch, trainer_kind
from plot_align.trl.checks import makes_reference_forward
from plot_align.trl.reference import reference_model
from plot_align.trl.term import HeadResult


class _WithoutPlot(FusedBackend):
    """Runs our kernel in place of TRL's, without output distributions."""

    def run_head(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor, spec: HeadSpec
    ) -> HeadOutput:
        head = fused_head(hidden, weight, bias, targets, replace(spec, workspace=self.workspace))
        nothing = Pooling(hidden.new_zeros(0), None, hidden.new_zeros(0))
        self.result = HeadResult(head, nothing, hidden, rows)  # once a step, as with PLOT
        return head

    def run_reference_head(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor, spec: HeadSpec
    ) -> HeadOutput:
        self.reference = hidden.new_zeros(0)
        return fused_head(hidden, weight, bias, targets, replace(spec, workspace=self.workspace))


@contextmanager
def without_plot(trainer: Any, config: PlotConfig | None = None) -> Iterator[None]:
    """Within this context, a trainer without PLOT runs our kernel in the policy's and the reference's head passes.

    Where a trainer builds its logits there is no kernel to exchange, and it stays TRL's own.

    Args:
        trainer: a trainer without the term.
        config: ``plot_impl`` and ``plot_block_mib`` choose the kernel; ``None`` takes the defaults.
    """
    kind = trainer_kind(trainer)
    own = own_pass(kind, getattr(trainer.args, "loss_type", None))
    if own == "logits":
        yield
        return
    anchor = causal_lm(reference_model(trainer)) if makes_reference_forward(trainer, kind) else None
    nothing: Any = torch.nn.Module()
    model, autocast = causal_lm(trainer.model), trainer.accelerator.autocast
    backend = _WithoutPlot(model, nothing, anchor, autocast, chunked=own == "chunked")
    backend.head_options = (config or PlotConfig()).head_options
    original = trainer.compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with backend.capture(policy_batch(kind, inputs)):
            result = original(model, inputs, *args, **kwargs)
        backend.take()
        return result

    trainer.compute_loss = compute_loss
    try:
        yield
    finally:
        del trainer.compute_loss
        backend.remove()
