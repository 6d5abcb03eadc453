"""Entropy-regularised optimal transport on a small support."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plot_align.errors import InputError
from plot_align.transport.base import Divergence
from plot_align.transport.geometry import check_valid, chunks
from plot_align.transport.support import distances, k_means, mean_cost, mean_token
from plot_align.transport.table import Table

_CHECK_EVERY = 10  # iterations between two checks of the marginals
_ROW_ELEMENTS = 1 << 24  # rows of p are solved together as long as their costs fit in 128 MiB of float64
# The numbers of a window stay within exp(+-5 max(C) / epsilon): inside float64 (exp(709)) and float32 (exp(88)).
_SAFE_RATIO = {torch.float64: 100.0, torch.float32: 15.0}


class SinkhornConvergenceWarning(UserWarning):
    """Sinkhorn's iterations stopped before the marginals were met."""


@dataclass(frozen=True)
class SinkhornResult:
    """The result of :func:`sinkhorn`.

    Attributes:
        value: (...) ``<f, p> + <g, P>``, the dual objective: ``<T, C> + epsilon * KL(T || p P^T)`` at convergence, and
            never above it (weak duality).
        transport_cost: (...) ``<T, C>``.
        f: (..., n) potential of p: the gradient of the value in p, finite where p = 0.
        g: (..., m) potential of P.
        iterations: number of iterations; rows that converge earlier do not change afterwards.
        marginal_error: (...) ``sum_j |sum_i T_ij - P_j|``; the other marginal is exact.
    """

    value: Tensor
    transport_cost: Tensor
    f: Tensor
    g: Tensor
    iterations: int
    marginal_error: Tensor


@torch.no_grad()
def sinkhorn(
    p: Tensor,
    target: Tensor,
    cost: Tensor,
    epsilon: float,
    *,
    max_iterations: int = 1000,
    tolerance: float = 1e-9,
) -> SinkhornResult:
    """Entropy-regularised optimal transport in the log domain, batched over leading dimensions.

        f = -eps * logsumexp((g - C) / eps + log P, -1); g = the same with p and f    # the naive lines, repeated

    Solves ``min over T in U(p, P) of <T, C> + epsilon * KL(T || p P^T)``. With ``KL(T || p P^T) = H(p) + H(P) - H(T)``
    the plan is that of ``<T, C> - epsilon * H(T)``. The two values differ by ``epsilon * (H(p) + H(P))``, whose
    derivative is infinite where p = 0 and rewards a flat p whatever P is: so KL is the form that is reported.
    ``T_ij = p_i P_j exp((f_i + g_j - C_ij) / epsilon)``.

    Where ``max(C) / epsilon`` is small enough for the floating-point range (100 in float64), ten iterations at a time
    are run as scalings, matrix-vector products, and absorbed into the potentials (same iterates, a tenth of the
    exponentials); otherwise all are log-sum-exps. The marginals are checked every ten iterations.

    Args:
        p: (..., n) non-negative, sum 1; zeros are allowed. Its dtype, float32 or float64, is that of the arithmetic.
        target: (..., m) P, non-negative, sum 1.
        cost: (..., n, m) ``C_ij``, finite, 0 or more; leading dimensions broadcast.
        epsilon: positive, in the unit of the cost.
        max_iterations: 0 or more, each of which updates g and f once.
        tolerance: marginal error (L1) at which the iterations stop.

    Raises:
        InputError: shapes that do not fit, epsilon not positive.

    Sources: M. Cuturi, "Sinkhorn distances" (2013); B. Schmitzer, "Stabilized sparse scaling algorithms for entropy
    regularized transport problems" (2019), section 3.1; Peyré & Cuturi, "Computational Optimal Transport" (2019), 4.4.
    """
    if cost.ndim < 2 or tuple(cost.shape[-2:]) != (p.shape[-1], target.shape[-1]):
        raise InputError(
            f"cost has shape {tuple(cost.shape)} for p of shape {tuple(p.shape)} and target of shape "
            f"{tuple(target.shape)}, but (..., n, m) for (..., n) and (..., m) is needed."
        )
    _check_epsilon(epsilon)
    p, target = p.detach(), target.detach().to(p)
    scaled = cost.detach().to(p) / epsilon  # (..., n, m); potentials are kept in units of epsilon until the end
    log_p, log_target = p.log(), target.log()  # -inf where 0
    safe = float(scaled.amax()) <= _SAFE_RATIO[p.dtype]
    g = torch.zeros_like(target)  # (..., m)
    f = _soft_min(scaled - g.unsqueeze(-2), log_target, -1)  # (..., n)
    iterations = 0
    while True:
        density = torch.sub(f.unsqueeze(-1) + g.unsqueeze(-2), scaled).exp_()  # (..., n, m) T_ij / (p_i P_j)
        column = _left(p, density)  # (..., m); rows are exact, because f came last
        error = (target * (column - 1.0).abs()).sum(-1)  # (...)
        if iterations >= max_iterations or bool((error <= tolerance).all()):
            break
        window = min(_CHECK_EVERY, max_iterations - iterations)
        if safe:
            u = torch.ones_like(f)
            for _ in range(window):
                v = _left(p * u, density).reciprocal_()  # (..., m)
                u = _right(density, target * v).reciprocal_()  # (..., n)
            new_f, new_g = f + u.log(), g + v.log()
        else:
            new_f, new_g = f, g
            for _ in range(window):
                new_g = _soft_min(scaled - new_f.unsqueeze(-1), log_p, -2)
                new_f = _soft_min(scaled - new_g.unsqueeze(-2), log_target, -1)
        running = (error > tolerance).unsqueeze(-1)  # (..., 1); a row must not depend on those it is solved with
        f, g = torch.where(running, new_f, f), torch.where(running, new_g, g)
        iterations += window
    transport = _left(p, density.mul_(scaled)).mul_(target).sum(-1)  # (...)
    value = (p * f).sum(-1) + (target * g).sum(-1)  # (...)
    return SinkhornResult(epsilon * value, epsilon * transport, epsilon * f, epsilon * g, iterations, error)


