"""Whether a model still writes and reads as it did: perplexity, diversity, repetition, length."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from plot_align.evaluation import data
from plot_align.evaluation.quantity import Quantity, of_items, of_whole
from plot_align.evaluation.subject import Found, Subject, require_count
from plot_align.inference.scoring import score
from plot_align.preference.estimation import ScoredSequence
from plot_align.statistics import jackknife_interval


@dataclass
class Perplexity:
    """Perplexity on held-out text: ``exp`` of the mean negative log-likelihood of its tokens.

    Every text is read in windows of ``max_length`` that do not overlap; a window's first token is given, not scored.

    Args:
        texts: a ``.txt`` file, rows with a column ``text``, or a data set of the Hub.
        dataset_config, split: of the data set. limit: texts, drawn by the seed.
    """

    texts: str = "Salesforce/wikitext"
    dataset_config: str | None = "wikitext-2-raw-v1"
    split: str = "test"
    limit: int | None = 500
    max_length: int = 1024

    def check(self) -> None:
        data.check_source("texts", self.texts)
        require_count("limit", self.limit)
        require_count("max_length", self.max_length, least=2)

    def run(self, subject: Subject) -> Found:
        """``nll`` (nats a token, weighted by tokens, the interval over texts), and its exponential."""
        texts = data.texts(self.texts, split=self.split, name=self.dataset_config, limit=self.limit, seed=subject.seed)
        sequences: list[ScoredSequence] = []
        owners: list[str] = []
        for name, text in texts.items():
            ids = np.array(subject.tokenizer(text).input_ids, np.int32)
            for start in range(0, len(ids), self.max_length):
                window = ids[start : start + self.max_length]
                if len(window) > 1:
                    sequences.append(ScoredSequence(window, 1, len(window)))
                    owners.append(name)
        scores = score(
            subject.model, sequences, batch_size=subject.batch_size, advance=subject.bar("perplexity", len(sequences))
        )
        nats: Counter[str] = Counter()
        tokens: Counter[str] = Counter()
        for owner, logp, count in zip(owners, scores.logps.tolist(), scores.tokens.tolist(), strict=True):
            nats[owner] -= logp
            tokens[owner] += count
        nll = of_items(
            "NLL of held-out text",
            {name: nats[name] / tokens[name] for name in tokens},
            weights={name: float(tokens[name]) for name in tokens},
            better="lower",
            unit="nats a token",
            seed=subject.seed,
        )
        low, high = nll["interval"]
        interval = (_exp(low), _exp(high))
        value = _exp(nll["value"])
        perplexity = of_whole("Perplexity of held-out text", value, nll["n"], interval=interval, better="lower")
        return Found({"nll": nll, "perplexity": perplexity}, {"tokens": tokens.total(), "texts": len(tokens)})


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


@dataclass
class Diversity:
    """Distinct n-grams, repetition and length of greedy answers to a set of prompts.

    Args:
        prompts: ``benign``, or rows with a column ``prompt``. split: of a data set of the Hub.
        limit: prompts, drawn by the seed. max_new_tokens: of an answer.
    """

    prompts: str = data.BENIGN
    split: str = "train"
    limit: int | None = 200
    max_new_tokens: int = 256

    def check(self) -> None:
        data.check_source("prompts", self.prompts, (data.BENIGN,))
        require_count("limit", self.limit)
        require_count("max_new_tokens", self.max_new_tokens)

    def run(self, subject: Subject) -> Found:
        """For each answer its repetition, its length, and whether it ends; over all answers distinct-1, -2, -3.

        distinct-n falls as answers grow, so it is read beside the length. Length is that of the answer's text as it is
        tokenised again.
        """
        answers = answers_to(self, subject)
        words = {name: text.split() for name, text in answers.items()}
        lengths = {n: float(len(subject.tokenizer(t, add_special_tokens=False).input_ids)) for n, t in answers.items()}
        seed = subject.seed
        return Found(
            {
                "repetition": of_items(
                    "Repeated 4-grams in an answer",
                    {name: repetition(tokens) for name, tokens in words.items()},
                    better="lower",
                    bounds=(0.0, 1.0),
                    seed=seed,
                ),
                **{f"distinct_{n}": distinct(list(words.values()), n) for n in (1, 2, 3)},
                "length": of_items("Length of an answer", lengths, better=None, unit="tokens", seed=seed),
                "unfinished": of_items(
                    "Answers cut off at the limit",
                    {name: float(length >= self.max_new_tokens) for name, length in lengths.items()},
                    better="lower",
                    bounds=(0.0, 1.0),
                    seed=seed,
                ),
            },
            {"max_new_tokens": self.max_new_tokens, "empty": sum(not tokens for tokens in words.values())},
        )


def answers_to(options: Diversity, subject: Subject) -> dict[str, str]:
    """Greedy answers to the prompts that ``options`` name, by their ids."""
    asked = data.prompts(options.prompts, split=options.split, limit=options.limit, seed=subject.seed)
    return dict(zip(asked, subject.answers(list(asked.values()), "answers", options.max_new_tokens), strict=True))


def distinct(answers: Sequence[Sequence[str]], n: int) -> Quantity:
    """distinct-n: distinct n-grams of words over all of them, across all answers.

    The interval is the delete-one jackknife's over answers, as drawing an answer twice (the bootstrap) adds n-grams
    that are not distinct. Source: Li et al., "A Diversity-Promoting Objective Function" (2016).
    """
    grams = [_grams(words, n) for words in answers]
    counts = Counter(gram for of_one in grams for gram in of_one)
    total = counts.total()
    value = len(counts) / total if total else math.nan
    without = []  # the value without each answer
    for of_one in grams:
        own = Counter(of_one)
        rest = total - len(of_one)
        if rest:
            without.append((len(counts) - sum(own[gram] == counts[gram] for gram in own)) / rest)
    return of_whole(
        f"distinct-{n} of the answers",
        value,
        len(answers) if total else 0,  # NaN rests on nothing
        interval=jackknife_interval(value, without),
        bounds=(0.0, 1.0),
        better="higher",
    )


def repetition(words: Sequence[str], n: int = 4) -> float:
    """Share of an answer's n-grams that stood in it before (``1 − distinct / all``); 0 where it has none.

    Source: rep-n of Welleck et al., "Neural Text Generation with Unlikelihood Training" (2020), section 3.
    """
    grams = _grams(words, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
