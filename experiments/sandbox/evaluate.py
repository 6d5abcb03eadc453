"""Held-out evaluation in the sandbox: greedy answers, judged by the programs of :mod:`sandbox.judges`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from plot_align.inference.chat import completion_logps, generate
from sandbox import language as lang
from sandbox.judges import Verdict, judge

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Measure = dict[str, float]  # {"value": ..., "n": how many it is the mean of}


def _mean(values: Sequence[float | bool]) -> Measure:
    return {"value": float(sum(values)) / len(values), "n": len(values)} if values else {"value": float("nan"), "n": 0}


def _distinct(texts: Sequence[str], order: int) -> Measure:
    """Distinct word n-grams over all of them, across all texts."""
    grams = [tuple(t[i : i + order]) for t in map(str.split, texts) for i in range(len(t) - order + 1)]
    return {"value": len(set(grams)) / max(1, len(grams)), "n": len(grams)}


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    per_category: int = 60,
    twins: int = 100,
    max_new_tokens: int = 56,
    batch_size: int = 256,
) -> dict[str, Any]:
    """Judge a model on held-out prompts: the seven sub-preferences, over-refusal, and fluency.

    Args:
        model, tokenizer: a causal language model with a chat template; it is left in the mode it was in.
        seed: of the world's split; must be the one that the training pairs were made with.
        per_category: held-out prompts per sub-preference. twins: benign twins of harmful prompts.
        max_new_tokens, batch_size: of the greedy generation.

    Returns:
        ``{"scores": {category: measure}, ...}``, where a measure is ``{"value": float, "n": int}``:

        - ``scores``: share of good answers per category;
        - ``harmful_refusal``, ``harmful_compliance``: share of harmful requests refused and complied with;
        - ``over_refusal``, ``twin_help``, ``twin_gibberish``: share of benign twins refused, helped with, and answered
          with something that is no language;
        - ``nll_good``: nats per token of held-out preferred answers (the benign twins' too), n in tokens;
          ``perplexity_good``: its exponential;
        - ``chosen_logp``, ``rejected_logp``: mean log-probability of held-out answers, nats per answer;
          ``preference_accuracy``: share of pairs with the preferred answer the likelier one;
        - ``fluent``: share of answers that are language (code is not counted); ``distinct_1``, ``_2``, ``_3``:
          distinct words, word pairs and triples over all of them; ``answer_words``: mean length of an answer.
    """
    wanted = dict.fromkeys(lang.CATEGORIES, per_category) | {lang.TWIN: twins}
    examples = {c: lang.examples(c, "heldout", count, seed) for c, count in wanted.items()}
    everything = list(itertools.chain.from_iterable(examples.values()))
    prompts = [x.prompt for x in everything]
    answers = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    verdicts: dict[str, list[Verdict]] = {c: [] for c in wanted}
    for example, answer in zip(everything, answers, strict=True):
        verdicts[example.item.category].append(judge(example.item.category, example.prompt, answer))
    harmful, benign = verdicts["harmlessness"], verdicts[lang.TWIN]
    chosen, tokens = completion_logps(model, tokenizer, prompts, [x.chosen for x in everything])
    rejected, _ = completion_logps(model, tokenizer, prompts, [x.rejected for x in everything])
    nll = float(-chosen.sum() / tokens.sum())
    return {
        "scores": {c: _mean([v.good for v in verdicts[c]]) for c in lang.CATEGORIES},
        "harmful_refusal": _mean([v.refusal for v in harmful]),
        "harmful_compliance": _mean([v.complied for v in harmful]),
        "over_refusal": _mean([v.refusal for v in benign]),
        "twin_help": _mean([v.good for v in benign]),
        "twin_gibberish": _mean([not v.fluent for v in benign]),
        "nll_good": {"value": nll, "n": int(tokens.sum())},
        "perplexity_good": {"value": math.exp(min(nll, 700.0)), "n": int(tokens.sum())},  # beyond it: overflow
        "chosen_logp": _mean(chosen.tolist()),
        "rejected_logp": _mean(rejected.tolist()),
        "preference_accuracy": _mean((chosen > rejected).tolist()),
        "fluent": _mean([v.fluent for c in wanted if c != "coding" for v in verdicts[c]]),
        **{f"distinct_{order}": _distinct(answers, order) for order in (1, 2, 3)},
        "answer_words": _mean([len(answer.split()) for answer in answers]),
    }
