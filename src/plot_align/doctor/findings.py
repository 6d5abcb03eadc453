"""The checks of the data, from which share on each is worth a note, a warning or an error, and what they find.

The thresholds are ours, chosen on the data sets of ``docs/doctor.md``; the source says why the fault matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Severity = Literal["note", "warning", "error"]
SEVERITIES: tuple[Severity, ...] = ("note", "warning", "error")
EXAMPLES = 5  # rows that a finding names


@dataclass(frozen=True)
class Finding:
    """One thing found in a data set.

    Attributes:
        check: name of the check, a key of :data:`CHECKS`. severity: note, warning or error.
        count: pairs (or rows, or answers) that have it. share: of those looked at; of ``length`` and ``first-words``
            how often the label is guessed rightly from it alone.
        sentence: what was found. remedy: what to do. source: why it matters.
        rows: the first few row numbers, from 0.
    """

    check: str
    severity: Severity
    count: int
    share: float
    sentence: str
    remedy: str
    source: str
    rows: list[int]


@dataclass(frozen=True)
class Check:
    """A check of the data.

    Attributes:
        says: what the pairs do that have the fault; follows "12 of 2,000 pairs (0.6 %)".
        thresholds: the value from which it is a note, a warning, an error; None: never; 0: as soon as there is one.
        remedy, source: see :class:`Finding`.
    """

    name: str
    says: str
    thresholds: tuple[float | None, float | None, float | None]
    remedy: str
    source: str

    def severity(self, value: float) -> Severity | None:
        """The highest severity whose threshold ``value`` reaches; None below all, and where nothing was found."""
        reached: Severity | None = None
        for severity, threshold in zip(SEVERITIES, self.thresholds, strict=True):
            if threshold is not None and value > 0 and value >= threshold:
                reached = severity
        return reached

    def finding(
        self,
        count: int,
        of: int,
        rows: Sequence[int] = (),
        *,
        value: float | None = None,
        share: float | None = None,
        sentence: str | None = None,
    ) -> list[Finding]:
        """What was found, as a list of one, or of none below the thresholds.

        Args:
            count: pairs that have it. of: pairs looked at. rows: examples.
            value: what is held against the thresholds; None: the share. share: None: ``count / of``.
            sentence: None: the count, the share and :attr:`says`.
        """
        if share is None:
            share = count / of if of else 0.0
        severity = self.severity(share if value is None else value)
        if severity is None:
            return []
        if sentence is None:
            sentence = f"{count:,} of {of:,} pairs ({percent(share)}) {self.says}."
        return [Finding(self.name, severity, count, share, sentence, self.remedy, self.source, list(rows[:EXAMPLES]))]


def percent(share: float) -> str:
    """``0.00213`` → ``0.2 %``; a share that would read 0.0 keeps one digit."""
    shown = f"{100 * share:.1f}"
    return f"{shown if float(shown) or not share else f'{100 * share:.1g}'} %"


def at_least(found: Sequence[Finding], severity: Severity) -> bool:
    """Whether a finding is ``severity`` or worse."""
    return any(SEVERITIES.index(finding.severity) >= SEVERITIES.index(severity) for finding in found)


_DPO = (
    "Rafailov et al. 2023 (arXiv 2305.18290), section 4: a pair's gradient is that of log p(chosen) − log p(rejected)"
)
_TRL = "TRL's tokenisation, which `plot-align estimate` repeats token by token"

CHECKS = {
    check.name: check
    for check in (
        Check(
            "no-pair",
            "are no pairs and were left out",
            (None, 0, 0.1),
            "Complete or remove these rows: a trainer stops at the first of them.",
            _TRL,
        ),
        Check(
            "empty",
            "have an empty answer",
            (None, 0, 0.1),
            "Remove them: only the end-of-sequence token would be trained.",
            _TRL,
        ),
        Check(
            "identical",
            "have two equal answers",
            (0, 0.01, 0.1),
            "Drop them: their gradient is zero, and they only dilute the batch.",
            _DPO,
        ),
        Check(
            "near-identical",
            "have two nearly equal answers (words in common: 90 % or more)",
            (0.01, 0.05, None),
            "Lowering the rejected answer lowers the chosen one: add the SFT term, or drop these pairs.",
            "Pal et al. 2024 (arXiv 2402.13228): DPO lowers the chosen answer where the edit distance is small",
        ),
        Check(
            "duplicate",
            "repeat an earlier pair: the same prompt and the same two answers",
            (0, 0.01, 0.2),
            "Drop the repetitions; of a set made by concatenation, check that no part is in it twice.",
            "Lee et al. 2021 (arXiv 2107.06499): repeated texts are memorised",
        ),
        Check(
            "contradictory",
            "contradict an earlier pair: the same prompt and answers the other way round",
            (0, 0.01, 0.1),
            "Drop both of such pairs, or settle them; where labels are noisy, use `loss_type: robust` with a "
            "`label_smoothing`.",
            "Chowdhury et al. 2024 (arXiv 2403.00409): DPO on flipped labels",
        ),
        Check(
            "truncated",
            "are longer than max_length, and TRL cuts them",
            (0.01, 0.05, None),
            "Raise `max_length`, or drop the long pairs; a cut answer has no end to learn.",
            _TRL,
        ),
        Check(
            "difference-lost",
            "differ only in what is cut off, or are dropped as their prompt fills max_length",
            (0, 0.01, 0.1),
            "Raise `max_length`, or drop these pairs: nothing is left of them that could be learned.",
            _TRL,
        ),
        Check(
            "eos-missing",
            "have an answer that ends with no special token",
            (0, 0.01, 0.5),
            "Set a chat template that ends each turn with `tokenizer.eos_token`; else the model never learns to stop.",
            _TRL,
        ),
        Check(
            "eos-other",
            "have an answer that ends with another special token than the tokenizer's end-of-sequence token",
            (0, None, None),
            "See that generation stops at it as well: `generation_config.eos_token_id`.",
            _TRL,
        ),
        Check(
            "eos-doubled",
            "have an answer with two end-of-sequence tokens at its end",
            (0, 0.01, None),
            "Strip the end-of-sequence token, and what stands after it, from the texts; TRL appends its own.",
            _TRL,
        ),
        Check(
            "template",
            "lose text of an answer in the chat template",
            (None, 0, 0.1),
            "Look at `tokenizer.apply_chat_template` of such a row: set a template that keeps the last turn as it is.",
            _TRL,
        ),
        Check(
            "border",
            "have a prompt whose tokens change when the answer follows",
            (0.01, 0.1, None),
            "Move the space between prompt and answer to the answer's beginning; of a chat template, check that its "
            "generation prompt is how its answers begin.",
            _TRL,
        ),
        Check(
            "raw-dialogue",
            "are raw dialogues: the prompt is whatever both sides share, the first words of the answer included",
            (0, None, None),
            "Convert them to conversations with `plot_align.preference.dialogues.as_conversations`; words that both "
            "answers begin with are else never trained.",
            "TRL's `extract_prompt`",
        ),
        Check(
            "length",
            "",
            (0.55, 0.65, None),
            "Expect longer answers after training. `ld_alpha: 0.5` of TRL's DPO or a length-normalised loss (SimPO) "
            "takes weight from length; or balance the lengths of the pairs.",
            "Singhal et al. 2023 (arXiv 2310.03716); Park et al. 2024 (arXiv 2403.19159); LD-DPO (arXiv 2409.06411)",
        ),
        Check(
            "first-words",
            "",
            (0.6, 0.7, None),
            "A model can fit the labels by its first words alone. Read the table of first words; mix in pairs that "
            "begin alike and differ later.",
            "Qi et al. 2024 (arXiv 2406.05946): alignment a few tokens deep falls to prefilling",
        ),
        Check(
            "refusals",
            "",
            (0.1, 0.25, None),
            "Add pairs of harmless requests whose chosen answer helps and whose rejected one refuses, and measure "
            "over-refusal after the run (`plot-align redteam`).",
            "Röttger et al. 2023 (arXiv 2308.01263): models trained to refuse refuse harmless requests as well",
        ),
        Check(
            "never-refuses",
            "",
            (0.1, 0.25, None),
            "Refusing is what these pairs train away: check that this is meant, and measure harmful requests after "
            "the run (`plot-align redteam`).",
            "Qi et al. 2023 (arXiv 2310.03693): fine-tuning undoes safety",
        ),
        Check(
            "scripts",
            "have answers in two different scripts",
            (0, 0.01, None),
            "Drop them, or check that a change of language is what is to be learned.",
            "a difference of script outweighs any other in the tokens' frequencies, of which the preference is made",
        ),
        Check(
            "languages",
            "have an answer in another script than the data set's main one",
            (0.01, None, None),
            "Evaluate in each language; languages of one script are not told apart here.",
            "scripts by Unicode's character names",
        ),
        Check(
            "overlap",
            "have a prompt of the file given with --overlap",
            (None, 0, 0.1),
            "Drop them, or do not report results on that file.",
            "Brown et al. 2020 (arXiv 2005.14165), appendix C: overlap of 13-grams",
        ),
    )
}
