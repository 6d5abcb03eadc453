"""What is wrong with many pairs together. Each tally keeps hashes and counters of the pairs it is given, no texts."""

from __future__ import annotations

import hashlib
import math
import random
import re
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import numpy as np
from scipy.special import betaincinv

from plot_align.doctor.faults import SHORT_HAN, script
from plot_align.doctor.findings import CHECKS, EXAMPLES, Finding, percent
from plot_align.doctor.pairs import Pair
from plot_align.records import NORMAL_95, measure, wilson
from plot_align.redteam import RefusalJudge


class Sample:
    """A uniform sample of pairs of a stream, by reservoir."""

    def __init__(self, number: int, seed: int = 0) -> None:
        self._number, self._random, self._seen = number, random.Random(seed), 0
        self._kept: list[Pair] = []

    def add(self, pair: Pair) -> None:
        self._seen += 1
        if len(self._kept) < self._number:
            self._kept.append(pair)
        elif (place := self._random.randrange(self._seen)) < self._number:
            self._kept[place] = pair

    def pairs(self) -> list[Pair]:
        """In the order of their rows."""
        return sorted(self._kept, key=lambda pair: pair.row)


@dataclass
class Rows:
    """How many rows have something, and the first few of them."""

    count: int = 0
    rows: list[int] = field(default_factory=list)

    def add(self, row: int) -> None:
        self.count += 1
        if len(self.rows) < EXAMPLES:
            self.rows.append(row)


def _digest(*texts: str) -> int:
    """64 bits of the texts, white space aside: among 10⁶ of them, two are alike by chance once in 37 million runs."""
    found = hashlib.blake2b(digest_size=8)
    for text in texts:
        found.update(" ".join(text.split()).encode("utf-8", "surrogatepass") + b"\0")
    return int.from_bytes(found.digest(), "little")


