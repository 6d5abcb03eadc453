"""W1 on a line through cumulative distribution functions, and its mean and maximum over several lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from plot_align.errors import InputError
from plot_align.transport.base import Divergence
from plot_align.transport.geometry import Geometry

# Bytes of one buffer of the lines that are processed together: on a CPU one line, which fits into its cache.
_TOGETHER = {"cpu": 1, "cuda": 64 << 20}


class Wasserstein1(Divergence):
    """The 1-Wasserstein distance of p to P for the cost ``|x_i - x_j|``.

        D = cumsum(p[order]) - cumsum(P[order]);  value = (D.abs() * gaps).sum()    # the naive line

    With the tokens sorted by coordinate, ``gaps[k] = x_(k+1) - x_(k)`` and the last gap 0::

        W1 = sum_k |F_p(k) - F_P(k)| * gaps[k]              s_j = sum_{k >= j} sign(F_p(k) - F_P(k)) * gaps[k]

    s is the Kantorovich potential, returned in token order; sign(0) = 0, so s = 0 at p = P (the subgradient of least
    norm). Tokens with equal coordinates have gap 0: their order does not matter. Where F_p and F_P tie exactly in
    theory but differ by rounding, the sign is that of the rounding: s is then another valid subgradient. Source:
    Peyré & Cuturi, "Computational Optimal Transport" (2019), remark 2.30.

    Three (..., V) buffers live at the peak, the returned potential included.

    Args:
        target: (V,) P, see :class:`Divergence`.
        geometry: coordinates (V,).

    Raises:
        InputError: the geometry has another number of tokens than the target.
    """

    order: Tensor  # (V,) int64: tokens by coordinate
    rank: Tensor  # (V,) int64: its inverse
    line: SortedLine  # the same in that order

    def __init__(self, target: Tensor, geometry: Geometry) -> None:
        super().__init__(target)
        order, rank, gaps = _sorted_line(geometry, self.target)
        self._constant("order", order)
        self._constant("rank", rank)
        self.line = SortedLine(self.target[order], gaps)

    @torch.no_grad()
    def value_and_potential(self, p: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Divergence.value_and_potential`; both in units of the geometry's coordinates."""
        value, potential = self.line.value_and_potential(*self._sorted(p, target))  # (...), (..., V)
        return value, potential.index_select(-1, self.rank)

    def _value_alone(self, p: Tensor, target: Tensor | None) -> Tensor:
        return self.line.value(*self._sorted(p, target))

    def sorted_form(self) -> tuple[Tensor, SortedLine]:
        return self.order, self.line

    def _sorted(self, p: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor | None]:
        p = self._prepare(p)  # (..., V)
        if target is not None:
            target = self._target_for(p, target).index_select(-1, self.order)  # (V,) or (..., V)
        return p.index_select(-1, self.order), target


