"""The LM head alone, forward and backward, with the term and without it."""

from __future__ import annotations

import contextlib
import functools
import gc
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from oracle import reference_head
from plot_align.bench.step import random_preference
from plot_align.bench.timing import Samples, held
from plot_align.config import PlotConfig
from plot_align.head import HeadOutput, HeadSpec, fused_head
from plot_align.preference.batch import Batch
from plot_align.records import measure
from plot_align.trl.term import HeadResult, PlotTerm
from roofline import HeadWork

OUTPUTS = ("entropy", "mean_logits", "is_top1")  # what TRL's DPO asks of its head
KINDS = {"dpo": "DPOTrainer", "sft": "SFTTrainer"}


class HeadProblem:
    """One head pass over a micro-batch, forward and backward: mean log-probability, plus the term.

    The first half of the sequences is chosen, the other rejected, as in a batch of pairs; all their tokens are
    completions. If the term's target is anchored on the reference's output, that output is given: the cost of its head
    pass shows in whole steps.

    Args:
        vocab, hidden: size of the head.
        rows, length: sequences, tokens each.
        plots: name of an arm → the term's options.
        method: ``"dpo"`` or ``"sft"``, whose defaults settle ``target="auto"``.
        spec: options of the head. outputs default to those of TRL's DPO.
        autocast: the dtype of the matrix products, where it is not that of the weights.
    """

    def __init__(
        self,
        vocab: int,
        hidden: int,
        rows: int,
        length: int,
        plots: Mapping[str, PlotConfig],
        *,
        device: torch.device,
        dtype: torch.dtype,
        method: str = "dpo",
        spec: HeadSpec | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.autocast = autocast
        self.base = held(device)
        generator = torch.Generator(device).manual_seed(0)
        make = functools.partial(torch.randn, generator=generator, device=device, dtype=dtype)
        self.spec = spec or HeadSpec(outputs=OUTPUTS)
        self.weight = make(vocab, hidden).mul_(0.02).requires_grad_()  # (V, H)
        count = rows * (length - 1)
        self.hidden = make(count, hidden).requires_grad_()  # (N, H)
        labels = torch.randint(vocab, (rows, length), generator=generator, device=device)
        roles = torch.ones(rows, dtype=torch.int8, device=device)
        if method == "dpo":
            roles[rows // 2 :] = -1
        self.batch = Batch(labels, roles)
        self.rows = torch.arange(count, device=device)
        self.targets = labels[:, 1:].flatten()  # (N,)
        preference = random_preference(vocab)
        self.terms: dict[str, PlotTerm] = {}
        for name, config in plots.items():
            config = config.resolve_auto(reference_forward=KINDS[method] in ("DPOTrainer", "KTOTrainer"))
            self.terms[name] = PlotTerm(preference, self.weight.detach(), config).to(device)
        self.reference = torch.rand(1, vocab, generator=generator, device=device, dtype=torch.float32)  # (1, V)
        self.reference /= self.reference.sum()

    @contextlib.contextmanager
    def arm(self, name: str) -> Iterator[Callable[[], None]]:
        """A step of this arm, as :func:`plot_align.bench.timing.interleaved` wants it.

        ``off``: the same kernel without the term. ``two-pass``: a second head pass for the first term of ``plots``.
        ``materialised``: whole logits. Any other: that term, in the head's own pass.
        """
        yield functools.partial(self.step, name)

    def step(self, name: str) -> None:
        """One forward and backward; gradients lie in ``hidden.grad`` and ``weight.grad``."""
        self.hidden.grad = self.weight.grad = None
        with torch.autocast(self.weight.device.type, self.autocast, enabled=self.autocast is not None):
            loss = self.loss(name)
        loss.backward()

    def loss(self, name: str) -> torch.Tensor:
        """The scalar that :meth:`step` goes back from."""
        match name:
            case "off":
                return self._head().log_probs.mean()
            case "two-pass":
                _, loss = self._sweep(fused_head, self._first, self.batch.selected(self._first.config.positions))
                return self._head().log_probs.mean() + loss
            case "materialised":
                head, loss = self._sweep(reference_head, self._first)
            case _:
                head, loss = self._sweep(fused_head, self.terms[name])
        return head.log_probs.mean() + loss

    @property
    def _first(self) -> PlotTerm:
        return next(iter(self.terms.values()))

    def _head(self) -> HeadOutput:
        return fused_head(self.hidden, self.weight, None, self.targets, self.spec)

    def _sweep(
        self, run: Callable[..., HeadOutput], term: PlotTerm, only: torch.Tensor | None = None
    ) -> tuple[HeadOutput, torch.Tensor]:
        """The head with what the term needs of it, and the term; over some positions ``only (B, T-1)``."""
        rows, hidden = self.rows, self.hidden
        if only is not None:
            rows = only.flatten().nonzero().squeeze(-1)
            hidden = hidden[rows]
        pooling = term.pooling(self.batch, rows)
        parts = pooling.arguments(hidden.device)
        divergence = term.head_divergence()
        head = run(hidden, self.weight, None, self.targets[rows], self.spec, divergence=divergence, **parts)
        head = replace(head, reward=term.reward(hidden, self.weight, None, self.spec, **parts))
        result = HeadResult(head, pooling, hidden, rows)
        if term.config.needs_reference:
            result.reference = self.reference.expand(pooling.counts.numel(), -1)
        return head, term.loss(result, self.batch)

    def own_peaks(self, samples: Mapping[str, Samples]) -> dict[str, Samples]:
        """``samples`` with the memory of the head and of each arm's own term.

        Taken off is what the process held before, and the constants of the other arms' terms, which all lie in memory.
        """
        every = sum(map(_bytes, self.terms.values()))
        corrected = {}
        for name, sample in samples.items():
            term = self.terms.get(name) or (self._first if name in ("two-pass", "materialised") else None)
            off = self.base + every - (0 if term is None else _bytes(term))
            corrected[name] = Samples(sample.seconds, [peak and peak - off for peak in sample.peak])
        return corrected

    def work(self, name: str) -> HeadWork:
        """What this arm needs at the least."""
        config = self.terms[name].config
        selected = self.batch.selected(config.positions)  # (B, T-1)
        on_directions = config.ablations.divergence == "w1" and config.ablations.geometry in ("sliced", "max_sliced")
        return HeadWork(
            rows=self.hidden.size(0),
            selected=int(selected.sum()),
            vocab=self.weight.size(0),
            hidden=self.weight.size(1),
            itemsize=(self.autocast or self.weight.dtype).itemsize,
            segments=int(selected.any(-1).sum()) if config.granularity == "sequence" else 1,
            lines=config.ablations.slices if on_directions else 1,
            per_token=config.granularity == "token",
        )


def _bytes(term: PlotTerm) -> int:
    """Of the term's constants: targets, coordinates, orders."""
    return sum(buffer.numel() * buffer.element_size() for buffer in term.buffers())


def extra_seconds(ours: Samples, base: Samples) -> dict[str, Any]:
    """Median of the rounds' differences in seconds, with its quartiles."""
    differences = [a - b for a, b in zip(ours.seconds, base.seconds, strict=True)]
    if len(differences) == 1:
        return {**measure(differences[0], 1, unit="s"), "quartiles": differences * 2}
    low, middle, high = statistics.quantiles(differences, n=4, method="inclusive")
    return {**measure(middle, len(differences), unit="s"), "quartiles": [low, high]}


def release(device: torch.device) -> None:
    """Gives back what the last problem held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
