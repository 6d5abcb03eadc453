"""DEFT's data filter (arXiv 2604.01787): keep the pairs with the highest distribution reward under a model.

The reward is that of :mod:`plot_align.head.reward`, computed for each completion under the reference model before
training. Scoring a large set takes long, so scores are journalled and an interrupted run resumes.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import date, time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plot_align.errors import InputError, RunError
from plot_align.head.reward import log_reward, reward_scale
from plot_align.inference.scoring import collate
from plot_align.io import complete_or_absent
from plot_align.preference.distribution import PreferenceDistribution, require_preference
from plot_align.preference.estimation import ScoredSequence, progress_bar, scored_pairs
from plot_align.transport.reward import DistributionReward

__all__ = [
    "DIRECTIONS",
    "READINGS",
    "SCORES",
    "keep_pairs",
    "pair_scores",
    "score_pairs",
    "scores_path",
    "write_pairs",
]

DIRECTIONS = ("highest", "lowest")
SCORES = ("chosen", "margin")
READINGS = ("log", "prob")
SUFFIXES = (".jsonl", ".jsonl.gz")


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
            to its name, so that a run never resumes another run's scores. Call :func:`forget_partial` once the result
            is stored. None: an interrupted run starts again.
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
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise InputError(f"batch_size is {batch_size!r}, expected a whole number of 1 or more")
    score = _scorer(model, tokenizer, preference, reading)

    sequences: list[ScoredSequence] = []  # chosen and rejected in turn
    total = len(pairs) if hasattr(pairs, "__len__") else None
    with progress_bar("reading pairs", progress, total) as advance:
        for pair in scored_pairs(pairs, tokenizer, max_length=max_length, truncation_mode=truncation_mode):
            sequences += pair
            advance(1)
    scored = [index for index, sequence in enumerate(sequences) if sequence.start < sequence.stop]
    scored.sort(key=lambda index: -len(sequences[index].ids))  # stable: the same batches in every run
    batches = [scored[at : at + batch_size] for at in range(0, len(scored), batch_size)]

    journal = None
    if partial is not None:
        found = _fingerprint(model, sequences, preference.difference(), reading, batch_size)
        journal = partial.with_name(f"{partial.name}.{found}")
    scores = torch.full((len(sequences),), torch.nan, dtype=torch.float64)  # (2N,)
    training = model.training
    model.eval()
    try:
        with progress_bar("scoring", progress, len(scored), "completions") as advance, _journal(journal) as keep:
            done = _read_journal(journal)
            for number, batch in enumerate(batches):
                values = done.get(number)
                if values is None:
                    try:
                        values = score([sequences[index] for index in batch])
                    except torch.OutOfMemoryError:
                        raise RunError(
                            f"the device is out of memory at {len(batch)} completions of up to "
                            f"{len(sequences[batch[0]].ids)} tokens; use a smaller batch_size or max_length"
                        ) from None
                    _require_finite(values, batch)
                    keep(number, values)
                scores[batch] = torch.tensor(values, dtype=torch.float64)
                advance(len(batch))
    finally:
        model.train(training)
    return scores.view(-1, 2)  # (N, 2)


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


def write_pairs(pairs: Any, scores: Tensor, kept: Tensor, path: Path) -> Path:
    """Write the kept rows with all their columns, in their order, and a second file with the scores of all rows.

    Args:
        pairs: the ``datasets.Dataset`` of N rows that was scored.
        scores: (N, 2) from :func:`score_pairs`.
        kept: (N,) bool from :func:`keep_pairs`.
        path: JSON lines, ``.jsonl`` or ``.jsonl.gz``. Neither file is ever partial, and the same content gives the
            same bytes.

    Returns:
        The path of the scores (:func:`scores_path`): one line per row with ``row``, ``chosen``, ``rejected`` (null if
        there is no score) and ``kept``.

    Raises:
        InputError: another ending, a folder that cannot be written, a value that JSON cannot hold.
    """
    beside = scores_path(path)
    rows = zip(scores.tolist(), kept.tolist(), strict=True)
    _write_lines(
        beside,
        (
            {"row": index, "chosen": _or_null(chosen), "rejected": _or_null(rejected), "kept": keep}
            for index, ((chosen, rejected), keep) in enumerate(rows)
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
    """``kept.jsonl`` → ``kept.scores.partial``, to which :func:`score_pairs` appends its fingerprint."""
    return path.with_name(f"{_stem(path)}.scores.partial")


def forget_partial(partial: Path) -> None:
    """Remove the journals that interrupted runs of :func:`score_pairs` left at ``partial``."""
    for path in partial.parent.iterdir():
        if re.fullmatch(re.escape(partial.name) + r"\.[0-9a-f]{16}", path.name):
            path.unlink(missing_ok=True)


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


def _require_finite(values: list[float], batch: list[int]) -> None:
    for index, value in zip(batch, values, strict=True):
        if not math.isfinite(value):
            raise RunError(
                f"the {'rejected' if index % 2 else 'chosen'} completion of row {index // 2} scores {value}, expected "
                "a finite number; the model overflows in its dtype: use bfloat16 or float32, or check its weights"
            )


# --- resuming -------------------------------------------------------------------------------------------------------


def _fingerprint(
    model: Any, sequences: Sequence[ScoredSequence], difference: Tensor, reading: str, batch_size: int
) -> str:
    """16 hex digits that identify everything a score depends on, including its rounding."""
    from plot_align.records import versions

    device = next(model.parameters()).device
    found = versions()
    options = {
        "reading": reading,
        "batch_size": batch_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {name: found[name] for name in ("plot-align", "torch", "transformers")},
        "config": model.config.to_dict(),
    }
    digest = hashlib.blake2b(json.dumps(options, sort_keys=True, default=str).encode(), digest_size=8)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy().data)
    digest.update(difference.numpy().data)
    for ids, start, stop in sequences:
        digest.update(np.array([len(ids), start, stop], np.int64).data)
        digest.update(ids.data)
    return digest.hexdigest()


@contextmanager
def _journal(path: Path | None) -> Iterator[Callable[[int, list[float]], None]]:
    """Yields a function that appends the scores of a batch to ``path`` and flushes the file."""
    if path is None:
        yield lambda number, values: None
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); name a folder you may write to") from None
    with file:
        if file.tell():
            file.write(b"\n")  # ends a line that was cut off

        def keep(number: int, values: list[float]) -> None:
            file.write(json.dumps([number, values]).encode() + b"\n")
            file.flush()

        yield keep


def _read_journal(path: Path | None) -> dict[int, list[float]]:
    """Scores of the batches that an interrupted run finished; an incomplete line is ignored."""
    done: dict[int, list[float]] = {}
    if path is None:
        return done
    for line in path.read_bytes().splitlines():
        try:
            number, values = json.loads(line)
        except (ValueError, TypeError):
            continue
        done[number] = values
    return done


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
