"""Score given completions: their log-probabilities and the model's mean output distribution, in bounded memory.

Sequences are those that the trainer's collator would give the model (:class:`~estimation.ScoredSequence`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plot_align.errors import RunError
from plot_align.head import causal_lm, fused_head, head_logits, head_spec
from plot_align.inference.chat import evaluating, not_finite
from plot_align.parallel import each
from plot_align.preference.estimation import ScoredSequence

_BLOCK = 1 << 26  # logits held at once by :func:`divergences`: 256 MiB of float32


@dataclass(frozen=True)
class Scores:
    """A model's scores of N sequences.

    Args:
        logps: (N,) float64, log-probability of the scored tokens in nats, 0 if none is scored.
        tokens: (N,) int64, how many there are.
        total: (V,) float64, sum of the output distributions of all scored positions.
    """

    logps: Tensor
    tokens: Tensor
    total: Tensor


def score(
    model: Any,
    sequences: Sequence[ScoredSequence],
    *,
    batch_size: int = 16,
    advance: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Log-probabilities and output distribution of the scored tokens.

    Args:
        model: a causal language model on its device, or a PEFT wrapper of one.
        batch_size: sequences per forward pass, longest first, so that too large a batch fails at once.
        advance: called with the number of newly scored sequences.

    Raises:
        RunError: a log-probability is not finite, or the device is out of memory.
    """
    logps = torch.zeros(len(sequences), dtype=torch.float64)  # (N,)
    tokens = torch.tensor([s.stop - s.start for s in sequences], dtype=torch.long)  # (N,)
    total = torch.zeros(causal_lm(model).get_output_embeddings().weight.size(0), dtype=torch.float64)  # (V,)
    batches = list(longest_first(sequences, batch_size))
    jobs = ([sequences[i] for i in batch] for batch in batches)
    for batch, (sums, distribution) in zip(batches, each(partial(_score, model), jobs), strict=True):
        logps[batch] = sums
        total += distribution  # in the order of the batches, whichever process computed them
        advance(len(batch))
    return Scores(logps, tokens, total)


def _score(model: Any, batch: list[ScoredSequence]) -> tuple[Tensor, Tensor]:
    """Of one batch: log-probability of each sequence's scored tokens (B,), sum of the output distributions (V,)."""
    base = causal_lm(model)
    head, spec = base.get_output_embeddings(), head_spec(base)
    with evaluating(base):
        hidden, targets, rows = last_hidden_states(base, batch)
        ones = torch.ones(len(targets), device=hidden.device)  # (n,)
        result = fused_head(hidden, head.weight, getattr(head, "bias", None), targets, spec, weights=ones)
    assert result.distributions is not None
    sums = torch.zeros(len(batch), dtype=torch.float64).index_add(0, rows, result.log_probs.double().cpu())
    if not bool(torch.isfinite(sums).all()):
        raise not_finite(base)
    return sums, result.distributions[0].double().cpu()


