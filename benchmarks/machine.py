"""What this machine can do, measured on the spot: bytes a second of a copy, operations a second of a product."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from plot_align.bench.timing import synchronize
from plot_align.records import measure

_ROUNDS = 7
_COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # far beyond the caches
_PRODUCT = {"cpu": (512, 8192), "cuda": (4096, 32768)}  # rows and columns at most


@dataclass(frozen=True)
class Machine:
    """Bytes a second (read and written) of a copy and floating-point operations a second of a matrix product.

    Each is the median of seven; ``bandwidth_range`` and ``throughput_range`` are the slowest and the fastest.
    """

    bandwidth: float
    throughput: float
    bandwidth_range: tuple[float, float]
    throughput_range: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """Entries of a record."""
        return {
            "bandwidth": measure(self.bandwidth, _ROUNDS, spread=self.bandwidth_range, unit="B/s"),
            "throughput": measure(self.throughput, _ROUNDS, spread=self.throughput_range, unit="FLOP/s"),
        }


def measure_machine(rows: int, hidden: int, vocab: int, device: torch.device, dtype: torch.dtype) -> Machine:
    """Measures a copy, and the product of the head's own shape ``(rows, hidden) @ (hidden, vocab)``, cut to a bound.

    Both in ``dtype``: that is what the head moves and multiplies.
    """
    copied, moved = _copy(_COPY_BYTES.get(device.type, _COPY_BYTES["cuda"]) // dtype.itemsize, device, dtype)
    most_rows, most_columns = _PRODUCT.get(device.type, _PRODUCT["cuda"])
    rows, columns = min(rows, most_rows), min(vocab, most_columns)
    left = torch.randn(rows, hidden, device=device, dtype=dtype)
    right = torch.randn(columns, hidden, device=device, dtype=dtype)
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    multiplied = _seconds(lambda: torch.mm(left, right.T, out=out), device)
    operations = 2 * rows * hidden * columns
    return Machine(
        bandwidth=moved / copied[len(copied) // 2],
        throughput=operations / multiplied[len(multiplied) // 2],
        bandwidth_range=(moved / copied[-1], moved / copied[0]),
        throughput_range=(operations / multiplied[-1], operations / multiplied[0]),
    )


def _copy(size: int, device: torch.device, dtype: torch.dtype) -> tuple[list[float], int]:
    """Sorted seconds of copying ``size`` numbers, and the bytes moved; both tensors are gone afterwards."""
    source = torch.zeros(size, device=device, dtype=dtype)
    target = torch.empty_like(source)
    return _seconds(lambda: target.copy_(source), device), 2 * size * dtype.itemsize


def _seconds(run: Callable[[], object], device: torch.device) -> list[float]:
    """Sorted seconds of seven runs, each several calls long on a GPU so that the launch does not count."""
    calls = 10 if device.type == "cuda" else 1
    seconds = []
    for _ in range(_ROUNDS + 1):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize(device)
        seconds.append((time.perf_counter() - start) / calls)
    return sorted(seconds[1:])  # the first one warms up
