"""A head pass of the term's own, from the backbone's output: slower, but it depends on no private name of TRL."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from plot_align.errors import InputError
from plot_align.head import head_spec
from plot_align.trl.backends.base import HeadBackend
from plot_align.trl.term import PlotTerm


class SeparateBackend(HeadBackend):
    """Makes a second head pass over the backbone's output, where the trainer's own cannot be reached.

    Args:
        model: the policy.
        term: the PLOT term.
        reference: the model whose forward inside ``compute_loss`` yields the reference's output distributions: the
            trainer's own reference model, or the policy itself if PEFT runs it without its adapters.
        temperature: the logits are divided by it.
    """

    def __init__(self, model: Any, term: PlotTerm, reference: Any = None, temperature: float = 1.0) -> None:
        super().__init__(model, term, wants_reference=reference is not None)
        self._temperature = temperature
        models = [model] if reference is None or reference is model else [model, reference]
        self._owners = {x.base_model: x for x in models}
        self._hooks = [x.base_model.register_forward_hook(self._after_backbone, with_kwargs=True) for x in models]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _after_backbone(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self.pending is None or not self.same_tokens(args[0] if args else kwargs.get("input_ids")):
            return
        model, labels = self._owners[module], self.pending.labels
        of_policy = model is self.model and self.is_policy_forward(None)
        if not of_policy and not self.is_reference_forward():
            return
        backbone = output.last_hidden_state  # (B, T + virtual, H)
        hidden = backbone[:, -labels.size(1) :][:, :-1]  # (B, T-1, H)
        if hidden.shape[:2] != labels[:, 1:].shape:
            return
        head = model.get_output_embeddings()
        if isinstance(head.weight, DTensor) or hasattr(head.weight, "ds_id"):
            raise InputError(
                "the LM head is sharded (FSDP or ZeRO-3), which plot_backend='separate' cannot read; expected a "
                "whole one: use plot_backend='fused'."
            )
        rows = (labels[:, 1:].flatten() != -100).nonzero().squeeze(-1)  # (M,)
        flat = hidden.reshape(-1, hidden.size(-1))[rows.to(hidden.device)]  # (M, H)
        targets = labels[:, 1:].flatten()[rows].to(flat.device)
        spec = dataclasses.replace(head_spec(model, self._temperature), **self.head_options)
        run = self.run_head if of_policy else self.run_reference_head
        run(flat, head.weight, head.bias, targets, rows, spec)
        if of_policy and self.result is not None:
            # The vanilla loss does not depend on `flat`: compare gradients at the tensor that both losses depend on.
            self.result.hidden, self.result.recompute_rows = backbone, None
