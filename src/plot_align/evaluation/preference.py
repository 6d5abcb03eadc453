"""What a model makes of preference pairs: which side it finds likelier, and where tuning moved the two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from plot_align.errors import InputError
from plot_align.evaluation import data
from plot_align.evaluation.quantity import of_items
from plot_align.evaluation.subject import Found, Subject, require_count
from plot_align.inference.scoring import Scores, score


@dataclass
class PairScores:
    """Both sides of the pairs that have a token to score on either; ``ids`` are theirs."""

    ids: list[str]
    chosen: Scores
    rejected: Scores


@dataclass
class OnPairs:
    """Options of what is measured on pairs.

    Args:
        pairs: a file or a data set of the Hub. split, data_dir: of the data set.
        limit: pairs, drawn by the seed. max_length: tokens a row is truncated to.
    """

    pairs: str = "Anthropic/hh-rlhf"
    split: str = "test"
    data_dir: str | None = None
    limit: int | None = 1000
    max_length: int = 1024

    def check(self) -> None:
        data.check_source("pairs", self.pairs)
        require_count("limit", self.limit)
        require_count("max_length", self.max_length)

    def scores(self, subject: Subject, of: Subject) -> PairScores:
        """How ``of`` scores the pairs that ``subject`` is measured on; once a model, whoever asks."""
        key = ("pairs", self.pairs, self.split, self.data_dir, self.limit, self.max_length)
        if key not in of.memory:
            rows = data.load(self.pairs, split=self.split, data_dir=self.data_dir, limit=self.limit, seed=subject.seed)
            chosen, rejected = data.scored(rows, of.tokenizer, self.max_length)
            kept = [i for i, s in enumerate(zip(chosen, rejected, strict=True)) if all(x.start < x.stop for x in s)]
            if not kept:
                raise InputError(
                    f"no pair of {self.pairs} has a token to score on both sides, expected some; raise max_length, or "
                    "check the pairs"
                )
            advance = of.bar(f"pairs of {self.pairs}", 2 * len(kept))
            of.memory[key] = PairScores(
                [str(i) for i in kept],
                *(
                    score(of.model, [side[i] for i in kept], batch_size=of.batch_size, advance=advance)
                    for side in (chosen, rejected)
                ),
            )
        return of.memory[key]


@dataclass
class PreferenceAccuracy(OnPairs):
    """How often the chosen answer is the likelier one: by the log-probability of the whole, and a token's mean."""

    def run(self, subject: Subject) -> Found:
        """Accuracy over the pairs; a tie is half."""
        found = self.scores(subject, subject)

        def accuracy(title: str, chosen: Any, rejected: Any) -> dict[str, Any]:
            wins = {
                name: 1.0 if a > b else 0.5 if a == b else 0.0
                for name, a, b in zip(found.ids, chosen.tolist(), rejected.tolist(), strict=True)
            }
            return of_items(title, wins, better="higher", bounds=(0.0, 1.0), seed=subject.seed)

        chosen, rejected = found.chosen, found.rejected
        means = chosen.logps / chosen.tokens, rejected.logps / rejected.tokens  # (N,) each
        return Found(
            {
                "accuracy": accuracy("Preference accuracy", chosen.logps, rejected.logps),
                "accuracy_per_token": accuracy("Preference accuracy, mean of tokens", *means),
            },
            {"pairs": len(found.ids)},
        )


@dataclass
class Displacement(OnPairs):
    """Where tuning moved the log-probability of chosen and rejected answers, against the reference model.

    A tuned model that orders pairs rightly may have lost the chosen answers on the way (likelihood displacement,
    Razin et al., arXiv 2410.08847): then ``chosen`` is negative.
    """

    def run(self, subject: Subject) -> Found:
        """Shifts in nats an answer, and the accuracy of the implicit reward (the sign of their difference)."""
        reference = subject.require_reference("displacement")
        after, before = self.scores(subject, subject), self.scores(subject, reference)
        if after.ids != before.ids:
            raise InputError(
                f"the tokenizers of {subject.name} and {reference.name} leave other pairs of {self.pairs} to score; "
                "raise max_length, or name the reference the model was tuned from"
            )
        chosen = (after.chosen.logps - before.chosen.logps).tolist()
        rejected = (after.rejected.logps - before.rejected.logps).tolist()
        margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
        wins = [1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins]

        def named(values: list[float]) -> dict[str, float]:
            return dict(zip(after.ids, values, strict=True))

        options: dict[str, Any] = {"unit": "nats", "seed": subject.seed}
        return Found(
            {
                "chosen": of_items("Chosen answers, log-p gained", named(chosen), better="higher", **options),
                "rejected": of_items("Rejected answers, log-p gained", named(rejected), better=None, **options),
                "reward_accuracy": of_items(
                    "Implicit reward accuracy", named(wins), better="higher", bounds=(0.0, 1.0), seed=subject.seed
                ),
            },
            {"pairs": len(after.ids)},
        )
