"""The mean output distribution of a model over a data set, on which a target can be anchored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from plot_align.errors import InputError
from plot_align.head import causal_lm, fused_head, head_spec
from plot_align.preference.batch import Batch
from plot_align.trl.batches import model_inputs, policy_batch


@torch.no_grad()
def mean_output_distribution(
    model: Any, batches: Iterable[tuple[dict[str, Tensor], Batch]], positions: str = "chosen"
) -> Tensor:
    """``p̄ = mean_t softmax(z_t)`` over the selected positions of all batches, every position with the same weight.

    Args:
        model: a causal language model (or a PEFT wrapper of one); its training mode is restored.
        batches: ``(inputs of the model, Batch)`` pairs; tensors are moved to the model's device.
        positions: ``chosen``, ``rejected`` or ``all``.

    Returns:
        ``(V,)`` float64 on the CPU, one entry per row of the head, sums to 1.

    Raises:
        InputError: no position is selected in any batch.
    """
    base = causal_lm(model)
    head = base.get_output_embeddings()
    device = head.weight.device
    spec = replace(head_spec(base), gather=gathered)
    total = torch.zeros(getattr(head.weight, "ds_shape", head.weight.shape)[0], dtype=torch.float64)
    tokens = 0
    sharded = is_sharded(model)
    training = model.training
    model.eval()

    def add(backbone: nn.Module, args: Any, output: Any) -> None:
        hidden = output.last_hidden_state[:, :-1][mask]  # (N, H)
        weight, bias = (x.full_tensor() if isinstance(x, DTensor) else x for x in (head.weight, head.bias))
        result = fused_head(
            hidden,
            weight,
            bias,
            torch.zeros(count, dtype=torch.long, device=device),
            spec,
            weights=torch.ones(count, device=device),
        )
        if result.distributions is not None:
            total.add_(result.distributions[0].double().cpu())

    hook = base.base_model.register_forward_hook(add)
    try:
        for inputs, batch in batches:
            mask = batch.selected(positions).to(device)  # (B, T-1)
            count = int(mask.sum())
            if count == 0:
                continue
            inputs = {name: value.to(device) for name, value in inputs.items()}
            if sharded:  # its weights are gathered only if the whole model is called
                model(**inputs, use_cache=False, logits_to_keep=1)
            else:
                base.base_model(**inputs, use_cache=False)
            tokens += count
    finally:
        hook.remove()
        model.train(training)
    if tokens == 0:
        raise InputError(f"no batch has a position with positions={positions!r}; expected completions of that role.")
    return total / total.sum()


def is_sharded(model: Any) -> bool:
    """Whether FSDP2 or ZeRO-3 has split the weights over the ranks."""
    return isinstance(model, FSDPModule) or any(hasattr(x, "ds_id") for x in model.parameters())


def gathered(*parameters: Tensor | None) -> AbstractContextManager[Any]:
    """Gathers parameters that ZeRO-3 has split, for the duration of a ``with`` block."""
    if not any(hasattr(x, "ds_id") for x in parameters):
        return nullcontext()  # TRL's function only asks whether ZeRO-3 is on; this model was made before
    try:
        from trl.trainer.utils import maybe_gather_lm_head_ctx
    except ImportError:  # TRL before 1.9
        import deepspeed

        own = {id(x): x for x in parameters if x is not None}
        return deepspeed.zero.GatheredParameters(list(own.values()))
    return maybe_gather_lm_head_ctx(*parameters)


@contextmanager
def gathered_again(holders: Sequence[nn.Module | None], *parameters: Tensor | None) -> Iterator[None]:
    """:func:`gathered`, and under FSDP2 where it has freed the parameters between forward and backward.

    Args:
        holders: modules that may hold the parameters' FSDP group, the nearest first.
    """
    freed = any(x is not None and x.numel() > 0 and x.untyped_storage().size() == 0 for x in parameters)
    with gathered(*parameters):
        if not freed:
            yield
            return
        group: Any = next(x for x in holders if isinstance(x, FSDPModule))
        group.unshard()
        try:
            yield
        finally:
            group.reshard()


def collated(
    trainer: Any, kind: str, rows: int | None = None, dataset: Any = None
) -> Iterator[tuple[dict[str, Tensor], Batch]]:
    """The first ``rows`` rows of a tokenised data set in order, through the trainer's collator."""
    dataset = trainer.train_dataset if dataset is None else dataset
    columns = None  # the trainer's own loader passes these columns to the collator
    if trainer.args.remove_unused_columns:
        trainer._set_signature_columns_if_needed()
        columns = trainer._signature_columns
    chunk: list[dict[str, Any]] = []
    for index, row in enumerate(dataset):
        if rows is not None and index >= rows:
            break
        chunk.append({name: value for name, value in row.items() if columns is None or name in columns})
        if len(chunk) == trainer.args.per_device_eval_batch_size:
            batch = trainer.data_collator(chunk)
            yield model_inputs(kind, batch, trainer), policy_batch(kind, batch, trainer)
            chunk = []
    if chunk:
        batch = trainer.data_collator(chunk)
        yield model_inputs(kind, batch, trainer), policy_batch(kind, batch, trainer)


def reference_distribution(trainer: Any, kind: str, rows: int, positions: str) -> Tensor:
    """p_ref ``(V,)`` float64: the reference model's p̄ over the first ``rows`` rows of the training set.

    Without a reference model of the trainer's own, the policy before training is the reference.

    Raises:
        InputError: a training set without completions (GRPO, RLOO) or with images; or a policy that is its own
            reference and already sharded.
    """
    has_images = getattr(trainer, "_is_vision_dataset", getattr(trainer, "is_vision_model", False))
    if kind in ("GRPOTrainer", "RLOOTrainer") or has_images:
        raise InputError(
            f"target is 'anchored' and the training set of this {kind} has no text completions from which to estimate "
            "the reference distribution; pass reference=, a (V,) distribution, to attach()."
        )
    from accelerate.utils import broadcast

    model = reference_model(trainer)
    accelerator = trainer.accelerator
    own = getattr(trainer, "ref_model", None) is not None
    if is_sharded(model) and not own:
        raise InputError(
            "target is 'anchored' on the data set and the policy, which is its own reference, is sharded by ZeRO-3 "
            "before training; pass reference=, a (V,) distribution made by one process, to attach(), or use "
            "target_scope='batch' or another target."
        )
    if accelerator.num_processes == 1 or is_sharded(model):  # a forward of sharded weights needs all ranks
        model.to(accelerator.device)
        return mean_output_distribution(model, collated(trainer, kind, rows), positions)
    found = torch.empty(causal_lm(model).get_output_embeddings().weight.size(0), dtype=torch.float64)
    if accelerator.is_main_process:  # with FSDP's RAM-efficient loading only this rank has weights
        model.to(accelerator.device)
        found = mean_output_distribution(model, collated(trainer, kind, rows), positions)
    return broadcast(found.to(accelerator.device), from_process=0).cpu()


def reference_model(trainer: Any) -> Any:
    """The trainer's reference model; if it has none, its policy."""
    own = getattr(trainer, "ref_model", None)
    return trainer.model if own is None else trainer.accelerator.unwrap_model(own)
