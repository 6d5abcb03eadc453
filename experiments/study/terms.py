"""Terms that are only tried: the PLOT term whose potential depends on something, and losses on rows beside the pairs.

What wins by the rule of docs/results.md becomes an option of the package; what does not stays here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from plot_align.inference.chat import evaluating
from plot_align.inference.contexts import cluster
from plot_align.inference.scoring import last_hidden_states, longest_first
from plot_align.preference.batch import Batch, Pooling
from plot_align.preference.estimation import ScoredSequence, scored_pairs
from plot_align.preference.target import anchored
from plot_align.trl.term import PlotTerm
from study.data import Pair, as_dataset

FIRST = 5  # tokens of an answer that count as its beginning
Kind = Literal["place", "answer", "request", "request and place"]


class Contexts:
    """The context of every position of the training pairs, and the preference within each of them.

    ``place``: the first five tokens of an answer, or the rest. ``answer``: a cluster of the reference's hidden state
    at the predicting position. ``request``: a cluster of its hidden state at the request's last token.

    Attributes:
        difference: ``(K, V)`` d of each context, shrunk towards the global d: ``(n·d_c + n0·d) / (n + n0)``.
    """

    SHRINK = 200.0  # n0, tokens

    def __init__(self, kind: Kind, states: States, size: int, clusters: int) -> None:
        self.of_row: dict[tuple[int, ...], Tensor] = {}
        lengths = [len(hidden) for hidden in states.hidden]
        if kind == "answer":
            nearest = cluster(torch.cat(states.hidden), clusters, 0).split(lengths)
        elif kind != "place":
            of_request = cluster(torch.stack([hidden[0] for hidden in states.hidden]), clusters, 0)  # (rows,)
            nearest = [row.expand(length) for row, length in zip(of_request, lengths, strict=True)]
        self.number = {"place": 2, "request and place": 2 * clusters}.get(kind, clusters)
        counts = torch.zeros(2, self.number, size, dtype=torch.float64)
        for i, row in enumerate(states.rows):
            place = (torch.arange(lengths[i]) >= FIRST).long()
            match kind:
                case "place":
                    context = place
                case "answer" | "request":
                    context = nearest[i]
                case "request and place":
                    context = 2 * nearest[i] + place
            self.of_row[tuple(row.ids.tolist())] = context
            tokens = torch.from_numpy(row.ids[row.start : row.stop]).long()
            ones = torch.ones(len(tokens), dtype=torch.float64)
            counts[i % 2].index_put_((context, tokens), ones, accumulate=True)  # chosen and rejected take turns
        tokens = counts.sum(-1, keepdim=True)  # (2, K, 1)
        local = (counts / tokens.clamp(min=1)).diff(dim=0)[0].neg()  # (K, V) chosen − rejected
        whole = counts.sum(1)
        overall = (whole / whole.sum(-1, keepdim=True)).diff(dim=0)[0].neg()  # (V,)
        n = tokens.amin(0)  # (K, 1) of the smaller side
        self.difference = (n * local + self.SHRINK * overall) / (n + self.SHRINK)

    def batch(self, ids: Tensor, mask: Tensor) -> Tensor:
        """``(B, T − 1)`` the context of each position that predicts a token; −1 in the prompt and the padding."""
        found = torch.full((ids.size(0), ids.size(1) - 1), -1)
        for i, (row, kept) in enumerate(zip(ids, mask.bool(), strict=True)):
            tokens = row[kept].tolist()
            context = self.of_row[tuple(tokens)]
            found[i, len(tokens) - 1 - len(context) : len(tokens) - 1] = context
        return found


class States:
    """The reference's hidden states over the training pairs, tokenised as TRL does; kept in a file.

    Attributes:
        rows: chosen and rejected of every pair in turns.
        hidden: of each row the directions ``(n, H)`` at the positions that predict its answer.
    """

    def __init__(self, model: Any, tokenizer: Any, pairs: Sequence[Pair], path: Path) -> None:
        self.rows = [row for pair in scored_pairs(as_dataset(pairs), tokenizer, max_length=None) for row in pair]
        if not path.exists():
            torch.save(self._compute(model), path)
        self.hidden: list[Tensor] = torch.load(path, weights_only=True)

    def _compute(self, model: Any) -> list[Tensor]:
        found = [torch.empty(0)] * len(self.rows)
        with evaluating(model):
            for batch in longest_first(self.rows, 16):
                hidden, _, owners = last_hidden_states(model, [self.rows[i] for i in batch])
                for place, i in enumerate(batch):
                    found[i] = torch.nn.functional.normalize(hidden[owners == place].float(), dim=-1)
        return found


class TriedTerm(PlotTerm):
    """The anchored term by context, and on rejected positions.

    Args:
        contexts: ``None``: one for all positions.
        rejected: hold the rejected answers' mean output to the reference's at the chosen ones.
    """

    contexts: Contexts | None
    rejected: bool
    batch_contexts: Tensor

    @classmethod
    def of(cls, term: PlotTerm, contexts: Contexts | None, rejected: bool) -> TriedTerm:
        term.__class__ = cls
        assert isinstance(term, cls)
        term.contexts, term.rejected = contexts, rejected
        if contexts is not None:
            by_context = torch.zeros(contexts.number, term.difference.numel(), dtype=torch.float64)
            by_context[:, : contexts.difference.size(1)] = contexts.difference
            term.by_context = by_context
        return term

    LEAST = 4  # positions of a context in a micro-batch

    def pooling(self, batch: Batch, rows: Tensor | None = None) -> Pooling:
        """One distribution a context; with ``rejected`` one of the chosen positions and one of the rejected."""
        if self.rejected:
            segments = torch.zeros(batch.labels.size(0), batch.labels.size(1) - 1, dtype=torch.long)
            segments[batch.roles < 0] = 1
            selected, number = batch.selected("all"), 2
        else:
            assert self.contexts is not None
            segments, number = self.batch_contexts, self.contexts.number
            selected = batch.selected(self.config.positions) & (segments >= 0)
        segments, selected = segments.clamp(min=0).flatten(), selected.flatten()
        if rows is not None:
            segments, selected = segments[rows], selected[rows]
        counts = torch.bincount(segments[selected], minlength=number)
        weights = selected.double() / counts.clamp(min=1)[segments]
        return Pooling(weights, segments, counts)

    @torch.no_grad()
    def targets(self, batch: Batch, outputs: Tensor, reference: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        assert reference is not None
        if self.rejected:  # both segments are held to the reference at the chosen positions
            reference, difference = reference[:1].expand(2, -1), self.difference
        else:
            difference = self.by_context
        weights = anchored(reference.double(), difference, self.config.target_strength)
        weights[:, self.valid :] = 0
        total = weights.sum(-1, keepdim=True)
        mass = outputs.detach().double().sum(-1, keepdim=True)
        exists = total[:, 0] > 0
        if self.rejected:
            exists[0] = False  # only the rejected positions are moved
        return weights * (mass / total.clamp(min=1e-300)), exists

    def mean_divergence(self, outputs: Tensor, counts: Tensor, target: Tensor | None, exists: Tensor | None) -> Tensor:
        """The mean over the contexts, weighted by their positions."""
        assert exists is not None
        outputs = outputs.double()
        counts = torch.where(exists & (counts >= self.LEAST), counts, 0)
        values = self.divergence.value(outputs, target)
        return (torch.where(counts > 0, values, 0.0) * counts).sum() / counts.sum().clamp(min=1)


class Beside:
    """A loss on rows of its own beside the pairs, a few rows a step.

    ``nll``: of the answers. ``kl``: KL of the reference to the model at the answers. ``w1``: W1 of the mean output to
    the reference's, along the term's lines.
    """

    ROWS = 2

    def __init__(
        self,
        kind: Literal["nll", "kl", "w1"],
        weight: float,
        rows: Sequence[ScoredSequence],
        reference: Any,
        divergence: Any = None,
    ) -> None:
        self.kind, self.weight, self.divergence = kind, weight, divergence
        self.batches = [list(rows[i : i + self.ROWS]) for i in range(0, len(rows) - self.ROWS + 1, self.ROWS)]
        self.head = reference.get_output_embeddings().weight.detach().clone()
        self.hidden = []
        if kind != "nll":
            with evaluating(reference):
                self.hidden = [last_hidden_states(reference, batch)[0] for batch in self.batches]

    def loss(self, model: Any, step: int) -> Tensor:
        number = step % len(self.batches)
        hidden, labels, _ = last_hidden_states(model, self.batches[number])
        logits = hidden @ model.get_output_embeddings().weight.T  # (n, V)
        if self.kind == "nll":
            return self.weight * torch.nn.functional.cross_entropy(logits, labels)
        log_p, log_q = logits.log_softmax(-1), (self.hidden[number] @ self.head.T).log_softmax(-1)
        if self.kind == "kl":
            return self.weight * (log_q.exp() * (log_q - log_p)).sum(-1).mean()
        p, q = log_p.exp().mean(0, keepdim=True).double(), log_q.exp().mean(0, keepdim=True).double()
        return self.weight * self.divergence.value(p, q * (p.detach().sum() / q.sum())).sum().float()


def hooked(trainer: Any, before: Callable[[dict[str, Any]], None] | None, beside: Beside | None) -> None:
    """Puts what a tried loss needs around the trainer's ``compute_loss``."""
    inner = trainer.compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(inputs)
        loss = inner(model, inputs, *args, **kwargs)
        if beside is None or not model.training:
            return loss
        extra = beside.loss(model, trainer.state.global_step)
        return (loss[0] + extra, *loss[1:]) if isinstance(loss, tuple) else loss + extra

    trainer.compute_loss = compute_loss
