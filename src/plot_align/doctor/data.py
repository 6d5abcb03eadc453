"""One pass over a preference set: every check of :mod:`~plot_align.doctor.findings`, in memory that does not grow."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from plot_align.doctor.faults import FAULTS, similarity
from plot_align.doctor.findings import CHECKS, EXAMPLES, Finding
from plot_align.doctor.masses import preference_of
from plot_align.doctor.pairs import Pair, batches, open_pairs
from plot_align.doctor.tallies import FirstWords, Lengths, Overlap, Refusals, Repeats, Rows, Sample, Scripts
from plot_align.errors import InputError
from plot_align.parallel import rank
from plot_align.preference.completions import RowError
from plot_align.preference.counting import Counts, count_sides
from plot_align.preference.estimation import progress_bar
from plot_align.text import passage

WORST = {"nearly equal": 7, "chosen much longer": 7, "chosen refuses": 6}  # pairs to read, twenty in all
_LONGEST = 600  # characters kept of a text to read


@dataclass(frozen=True)
class Examination:
    """What one pass over the data found.

    Attributes:
        rows: rows read. pairs: those that are pairs. findings: worst first.
        measures: name → number, or :func:`plot_align.records.measure`; the share of each check among them.
        refused: the first rows that are no pairs, each with its reason.
        length_differences: chosen − rejected in tokens → pairs. first_words: see :meth:`FirstWords.table`.
        preference: see :func:`~plot_align.doctor.masses.preference_of`.
        worst: up to twenty pairs to read: ``row``, ``why``, ``prompt``, ``chosen``, ``rejected``, long texts cut.
    """

    rows: int
    pairs: int
    findings: list[Finding]
    measures: dict[str, Any]
    refused: list[str]
    length_differences: dict[int, int]
    first_words: list[dict[str, Any]]
    preference: dict[str, Any] | None
    worst: list[dict[str, Any]]


def examine(
    data: Any,
    tokenizer: Any,
    *,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    strict: bool = False,
    overlap: Iterable[str] = (),
    batch_size: int = 1000,
    progress: bool = True,
    source: str = "the data",
    sample: Sample | None = None,
) -> Examination:
    """Run every check over the rows, a batch of them in memory at a time.

    Several processes (:mod:`plot_align.parallel`) divide the tokenising; each of them gets the whole result.

    Args:
        data: ``datasets.Dataset`` or ``IterableDataset`` of pairs, in any of TRL's formats.
        tokenizer: the one the trainer is given.
        max_length, truncation_mode, batch_size: see :func:`plot_align.estimate`.
        strict: refuse the first row that is no pair instead of leaving it out.
        overlap: prompts that should not be among those of the data.
        progress: show a progress bar on standard error. source: what to call the data.
        sample: keeps some of the pairs.

    Raises:
        InputError: what :func:`plot_align.estimate` refuses of a whole data set; no row is a pair; with ``strict``,
            a row that is none.
    """
    rows, rules, refused = open_pairs(data, tokenizer, max_length, truncation_mode, batch_size)
    faults = {name: Rows() for name in FAULTS}
    bad, counts = Rows(), Counts(rules.size)
    reasons: list[str] = []
    repeats, lengths, words, refusals, scripts = Repeats(), Lengths(), FirstWords(), Refusals(), Scripts()
    shared, worst, pairs = Overlap(overlap), Worst(), 0

    def refuse(error: RowError) -> None:
        if strict:
            raise error
        bad.add(error.first)
        if len(reasons) < EXAMPLES:
            reasons.append(f"row {error.first}: {error.reason}")

    for error in refused:
        refuse(error)
    total = len(data) if hasattr(data, "__len__") else None
    with progress_bar("examining pairs", progress and rank() == 0, total) as advance:
        advance(len(refused))
        for batch in batches(rows, rules, batch_size, len(refused)):
            if batch.refused is not None:
                refuse(batch.refused)
                advance(1)
                continue
            for pair in batch.pairs:
                for name, has in FAULTS.items():
                    if has(pair, rules):
                        faults[name].add(pair.row)
                for tally in (repeats, lengths, words, scripts, shared):
                    tally.add(pair)
                worst.add(pair, *refusals.add(pair))
                if sample is not None:
                    sample.add(pair)
            counts.add(count_sides(batch.border, batch.sides, rules))
            pairs += len(batch.pairs)
            advance(len(batch.pairs))
    if not pairs:
        raise InputError(f"none of the {bad.count:,} rows is a pair ({reasons[0]}); check the file and its columns")

    accuracy = words.accuracy()
    measures: dict[str, Any] = {
        **{name: found.count / pairs for name, found in faults.items()},
        "no-pair": bad.count / (pairs + bad.count),
        "duplicate": repeats.duplicates.count / pairs,
        "contradictory": repeats.contradictory.count / pairs,
        "overlap": shared.rows.count / pairs,
        **lengths.measures(),
        **refusals.measures(),
        "first_words_accuracy": accuracy,
    }
    findings = [
        *CHECKS["no-pair"].finding(
            bad.count,
            pairs + bad.count,
            bad.rows,
            sentence=f"{bad.count:,} of {pairs + bad.count:,} rows are no pairs and were left out; the first is "
            f"{reasons[0] if reasons else ''}.",
        ),
        *(
            finding
            for name, found in faults.items()
            for finding in CHECKS[name].finding(found.count, pairs, found.rows)
        ),
        *repeats.findings(pairs),
        *lengths.findings(measures),
        *words.findings(accuracy),
        *refusals.findings(measures),
        *scripts.findings(),
        *shared.findings(pairs),
    ]
    order = {"error": 0, "warning": 1, "note": 2}
    return Examination(
        rows=pairs + bad.count,
        pairs=pairs,
        findings=sorted(findings, key=lambda finding: order[finding.severity]),
        measures=measures,
        refused=reasons,
        length_differences=dict(sorted(lengths.differences.items())),
        first_words=words.table(),
        preference=preference_of(counts, tokenizer, source),
        worst=worst.rows(),
    )


class Worst:
    """The pairs to read first: nearly equal, with a chosen answer much longer, or whose chosen one alone refuses."""

    def __init__(self) -> None:
        self._heaps: dict[str, list[tuple[float, int, dict[str, Any]]]] = {why: [] for why in WORST}

    def add(self, pair: Pair, chosen_refuses: bool, rejected_refuses: bool) -> None:
        chosen, rejected = pair.lengths
        if chosen and rejected and 0.7 <= chosen / rejected <= 1.4:
            alike = similarity(pair)
            if alike >= 0.7:
                self._push("nearly equal", alike, pair)
        if chosen > 2 * rejected:
            self._push("chosen much longer", chosen - rejected, pair)
        if chosen_refuses and not rejected_refuses:
            self._push("chosen refuses", len(pair.rejected) - len(pair.chosen), pair)

    def _push(self, why: str, badness: float, pair: Pair) -> None:
        heap = self._heaps[why]
        if len(heap) == WORST[why] and badness <= heap[0][0]:
            return  # the earlier row of equally bad ones stays
        texts = {name: passage(getattr(pair, name), longest=_LONGEST) for name in ("prompt", "chosen", "rejected")}
        entry = (badness, -pair.row, {"row": pair.row, "why": why, **texts})
        if len(heap) < WORST[why]:
            heapq.heappush(heap, entry)
        else:
            heapq.heapreplace(heap, entry)

    def rows(self) -> list[dict[str, Any]]:
        """Worst first within each kind; a pair stands in the first kind that has it."""
        found: dict[int, dict[str, Any]] = {}
        for heap in self._heaps.values():
            for _, _, entry in sorted(heap, reverse=True, key=lambda entry: entry[:2]):
                found.setdefault(entry["row"], entry)
        return list(found.values())
