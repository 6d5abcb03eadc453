"""Records: one JSON file per run, with its configuration, seed, versions, hardware, commit and results.

Reports read only these files. A record is strict JSON (RFC 8259), which has neither NaN nor infinity. An infinite
divergence must stay infinite in the report, so a float that is not finite is written as the object
``{"$float": "NaN"}`` (or ``"Infinity"``, ``"-Infinity"``) and read back as that float. ``digest`` is of all else in
it: a record that was altered is refused. One without it, of an earlier version or written by hand, is read as it is.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from plot_align._version import __version__
from plot_align.errors import InputError
from plot_align.io import complete_or_absent, json_digest, parse_json

FORMAT = "plot-align record"
SCHEMA = 1
NORMAL_95 = statistics.NormalDist().inv_cdf(0.975)  # half the width of a 95 % interval, in standard errors

_PACKAGES = (
    "torch",
    "trl",
    "transformers",
    "datasets",
    "tokenizers",
    "accelerate",
    "peft",
    "numpy",
    "scipy",
    "safetensors",
)
_FLOAT = "$float"
_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def measure(
    value: float,
    n: int,
    *,
    interval: tuple[float, float] | None = None,
    spread: tuple[float, float] | None = None,
    error: float | None = None,
    unit: str | None = None,
) -> dict[str, Any]:
    """The entry of one measured number in a record.

    Args:
        value: the number, in ``unit``.
        n: number of observations.
        interval: 95 % confidence interval (low, high).
        spread: smallest and largest observation, if there are too few for an interval (three seeds).
        error: standard error of ``value``, in ``unit``.
        unit: e.g. ``"s"``, ``"MiB"``; None for a plain number or a proportion.

    Raises:
        InputError: ``n`` is negative.
    """
    if n < 0:
        raise InputError(f"measure: n is {n}, expected the number of observations, 0 or more; count them again")
    entry: dict[str, Any] = {"value": value, "n": n}
    if interval is not None:
        entry["interval"] = list(interval)
    if spread is not None:
        entry["spread"] = list(spread)
    if error is not None:
        entry["error"] = error
    if unit is not None:
        entry["unit"] = unit
    return entry


def mean_of(values: Sequence[float], *, unit: str | None = None) -> dict[str, Any]:
    """Mean of repeated runs, their spread (smallest, largest) and, for two or more runs, the standard error."""
    if not values:
        return measure(math.nan, 0, unit=unit)
    low, high = min(values), max(values)
    # Rounding can put the mean of equal values outside them, and a whisker of negative length breaks a figure.
    mean = min(max(statistics.fmean(values), low), high)
    error = standard_error(values) if len(values) > 1 else None
    return measure(mean, len(values), spread=(low, high), error=error, unit=unit)


def standard_error(values: Sequence[float]) -> float:
    """``s / sqrt(n)`` of the mean, s the sample standard deviation (n - 1); NaN if it is undefined."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    return statistics.stdev(values) / math.sqrt(len(values))


def paired(treated: Mapping[int, float], control: Mapping[int, float], *, unit: str | None = None) -> dict[str, Any]:
    """Mean of ``treated - control`` over the seeds that both have, with the standard error of that mean.

    Both arms of a seed see the same data in the same order, so variation between seeds cancels. Two infinities have
    the difference NaN.

    Args:
        treated, control: seed to value.
        unit: unit of the values.
    """
    return mean_of([treated[seed] - control[seed] for seed in treated if seed in control], unit=unit)


def proportion_of(hits: int, n: int) -> dict[str, Any]:
    """``hits / n`` with its 95 % Wilson score interval (:func:`wilson`).

    Raises:
        InputError: ``hits`` is not between 0 and ``n``.
    """
    if not 0 <= hits <= n:
        raise InputError(f"proportion_of: hits is {hits}, expected 0 to n = {n}; count hits among the n cases only")
    proportion = hits / n if n else math.nan
    return measure(proportion, n, interval=wilson(proportion, n))


