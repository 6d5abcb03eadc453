"""nanoGCG's half of benchmarks/gcg.py, and how a child process talks to it.

Runs with torch, transformers and nanoGCG alone: in its environment there is no plot-align. A child reads one JSON
object a line from stdin, ``{"do": NAME, ...arguments}``, and answers with one a line on stdout. Whatever else writes
to stdout lands on stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any


def serve(handlers: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """Answers requests until stdin ends; an exception ends the process with its traceback on stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(handlers[request.pop("do")](**request)) + "\n")
        answers.flush()


def peak() -> float:
    """Peak of the resident set of this process in bytes; NaN where the system does not tell.

    Not ``getrusage``: its peak is inherited from the process that started this one.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return float("nan")
    return next((1024.0 * int(row.split()[1]) for row in status.splitlines() if row.startswith("VmHWM")), float("nan"))


class Checkpoint:
    """What both children do alike: load the model and say what it computes."""

    packages: tuple[str, ...] = ("torch", "transformers", "tokenizers")

    def load(self, folder: str, threads: int) -> dict[str, Any]:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.loaded = peak()
        return {"versions": {name: metadata.version(name) for name in self.packages}}

    def logits(self, text: str) -> dict[str, Any]:
        """Token ids of a text and the logits after its last token."""
        import torch

        row = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids  # (1, T)
        with torch.no_grad():
            return {"ids": row[0].tolist(), "logits": self.model(input_ids=row).logits[0, -1].float().tolist()}

    def measured(self, seconds: float, cpu: float, losses: list[float], kept: list[int]) -> dict[str, Any]:
        """The answer to ``run``.

        Args:
            seconds, cpu: wall-clock and processor time of the whole attack.
            losses: the best so far after so many steps, from 0 on.
            kept: candidates that came back from text as the tokens they were, of every step.
        """
        mean = sum(kept) / len(kept)
        return {
            "seconds": seconds, "cpu_seconds": cpu, "losses": losses, "kept": mean, "peak": peak() - self.loaded
        }  # fmt: skip


class NanoGCG(Checkpoint):
    packages = (*Checkpoint.packages, "nanogcg")

    def run(
        self, prompt: str, target: str, suffix: str, steps: int, width: int, top_k: int, batch_size: int | None,
        seed: int,
    ) -> dict[str, Any]:  # fmt: skip
        """One attack."""
        import torch
        from nanogcg import GCGConfig, gcg

        kept: list[int] = []
        initial: list[float] = []

        class Watched(gcg.GCG):  # nanogcg.run with the loss of the initial suffix looked at
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                special = torch.tensor(self.tokenizer.all_special_ids)
                self.not_allowed_ids = torch.cat([self.not_allowed_ids, special]).unique()

            def init_buffer(self) -> Any:
                buffer = super().init_buffer()
                initial.append(float(buffer.get_lowest_loss()))
                return buffer

        def counted(ids: torch.Tensor, tokenizer: Any) -> torch.Tensor:
            found = filter_ids(ids, tokenizer)
            kept.append(len(found))
            return found

        config = GCGConfig(
            num_steps=steps, optim_str_init=suffix, search_width=width, topk=top_k, batch_size=batch_size,
            seed=seed, verbosity="ERROR",
        )  # fmt: skip
        gcg.logger.setLevel("ERROR")
        filter_ids, gcg.filter_ids = gcg.filter_ids, counted
        try:
            start, cpu = time.perf_counter(), time.process_time()
            attack = Watched(self.model, self.tokenizer, config)
            result = attack.run([{"role": "user", "content": prompt + "{optim_str}"}], target)
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        finally:
            gcg.filter_ids = filter_ids
        best = [min(initial)]
        for loss in result.losses:
            best.append(min(best[-1], loss))
        return self.measured(seconds, cpu, best, kept)


if __name__ == "__main__":
    child = NanoGCG()
    serve({"load": child.load, "logits": child.logits, "run": child.run})