@dataclass(frozen=True)
class _Support:
    """r rows of p and their targets on n atoms.

    Attributes:
        mass: (r, 1) the sum of p; 1 where it is 0, and p is then replaced by P.
        source: (r, n) p on the atoms, sum 1.
        sink: (r, n) P on the atoms, sum 1.
        cost: (n, n) or (r, n, n), in units.
        index: tokens of the atoms, or atoms of the tokens.
    """

    mass: Tensor
    source: Tensor
    sink: Tensor
    cost: Tensor
    index: Tensor

    @staticmethod
    def of(source: Tensor, sink: Tensor, cost: Tensor, index: Tensor) -> _Support:
        sink = sink / sink.sum(-1, keepdim=True)  # (r, n)
        mass = source.sum(-1, keepdim=True)  # (r, 1)
        # Of a sequence without a selected position. Nobody reads its value; as NaN it would use up all iterations.
        empty = mass == 0
        mass = mass.masked_fill(empty, 1.0)
        return _Support(mass, torch.where(empty, sink, source / mass), sink, cost, index)


class Sinkhorn(Divergence):
    """Entropy-regularised transport of p to P for the Euclidean cost of the embeddings, on a small support.

        C = torch.cdist(e, e) / unit; T = ot.sinkhorn(p, P, C, epsilon)
        value = (T * C).sum() + epsilon * (T * (T / (p[:, None] * P)).log()).sum()    # the naive lines, V x V

    Subclasses choose the support: :class:`SinkhornTopK`, :class:`SinkhornClusters`. The unit
    is the mean cost between two random tokens (of a seeded sample if there are more than 2,048), so that moving all
    mass from one random token to another costs 1 on average, and epsilon means the same on every model. p and P are
    divided by their sums first. Potential: the dual potential of a token's atom (envelope theorem), finite where
    p = 0.

    The value is not 0 at p = P, and P is not its minimum: entropy pulls p towards the centre of P, more so for larger
    epsilon. Self-transport terms would remove this bias, but their iterations converge many times more slowly than
    those for p and P, so they are not implemented.

    All of it runs in float64 (float32 on devices without it), whatever p's dtype. Where the marginals are not met
    within ``max_iterations`` a :class:`SinkhornConvergenceWarning` says so, and the value and potential are those of
    the last iteration; ``last_error`` keeps the largest marginal error of the last call.

    Args:
        target: (V,) P, see :class:`Divergence`.
        embeddings: (V, H), any floating dtype and device, finite; see :class:`plot_align.transport.table.Table`.
        epsilon: strength of the entropy, in the unit of the cost (relative to a random move).
        max_iterations: 1 or more.
        tolerance: marginal error (L1, in mass) that counts as converged.
        valid: number of tokenizer ids; rows of the head beyond are padding. None: V.
        seed: of the samples and of k-means.

    Raises:
        InputError: the target is no distribution; embeddings of another size, all equal or not finite; an option out
            of range.
    """

    radii: Tensor  # (V,) the distance by which pooling moves each token, in units

    def __init__(
        self,
        target: Tensor,
        embeddings: Tensor,
        *,
        epsilon: float = 0.1,
        max_iterations: int = 100,
        tolerance: float = 1e-3,
        valid: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(target)
        self._table = Table(embeddings, self.vocab_size)
        self.valid = check_valid(valid, self.vocab_size)
        _check_epsilon(epsilon)
        if not isinstance(max_iterations, int) or isinstance(max_iterations, bool) or max_iterations < 1:
            raise InputError(
                f"max_iterations is {max_iterations!r}, but an integer of 1 or more is needed: 100 is usual."
            )
        if not (math.isfinite(tolerance) and tolerance > 0):
            raise InputError(
                f"tolerance is {tolerance!r}, but a positive fraction of the mass is needed: 0.001 is usual."
            )
        self.epsilon, self.max_iterations, self.tolerance = epsilon, max_iterations, tolerance
        self.unit = mean_cost(self._table.weight, self.valid, seed)
        self.last_error = 0.0

    @torch.no_grad()
    def value_and_potential(self, p: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`Divergence.value_and_potential`; both in units of the mean cost between two random tokens."""
        p = self._prepare(p)  # (..., V)
        values, potentials, errors = [], [], []
        for _, _, support in self._supports(p, target):
            solved = self._solve(support)
            # of value(p / sum p): constant on the ray through p
            centred = solved.f - (solved.f * support.source).sum(-1, keepdim=True)  # (r, n)
            values.append(solved.value)
            potentials.append(self._spread(centred / support.mass, support).to(p.dtype))
            errors.append(solved.marginal_error.max())
        self._report(float(torch.stack(errors).max()) if errors else 0.0)  # NaN stays NaN
        return torch.cat(values).to(p.dtype).reshape(p.shape[:-1]), torch.cat(potentials).reshape(p.shape)

    @torch.no_grad()
    def error_bound(self, p: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """How far the exact cost over all V tokens can be from the value: below it, and above it.

        ``value - below <= min over T in U(p, P) of <T, C> <= value + above`` for the Euclidean cost in the same unit:
        entropy adds at most ``epsilon * min(H(p), H(P))`` on the support, a marginal error e makes the value at most
        ``max(C) * e`` too small, and pooling changes the exact cost by at most the distance that it moves p and P.
        Equations: ``docs/mathematics.md``, section 9.

        Args:
            p: (..., V) distributions.
            target: as in :meth:`value`.

        Returns:
            below (...) and above (...), both 0 or more, float64 (float32 on devices without it).
        """
        p = self._prepare(p)  # (..., V)
        bounds = []
        for rows, targets, support in self._supports(p, target):
            own, other = (torch.special.entr(x).sum(-1) for x in (support.source, support.sink))  # (r,), (r,)
            below = self.epsilon * torch.minimum(own, other)  # (r,)
            above = support.cost.amax(dim=(-2, -1)) * self._solve(support).marginal_error  # (r,)
            for side in (rows, targets):
                side = side.to(self.radii.dtype)  # (r, V)
                moved = self._pooled(side, support) @ self.radii / side.sum(-1)  # (r,)
                below, above = below + moved, above + moved
            bounds.append(torch.stack([below, above]))
        below, above = torch.cat(bounds, dim=1)
        return below.reshape(p.shape[:-1]), above.reshape(p.shape[:-1])

    @abstractmethod
    def _reduce(self, p: Tensor, target: Tensor, fixed: bool) -> _Support:
        """(r, V), (r, V) → the support; ``fixed``: the target is the one given at construction."""

    @abstractmethod
    def _spread(self, f: Tensor, support: _Support) -> Tensor:
        """(r, n) → (r, V): each token its atom's potential."""

    @abstractmethod
    def _pooled(self, side: Tensor, support: _Support) -> Tensor:
        """(r, V) → (r, V): the mass that is not at its own embedding."""

    @abstractmethod
    def _row_elements(self) -> int:
        """Numbers that one row of p needs."""

    def _supports(self, p: Tensor, target: Tensor | None) -> Iterator[tuple[Tensor, Tensor, _Support]]:
        """Groups of rows of p and their targets, (r, V) each, with their support."""
        fixed, target = target is None, self._target_for(p, target)
        rows = p.reshape(-1, self.vocab_size)  # (N, V)
        targets = target.expand(p.shape).reshape(rows.shape)  # (N, V)
        group = max(1, _ROW_ELEMENTS // self._row_elements())
        for some, theirs in zip(rows.split(group), targets.split(group), strict=True):
            yield some, theirs, self._reduce(some, theirs, fixed)

    def _solve(self, support: _Support) -> SinkhornResult:
        return sinkhorn(
            support.source,
            support.sink,
            support.cost,
            self.epsilon,
            max_iterations=self.max_iterations,
            tolerance=self.tolerance,
        )

    def _report(self, error: float) -> None:
        self.last_error = error
        if not error <= self.tolerance:
            warnings.warn(  # one digit, so that Python's filter shows a message once and not on every step
                f"Sinkhorn stopped after {self.max_iterations} iterations with a marginal error of {error:.0e}, above "
                f"the tolerance of {self.tolerance:g}: raise epsilon (now {self.epsilon:g}) or max_iterations.",
                SinkhornConvergenceWarning,
                stacklevel=3,
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Divergence:
        super()._apply(fn, recurse)
        self._table.to(self.target.device)
        return self


class SinkhornTopK(Sinkhorn):
    """:class:`Sinkhorn` on the ``size`` largest tokens of p and the ``size`` largest of P.

    What is left of each side is one atom at the mean of all embeddings; a token of the remainder gets that atom's
    potential. The support follows p, so value and gradient jump slightly when a token enters or leaves it.

    Each row of p has a cost matrix of ``(2 size + 1)^2`` numbers of its own.
    """

    centre: Tensor  # (H,) mean embedding
    fixed_top: Tensor  # (k,) int64: the largest tokens of the target given at construction

    def __init__(self, target: Tensor, embeddings: Tensor, *, size: int = 96, **options: Any) -> None:
        super().__init__(target, embeddings, **options)
        self.size = min(_check_size(size), self.vocab_size)
        weight, device = self._table.weight, self.target.device
        centre = mean_token(weight, self.valid)  # (H,)
        self._constant("centre", centre.to(self.target.dtype).to(device))
        radii = torch.cat([torch.linalg.vector_norm(rows - centre, dim=1) for rows in chunks(weight)])  # (V,)
        self._constant("radii", (radii / self.unit).to(self.target.dtype).to(device))
        self._constant("fixed_top", self.target.topk(self.size, sorted=False).indices)

    def _row_elements(self) -> int:
        atoms = 2 * self.size + 1
        return max(atoms * max(atoms, self.centre.numel()), self.vocab_size)

    def _reduce(self, p: Tensor, target: Tensor, fixed: bool) -> _Support:
        ours = p.topk(self.size, sorted=False).indices  # (r, k)
        theirs = self.fixed_top.expand_as(ours) if fixed else target.topk(self.size, sorted=False).indices  # (r, k)
        new = ~(theirs.unsqueeze(-1) == ours.unsqueeze(-2)).any(-1)  # (r, k); a token of both has its mass once
        index = torch.cat([ours, theirs], dim=-1)  # (r, 2k)
        weight = torch.cat([torch.ones_like(new), new], dim=-1)  # (r, 2k)
        dtype, masses = self.radii.dtype, []
        for side in (p, target):
            own = side.gather(-1, index).to(dtype) * weight  # (r, 2k)
            rest = (side.sum(-1, dtype=dtype) - own.sum(-1)).clamp_min(0.0)  # (r,)
            masses.append(torch.cat([own, rest.unsqueeze(-1)], dim=-1))  # (r, 2k + 1)
        rows = self._table.weight[index].to(dtype) - self.centre  # (r, 2k, H)
        rows = torch.cat([rows, torch.zeros_like(rows[:, :1])], dim=1)  # (r, 2k + 1, H)
        return _Support.of(masses[0], masses[1], distances(rows) / self.unit, index)

    def _spread(self, f: Tensor, support: _Support) -> Tensor:
        ours, theirs = support.index.split(self.size, dim=-1)  # (r, k), (r, k)
        potential = f[:, -1:].repeat(1, self.vocab_size)  # (r, V)
        potential.scatter_(1, theirs, f[:, self.size : -1])
        return potential.scatter_(1, ours, f[:, : self.size])  # a token of both: one and the same row of the cost

    def _pooled(self, side: Tensor, support: _Support) -> Tensor:
        return side.scatter(1, support.index, 0.0)


class SinkhornClusters(Sinkhorn):
    """:class:`Sinkhorn` on ``size`` k-means clusters of the embeddings, computed once.

    A cluster's mass is the sum over its tokens, the cost is that of the centroids, and a token gets its cluster's
    potential: moving mass within a cluster is free. See :func:`plot_align.transport.support.k_means`.
    """

    labels: Tensor  # (V,) int64
    cost: Tensor  # (n, n)
    fixed_masses: Tensor  # (n,) of the target given at construction

    def __init__(self, target: Tensor, embeddings: Tensor, *, size: int = 256, seed: int = 0, **options: Any) -> None:
        super().__init__(target, embeddings, seed=seed, **options)
        self.size = _check_size(size)
        if self.size > self.valid:
            raise InputError(f"size is {size} for {self.valid} tokens, but at most one cluster per token is possible.")
        device = self.target.device
        labels, centroids, radii = k_means(self._table.weight, self.size, valid=self.valid, seed=seed)
        cost = distances(centroids - centroids.mean(0))  # (n, n)
        self._constant("labels", labels.to(device))
        self._constant("cost", (cost / self.unit).to(self.target.dtype).to(device))
        self._constant("radii", (radii / self.unit).to(self.target.dtype).to(device))
        self._constant("fixed_masses", self._masses(self.target.unsqueeze(0))[0])

    def _row_elements(self) -> int:
        return max(self.size**2, self.vocab_size)

    def _masses(self, rows: Tensor) -> Tensor:
        """(r, V) → (r, n)"""
        masses = torch.zeros(len(rows), self.size, dtype=self.radii.dtype, device=rows.device)
        return masses.index_add_(1, self.labels, rows.to(masses.dtype))

    def _reduce(self, p: Tensor, target: Tensor, fixed: bool) -> _Support:
        source = self._masses(p)  # (r, n)
        sink = self.fixed_masses.expand_as(source) if fixed else self._masses(target)  # (r, n)
        return _Support.of(source, sink, self.cost, self.labels)

    def _spread(self, f: Tensor, support: _Support) -> Tensor:
        return f.index_select(-1, support.index)

    def _pooled(self, side: Tensor, support: _Support) -> Tensor:
        return side


def _soft_min(costs: Tensor, log_mass: Tensor, dim: int) -> Tensor:
    """``-log sum_j m_j exp(-c_ij)`` over ``dim`` of (..., n, m), in units of epsilon; never above the largest cost."""
    return -torch.logsumexp(log_mass.unsqueeze(-1 if dim == -2 else -2) - costs, dim)


def _left(mass: Tensor, matrix: Tensor) -> Tensor:
    """(..., n), (..., n, m) → (..., m)"""
    return (mass.unsqueeze(-2) @ matrix).squeeze(-2)


def _right(matrix: Tensor, mass: Tensor) -> Tensor:
    """(..., n, m), (..., m) → (..., n)"""
    return (matrix @ mass.unsqueeze(-1)).squeeze(-1)


def _check_epsilon(epsilon: float) -> None:
    if not isinstance(epsilon, (int, float)) or not (math.isfinite(epsilon) and epsilon > 0):
        raise InputError(f"epsilon is {epsilon!r}, but a positive number is needed: 0.1 is usual.")


def _check_size(size: int) -> int:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise InputError(f"size is {size!r}, but an integer of 1 or more is needed: 96 tokens or 256 clusters.")
    return size