def wilson(proportion: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval (low, high) of a proportion of ``n`` cases; (0, 1) if there are none.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).

    Args:
        proportion: in [0, 1]; not used if ``n`` is 0.
        n: number of independent cases.
    """
    if n == 0:
        return 0.0, 1.0
    z = NORMAL_95
    middle = (proportion + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(proportion * (1 - proportion) / n + z * z / (4 * n * n))
    # Rounding can move an end by 1e-17 past the proportion, or out of [0, 1].
    return min(max(middle - half, 0.0), proportion), max(min(middle + half, 1.0), proportion)


def write_record(
    path: str | os.PathLike[str],
    kind: str,
    results: Mapping[str, Any],
    *,
    config: Mapping[str, Any],
    seed: int | None = None,
) -> Path:
    """Write one record, never a partial file.

    Args:
        path: the JSON file; its folder is created if missing.
        kind: the command that measured, e.g. ``"estimate"``.
        results: name to number, string, list, nested mapping, or an entry made by :func:`measure`.
        config: every option that decides the result. Paths, dataclasses, tuples, zero-dimensional
            arrays and tensors are converted.
        seed: the seed of the run, None if nothing was random.

    Returns:
        The path written.

    Raises:
        InputError: a value that JSON cannot hold (named by its place), or a folder that cannot be written.
    """
    path = Path(path)
    record = {
        "format": FORMAT,
        "schema": SCHEMA,
        "kind": kind,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "config": _encode(config, "config"),
        "seed": seed,
        "versions": versions(),
        "hardware": hardware(),
        "commit": commit(),
        "results": _encode(results, "results"),
    }
    text = json.dumps({**record, "digest": _digest(record)}, indent=2, allow_nan=False)
    with complete_or_absent(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def _digest(record: Mapping[str, Any]) -> str:
    """16 hex digits of a record as JSON has it."""
    content = {key: value for key, value in record.items() if key != "digest"}
    return json_digest(content)


def read_record(path: str | os.PathLike[str], kind: str | None = None) -> dict[str, Any]:
    """Read a record written by :func:`write_record`, non-finite floats restored.

    Args:
        path: the JSON file.
        kind: the kind expected; None takes any.

    Raises:
        InputError: the file is missing, truncated, not a record, of a newer schema, or of another kind.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a plot-align record: it is not text; name the .json file of a run") from None
    except OSError as error:
        raise InputError(f"record {path} cannot be read ({error.strerror}); check the path") from None
    try:
        plain = parse_json(text, parse_constant=_refuse_constant)
        record = _decode(plain)
    except ValueError:
        raise InputError(
            f"{path} is not complete JSON, so it is damaged or was cut off; delete it, and run the command that wrote "
            "it again"
        ) from None
    schema = record.get("schema") if isinstance(record, dict) and record.get("format") == FORMAT else None
    if isinstance(schema, bool) or not isinstance(schema, int) or schema < 1:
        raise InputError(f"{path} is not a plot-align record; name the .json file that a plot-align command wrote")
    if schema > SCHEMA:
        raise InputError(
            f"{path} has record schema {schema}, and this version reads up to {SCHEMA}; upgrade plot-align"
        )
    missing = {"kind", "config", "seed", "versions", "hardware", "commit", "results"} - record.keys()
    if missing:
        raise InputError(f"{path} lacks {', '.join(sorted(missing))}; run the command that wrote it again")
    if "digest" in plain and plain["digest"] != _digest(plain):
        raise InputError(
            f"{path} was altered after it was written, so its numbers cannot be trusted; delete it, and run the "
            "command that wrote it again"
        )
    if kind is not None and record["kind"] != kind:
        raise InputError(f"{path} is a record of {record['kind']!r}, expected {kind!r}; name the record of that run")
    return record


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that affect results; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "plot-align": __version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def hardware() -> dict[str, Any]:
    """Processor, accelerators and memory in bytes; None for what the system does not report."""
    affinity = getattr(os, "sched_getaffinity", None)
    gpus: list[dict[str, Any]] = []
    torch = sys.modules.get("torch")  # a run without torch used no GPU
    if torch is not None and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append({"name": properties.name, "memory": properties.total_memory})
    return {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_count": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads() if torch is not None else None,
        "memory": _memory(),
        "gpus": gpus,
    }


def commit() -> dict[str, Any] | None:
    """Commit of the git repository around the working directory, and whether it has uncommitted changes."""
    try:
        head = _git("rev-parse", "HEAD")
        names = _git("config", "--list", "--name-only").splitlines()
        # A folder that was unpacked can hold a repository whose configuration names programs for git to run.
        off = {"core.fsmonitor": "false"}
        off |= {name: "" for name in names if name.startswith("filter.") and name.endswith((".clean", ".process"))}
        off |= {name: "false" for name in names if name.startswith("filter.") and name.endswith(".required")}
        status = _git("status", "--porcelain", "--untracked-files=no", "--ignore-submodules=dirty", settings=off)
        return {"id": head, "dirty": bool(status)}
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _git(*arguments: str, settings: Mapping[str, str] | None = None) -> str:
    """What git prints. ``settings``: go before those of its files."""
    pairs = list((settings or {}).items())
    environment = {**os.environ, "GIT_CONFIG_COUNT": str(len(pairs))}
    for number, (name, value) in enumerate(pairs):
        environment |= {f"GIT_CONFIG_KEY_{number}": name, f"GIT_CONFIG_VALUE_{number}": value}
    return subprocess.run(
        ["git", *arguments],
        capture_output=True, text=True, check=True, timeout=10, stdin=subprocess.DEVNULL, env=environment,
    ).stdout.strip()  # fmt: skip


def _cpu_model() -> str | None:
    try:
        for row in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if row.startswith("model name"):
                return row.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine() or None


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _encode(value: Any, place: str) -> Any:
    """``value`` as strict JSON; ``place`` names it in the error."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return {_FLOAT: "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key == _FLOAT:
                raise InputError(f"record: {place} has the key {key!r}, expected a string other than {_FLOAT!r}")
        return {key: _encode(entry, f"{place}.{key}") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(entry, f"{place}[{index}]") for index, entry in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _encode(dataclasses.asdict(value), place)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # NumPy scalar, zero-dimensional tensor
        return _encode(value.item(), place)
    raise InputError(
        f"record: {place} is a {type(value).__name__}, expected numbers, strings, lists and mappings; convert it first"
    )


def _decode(value: Any) -> Any:
    """``value`` as JSON has it, every ``{"$float": …}`` in it as that float."""
    if isinstance(value, list):
        return [_decode(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    if value.keys() != {_FLOAT}:
        return {key: _decode(entry) for key, entry in value.items()}
    name = value[_FLOAT]
    if not isinstance(name, str) or name not in _SPECIAL:
        raise ValueError(f"unknown float {name!r}")
    return _SPECIAL[name]


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
