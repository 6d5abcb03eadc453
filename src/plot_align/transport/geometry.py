"""Token embeddings → one coordinate per token, so that optimal transport becomes a sorted one-dimensional problem.

Every coordinate made from embeddings is 1-Lipschitz under its cost, ``|x_i - x_j| <= C_ij``; by duality
the transport cost on the line never exceeds the exact cost on the embeddings. Equations: ``docs/mathematics.md``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from plot_align.errors import InputError

KINDS = ("norm", "principal", "vocabulary")

_CHUNK_ELEMENTS = 1 << 22  # embeddings upcast at a time: 32 MiB in float64, whatever V and H are


@dataclass(frozen=True, eq=False)
class Geometry:
    """A line with one point per token (row of the head).

    Attributes:
        coordinates: (V,) float64, detached, finite; already divided by ``unit``.
        kind: ``"norm"``, ``"principal"`` or ``"vocabulary"`` when made by :func:`line`, ``"slice"`` by
            :func:`slices`; any name for coordinates of your own.
        norm_order: the l of the cost ``||e_i - e_j||_l`` under which ``unit * coordinates`` is 1-Lipschitz, or None
            if there is no such cost.
        unit: the divisor of the raw coordinates, in the embeddings' own unit (1.0 when they were not scaled).
            ``unit * W1`` is the lower bound of the exact cost.
        valid: number of leading rows that are tokenizer ids; the rest is padding of the head. None: all V.

    Raises:
        InputError: the coordinates are not a finite floating-point vector, or ``unit`` is not positive.
    """

    coordinates: Tensor
    kind: str
    norm_order: float | None = None
    unit: float = 1.0
    valid: int | None = None

    def __post_init__(self) -> None:
        x = self.coordinates
        if not isinstance(x, Tensor) or x.ndim != 1 or not x.is_floating_point():
            raise InputError(
                f"coordinates is {_describe(x)}, but a floating-point tensor of shape (V,) is needed: "
                "pass one number per row of the head."
            )
        x = x.detach().to(_float64_device(x.device)).to(torch.float64)  # (V,)
        if not torch.isfinite(x).all():
            raise InputError(
                f"coordinates has a NaN or infinite entry at row {_first(~x.isfinite())}, but every token needs a "
                "finite coordinate: check the embeddings they come from."
            )
        if not (math.isfinite(self.unit) and self.unit > 0):
            raise InputError(f"unit is {self.unit}, but a positive finite number is needed: pass 1.0 for raw.")
        valid = check_valid(self.valid, x.numel())
        object.__setattr__(self, "coordinates", x)
        object.__setattr__(self, "valid", valid)

    @property
    def vocab_size(self) -> int:
        """V, the number of rows of the head (padding included)."""
        return self.coordinates.numel()


def line(
    embeddings: Tensor,
    kind: str = "norm",
    *,
    norm_order: float = 2.0,
    scaled: bool = True,
    valid: int | None = None,
) -> Geometry:
    """Puts every token on a line: ``x_i = ||e_i||_l`` or ``x_i = <e_i - mean, u>``, u the first principal axis.

    ``norm`` is a lower bound under ``C_ij = ||e_i - e_j||_l`` by the reverse triangle inequality; ``principal`` is one
    under the Euclidean cost because u is a unit vector (Cauchy-Schwarz). ``vocabulary`` is the token id, ``x_i = i``:
    optimal transport without the embeddings (an ablation), which bounds no cost.

    Scale: the coordinates are divided by Gini's mean difference, the mean of ``|x_i - x_j|`` over all pairs of
    different tokenizer ids. Moving all mass from one random token to another then costs 1 on average on every model,
    so one value of alpha means the same everywhere. ``scaled=False`` keeps the embeddings' own unit.

    Padding: rows from ``valid`` on keep the coordinate of their own embedding (so the lower bound stays true), but
    take part neither in the scale nor in the axis.

    Args:
        embeddings: (V, H), any floating dtype and device, finite; never modified, no gradient is kept. They are
            upcast to float64 in chunks of 32 MiB.
        kind: ``"norm"``, ``"principal"`` or ``"vocabulary"`` (the embeddings then give only V and the device).
        norm_order: l of the norm and of the cost, 1 <= l <= inf. Only ``norm`` has a choice: 2 with the others.
        scaled: divide by Gini's mean difference.
        valid: number of tokenizer ids, from 2 to V; None means V.

    Returns:
        Geometry: coordinates (V,) float64 on the embeddings' device (on the CPU for devices without float64).

    Raises:
        InputError: wrong shape or dtype; NaN or infinite embeddings; l < 1; l != 2 with another kind than ``norm``;
            ``valid`` out of range; an unknown kind; all coordinates equal (then W1 is zero for every pair of
            distributions).

    The axis is the eigenvector of the (H, H) covariance with the largest eigenvalue, with the sign that makes its
    entry of largest magnitude positive. Where the largest eigenvalue is repeated the axis is one of many equally good
    ones, and may differ between machines.
    """
    if kind not in KINDS:
        raise InputError(f'kind is {kind!r}, but "norm", "principal" or "vocabulary" is needed: choose one of them.')
    norm_order = check_norm_order(norm_order)
    if kind != "norm" and norm_order != 2:
        raise InputError(
            f'norm_order is {norm_order:g} with kind "{kind}", but only kind "norm" has a choice: '
            'leave norm_order at 2 or use kind "norm".'
        )
    embeddings = check_embeddings(embeddings)  # (V, H)
    valid = check_valid(valid, embeddings.shape[0])
    match kind:
        case "norm":
            raw = torch.cat([_row_norms(chunk, norm_order) for chunk in chunks(embeddings)])  # (V,)
            magnitude = float(raw[:valid].max())
        case "principal":
            raw, magnitude = _principal_coordinates(embeddings, valid)  # (V,)
        case _:
            device = _float64_device(embeddings.device)
            raw = torch.arange(embeddings.shape[0], dtype=torch.float64, device=device)  # (V,)
            magnitude = 0.0  # ids are exact: any difference is one

    mean_difference = gini_mean_difference(raw[:valid])
    if mean_difference <= _rounding(embeddings) * magnitude:
        raise InputError(
            f'embeddings give all {valid} tokens the same "{kind}" coordinate, but at least two different ones are '
            f'needed for a distance: use kind "{"principal" if kind == "norm" else "norm"}" or the embeddings of '
            "another layer."
        )
    unit = mean_difference if scaled else 1.0
    cost = None if kind == "vocabulary" else norm_order
    return Geometry(coordinates=raw / unit, kind=kind, norm_order=cost, unit=unit, valid=valid)


def slices(
    embeddings: Tensor, count: int, *, seed: int = 0, scaled: bool = True, valid: int | None = None
) -> list[Geometry]:
    """``count`` random lines through the embeddings: ``x_i = <e_i, u>``, u uniform on the unit sphere.

    Each line is a lower bound under the Euclidean cost (Cauchy-Schwarz), so their mean and their largest are too; see
    :class:`plot_align.transport.SlicedWasserstein` and :class:`plot_align.transport.MaxSlicedWasserstein`.

    Scale: all lines are divided by one unit, the mean over the slices of Gini's mean difference. A random move costs 1
    on average over the slices, and a direction in which the embeddings spread further keeps its longer line.

    Directions are drawn on the CPU, from a generator of their own: the same seed gives the same lines on every device.
    ``count`` vectors of V float64 numbers are held; the embeddings are upcast in chunks.

    Args:
        embeddings: (V, H), as in :func:`line`.
        count: number of lines, 1 or more.
        seed: of the directions.
        scaled: divide by the common unit; False keeps the embeddings' own unit.
        valid: as in :func:`line`.

    Raises:
        InputError: wrong shape or dtype; NaN or infinite embeddings; ``count`` < 1; ``valid`` out of range; all
            embeddings equal.

    Source: Bonneel et al., "Sliced and Radon Wasserstein barycenters of measures" (2015).
    """
    embeddings = check_embeddings(embeddings)  # (V, H)
    valid = check_valid(valid, embeddings.shape[0])
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise InputError(f"count is {count!r}, but at least one slice is needed: 50 is a usual choice.")
    axes = directions(embeddings.shape[1], count, seed).to(_float64_device(embeddings.device))  # (H, k)
    blocks, magnitude = [], 0.0
    for first, rows in _numbered_chunks(embeddings):
        blocks.append(rows @ axes)  # (n, k)
        if first < valid:
            magnitude = max(magnitude, float(_row_norms(rows[: valid - first], 2.0).max()))
    raw = torch.cat(blocks).T.contiguous()  # (k, V)
    mean_difference = sum(gini_mean_difference(x[:valid]) for x in raw) / count
    if mean_difference <= _rounding(embeddings) * magnitude:
        raise InputError(
            f"embeddings are the same for all {valid} tokens, but at least two different ones are needed for a "
            "distance: use the embeddings of another layer."
        )
    unit = mean_difference if scaled else 1.0
    return [Geometry(coordinates=x / unit, kind="slice", norm_order=2.0, unit=unit, valid=valid) for x in raw]


def directions(width: int, count: int, seed: int) -> Tensor:
    """(H, k) float64 on the CPU: unit columns, uniform on the sphere."""
    gaussian = torch.randn(width, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return gaussian / torch.linalg.vector_norm(gaussian, dim=0)


def gini_mean_difference(values: Tensor) -> float:
    """Mean of ``|x_i - x_j|`` over all pairs i != j, from the sorted values in O(n log n).

    ``2 / (n (n - 1)) * sum_k k (n - k) (x_(k+1) - x_(k))``: the k-th gap lies between k (n - k) of the pairs. All
    terms are non-negative, so nothing cancels. Source: C. Gini, "Variabilità e mutabilità" (1912).

    Args:
        values: (n,) float64 with n >= 2.
    """
    n = values.numel()
    gaps = values.sort().values.diff()  # (n - 1,)
    k = torch.arange(1, n, dtype=values.dtype, device=values.device)  # (n - 1,)
    return float((k * (n - k) * gaps).sum() * (2.0 / (n * (n - 1.0))))


def _row_norms(rows: Tensor, order: float) -> Tensor:
    """(n, H) → (n,). Divided by the largest entry first: with l = 200, 0.001**l would underflow to a norm of zero."""
    largest = rows.abs().amax(dim=1)  # (n,)
    safe = torch.where(largest > 0, largest, 1.0)  # (n,)
    return largest * torch.linalg.vector_norm(rows / safe[:, None], ord=order, dim=1)  # (n,)


def _principal_coordinates(embeddings: Tensor, valid: int) -> tuple[Tensor, float]:
    """Coordinates (V,) along the first principal axis of the first ``valid`` rows, and those rows' largest norm."""
    width = embeddings.shape[1]
    total, magnitude = torch.zeros(()), 0.0
    for rows in chunks(embeddings[:valid]):
        total = total.to(rows) + rows.sum(dim=0)  # (H,)
        magnitude = max(magnitude, float(_row_norms(rows, 2.0).max()))
    mean = total / valid  # (H,)

    covariance = mean.new_zeros(width, width)  # (H, H)
    for rows in chunks(embeddings[:valid]):
        rows = rows - mean  # (n, H); centred before squaring, because a large mean would cancel badly afterwards
        covariance.addmm_(rows.T, rows)
    axis = torch.linalg.eigh(covariance).eigenvectors[:, -1]  # (H,)
    axis = axis * torch.sign(axis[axis.abs().argmax()])
    return torch.cat([(rows - mean) @ axis for rows in chunks(embeddings)]), magnitude


