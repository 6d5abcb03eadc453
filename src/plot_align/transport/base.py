"""The base class of all divergences: one primitive without a graph, and its differentiable value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from plot_align.errors import InputError

SUM_TOLERANCE = 1e-6  # a float32 target is off by 6e-8 at most; a bfloat16 one by far more, and is refused


class Constants(nn.Module):
    """A module whose constants stay float64 (float32 on devices without it), even under ``.to(dtype)``.

    They are buffers, so ``.to(device)`` moves them, but they are not part of ``state_dict``.
    """

    def _constant(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for name, buffer in self._buffers.items():
            if buffer is None:
                continue
            device = fn(buffer.new_empty(0, dtype=torch.float32)).device  # the target device; its dtype is ignored
            dtype = widest_dtype(device) if buffer.is_floating_point() else buffer.dtype
            # MPS has no float64: convert before moving there, and after moving away
            self._buffers[name] = buffer.to(dtype).to(device) if device.type == "mps" else buffer.to(device).to(dtype)
        for child in self.children() if recurse else ():
            child._apply(fn)
        return self


class Divergence(Constants, ABC):
    """A distance of distributions over V tokens to a target P, given here or with each call.

    Subclasses need to implement only :meth:`value_and_potential`.

    A target of the current batch is passed with the call. It is a constant without gradient. Only its shape is
    checked: a check that it is a distribution would synchronise a GPU on every step.

    Arithmetic is in p's dtype, but in float32 at least. The constants stay in float64 (see :class:`Constants`),
    because a target rounded to bfloat16 would be another target, and out of ``state_dict``, because a checkpoint must
    not depend on the term it was trained with.

    Args:
        target: (V,) P, non-negative, finite, sum 1 within 1e-6; zero entries are allowed. Any float dtype and device.

    Raises:
        InputError: the target is not a distribution.
    """

    target: Tensor  # (V,)

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._constant("target", check_target(target))

    @property
    def vocab_size(self) -> int:
        """V, the number of rows of the head that the target covers."""
        return self.target.numel()

    @abstractmethod
    def value_and_potential(self, p: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """D(p, P) and its derivative in p, sharing the work, without a graph.

        Args:
            p: (..., V), never modified.
            target: P of this call, (V,) or broadcastable to p's shape, on p's device; a distribution (not checked),
                never modified. None: the target given at construction.

        Returns:
            value (...) and potential (..., V), both in the dtype of the arithmetic. The potential is the derivative
            of the value in each p_j without the constraint sum p = 1. On the simplex an additive constant does not
            matter, and ``p_t * (s - <p_t, s>)`` does not depend on it.

        Raises:
            InputError: the last dimension of p is not V, or target's shape does not broadcast to p's.
        """

    def value(self, p: Tensor, target: Tensor | None = None) -> Tensor:
        """D(p, P): (..., V) → (...), differentiable once in p. Infinite values come back as inf."""
        if torch.is_grad_enabled() and p.requires_grad:
            return _Value.apply(p, self, target)
        return self._value_alone(p, target)

    def _value_alone(self, p: Tensor, target: Tensor | None) -> Tensor:
        """The value without a derivative; subclasses override it if they can save the potential."""
        return self.value_and_potential(p, target)[0]

    def potential(self, p: Tensor, target: Tensor | None = None) -> Tensor:
        """dD/dp: (..., V) → (..., V), no graph."""
        return self.value_and_potential(p, target)[1]

    def forward(self, p: Tensor, target: Tensor | None = None) -> Tensor:
        """Same as :meth:`value`."""
        return self.value(p, target)

    def sorted_form(self) -> tuple[Tensor, Divergence] | None:
        """An order (V,) of the tokens in which this divergence needs neither a sort nor a gather, and the same
        divergence for p in that order; ``None`` if there is no such order."""
        return None

    def _prepare(self, p: Tensor) -> Tensor:
        """(..., V) → (..., V), detached, in the dtype the arithmetic uses."""
        if p.ndim == 0 or p.shape[-1] != self.vocab_size:
            raise InputError(
                f"p has shape {tuple(p.shape)}, but its last dimension must be the target's {self.vocab_size} tokens: "
                "build the target with size = the number of rows of the head."
            )
        return p.detach().to(torch.promote_types(p.dtype, torch.float32))

    def _target_for(self, p: Tensor, target: Tensor | None) -> Tensor:
        """P of this call: (V,) or broadcastable to p, detached, float32 at least; not yet in p's dtype."""
        if target is None:
            return self.target
        if target.ndim == 0 or target.shape[-1] != p.shape[-1] or not _broadcasts(target.shape, p.shape):
            raise InputError(
                f"target has shape {tuple(target.shape)} for p of shape {tuple(p.shape)}, but ({self.vocab_size},) or "
                "a shape that broadcasts to p's is needed: pass one target for all, or one for each row of p."
            )
        return target.detach().to(torch.promote_types(target.dtype, torch.float32))


class _Value(torch.autograd.Function):
    """value(p) with the potential as its gradient."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, divergence: Divergence, target: Tensor | None) -> Tensor:
        value, potential = divergence.value_and_potential(p, target)  # (...), (..., V)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(potential)
            ctx.input_dtype = p.dtype
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():  # the saved potential has no graph: second derivatives would silently be zero
            raise InputError(
                "create_graph is True, but a divergence can be differentiated only once: leave create_graph off, or "
                "use an optimiser that needs no second derivatives."
            )
        (potential,) = ctx.saved_tensors  # (..., V)
        return (grad.unsqueeze(-1) * potential).to(ctx.input_dtype), None, None


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(to), strict=False))


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64, except on Apple's GPUs, which have none."""
    return torch.float32 if device.type == "mps" else torch.float64


def check_target(target: Tensor) -> Tensor:
    """(V,) → (V,) in float64 (float32 on MPS), its own copy; refuses what is no distribution.

    Raises:
        InputError: not a floating-point vector, or with NaN, infinite or negative entries, or a sum that is not 1.
    """
    if not isinstance(target, Tensor) or target.ndim != 1 or not target.is_floating_point():
        got = f"a {target.dtype} tensor of shape {tuple(target.shape)}" if isinstance(target, Tensor) else type(target)
        raise InputError(
            f"target is {got}, but a floating-point tensor of shape (V,) is needed: "
            "pass PreferenceDistribution.target()."
        )
    target = target.detach().to(widest_dtype(target.device), copy=True)  # (V,)
    total = float(target.sum())
    if not torch.isfinite(target).all() or bool((target < 0).any()) or abs(total - 1.0) > SUM_TOLERANCE:
        smallest = float(target.min())
        raise InputError(
            f"target sums to {total:.9g} with smallest entry {smallest:.3g}, but a distribution is needed (finite, "
            "non-negative, sum 1 within 1e-6): divide the non-negative weights by their sum, in float64."
        )
    return target
