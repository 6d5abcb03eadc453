"""Scoring that an interrupted run goes on with: finished batches are journalled, and never taken for another run's.

A line of a journal is ``[number, values, checksum]``. One that was cut off or altered is as if it were not there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from plot_align.io import no_link, parse_json, unwritable
from plot_align.parallel import each, on_main, rank
from plot_align.preference.estimation import ScoredSequence

Batch = TypeVar("Batch")


def resumed(
    compute: Callable[[Batch], list[Any]], batches: Sequence[Batch], journal: Path | None
) -> Iterator[list[Any]]:
    """Yield ``compute(batch)`` for every batch in order; what the journal holds is read and not computed again.

    The batches are divided among processes (:func:`~parallel.each`); the main one writes the journal.

    Args:
        compute: its result must be what JSON can hold.
        journal: see :func:`journal_path`; None: an interrupted run starts again.

    Raises:
        InputError: the journal cannot be written.
    """
    done = on_main(lambda: read_journal(journal))
    with _journal(journal if rank() == 0 else None) as keep:
        computed = each(compute, (batch for number, batch in enumerate(batches) if number not in done))
        for number in range(len(batches)):
            values = done.get(number)
            if values is None:
                values = next(computed)
                keep(number, values)
            yield values


def journal_path(partial: Path, fingerprint: str) -> Path:
    """``kept.scores.partial`` → ``kept.scores.partial.0123456789abcdef``."""
    return partial.with_name(f"{partial.name}.{fingerprint}")


def forget_partial(partial: Path) -> None:
    """Remove the journals that interrupted runs left at ``partial``."""
    for path in partial.parent.iterdir():
        if re.fullmatch(re.escape(partial.name) + r"\.[0-9a-f]{16}", path.name):
            path.unlink(missing_ok=True)


def fingerprint(
    model: Any, sequences: Sequence[ScoredSequence], options: Mapping[str, Any], *vectors: Tensor | None
) -> str:
    """16 hex digits that identify everything a score depends on, including its rounding.

    Args:
        options: what else decides it, e.g. the batch size. vectors: on the CPU, likewise.
    """
    from plot_align.records import versions

    device = next(model.parameters()).device
    found = versions()
    settings = {
        **options,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {name: found[name] for name in ("plot-align", "torch", "transformers")},
        "config": model.config.to_dict(),
    }
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=8)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy().data)
    for vector in vectors:
        digest.update(b"none" if vector is None else vector.numpy().data)
    for ids, start, stop in sequences:
        digest.update(np.array([len(ids), start, stop], np.int64).data)
        digest.update(ids.data)
    return digest.hexdigest()


@contextmanager
def _journal(path: Path | None) -> Iterator[Callable[[int, list[Any]], None]]:
    """Yields a function that appends the result of a batch to ``path`` and flushes the file."""
    if path is None:
        yield lambda number, values: None
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab", buffering=0, opener=no_link)  # noqa: SIM115 (closed below)
    except OSError as error:
        raise unwritable(path, error) from None

    def keep(number: int, values: list[Any]) -> None:
        line = json.dumps([number, values, _checksum(number, values)]).encode() + b"\n"
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise unwritable(path, error) from None

    with file:
        if file.tell():
            file.write(b"\n")  # ends a line that was cut off
        yield keep


def _checksum(number: int, values: list[Any]) -> int:
    return zlib.crc32(json.dumps([number, values]).encode())


def read_journal(path: Path | None) -> dict[int, list[Any]]:
    """Results of the batches that an interrupted run finished; an incomplete or altered line is ignored."""
    done: dict[int, list[Any]] = {}
    if path is None or not path.exists():
        return done
    for line in path.read_bytes().splitlines():
        try:
            number, values, checksum = parse_json(line)
            if checksum == _checksum(number, values):
                done[number] = values
        except (ValueError, TypeError):
            continue
    return done