def check_embeddings(embeddings: Tensor) -> Tensor:
    """(V, H) → the same tensor, detached; refuses what is no finite floating-point table.

    Raises:
        InputError: wrong shape or dtype; NaN or infinite entries.
    """
    is_table = isinstance(embeddings, Tensor) and embeddings.ndim == 2 and embeddings.shape[1] > 0
    if not is_table or not embeddings.is_floating_point():
        raise InputError(
            f"embeddings is {_describe(embeddings)}, but a floating-point tensor of shape (V, H) is needed: "
            "pass the weight of the model's input embedding."
        )
    embeddings = embeddings.detach()  # (V, H)
    finite = torch.cat([rows.isfinite().all(dim=1) for rows in embeddings.split(rows_per_chunk(embeddings))])  # (V,)
    if not finite.all():
        raise InputError(
            f"embeddings has a NaN or infinite entry in row {_first(~finite)}, but every row must be finite: "
            "check that the checkpoint was loaded completely."
        )
    return embeddings


def chunks(embeddings: Tensor) -> Iterator[Tensor]:
    """(V, H) in any dtype → (n, H) blocks in float64 (on the CPU for devices without it)."""
    return (rows for _, rows in _numbered_chunks(embeddings))


def _numbered_chunks(embeddings: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The blocks of :func:`chunks`, each with the number of its first row."""
    device, first = _float64_device(embeddings.device), 0
    for rows in embeddings.split(rows_per_chunk(embeddings)):
        yield first, rows.to(device).to(torch.float64)
        first += len(rows)


def _rounding(embeddings: Tensor) -> float:
    """Rows equal up to the rounding of their own dtype (unit-normalised embeddings) have no geometry, only noise."""
    own = torch.finfo(embeddings.dtype).eps / math.sqrt(embeddings.shape[1])
    return max(own, 32 * torch.finfo(torch.float64).eps)


def rows_per_chunk(embeddings: Tensor) -> int:
    return max(1, _CHUNK_ELEMENTS // embeddings.shape[1])


def _float64_device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device  # Apple's GPUs have no float64


def check_norm_order(order: float) -> float:
    if not isinstance(order, (int, float)) or isinstance(order, bool) or not order >= 1:  # `not >=` catches NaN
        raise InputError(
            f"norm_order is {order!r}, but a number l with 1 <= l <= inf is needed (below 1 it is no norm): "
            "the usual choice is 2."
        )
    return float(order)


def check_valid(valid: int | None, rows: int) -> int:
    if valid is None:
        valid = rows
    if not isinstance(valid, int) or isinstance(valid, bool) or not 2 <= valid <= rows:
        raise InputError(
            f"valid is {valid!r} for {rows} rows, but an integer from 2 to the number of rows is needed: "
            "pass the number of tokenizer ids, len(tokenizer)."
        )
    return valid


def _first(flags: Tensor) -> int:
    return int(flags.nonzero()[0, 0])


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
