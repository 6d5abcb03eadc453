"""``python -m fuzz``: every target by both engines, a record of each thousand cases, a table, what was found."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

# Before any library reads them: no hub, one thread, no cache of the user's.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp(prefix="fuzz-cache-"))

from fuzz.engines import ENGINES, run
from fuzz.targets import NAMES
from plot_align.records import read_record, write_record

PART = 1000  # cases of one record, with a seed of their own: what is interrupted goes on after the last


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument(
        "--cases", type=int, default=10_000, metavar="N", help="of each target and engine (%(default)s)"
    )
    parser.add_argument("--targets", nargs="+", default=NAMES, choices=NAMES, metavar="T", help=", ".join(NAMES))
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES, metavar="E", help=", ".join(ENGINES))
    parser.add_argument("--output", type=Path, default=Path("runs/fuzz"), metavar="DIR", help="(%(default)s)")
    options = parser.parse_args()
    parts: dict[tuple[str, str], list[dict]] = {(n, e): [] for n in options.targets for e in options.engines}
    for seed in range(
        -(-options.cases // PART)
    ):  # a part of every target, then the next: stopped early, all have some
        for name, engine in parts:
            parts[name, engine].append(part(name, engine, seed, options))
            print(row(name, engine, together(parts[name, engine])), flush=True)
    entries = {key: together(of) for key, of in parts.items()}
    print("\n" + table(entries))
    for (name, engine), found in entries.items():
        for finding in found["findings"].values():
            case = bytes.fromhex(finding["case"])[:300]
            print(f"\n{name}, {engine}: {finding['key']}\n  {finding['said']}\n  {case!r}")


def part(name: str, engine: str, seed: int, options: argparse.Namespace) -> dict:
    """The results of one part, from their record where they have run."""
    cases = min(PART, options.cases - PART * seed)
    path = options.output / f"{name}-{engine}-{seed}-{cases}.json"
    if not path.exists():
        found = run(name, engine, cases, seed)
        write_record(path, "fuzz", found, config={"target": name, "engine": engine, "cases": cases}, seed=seed)
    return read_record(path, "fuzz")["results"]


def together(parts: list[dict]) -> dict:
    """Sums over the parts; each finding once."""
    summed = {key: sum(found[key] for found in parts) for key in ("cases", "right", "refused", "failed", "seconds")}
    findings = {finding["key"]: finding for found in reversed(parts) for finding in found["findings"]}
    return {**summed, "peak_mib": max(found["peak_mib"] for found in parts), "findings": findings}


_HEAD = ("input", "engine", "cases", "right", "clear errors", "findings", "seconds", "peak MiB")


def row(name: str, engine: str, found: dict) -> str:
    counts = [f"{found[key]:,}" for key in ("cases", "right", "refused")]
    cells = [name, engine, *counts, len(found["findings"]), f"{found['seconds']:.0f}", f"{found['peak_mib']:.0f}"]
    return f"| {' | '.join(map(str, cells))} |"


def table(entries: dict) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(_HEAD)} |", "|---|---|" + "---:|" * 6]
    return "\n".join([*lines, *(row(name, engine, found) for (name, engine), found in entries.items())])


if __name__ == "__main__":
    main()
