"""What the divergences cost beside W1 on the norm line: value and potential of one output distribution.

    python benchmarks/sinkhorn.py                                  # vocabulary 131,072, width 512, the CPU, float64
    python benchmarks/sinkhorn.py --device cuda --hidden 4096

Arms are interleaved and compared round by round, each called five times a round. ``w1/norm`` is what they are compared
with; ``... per call`` gets a target of its own with the call. Embeddings and distributions are random. Sinkhorn runs
with its defaults and is expected at no more than ten times W1. The last line printed is the record's path.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from plot_align.bench import interleaved, paired_ratio
from plot_align.records import measure, write_record
from plot_align.transport import Divergence, make_divergence
from plot_align.transport.geometry import line, slices

BASE = "w1/norm"
CALLS = 5  # a call of W1 takes about a millisecond, less than other programs may take the processor away for


def arms(vocab: int, hidden: int, count: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Each divergence, built, as a step of one value and potential."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(vocab, hidden, generator=generator)
    embeddings = (embeddings * (0.5 + torch.rand(vocab, 1, generator=generator))).to(device)  # norms that differ
    logits = 3.0 * torch.randn(3, vocab, generator=generator, dtype=torch.float64)
    p, target, own = logits.softmax(-1).to(device)
    several = slices(embeddings, count)
    built = {
        BASE: make_divergence("w1", target, line(embeddings)),
        f"w1/{count} slices": make_divergence("w1", target, several),
        f"max_w1/{count} slices": make_divergence("max_w1", target, several),
        "emo": make_divergence("emo", target, embeddings=embeddings),
        "sinkhorn/topk": make_divergence("sinkhorn", target, embeddings=embeddings),
        "sinkhorn/clusters": make_divergence("sinkhorn", target, embeddings=embeddings, sinkhorn_support="clusters"),
    }
    steps: dict[str, Callable[[], object]] = {}
    for name, divergence in built.items():
        steps[name] = functools.partial(repeat, divergence, p)
        steps[f"{name} per call"] = functools.partial(repeat, divergence, p, own)
    return steps


def repeat(divergence: Divergence, *tensors: torch.Tensor) -> None:
    for _ in range(CALLS):
        divergence.value_and_potential(*tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=131_072)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--slices", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, default=Path("runs/sinkhorn.json"))
    args = parser.parse_args()
    device = torch.device(args.device)

    from rich.console import Console
    from rich.table import Table

    console = Console()
    with console.status("building the divergences"):
        steps = arms(args.vocab, args.hidden, args.slices, device)
    with console.status(f"{args.repeats + 1} rounds of {len(steps)} arms"):
        contexts = {name: functools.partial(contextlib.nullcontext, step) for name, step in steps.items()}
        samples = interleaved(contexts, repeats=args.repeats, device=device)

    results = {}
    table = Table("arm", "ms", f"time / {BASE}", "middle half", "peak MiB more", title=f"{args.vocab} x {args.hidden}")
    for name, sample in samples.items():
        ratio, *half = paired_ratio(sample.seconds, samples[BASE].seconds)
        extra = statistics.median(sample.peak) - statistics.median(samples[BASE].peak)
        rounds = len(sample.seconds)
        seconds = statistics.median(sample.seconds) / CALLS
        results[name] = {
            "time": measure(ratio, rounds, spread=(half[0], half[1])),
            "seconds": measure(seconds, rounds, unit="s"),
            "extra_peak": measure(extra, rounds, unit="B"),
            "peak": measure(statistics.median(sample.peak), rounds, unit="B"),
        }
        spread = f"{half[0]:.2f} to {half[1]:.2f}"
        table.add_row(name, f"{1e3 * seconds:.2f}", f"{ratio:.2f}", spread, f"{extra / 2**20:.0f}")
    console.print(table)
    config = {name: getattr(args, name) for name in ("vocab", "hidden", "slices", "repeats", "device")}
    print(json.dumps({"record": str(write_record(args.output, "divergences", results, config=config, seed=0))}))


if __name__ == "__main__":
    main()
