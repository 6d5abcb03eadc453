"""The whole of it: a data set and a tokenizer in, findings and a verdict out; as text, as JSON, as a record."""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from plot_align.doctor.data import Examination, examine
from plot_align.doctor.findings import Finding, percent
from plot_align.doctor.pairs import open_data, prompts_of
from plot_align.doctor.verdict import Advice, judge
from plot_align.errors import InputError
from plot_align.inference.load import load_tokenizer
from plot_align.preference.distribution import tokenizer_name
from plot_align.records import write_record
from plot_align.text import readable

KIND = "doctor"  # of the record
KINDS = {
    "length": "the end of the answer, which is length",
    "format": "format: white space, punctuation, markup",
    "refusal": "words of refusal",
}


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor found in a data set, and what it advises.

    Attributes:
        source: the data set. tokenizer: its name. config: what decides the result. seconds: how long it took.
        examination: the findings and what they are made of. verdict: what to do, in plain words.
    """

    source: str
    tokenizer: str
    config: dict[str, Any]
    seconds: float
    examination: Examination
    verdict: list[Advice]

    def to_dict(self) -> dict[str, Any]:
        """All as JSON-able values, without any text of the data but single words and tokens."""
        found = asdict(self.examination)
        found["worst"] = [{"row": pair["row"], "why": pair["why"]} for pair in found["worst"]]
        found["length_differences"] = [list(entry) for entry in found["length_differences"].items()]
        return {
            "source": self.source,
            "tokenizer": self.tokenizer,
            "verdict": [asdict(advice) for advice in self.verdict],
            **found,
            "seconds": self.seconds,
        }

    def as_text(self) -> str:
        """For people, in 80 columns: the findings, worst first, and the verdict."""
        of = self.examination
        lines = [f"{of.pairs:,} pairs of {self.source}, read with {self.tokenizer}", ""]
        for finding in of.findings:
            lines += _wrapped(f"{finding.severity:<8} ", f"{finding.sentence} {_rows(finding)}".strip())
        if not of.findings:
            lines.append("no check found anything")
        if of.preference is not None:
            lines += ["", *_wrapped("", preference_sentence(of.preference))]
            for side in ("preferred", "rejected"):
                words = "  ".join(readable(token["text"]) for token in of.preference[side][:8])
                lines += _wrapped(f"{side:<10}", words)
        return "\n".join([*lines, "", *(line for advice in self.verdict for line in _wrapped("- ", advice.sentence))])

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the record, a ``.json`` file; returns its path. Errors: :func:`plot_align.records.write_record`."""
        return write_record(path, KIND, self.to_dict(), config=self.config)


def diagnose(
    dataset: Any,
    model_or_tokenizer: Any,
    *,
    name: str | None = None,
    split: str = "train",
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    strict: bool = False,
    overlap: str | os.PathLike[str] | None = None,
    batch_size: int = 1000,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> Diagnosis:
    """Look for what is wrong with a preference data set before a run.

    Rows that are no pairs are counted and left out. One batch of rows is in memory at a time, and of the rest hashes
    and counters. Nothing is trained or generated, and no model is loaded.

    Args:
        dataset: a ``datasets.Dataset`` or ``IterableDataset`` of pairs, or what :func:`plot_align.load_pairs` opens.
        model_or_tokenizer: a tokenizer; or a model, a hub id or a folder, whose tokenizer is loaded.
        name: configuration of a Hub data set that is opened here.
        split: its split.
        max_length: as in ``DPOConfig``.
        truncation_mode: as in ``DPOConfig``.
        strict: refuse the first row that is no pair.
        overlap: file of prompts that should not be among those of the data, e.g. a benchmark's.
        batch_size: rows tokenised at a time.
        progress: show a progress bar on standard error.
        trust_remote_code: allow a tokenizer's own code.

    Raises:
        InputError: what :func:`plot_align.load_pairs` and :func:`plot_align.estimate` refuse of a whole data set; no
            row is a pair; with ``strict``, a row that is none; a file of prompts that cannot be read.
    """
    tokenizer = _tokenizer(model_or_tokenizer, trust_remote_code)
    if isinstance(dataset, str | os.PathLike):
        source = Path(dataset).name if Path(dataset).exists() else str(dataset)
        data = open_data(dataset, name=name, split=split)
    else:
        data = dataset
        known = getattr(getattr(data, "info", None), "download_checksums", None) or {}
        source = next(iter(known), "the data set")
    start = time.perf_counter()
    found = examine(
        data,
        tokenizer,
        max_length=max_length,
        truncation_mode=truncation_mode,
        strict=strict,
        overlap=() if overlap is None else prompts_of(overlap),
        batch_size=batch_size,
        progress=progress,
        source=source,
    )
    config: dict[str, Any] = {
        "data": source,
        "tokenizer": tokenizer_name(tokenizer),
        "name": name,
        "split": split,
        "max_length": max_length,
        "truncation_mode": truncation_mode,
        "overlap": None if overlap is None else Path(overlap).name,
    }
    verdict = judge(measured(found))
    return Diagnosis(source, config["tokenizer"], config, time.perf_counter() - start, found, verdict)


def measured(found: Examination) -> Mapping[str, Any]:
    """What the verdict's rules read of the data; a model's measures can be added to it."""
    if found.preference is None or not found.preference["certain"]:
        return found.measures
    mass = found.preference["mass"]
    largest = max(KINDS, key=lambda kind: mass[kind])
    return {**found.measures, "content": mass["content"], "largest_kind": KINDS[largest]}


def preference_sentence(preference: Mapping[str, Any]) -> str:
    """What PLOT would train, in one sentence."""
    if not preference["certain"]:
        return "No token is clearly preferred or rejected: PLOT would have nothing to train."
    parts = ", ".join(f"{name} {percent(share)}" for name, share in preference["mass"].items())
    return (
        f"What PLOT would train: of the tokens clearly preferred or rejected ({percent(preference['certain'])} of the "
        f"difference between the sides, total variation {preference['distance']:.3f}) {parts}."
    )


def _tokenizer(given: Any, trust_remote_code: bool) -> Any:
    from transformers import PreTrainedTokenizerBase

    if isinstance(given, PreTrainedTokenizerBase):
        return given
    name = getattr(getattr(given, "config", None), "name_or_path", given)  # of a model, where it was loaded from
    if isinstance(name, str | os.PathLike) and str(name):
        return load_tokenizer(str(name), trust_remote_code=trust_remote_code)
    raise InputError(
        f"model_or_tokenizer is a {type(given).__name__}, expected a tokenizer, a model that was loaded by its name, "
        "a hub id or a folder; pass the tokenizer"
    )


def _rows(finding: Finding) -> str:
    more = ", …" if finding.count > len(finding.rows) else "."
    return f"Rows {', '.join(map(str, finding.rows))}{more}" if finding.rows else ""


def _wrapped(start: str, text: str) -> list[str]:
    return textwrap.wrap(text, 80, initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False)
