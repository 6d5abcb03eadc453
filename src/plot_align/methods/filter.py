"""Filters of pairs: keep a share of them by DEFT's distribution reward, by CHES or by the lengths of their sides.

DEFT (arXiv 2604.01787) keeps the pairs with the highest distribution reward (:mod:`plot_align.head.reward`) of each
completion under the reference model. Razin et al. (arXiv 2410.08847) drop the pairs with the largest
length-normalised CHES (:mod:`plot_align.inference.ches`). Scoring a large set takes long, so scores are journalled and
an interrupted run resumes.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from datetime import date, time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plot_align.errors import InputError, RunError
from plot_align.head.reward import log_reward, reward_scale
from plot_align.inference.ches import Pair, ches, pair_batches
from plot_align.inference.resume import fingerprint, journal_path, resumed
from plot_align.inference.scoring import collate, longest_first
from plot_align.io import complete_or_absent
from plot_align.preference.distribution import PreferenceDistribution, require_preference
from plot_align.preference.estimation import ScoredSequence, progress_bar, scored_pairs
from plot_align.transport.reward import DistributionReward

__all__ = [
    "DIRECTIONS",
    "READINGS",
    "SCORES",
    "ches_scores",
    "completion_lengths",
    "keep_pairs",
    "length_ratio",
    "pair_scores",
    "score_pairs",
    "scores_path",
    "write_pairs",
]

DIRECTIONS = ("highest", "lowest")
SCORES = ("chosen", "margin")
READINGS = ("log", "prob")
SUFFIXES = (".jsonl", ".jsonl.gz")
_BLOCK = 4096  # rows that are Python's own objects at a time


@torch.no_grad()
def score_pairs(
    model: Any,
    tokenizer: Any,
    pairs: Any,
    preference: PreferenceDistribution,
    *,
    reading: str = "log",
    batch_size: int = 16,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    partial: Path | None = None,
    progress: bool = True,
) -> Tensor:
    """Distribution reward of the chosen and of the rejected completion of every pair.

        log:  R = Σ_v d_v · mean_t log p(v | x, y_<t)          prob:  R = Σ_v d_v · mean_t p(v | x, y_<t)

    t runs over the positions that predict the completion's scored tokens, which are those that
    :func:`plot_align.estimate` counts. The logits of a batch are never held as a whole.

    Args:
        model: a causal language model, or a PEFT wrapper of one, on the device to score on; its training mode is
        restored.
        tokenizer: the model's tokenizer, with which ``preference`` was counted.
        pairs: ``datasets.Dataset`` or ``IterableDataset`` of pairs, as :func:`plot_align.estimate` takes it.
        preference: gives d.
        reading: ``"log"`` or ``"prob"``.
        batch_size: completions per forward pass. They are sorted by length, longest first, so that batches have
            little padding and a batch that does not fit into memory fails at once.
        max_length: see :func:`plot_align.estimate`.
        truncation_mode: see :func:`plot_align.estimate`.
        partial: journal of finished batches. A fingerprint of the tokens, the weights, d and every option is appended
            to its name, so that a run never resumes another run's scores. Call
            :func:`plot_align.inference.resume.forget_partial` once the result is stored. None: an interrupted run
            starts again.
        progress: show progress bars on standard error.

    Returns:
        (N, 2) float64 on the CPU: chosen, rejected. NaN for a completion without a scored token, including
        rows that TRL's length filter drops. In nats (``log``) or probability (``prob``).

    Raises:
        InputError: another tokenizer, a head smaller than the vocabulary, d = 0 everywhere, ``log`` with a model that
            caps its logits, an option out of range, a data set or row that :func:`plot_align.estimate` refuses.
        RunError: a score is NaN or infinite, or the device is out of memory.
    """
    if reading not in READINGS:
        raise InputError(f"reading is {reading!r}, expected {' or '.join(READINGS)}")
    _check_batch_size(batch_size)
    score = _scorer(model, tokenizer, preference, reading)
    pairs = _reading(pairs, tokenizer, max_length, truncation_mode, progress)
    sequences = [sequence for pair in pairs for sequence in pair]  # chosen and rejected in turn
    batches = list(longest_first(sequences, batch_size))

    def values_of(batch: list[int]) -> list[float]:
        try:
            values = score([sequences[index] for index in batch])
        except torch.OutOfMemoryError:
            raise RunError(
                f"the device is out of memory at {len(batch)} completions of up to {len(sequences[batch[0]].ids)} "
                "tokens; use a smaller batch_size or max_length"
            ) from None
        for index, value in zip(batch, values, strict=True):
            _require_finite(f"the {'rejected' if index % 2 else 'chosen'} completion of row {index // 2}", value)
        return values

    journal = None
    if partial is not None:
        options = {"reading": reading, "batch_size": batch_size}
        journal = journal_path(partial, fingerprint(model, sequences, options, preference.difference()))
    scores = torch.full((len(sequences),), torch.nan, dtype=torch.float64)  # (2N,)
    training = model.training
    model.eval()
    try:
        with progress_bar("scoring", progress, sum(map(len, batches)), "completions") as advance:
            for batch, values in zip(batches, resumed(values_of, batches, journal), strict=True):
                scores[batch] = torch.tensor(values, dtype=torch.float64)
                advance(len(batch))
    finally:
        model.train(training)
    return scores.view(-1, 2)  # (N, 2)


def ches_scores(
    model: Any,
    tokenizer: Any,
    pairs: Any,
    *,
    batch_size: int = 16,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    partial: Path | None = None,
    progress: bool = True,
) -> Tensor:
    """CHES of every pair, as it is and length-normalised (:mod:`plot_align.inference.ches`).

    Args and errors: see :func:`score_pairs`; half of ``batch_size`` pairs are in one forward pass.

    Returns:
        (N, 2) float64 on the CPU, in squared units of the hidden states; NaN for a pair of which a side has no scored
        token.
    """
    _check_batch_size(batch_size)
    read = list(_reading(pairs, tokenizer, max_length, truncation_mode, progress))
    batches = list(pair_batches(read, max(1, batch_size // 2)))

    def values_of(batch: list[int]) -> list[list[float]]:
        values = ches(model, [read[index] for index in batch]).tolist()
        for index, (_, normalised) in zip(batch, values, strict=True):
            _require_finite(f"the pair of row {index}", normalised)
        return values

    journal = None
    if partial is not None:
        options = {"by": "ches", "batch_size": batch_size}
        journal = journal_path(partial, fingerprint(model, [s for pair in read for s in pair], options))
    scores = torch.full((len(read), 2), torch.nan, dtype=torch.float64)  # (N, 2)
    with progress_bar("scoring", progress, sum(map(len, batches)), "pairs") as advance:
        for batch, values in zip(batches, resumed(values_of, batches, journal), strict=True):
            scores[batch] = torch.tensor(values, dtype=torch.float64)
            advance(len(batch))
    return scores


def completion_lengths(
    tokenizer: Any,
    pairs: Any,
    *,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    progress: bool = True,
) -> Tensor:
    """Scored tokens of the chosen and of the rejected completion of every pair; args and errors: :func:`score_pairs`.

    Returns:
        (N, 2) float64; NaN for a completion without a scored token.
    """
    read = _reading(pairs, tokenizer, max_length, truncation_mode, progress)  # lengths stay, tokens do not
    lengths = np.fromiter((side.stop - side.start or math.nan for pair in read for side in pair), np.float64)
    return torch.from_numpy(lengths).view(-1, 2)


def length_ratio(lengths: Tensor) -> Tensor:
    """The longer side of every pair over the shorter one: (N, 2) → (N,), 1 for equal lengths, NaN without a length."""
    return lengths.amax(-1) / lengths.amin(-1)


def pair_scores(scores: Tensor, score: str = "chosen") -> Tensor:
    """One score per pair: (N, 2) → (N,), NaN if a completion has none.

    Args:
        scores: from :func:`score_pairs`.
        score: ``"chosen"``, the chosen completion's reward, or ``"margin"``, the chosen's minus the rejected's.

    Raises:
        InputError: another name.
    """
    match score:
        case "chosen":
            return scores[:, 0]
        case "margin":
            return scores[:, 0] - scores[:, 1]
    raise InputError(f"score is {score!r}, expected {' or '.join(SCORES)}")


def keep_pairs(scores: Tensor, share: float, direction: str = "highest") -> Tensor:
    """Which pairs to keep: (N,) → (N,) bool.

    ``share`` is the fraction of the pairs with a score, rounded up, so at least one is kept. Of equal scores the
    earlier row wins.

    Args:
        scores: (N,) from :func:`pair_scores`; pairs with NaN are never kept.
        share: in (0, 1].
        direction: keep the ``"highest"`` or the ``"lowest"`` scores. The paper does not say; we read it as the
            highest.

    Raises:
        InputError: a share or direction out of range, or no pair has a score.
    """
    if not 0 < share <= 1:
        raise InputError(f"share is {share}, expected a share of the pairs above 0 and at most 1, e.g. 0.05")
    if direction not in DIRECTIONS:
        raise InputError(f"direction is {direction!r}, expected {' or '.join(DIRECTIONS)}")
    scored = scores.isfinite().nonzero().squeeze(-1)  # (n,)
    if len(scored) == 0:
        raise InputError(
            f"none of the {len(scores)} pairs has a scored token in its completions; raise max_length or check the "
            "data set"
        )
    # The decimal that was written: 0.07 · 100 is 7, not the 7.000000000000001 that would round up to 8.
    count = math.ceil(Fraction(repr(float(share))) * len(scored))
    order = scores[scored].argsort(descending=direction == "highest", stable=True)  # (n,)
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[scored[order[:count]]] = True
    return kept


def write_pairs(
    pairs: Any, scores: Tensor, kept: Tensor, path: Path, names: Sequence[str] = ("chosen", "rejected")
) -> Path:
    """Write the kept rows with all their columns, in their order, and a second file with the scores of all rows.

    Args:
        pairs: the ``datasets.Dataset`` of N rows that was scored.
        scores: (N, C) from :func:`score_pairs`, :func:`ches_scores` or :func:`completion_lengths`.
        kept: (N,) bool from :func:`keep_pairs`.
        names: of the C scores.
        path: JSON lines, ``.jsonl`` or ``.jsonl.gz``. Neither file is ever partial, and the same content gives the
            same bytes.

    Returns:
        The path of the scores (:func:`scores_path`): one line per row with ``row``, each of ``names`` (null if there
        is no score) and ``kept``.

    Raises:
        InputError: another ending, a folder that cannot be written, a value that JSON cannot hold.
    """
    beside = scores_path(path)
    parts = zip(scores.split(_BLOCK), kept.split(_BLOCK), strict=True)
    rows = (row for part in parts for row in zip(*(column.tolist() for column in part), strict=True))
    _write_lines(
        beside,
        (
            {"row": index, **dict(zip(names, map(_or_null, values), strict=True)), "kept": keep}
            for index, (values, keep) in enumerate(rows)
        ),
    )
    _write_lines(path, pairs.with_format(None).select(kept.nonzero().squeeze(-1).tolist()))
    return beside


def scores_path(path: Path) -> Path:
    """``kept.jsonl`` → ``kept.scores.jsonl``, and the same with ``.gz``.

    Raises:
        InputError: the path does not end in ``.jsonl`` or ``.jsonl.gz``.
    """
    return path.with_name(f"{_stem(path)}.scores{path.name.removeprefix(_stem(path))}")


def record_path(path: Path) -> Path:
    """``kept.jsonl`` or ``kept.jsonl.gz`` → ``kept.record.json``."""
    return path.with_name(f"{_stem(path)}.record.json")


def partial_path(path: Path) -> Path:
    """``kept.jsonl`` → ``kept.scores.partial``, to which a scoring appends its fingerprint."""
    return path.with_name(f"{_stem(path)}.scores.partial")


def require_json(pairs: Any) -> None:
    """Refuse, before the scoring, rows that :func:`write_pairs` could not write; checks only the first row.

    Raises:
        InputError: a value that JSON cannot hold.
    """
    for row in pairs.with_format(None).take(1):
        _line(row)


def _scorer(
    model: Any, tokenizer: Any, preference: PreferenceDistribution, reading: str
) -> Callable[[Sequence[ScoredSequence]], list[float]]:
    """Checks the model and returns the function that scores one batch of sequences."""
    from plot_align.head import causal_lm, fused_head, head_spec

    base = causal_lm(model)
    head = base.get_output_embeddings()
    spec = head_spec(base)
    weight, bias = head.weight, getattr(head, "bias", None)
    device = weight.device
    preference.check_tokenizer(tokenizer)
    difference = preference.difference(size=weight.size(0))  # (V,)
    require_preference(difference)
    scale = 1.0
    if reading == "log":
        scale = reward_scale(logit_scale=spec.logit_scale, temperature=spec.temperature, softcap=spec.softcap)
    cost = DistributionReward(difference).to(device)
    difference = cost.difference  # on the device, in its widest dtype

    def score(batch: Sequence[ScoredSequence]) -> list[float]:
        inputs, rows, columns, weights = (part.to(device) for part in collate(batch))
        ids, mask = inputs  # (B, T) each
        hidden = base.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state  # (B, T, H)
        hidden = hidden[rows, columns]  # (N, H)
        count = len(batch)
        if reading == "log":
            rewards = log_reward(
                hidden, weight, bias, difference, weights=weights, segments=rows, num_segments=count, scale=scale
            )
        else:
            unused = torch.zeros_like(rows)  # targets
            result = fused_head(hidden, weight, bias, unused, spec, weights=weights, segments=rows, num_segments=count)
            assert result.distributions is not None  # (B, V)
            rewards = -cost.value(result.distributions)
        return rewards.tolist()  # (B,)

    return score


def _check_batch_size(batch_size: int) -> None:
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise InputError(f"batch_size is {batch_size!r}, expected a whole number of 1 or more")


def _reading(
    pairs: Any, tokenizer: Any, max_length: int | None, truncation_mode: str, progress: bool
) -> Iterator[Pair]:
    """The tokens of one pair after the other, under a bar."""
    total = len(pairs) if hasattr(pairs, "__len__") else None
    with progress_bar("reading pairs", progress, total) as advance:
        for pair in scored_pairs(pairs, tokenizer, max_length=max_length, truncation_mode=truncation_mode):
            yield pair
            advance(1)


def _require_finite(what: str, value: float) -> None:
    if not math.isfinite(value):
        raise RunError(
            f"{what} scores {value}, expected a finite number; the model overflows in its dtype: use bfloat16 or "
            "float32, or check its weights"
        )


# --- writing --------------------------------------------------------------------------------------------------------


def _stem(path: Path) -> str:
    for suffix in reversed(SUFFIXES):
        if path.name.endswith(suffix) and path.name != suffix:
            return path.name.removesuffix(suffix)
    raise InputError(f"output is {str(path)!r}, expected a name ending in {' or '.join(SUFFIXES)}; rename it")


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with complete_or_absent(path) as temporary, temporary.open("wb") as raw:
        # Without a name and a time in the gzip header, the same rows give the same bytes.
        packed = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if path.suffix == ".gz" else nullcontext(raw)
        with packed as file:
            for row in rows:
                file.write(_line(row).encode())


def _line(row: dict[str, Any]) -> str:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False, default=_plain) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(
            f"a kept row cannot be written as JSON ({error}); remove the column that holds it from the data set"
        ) from None


def _plain(value: Any) -> str:
    if isinstance(value, date | time):
        return value.isoformat()
    raise TypeError(f"a {type(value).__name__} is no JSON value")


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None
