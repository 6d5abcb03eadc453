"""Is a kernel as exact as eager torch? Both against float64, on the same rounded inputs.

For every result x of the head (log-probabilities, entropy, output distributions, values, both gradients)

    error(x) = max |x − x₆₄| / max |x₆₄|

of the kernel may be at most that of eager torch in the same dtype plus a :func:`tolerance`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from oracle import reference_head
from plot_align.head import HeadOutput, HeadSpec, fused_head
from plot_align.transport import Divergence, make_divergence
from plot_align.transport.geometry import line, slices

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Eager's own error is some 1e-7, 4e-3 and 1e-3.
_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 1e-3}
_INTERPRETED = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# z = softcap(logit_scale · h W^T) / temperature, with all three at once and with none.
SPECS = {
    "plain": HeadSpec(outputs=("entropy",)),
    "softcap": HeadSpec(temperature=0.7, softcap=3.0, logit_scale=1.3, outputs=("entropy",)),
}
GRANULARITIES = ("batch", "sequence", "token", "token sliced")
_SEGMENTS = 3


@dataclass(frozen=True)
class Case:
    """One head: its vocabulary, dtype, way from products to logits, and its optional outputs."""

    vocab: int
    dtype: torch.dtype
    spec: str
    granularity: str

    @property
    def name(self) -> str:
        """As it stands in a record."""
        return f"{self.vocab} {str(self.dtype).removeprefix('torch.')} {self.spec} {self.granularity}"


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """What a kernel may lose beyond eager torch: rounding in another order of summation.

    Triton's interpreter, which stands in on a CPU, cuts bfloat16 off where a GPU rounds it, and sums up one by one
    where a GPU does it in a tree: it may lose more.
    """
    return (_INTERPRETED if device.type == "cpu" else _TOLERANCE)[dtype]


def cases(vocabularies: tuple[int, ...]) -> Iterator[Case]:
    """Every combination, small vocabularies first."""
    for vocab, dtype, spec, granularity in product(vocabularies, DTYPES, SPECS, GRANULARITIES):
        yield Case(vocab, dtype, spec, granularity)


def errors(case: Case, *, rows: int, hidden: int, device: torch.device, impl: str) -> dict[str, dict[str, float]]:
    """Error of the fused head with ``impl`` and of eager torch in every result.

    Args:
        case: which head.
        rows, hidden: N, H.
        device: where all three run.
        impl: of :class:`plot_align.head.HeadSpec`.

    Returns:
        Result → ``kernel``, ``eager`` and ``allowed``.
    """
    problem = _Problem(case, rows, hidden, device)
    spec: Any = SPECS[case.spec]
    exact = problem.run(reference_head, torch.float64, spec)
    eager = problem.run(reference_head, case.dtype, spec)
    kernel = problem.run(fused_head, case.dtype, replace(spec, impl=impl))
    return {
        name: {
            "kernel": _error(kernel[name], value),
            "eager": _error(eager[name], value),
            "allowed": _error(eager[name], value) + tolerance(case.dtype, device),
        }
        for name, value in exact.items()
    }


def failures(found: dict[str, dict[str, float]]) -> list[str]:
    """Results that are worse than allowed; one that is not a number is."""
    return [name for name, entry in found.items() if not entry["kernel"] <= entry["allowed"]]


class _Problem:
    def __init__(self, case: Case, rows: int, hidden: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(case.vocab)

        def normal(*shape: int) -> Tensor:  # rounded to the dtype at once: all three get the same input
            return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(case.dtype)

        self.case, self.device = case, device
        self.hidden, self.weight = normal(rows, hidden), normal(case.vocab, hidden)  # (N, H), (V, H)
        self.weight /= hidden**0.5
        self.targets = torch.randint(case.vocab, (rows,), generator=generator, device=device)
        self.targets[0], self.targets[1] = case.vocab - 1, 0  # the last column, and the first
        places = torch.arange(rows, device=device)
        self.weights = torch.rand(rows, generator=generator, device=device) * (places % 4 != 1)  # gaps in between
        self.weights /= self.weights.sum()
        self.segments = places * _SEGMENTS // rows
        self.up = torch.randn(3, rows, generator=generator, device=device, dtype=torch.float64)
        self.potential = torch.randn(_SEGMENTS, case.vocab, generator=generator, device=device, dtype=torch.float64)
        self.target = torch.rand(case.vocab, generator=generator, device=device, dtype=torch.float64)
        self.target /= self.target.sum()

    def run(self, head: Callable[..., HeadOutput], dtype: torch.dtype, spec: HeadSpec) -> dict[str, Tensor]:
        """All results and both gradients of ``head`` in ``dtype``."""
        hidden, weight = (x.to(dtype, copy=True).requires_grad_() for x in (self.hidden, self.weight))
        out = head(hidden, weight, None, self.targets, spec, **self._plot())
        if out.distributions is None or out.entropy is None:
            raise ValueError("the head was run without weights")
        loss = (out.log_probs * self.up[0]).sum() + (out.entropy * self.up[1]).sum()
        if out.values is not None:
            loss = loss + (out.values * self.up[2]).sum()
        else:
            loss = loss + (out.distributions * self.potential[: len(out.distributions)]).sum()
        loss.backward()
        found = {
            "log_probs": out.log_probs,
            "entropy": out.entropy,
            "marginals": out.distributions,
            "values": out.values,
            "grad_hidden": hidden.grad,
            "grad_weight": weight.grad,
        }
        return {name: value.detach().double() for name, value in found.items() if value is not None}

    def _plot(self) -> dict[str, Any]:
        options: dict[str, Any] = {"weights": self.weights}
        match self.case.granularity:
            case "sequence":
                options |= {"segments": self.segments, "num_segments": _SEGMENTS}
            case "token":
                options["divergence"] = self._divergence(line(self.weight))
            case "token sliced":
                options["divergence"] = self._divergence(slices(self.weight, 3, seed=0))
        return options

    def _divergence(self, geometry: Any) -> Divergence:
        return make_divergence("w1", self.target, geometry).to(self.device)


def _error(value: Tensor, exact: Tensor) -> float:
    return float((value - exact).abs().max() / exact.abs().max())