def divergences(
    model: Any,
    reference: Any,
    sequences: Sequence[ScoredSequence],
    *,
    batch_size: int = 16,
    advance: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """``KL(p_t ‖ q_t)`` of the whole next-token distributions, averaged over each sequence's scored positions.

    Args:
        model, reference: p and q, with the same vocabulary.
        sequences, batch_size, advance: as in :func:`score`.

    Returns:
        (N,) float64, nats per token; NaN if nothing is scored, infinite where q gives a token of p no probability.

    Raises:
        RunError: logits that are NaN.
    """
    found = torch.full((len(sequences),), torch.nan, dtype=torch.float64)  # (N,)
    batches = list(longest_first(sequences, batch_size))
    jobs = ([sequences[i] for i in batch] for batch in batches)
    for batch, means in zip(batches, each(partial(_diverge, model, reference), jobs), strict=True):
        found[batch] = means
        advance(len(batch))
    return found


def _diverge(model: Any, reference: Any, batch: list[ScoredSequence]) -> Tensor:
    """Mean divergence (B,) of each sequence of one batch."""
    p_model, q_model = causal_lm(model), causal_lm(reference)
    with evaluating(p_model), evaluating(q_model):
        hidden_p, _, rows = last_hidden_states(p_model, batch)
        hidden_q, _, _ = last_hidden_states(q_model, batch)
        values = torch.cat(list(_position_divergences(p_model, hidden_p, q_model, hidden_q)))  # (n,)
    sums = torch.zeros(len(batch), dtype=torch.float64).index_add(0, rows, values)
    if bool(sums.isnan().any()):
        raise RunError(
            "the model or its reference gives logits that are not finite, expected numbers; one of them overflows in "
            "its dtype: use bfloat16 or float32, or check its weights"
        )
    return sums / torch.tensor([s.stop - s.start for s in batch])


def _position_divergences(p_model: Any, hidden_p: Tensor, q_model: Any, hidden_q: Tensor) -> Iterator[Tensor]:
    """KL at every position, in blocks of rows: (block,) float64 each, on the CPU."""
    # The heads may be padded to different widths; padding has no tokens.
    width = min(m.get_output_embeddings().weight.size(0) for m in (p_model, q_model))
    size = max(1, _BLOCK // width)
    for start in range(0, len(hidden_p), size):
        log_p = _logits(p_model, hidden_p[start : start + size])[:, :width].log_softmax(-1)  # (block, V)
        log_q = _logits(q_model, hidden_q[start : start + size])[:, :width].log_softmax(-1)  # (block, V)
        terms = log_p.exp() * (log_p - log_q.to(log_p.device))  # (block, V)
        # 0 · log 0 = 0: a token that the model masks. (NaN is not −inf, and stays.)
        yield terms.masked_fill_(log_p == -torch.inf, 0.0).sum(-1).double().cpu()


def _logits(base: Any, hidden: Tensor) -> Tensor:
    head = base.get_output_embeddings()
    return head_logits(hidden, head.weight, getattr(head, "bias", None), head_spec(base))


def longest_first(sequences: Sequence[ScoredSequence], size: int) -> Iterator[list[int]]:
    """Indices of the sequences that have a scored token, longest first; a stable order, the same in every run."""
    scored = [i for i, sequence in enumerate(sequences) if sequence.start < sequence.stop]
    scored.sort(key=lambda i: -len(sequences[i].ids))
    for at in range(0, len(scored), size):
        yield scored[at : at + size]


def last_hidden_states(base: Any, batch: Sequence[ScoredSequence]) -> tuple[Tensor, Tensor, Tensor]:
    """Last hidden states (n, H) of the positions that predict scored tokens, those tokens (n,), and, on the CPU, their
    row in the batch (n,)."""
    device = base.get_output_embeddings().weight.device
    inputs, rows, columns, _ = collate(batch)
    ids, mask = inputs.to(device)  # (B, T) each
    try:
        hidden = base.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state  # (B, T, H)
    except torch.OutOfMemoryError:
        raise RunError(
            f"the device is out of memory at {len(batch)} sequences of up to {ids.size(1)} tokens; use a smaller "
            "batch_size or max_length"
        ) from None
    at, to = rows.to(device), columns.to(device)
    return hidden[at, to], ids[at, to + 1], rows


def collate(batch: Sequence[ScoredSequence]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids and attention mask (2, B, T), padded on the right; and of the n positions that predict a scored token the
    row (n,), the column (n,) and the weight in its sequence (n,)."""
    longest = max(len(sequence.ids) for sequence in batch)
    inputs = np.zeros((2, len(batch), longest), np.int64)
    for row, sequence in enumerate(batch):
        inputs[0, row, : len(sequence.ids)] = sequence.ids
        inputs[1, row, : len(sequence.ids)] = 1
    counts = np.array([sequence.stop - sequence.start for sequence in batch])  # (B,)
    columns = np.concatenate([np.arange(sequence.start - 1, sequence.stop - 1) for sequence in batch])  # (n,)
    return (
        torch.from_numpy(inputs),
        torch.from_numpy(np.repeat(np.arange(len(batch)), counts)),
        torch.from_numpy(columns),
        torch.from_numpy(np.repeat(1 / counts, counts)).float(),
    )