class SortedLine(Divergence):
    """W1 of distributions whose tokens are already in the order of their coordinates: no sort, no gather.

    Args:
        target: (V,) P in that order, see :class:`Divergence`.
        gaps: (V,) distance from each coordinate to the next, the last one 0.
    """

    gaps: Tensor  # (V,)

    def __init__(self, target: Tensor, gaps: Tensor) -> None:
        super().__init__(target)
        self._constant("gaps", gaps)

    @torch.no_grad()
    def value_and_potential(self, p: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Divergence.value_and_potential`."""
        difference = self._difference(p, target)  # (..., V)
        return _transport(difference, self.gaps.to(difference.dtype))

    @torch.no_grad()
    def _value_alone(self, p: Tensor, target: Tensor | None) -> Tensor:
        distance = _cumulate(self._difference(p, target)).abs_()  # (..., V) |F_p - F_P|
        return distance.mul_(self.gaps.to(distance.dtype)).sum(-1)  # a product and a sum, as in `_transport`

    def _difference(self, p: Tensor, target: Tensor | None) -> Tensor:
        p = self._prepare(p)  # (..., V)
        return p - self._target_for(p, target).to(p.dtype)


class SlicedWasserstein(Divergence):
    """The mean over several lines of W1: sliced Wasserstein for random slices.

        value = torch.stack([Wasserstein1(P, line).value(p) for line in geometries]).mean(0)    # the naive line

    The potential is the mean of the lines' potentials. A lower bound of the exact cost where every line is one, and of
    the largest slice. Source: Bonneel et al., "Sliced and Radon Wasserstein barycenters of measures" (2015).

    Four buffers live at the peak, of one line (..., V) on a CPU, and of as many as make 64 MiB a buffer on a GPU;
    16 bytes per line and token are kept.

    Args:
        target: (V,) P, see :class:`Divergence`.
        geometries: at least one, coordinates (V,) each, with one unit (:func:`~geometry.slices` sees to it).

    Raises:
        InputError: no geometry, or one with another number of tokens than the target.
    """

    orders: Tensor  # (k, V) int32: tokens by coordinate, for each line
    ranks: Tensor  # (k, V) int32
    gaps: Tensor  # (k, V)

    def __init__(self, target: Tensor, geometries: Sequence[Geometry]) -> None:
        super().__init__(target)
        if len(geometries) == 0:
            raise InputError(
                "geometries is empty, but at least one line is needed: pass geometry.slices(embeddings, 50)."
            )
        order, rank, gaps = (
            torch.stack(lines) for lines in zip(*(_sorted_line(g, self.target) for g in geometries), strict=True)
        )
        self._constant("orders", order.int())
        self._constant("ranks", rank.int())
        self._constant("gaps", gaps)

    @torch.no_grad()
    def value_and_potential(self, p: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Divergence.value_and_potential`; both in units of the geometries' coordinates."""
        groups = ((values.sum(-1), potentials.sum(-2)) for values, potentials in self._groups(p, target))
        value, potential = next(groups)
        for group_value, group_potential in groups:
            value += group_value
            potential += group_potential
        return value.div_(len(self.gaps)), potential.div_(len(self.gaps))

    def _groups(self, p: Tensor, target: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Values (..., g) and potentials (..., g, V) of groups of g lines: one line would not fill a GPU."""
        p = self._prepare(p)  # (..., V)
        target = self._target_for(p, target).to(p.dtype)  # (V,) or (..., V)
        together = max(1, _TOGETHER.get(p.device.type, _TOGETHER["cuda"]) // max(1, p.numel() * p.element_size()))
        for start in range(0, len(self.gaps), together):
            some = slice(start, start + together)
            order, rank = self.orders[some], self.ranks[some]  # (g, V)
            difference = p[..., order].sub_(target[..., order])  # (..., g, V)
            values, potentials = _transport(difference, self.gaps[some].to(p.dtype))
            del difference
            yield values, potentials.gather(-1, rank.long().expand_as(potentials))


class MaxSlicedWasserstein(SlicedWasserstein):
    """The largest W1 over several lines, for each row of p; the potential is that line's.

        value = torch.stack([Wasserstein1(P, line).value(p) for line in geometries]).amax(0)    # the naive line

    The tightest of the lines' lower bounds. Where several lines tie, the first one counts: any of their potentials is
    a subgradient. Source: Deshpande et al., "Max-sliced Wasserstein distance and its use for GANs" (2019), here over
    the lines given and not over all directions.

    Memory, arguments and errors as :class:`SlicedWasserstein`.
    """

    @torch.no_grad()
    def value_and_potential(self, p: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Divergence.value_and_potential`; both in units of the geometries' coordinates."""
        lines = (
            (values[..., line], potentials[..., line, :])
            for values, potentials in self._groups(p, target)
            for line in range(values.size(-1))
        )
        value, potential = next(lines)
        for line_value, line_potential in lines:
            larger = line_value > value  # (...)
            value = torch.where(larger, line_value, value)
            potential = torch.where(larger.unsqueeze(-1), line_potential, potential)
        return value, potential


def _sorted_line(geometry: Geometry, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Order (V,), its inverse and the gaps in that order (the last one 0), on the target's device."""
    if geometry.vocab_size != target.numel():
        raise InputError(
            f"geometry has {geometry.vocab_size} tokens and target {target.numel()}, but both must have one "
            "entry per row of the head: build the target with size = geometry.vocab_size."
        )
    coordinates, order = geometry.coordinates.sort(stable=True)  # (V,), (V,)
    gaps = torch.cat([coordinates.diff(), coordinates.new_zeros(1)])  # (V,)
    order = order.to(target.device)
    return order, order.argsort(), gaps.to(target.dtype).to(target.device)


def _transport(difference: Tensor, gaps: Tensor) -> tuple[Tensor, Tensor]:
    """p - P in the line's order, overwritten: (..., V) → W1 (...) and its potential (..., V) in the same order."""
    # cumsum of the difference, not difference of the cumsums: exact zeros where p = P, one pass less
    tail = _cumulate(difference)  # (..., V) F_p - F_P
    slope = tail.sign().mul_(gaps)  # (..., V)
    value = tail.mul_(slope).sum(-1)  # (...); a product and a sum, because autocast and TF32 round matmuls
    _cumulate(tail.copy_(slope))
    total = tail[..., -1:].clone()  # (..., 1)
    torch.sub(slope, tail, out=tail).add_(total)  # (..., V) sum over k >= j = total - (sum over k <= j) + slope_j
    return value, tail


def _cumulate(x: Tensor) -> Tensor:
    """Cumulative sums over the last dimension of ``x``, in place.

    On a GPU torch's kernel adds in an order that differs between runs, so torch refuses it if deterministic algorithms
    are required (``full_determinism`` of the Trainer).
    """
    if x.device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        return x.copy_(cumulative_sums_by_products(x))
    return x.cumsum_(-1)


def cumulative_sums_by_products(x: Tensor, block: int = 512) -> Tensor:
    """Cumulative sums over the last dimension as matrix products in float64: (..., V) → (..., V), deterministic.

    Within blocks by a triangle of ones, then over the blocks' sums in the same way.
    """
    size = x.size(-1)
    blocks = -(-size // block)
    padded = torch.nn.functional.pad(x.double(), (0, blocks * block - size))
    triangle = torch.ones(block, block, dtype=torch.float64, device=x.device).triu()
    within = padded.unflatten(-1, (blocks, block)) @ triangle  # (..., m, block)
    if blocks > 1:
        sums = within[..., -1]  # (..., m)
        within = within + (cumulative_sums_by_products(sums, block) - sums).unsqueeze(-1)
    return within.flatten(-2)[..., :size].to(x.dtype)
