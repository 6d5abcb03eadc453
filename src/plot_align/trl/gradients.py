"""The gradient norm of each loss at the head's input, without a backward through the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from plot_align.trl.term import HeadResult

# Rows of the head's input in the sample. Both norms use the same rows, spread over the whole batch, and are averaged
# over the steps: a small sample is enough for their ratio, and costs a small part of a head pass.
_SAMPLED_ROWS = 64


def gradient_norms(vanilla: Tensor, plot: Tensor, result: HeadResult, *, offset: int = 0) -> Tensor:
    """``(‖∂L_vanilla/∂h‖, ‖∂L_PLOT/∂h‖)`` at the head's input h, ``(2,)``; exact up to 64 rows, estimated above.

    Given the derivatives in the head's outputs, which are cheap, a row of ∂L/∂h depends on that row alone. So the head
    is run again on an evenly spaced sample of n of the N rows, and each norm is that of the sample times sqrt(N/n).
    Gradients that reach h past the head (a router's auxiliary loss) are not counted.

    Args:
        vanilla, plot: the two losses; their graphs are kept.
        result: the head pass that both come from.
        offset: which of the evenly spaced samples, e.g. the step.
    """
    with _without_hooks(result.outputs):
        return _norms(vanilla, plot, result, offset)


def _norms(vanilla: Tensor, plot: Tensor, result: HeadResult, offset: int) -> Tensor:
    if result.recompute_rows is None:
        norms = []
        with result.gather():
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
    names = {"vanilla": ("log_probs", "entropy"), "plot": ("distributions", "values", "reward")}
    hidden, again = result.recompute_rows(sample)  # (n, H)
    squares = []
    for loss, fields in ((vanilla, names["vanilla"]), (plot, names["plot"])):
        fields = tuple(name for name in fields if _is_differentiable(getattr(head, name)))
        outputs_of_pass = [getattr(head, name) for name in fields]
        found = torch.autograd.grad(loss, outputs_of_pass, retain_graph=True, allow_unused=True)
        given = [
            (getattr(again, name), gradient if name in ("distributions", "reward") else gradient[sample])
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
    """Removes the hooks that FSDP2 and DeepSpeed put on the model's outputs. They would take the first gradient for
    the backward of the step, gather weights, and at its end reduce gradients that do not exist."""
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
