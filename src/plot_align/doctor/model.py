"""A model on preference data before any training: what it prefers, how it would answer, what a step would do."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial as bound
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor

from plot_align.doctor.forecast import LOSSES, Step, forecast
from plot_align.errors import InputError, RunError
from plot_align.head import causal_lm, fused_head, head_spec
from plot_align.inference.chat import continue_rows, evaluating
from plot_align.inference.ches import Pair, ches_of_states, pair_batches, stacked
from plot_align.inference.resume import fingerprint, journal_path, resumed
from plot_align.inference.scoring import last_hidden_states, score
from plot_align.plot import PlotLoss
from plot_align.preference.distribution import PreferenceDistribution, vocabulary_size
from plot_align.preference.estimation import ScoredSequence

ANSWERED, TOKENS = 32, 64  # prompts that the model answers itself, and the longest answer
NO_LIMIT = 10**9  # from here on a tokenizer's model_max_length says that it knows none
WITHIN = (0.025, 0.975)  # the quantiles of the model's own answers between which an answer counts as one of its own


@dataclass(frozen=True)
class ModelMeasures:
    """What :func:`measure` found. Log-probabilities are in nats; those of an answer are sums over its scored tokens.

    Attributes:
        pairs: with a scored token on both sides; all means are over these. unscored: the others.
        accuracy: share of pairs whose chosen answer is likelier than the rejected one, ties half; ``None`` of no pair.
        accuracy_per_token: the same of log-probabilities divided by the number of tokens.
        log_p: mean log-probability, ``{"chosen": nats, "rejected": nats}``.
        on_policy: mean log-probability per token of ``chosen``, ``rejected`` and the model's ``own`` answers, sampled
            at temperature 1; ``interval``, which holds 95 % of its own answers; the share of chosen and of rejected
            answers below, within and above it, ``chosen_below``, ``rejected_below`` and so on; ``answers``, how many
            it gave. ``None`` for what has no answer.
        ches_mean: mean length-normalised CHES. ches_interval: 95 % interval of that mean over the pairs, Student's.
        ches: by pair, CHES; ``None`` where a side has no scored token. ches_normalised: by pair, length-normalised.
        forecast: mean forecast change of the log-probability of chosen answers in the first step, by loss (``DPO``,
            ``DPO+SFT``, ``DPO+PLOT``); ``None`` where there is no pair, or no preference for the PLOT term.
        forecast_interval: 95 % interval of that mean over the answers, Student's.
        forecast_falls: share of the answers whose log-probability is forecast to fall.
        step: the step that was forecast (:class:`~forecast.Step`).
    """

    pairs: int
    unscored: int
    accuracy: float | None
    accuracy_per_token: float | None
    log_p: dict[str, float | None]
    on_policy: dict[str, Any]
    ches_mean: float | None
    ches_interval: list[float] | None
    ches: list[float | None]
    ches_normalised: list[float | None]
    forecast: dict[str, float | None]
    forecast_interval: dict[str, list[float] | None]
    forecast_falls: dict[str, float | None]
    step: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """For a record: plain JSON values."""
        return asdict(self)


def context_of(model: Any, tokenizer: Any = None) -> int | None:
    """How many tokens the model holds; ``None`` where neither it nor the tokenizer says so.

    Args:
        model: a causal language model, or a PEFT wrapper of one; ``None``: not known.
        tokenizer: asked where the model's configuration names no number of positions.
    """
    config = None if model is None else causal_lm(model).config.get_text_config()
    for limit in (getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)):
        if isinstance(limit, int) and 0 < limit < NO_LIMIT:
            return limit
    return None


def measure(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    *,
    preference: PreferenceDistribution | None = None,
    step: Step | None = None,
    answered: int = ANSWERED,
    batch_size: int = 16,
    seed: int = 0,
    partial: Path | None = None,
    bar: Callable[[str, int], Callable[[int], None]] = lambda description, total: lambda done: None,
) -> ModelMeasures:
    """Measure a model on pairs: one forward pass over all of them, answers to some prompts, gradients of some pairs.

    Nothing that grows with the pairs is kept but their tokens and four numbers each. In several processes
    (:mod:`plot_align.parallel`) the batches are divided; the forecast and the answers are one job each.

    Args:
        model: a causal language model on its device, or a PEFT wrapper of one.
        tokenizer: the model's.
        pairs: from :func:`plot_align.preference.estimation.scored_pairs`.
        preference: what the PLOT term prefers; ``None``: counted in these pairs.
        step: what is forecast; ``None``: TRL's defaults (:class:`~forecast.Step`).
        answered: how many prompts the model answers itself.
        batch_size: completions per forward pass, longest first.
        seed: of the samples.
        partial: journal of what is finished, to which a fingerprint of everything is appended, so that an interrupted
            run goes on. Call :func:`plot_align.inference.resume.forget_partial` once the result is stored.
        bar: given a description and a total, returns what is called with each number of newly done pairs and samples.

    Raises:
        InputError: ``batch_size`` or ``answered`` below one, another tokenizer, a pair longer than the model's
            context, no parameter that trains.
        RunError: a measure is not finite, or the device is out of memory.
    """
    for name, value in (("batch_size", batch_size), ("answered", answered)):
        if value < 1:
            raise InputError(f"{name} is {value}, expected 1 or more")
    step = step or Step()
    context = context_of(model)
    _check_fit(model, pairs, context)
    plot = _term(model, tokenizer, preference, pairs)
    batches = list(pair_batches(pairs, max(1, batch_size // 2)))
    prompts = _prompts(pairs, [i for batch in batches for i in batch], answered, seed, context)
    sizes = [step.pairs * step.batches + step.answers, len(prompts), *map(len, batches)]
    left = list(sizes)  # of each job, what the bar has not been told of

    def counted(job: int, done: int) -> None:
        left[job] -= done
        advance(done)

    def forecasts() -> list[Any]:
        found = forecast(model, pairs, plot, step, seed=seed, advance=bound(counted, 0))
        return [found[name] for name in LOSSES if name in found]

    def answers() -> list[Any]:
        return _own_log_p(model, tokenizer, prompts, batch_size, seed, context, bound(counted, 1))

    # What takes most memory comes first, so that too little fails at once.
    jobs: list[Callable[[], list[Any]]] = [forecasts, answers]
    jobs += [bound(_scores, model, [pairs[i] for i in batch]) for batch in batches]
    journal = None
    if partial is not None:
        options = {"batch_size": batch_size, "seed": seed, "answered": answered, "step": asdict(step)}
        d = None if plot is None else plot.difference.cpu()
        journal = journal_path(partial, fingerprint(model, [s for pair in pairs for s in pair], options, d))
    values = torch.full((len(pairs), 4), torch.nan, dtype=torch.float64)  # (N, 4)
    advance = bar("measuring the model", sum(sizes))
    found = []
    for job, result in enumerate(resumed(lambda job: job(), jobs, journal)):
        found.append(result)
        counted(job, left[job])  # all of what the journal holds or another process did
    forecast_values, own, *scores = found
    for batch, of_batch in zip(batches, scores, strict=True):
        values[batch] = torch.tensor(of_batch, dtype=torch.float64)
    return _summed_up(values, pairs, own, dict(zip(LOSSES, forecast_values, strict=False)), step)


def _check_fit(model: Any, pairs: Sequence[Pair], context: int | None) -> None:
    """Refuse what the model cannot read: else the error is one of an index, within an embedding."""
    sequences = [sequence for pair in pairs for sequence in pair]
    longest = max((len(sequence.ids) for sequence in sequences), default=0)
    if context is not None and longest > context:
        raise InputError(
            f"the longest of the pairs has {longest} tokens, expected at most the {context} that the model holds; "
            f"tokenise them with a max_length of {context} or less"
        )
    rows = causal_lm(model).get_input_embeddings().weight.size(0)
    highest = max((int(sequence.ids.max()) for sequence in sequences if len(sequence.ids)), default=0)
    if highest >= rows:
        raise InputError(
            f"the tokenizer gives a token the id {highest}, expected less than {rows}, the model's number of "
            "embeddings; take the tokenizer of this model, or resize its embeddings"
        )


def _term(
    model: Any, tokenizer: Any, preference: PreferenceDistribution | None, pairs: Sequence[Pair]
) -> PlotLoss | None:
    """The PLOT term at its defaults; ``None`` where both sides have the same tokens, so that nothing is preferred."""
    base = causal_lm(model)
    rows = base.get_output_embeddings().weight.size(0)
    if preference is None:
        size = vocabulary_size(tokenizer)
        counts = [np.zeros(size, np.int64), np.zeros(size, np.int64)]
        for pair in pairs:
            for side, sequence in zip(counts, pair, strict=True):
                np.add.at(side, sequence.ids[sequence.start : sequence.stop], 1)
        if not all(side.any() for side in counts):
            return None
        chosen, rejected = map(torch.from_numpy, counts)
        preference = PreferenceDistribution(chosen, rejected, {})
    else:
        preference.check_tokenizer(tokenizer)
    if not preference.difference().any():
        return None
    embeddings = base.get_input_embeddings().weight.detach()
    return PlotLoss(preference, embeddings, rows=rows).to(embeddings.device)


def _scores(model: Any, batch: Sequence[Pair]) -> list[Any]:
    """Of each pair, from one forward pass: log-probability of both sides, CHES, length-normalised CHES."""
    base = causal_lm(model)
    head = base.get_output_embeddings()
    with evaluating(base):
        hidden, targets, rows = last_hidden_states(base, stacked(batch))
        result = fused_head(hidden, head.weight, getattr(head, "bias", None), targets, head_spec(base))
        similarity = ches_of_states(hidden, rows, batch)  # (B, 2)
    logps = torch.zeros(2 * len(batch), dtype=torch.float64).index_add(0, rows, result.log_probs.double().cpu())
    found = torch.cat([logps.view(2, -1).T, similarity], dim=1)  # (B, 4)
    if not bool(torch.isfinite(found).all()):
        raise RunError(
            "the model gives a log-probability or hidden state that is not finite, expected numbers; it overflows in "
            "its dtype: use bfloat16 or float32, or check its weights"
        )
    return found.tolist()


def _answer_length(context: int | None) -> int:
    """The longest answer that the model gives itself, in tokens; of a short context half."""
    return TOKENS if context is None else min(TOKENS, max(1, context // 2))


def _prompts(
    pairs: Sequence[Pair], scored: list[int], number: int, seed: int, context: int | None = None
) -> list[list[int]]:
    """Token ids of a random sample of the prompts that leave room for an answer."""
    room = math.inf if context is None else context - _answer_length(context)
    fitting = [i for i in sorted(scored) if pairs[i][0].start <= room]
    sample = random.Random(seed).sample(fitting, min(number, len(fitting)))
    return [pairs[i][0].ids[: pairs[i][0].start].tolist() for i in sample]


def _own_log_p(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    batch_size: int,
    seed: int,
    context: int | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Any]:
    """Log-probability per token of the answer that the model samples at temperature 1, for each prompt with one."""
    if not prompts:
        return []
    texts = continue_rows(
        causal_lm(model),
        tokenizer,
        prompts,
        max_new_tokens=_answer_length(context),
        batch_size=batch_size,
        temperature=1.0,
        seed=seed,
        advance=advance,
    )
    answers = []
    for prompt, text in zip(prompts, texts, strict=True):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokens:
            # A text may have more tokens than those it was decoded from.
            ids = np.array((prompt + tokens)[:context], np.int32)
            answers.append(ScoredSequence(ids, len(prompt), len(ids)))
    scores = score(model, answers, batch_size=batch_size)
    return (scores.logps / scores.tokens).tolist()


def _summed_up(
    values: Tensor, pairs: Sequence[Pair], own: list[float], forecasts: dict[str, list[float]], step: Step
) -> ModelMeasures:
    scored = values[:, 0].isfinite()  # (N,)
    chosen, rejected = values[scored, 0], values[scored, 1]  # (n,) each
    tokens = torch.tensor([[s.stop - s.start for s in pair] for pair in pairs]).view(-1, 2)[scored]  # (n, 2)
    each = {"chosen": chosen / tokens[:, 0], "rejected": rejected / tokens[:, 1]}
    on_policy: dict[str, Any] = {name: _mean(found) for name, found in each.items()}
    on_policy |= {"own": _mean(torch.tensor(own)), "interval": None, "answers": len(own)}
    on_policy |= {f"{name}_{place}": None for name in each for place in ("below", "within", "above")}
    if own:
        low, high = np.quantile(own, WITHIN).tolist()
        on_policy["interval"] = [low, high]
        for name, found in each.items():
            on_policy[f"{name}_below"] = _mean(found < low)
            on_policy[f"{name}_within"] = _mean((found >= low) & (found <= high))
            on_policy[f"{name}_above"] = _mean(found > high)
    changes = {name: torch.tensor(forecasts.get(name, []), dtype=torch.float64) for name in LOSSES}
    return ModelMeasures(
        pairs=int(scored.sum()),
        unscored=int((~scored).sum()),
        accuracy=_mean(_wins(chosen - rejected)),
        accuracy_per_token=_mean(_wins(each["chosen"] - each["rejected"])),
        log_p={"chosen": _mean(chosen), "rejected": _mean(rejected)},
        on_policy=on_policy,
        ches_mean=_mean(values[scored, 3]),
        ches_interval=_interval(values[scored, 3]),
        ches=_or_none(values[:, 2]),
        ches_normalised=_or_none(values[:, 3]),
        forecast={name: _mean(found) for name, found in changes.items()},
        forecast_interval={name: _interval(found) for name, found in changes.items()},
        forecast_falls={name: _mean(found < 0) for name, found in changes.items()},
        step=asdict(step),
    )


def _wins(margins: Tensor) -> Tensor:
    return (margins > 0) + 0.5 * (margins == 0)


def _mean(values: Tensor) -> float | None:
    return float(values.double().mean()) if len(values) else None


def _interval(values: Tensor) -> list[float] | None:
    """Student's 95 % interval of the mean; ``None`` of fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    half = float(student.ppf(0.975, n - 1)) * float(values.std()) / math.sqrt(n)
    return [float(values.mean()) - half, float(values.mean()) + half]


def _or_none(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]
