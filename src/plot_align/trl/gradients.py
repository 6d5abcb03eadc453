"""How strongly each loss pulls at the head's input, without a backward through the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from plot_align.trl.term import HeadResult

# Rows of the head's input that are looked at. Both norms are taken over the same rows, spread over the whole batch,
# and averaged over the steps: a small sample says enough about their ratio, and costs a small part of the head.
_SAMPLED_ROWS = 64


def gradient_norms(vanilla: Tensor, plot: Tensor, result: HeadResult, *, offset: int = 0) -> Tensor:
    """``(‖∂L_vanilla/∂h‖, ‖∂L_PLOT/∂h‖)`` at the head's input h, ``(2,)``; exact up to 64 rows, estimated above.

    A row of ∂L/∂h depends on that row alone once the derivatives in the head's outputs are known, and those are cheap.
    So an evenly spaced sample of n of the N rows is swept again, and each norm is that of the sample times sqrt(N/n).
    What reaches h past the head (a router's auxiliary loss) is not counted.

    Args:
        vanilla, plot: the two losses, with their graphs, which stay usable.
        result: the head pass that both come from.
        offset: which of the evenly spaced samples, e.g. the step.
    """
    with _without_hooks(result.outputs):
        return _norms(vanilla, plot, result, offset)


def _norms(vanilla: Tensor, plot: Tensor, result: HeadResult, offset: int) -> Tensor:
    if result.recompute_rows is None:
        norms = []
        for loss in (vanilla, plot):
            (gradient,) = torch.autograd.grad(loss, result.hidden, retain_graph=True, allow_unused=True)
            norms.append(vanilla.new_zeros(()) if gradient is None else gradient.float().norm())
        return torch.stack(norms)
    head = result.head
    rows = result.hidden.size(0)
    stride = max(1, -(-rows // _SAMPLED_ROWS))
    sample = torch.arange(offset % stride, rows, stride, device=result.hidden.device)  # (n,)
    if sample.numel() == 0:
        return vanilla.new_zeros(2)
    names = {"vanilla": ("log_probs", "entropy"), "plot": ("marginals", "values", "reward")}
    hidden, again = result.recompute_rows(sample)  # (n, H)
    squares = []
    for loss, fields in ((vanilla, names["vanilla"]), (plot, names["plot"])):
        fields = tuple(name for name in fields if _is_differentiable(getattr(head, name)))
        outputs_of_pass = [getattr(head, name) for name in fields]
        found = torch.autograd.grad(loss, outputs_of_pass, retain_graph=True, allow_unused=True)
        given = [
            (getattr(again, name), gradient if name in ("marginals", "reward") else gradient[sample])
            for name, gradient in zip(fields, found, strict=True)
            if gradient is not None
        ]
        if not given:
            squares.append(vanilla.new_zeros(()).float())
            continue
        outputs, gradients = zip(*given, strict=True)
        (gradient,) = torch.autograd.grad(outputs, hidden, gradients, retain_graph=True)  # (n, H)
        squares.append(gradient.float().square().sum() * (rows / sample.numel()))
    return torch.stack(squares).sqrt()


@contextmanager
def _without_hooks(outputs: Iterable[Tensor]) -> Iterator[None]:
    """FSDP2 and DeepSpeed take the first gradient that passes the model's outputs for the backward of the step: they
    gather weights, and at its end reduce gradients that are not there."""
    hooks = [output._backward_hooks for output in outputs if output._backward_hooks]
    kept = [dict(of_output) for of_output in hooks]
    for of_output in hooks:
        of_output.clear()
    try:
        yield
    finally:
        for of_output, before in zip(hooks, kept, strict=True):
            of_output.update(before)


def _is_differentiable(output: Tensor | None) -> bool:
    return output is not None and output.requires_grad