def exact(count: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Clopper-Pearson interval (low, high) of a proportion: too wide rather than too narrow, however small n is.

    Source: C. J. Clopper and E. S. Pearson, "The use of confidence or fiducial limits", Biometrika 26 (1934).

    Args:
        count: successes among ``n`` cases, 1 or more; a tie counts one half, which spreads less than a case of 0 or 1.
        confidence: e.g. 0.95.
    """
    tail = (1 - confidence) / 2
    low = float(betaincinv(count, n - count + 1, tail)) if count > 0 else 0.0
    high = float(betaincinv(count + 1, n - count, 1 - tail)) if count < n else 1.0
    return low, high


class Repeats:
    """Pairs seen before, the same way round or the other."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self.duplicates, self.contradictory = Rows(), Rows()

    def add(self, pair: Pair) -> None:
        if pair.chosen.split() == pair.rejected.split():
            return  # identical sides contradict themselves
        key = _digest(pair.tools, pair.prompt, pair.chosen, pair.rejected)
        if key in self._seen:
            self.duplicates.add(pair.row)
        elif _digest(pair.tools, pair.prompt, pair.rejected, pair.chosen) in self._seen:
            self.contradictory.add(pair.row)
        self._seen.add(key)

    def findings(self, pairs: int) -> list[Finding]:
        """Those of the checks duplicate and contradictory."""
        return [
            *CHECKS["duplicate"].finding(self.duplicates.count, pairs, self.duplicates.rows),
            *CHECKS["contradictory"].finding(self.contradictory.count, pairs, self.contradictory.rows),
        ]


class Lengths:
    """How much longer the chosen answer is, in tokens, and how well length alone tells the label.

    The AUC is that within pairs, the probability that the longer of the two answers is the chosen one, ties one half.
    A pair is one draw. The interval is :func:`exact`, since few pairs can all go one way by chance.
    """

    def __init__(self) -> None:
        self.differences: Counter[int] = Counter()  # chosen − rejected, tokens
        self.totals: Counter[int] = Counter()  # prompt and the longer answer, tokens

    def add(self, pair: Pair) -> None:
        chosen, rejected = pair.lengths
        self.differences[chosen - rejected] += 1
        self.totals[max(map(len, pair.ids))] += 1

    def measures(self) -> dict[str, Any]:
        """``length_auc``, ``length_difference`` (tokens), ``longest_99`` (tokens that hold 99 % of the pairs)."""
        n = self.differences.total()
        values = np.array(sorted(self.differences), dtype=float)
        counts = np.array([self.differences[int(value)] for value in values])
        wins = float((np.sign(values) + 1) @ counts / 2)
        mean = float(values @ counts / n)
        error = math.sqrt(float((values - mean) ** 2 @ counts) / (n - 1) / n) if n > 1 else 0.0
        # Of equal differences alone, no spread can be told.
        interval = (mean - NORMAL_95 * error, mean + NORMAL_95 * error) if error else None
        return {
            "length_auc": measure(wins / n, n, interval=exact(wins, n)),
            "length_difference": measure(mean, n, interval=interval, error=error or None, unit="tokens"),
            "longest_99": measure(_quantile(self.totals, 0.99), n, unit="tokens"),
        }

    def findings(self, measures: dict[str, Any]) -> list[Finding]:
        """That of the check length, held to the lower end of the AUC's 95 % interval."""
        auc, mean = measures["length_auc"], measures["length_difference"]
        longer = sum(count for value, count in self.differences.items() if value > 0)
        strength = abs(auc["value"] - 0.5)
        low, high = auc["interval"]
        certain, most = (low, high) if auc["value"] >= 0.5 else (1 - high, 1 - low)
        word = "longer" if auc["value"] >= 0.5 else "shorter"
        sentence = (
            f"Length alone tells the label in {percent(0.5 + strength)} of the pairs (95 % interval "
            f"{percent(certain)} to {percent(most)}): the chosen answer is longer in {longer:,} of {auc['n']:,}, and "
            f"on average {abs(mean['value']):.1f} tokens {'longer' if mean['value'] >= 0 else 'shorter'}; the {word} "
            "one wins."
        )
        return CHECKS["length"].finding(longer, auc["n"], value=certain, share=auc["value"], sentence=sentence)


def _quantile(counts: Counter[int], share: float) -> int:
    """The smallest value that at least ``share`` of the counted do not exceed."""
    below, needed = 0, share * counts.total()
    for value in sorted(counts):
        below += counts[value]
        if below >= needed:
            return value
    return 0


class FirstWords:
    """How well the first words of the answers alone tell which is chosen: a naive Bayes classifier, cross-validated.

    A feature is a word in its place, among the first five, hashed into 2¹⁶ classes. The score of an answer is
    ``Σ log (c + 1)/(r + 1)`` over its features, c and r how often they begin chosen and rejected answers in the other
    four of five parts; the higher score of a pair is the guess, a tie one half. A part holds all pairs of a prompt.
    """

    WORDS, PARTS, CLASSES = 5, 5, 1 << 16
    _WORD = re.compile(r"\w+(?:['’]\w+)*")

    def __init__(self) -> None:
        self._features = array("H")  # pairs · 2 · WORDS, 0 where an answer is shorter
        self._parts = array("B")
        self._counts = np.zeros((2, self.CLASSES), np.int64)  # of first words alone, for the table
        self._texts: dict[int, str] = {}  # at most one word a class

    def add(self, pair: Pair) -> None:
        self._parts.append(crc32(pair.prompt.encode("utf-8", "surrogatepass")) % self.PARTS)
        for side, answer in enumerate(pair.answers):
            words = [word.lower() for word in self._WORD.findall(answer[:200])[: self.WORDS]]
            classes = [self._class(f"{place} {word}") for place, word in enumerate(words)]
            self._features.extend(classes + [0] * (self.WORDS - len(classes)))
            if words:
                self._counts[side, classes[0]] += 1
                self._texts.setdefault(classes[0], words[0][:40])

    def _class(self, feature: str) -> int:
        return 1 + crc32(feature.encode("utf-8", "surrogatepass")) % (self.CLASSES - 1)

    def accuracy(self) -> dict[str, Any]:
        """Share of pairs guessed rightly, a :func:`plot_align.records.measure` with Wilson's interval."""
        parts = np.frombuffer(self._parts, np.uint8)  # (N,)
        features = np.frombuffer(self._features, np.uint16).reshape(-1, 2, self.WORDS)  # (N, 2, WORDS)
        counts = np.zeros((self.PARTS, 2, self.CLASSES), np.int64)
        for part in range(self.PARTS):
            for side in range(2):
                counts[part, side] = np.bincount(features[parts == part, side].ravel(), minlength=self.CLASSES)
        right = 0.0
        for part in range(self.PARTS):
            chosen, rejected = counts.sum(0) - counts[part]  # (CLASSES,) each
            weight = np.log((chosen + 1) / (rejected + 1))
            weight[0] = 0  # no word
            scores = weight[features[parts == part]].sum(-1)  # (n, 2)
            right += float((np.sign((scores[:, 0] - scores[:, 1]).round(9)) + 1).sum()) / 2
        n = len(parts)
        share = right / n if n else math.nan
        return measure(share, n, interval=wilson(share, n))

    def table(self, rows: int = 15) -> list[dict[str, Any]]:
        """The first words whose frequencies differ most between the sides, as dictionaries: word, chosen, rejected."""
        gaps = np.abs(self._counts[0] - self._counts[1])
        order = [int(at) for at in np.argsort(-gaps, kind="stable")[:rows] if gaps[at]]
        return [
            {"word": self._texts[at], "chosen": int(self._counts[0, at]), "rejected": int(self._counts[1, at])}
            for at in order
        ]

    def findings(self, accuracy: dict[str, Any]) -> list[Finding]:
        """That of the check first-words, held to the lower end of the interval."""
        if not accuracy["n"]:
            return []
        low, high = accuracy["interval"]
        sentence = (
            f"The first {self.WORDS} words of the answers alone tell which one is chosen in "
            f"{percent(accuracy['value'])} of {accuracy['n']:,} held-out pairs (95 % interval {percent(low)} to "
            f"{percent(high)}; chance is 50 %)."
        )
        right = round(accuracy["value"] * accuracy["n"])
        return CHECKS["first-words"].finding(
            right, accuracy["n"], value=low, share=accuracy["value"], sentence=sentence
        )


class Refusals:
    """How many chosen and rejected answers refuse, by ``redteam``'s own judge."""

    def __init__(self) -> None:
        self._judge = RefusalJudge()
        self.counts = [[0, 0], [0, 0]]  # [chosen refuses][rejected refuses]
        self.rows = Rows(), Rows()  # only the chosen refuses; only the rejected

    def add(self, pair: Pair) -> tuple[bool, bool]:
        """Whether the chosen and whether the rejected answer refuses."""
        chosen, rejected = (self._judge.refusal(answer) is not None for answer in pair.answers)
        self.counts[chosen][rejected] += 1
        if chosen != rejected:
            self.rows[0 if chosen else 1].add(pair.row)
        return chosen, rejected

    def measures(self) -> dict[str, Any]:
        """``refusals_chosen``, ``refusals_rejected``: shares; ``refusal_gap``: the first less the second, paired.

        The gap is the share of pairs in which the chosen answer alone refuses, less that of the rejected one alone.
        Each has an exact interval of 97.5 %, so both hold in 95 % at least (Bonferroni), and with them the gap's.
        """
        (neither, other), (own, both) = self.counts
        n = neither + other + own + both
        found = {}
        for name, count in (("refusals_chosen", own + both), ("refusals_rejected", other + both)):
            share = count / n if n else math.nan
            found[name] = measure(share, n, interval=wilson(share, n))
        if not n:
            return {**found, "refusal_gap": measure(math.nan, 0, interval=(-1.0, 1.0))}
        (own_low, own_high), (other_low, other_high) = (exact(count, n, 0.975) for count in (own, other))
        interval = own_low - other_high, own_high - other_low
        found["refusal_gap"] = measure((own - other) / n, n, interval=interval)
        return found

    def findings(self, measures: dict[str, Any]) -> list[Finding]:
        """That of the check refusals or never-refuses; of the gap's 95 % interval the end nearer to 0 counts."""
        (neither, other), (own, both) = self.counts
        n = neither + other + own + both
        if not n:
            return []
        low, high = measures["refusal_gap"]["interval"]
        certain = low if own >= other else -high
        sentence = (
            f"{percent((own + both) / n)} of the chosen and {percent((other + both) / n)} of the rejected answers "
            f"refuse; the chosen alone refuses in {own:,} pairs, the rejected alone in {other:,}."
        )
        check, count = ("refusals", own) if own >= other else ("never-refuses", other)
        rows = self.rows[0 if own >= other else 1].rows
        return CHECKS[check].finding(count, n, rows, value=certain, sentence=sentence)


class Scripts:
    """The scripts of the answers."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, pair: Pair) -> None:
        self.counts.update(filter(None, map(script, pair.spoken)))

    def findings(self) -> list[Finding]:
        """That of the check languages, over answers; short ones in Han are in whichever language of it is commoner."""
        counts = Counter(self.counts)
        counts[max("Han", "Japanese", key=lambda name: counts[name])] += counts.pop(SHORT_HAN, 0)
        total = counts.total()
        if not total:
            return []
        others = total - counts.most_common(1)[0][1]
        listed = ", ".join(f"{name} {percent(count / total)}" for name, count in counts.most_common(5) if count)
        return CHECKS["languages"].finding(others, total, sentence=f"The answers' scripts: {listed}.")


class Overlap:
    """Prompts shared with a benchmark: equal but for case, punctuation and white space, or with 13 words in a row."""

    WORDS = 13

    def __init__(self, prompts: Iterable[str]) -> None:
        self._known: set[int] = set()
        for prompt in prompts:
            self._known.update(self._keys(prompt))
        self.rows = Rows()

    def _keys(self, text: str) -> Iterable[int]:
        words = re.findall(r"\w+", text.casefold())
        if not words:
            return
        yield hash(("whole", *words))
        for at in range(len(words) - self.WORDS + 1):
            yield hash(tuple(words[at : at + self.WORDS]))

    def add(self, pair: Pair) -> None:
        if self._known and any(key in self._known for request in pair.requests for key in self._keys(request)):
            self.rows.add(pair.row)

    def findings(self, pairs: int) -> list[Finding]:
        """That of the check overlap."""
        return CHECKS["overlap"].finding(self.rows.count, pairs, self.rows.rows)
