"""The whole of it: a data set and a tokenizer in, findings and a verdict out; as text, as JSON, as a record."""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from plot_align import records
from plot_align.doctor.data import Examination, examine
from plot_align.doctor.findings import SEVERITIES, Finding, Severity, at_least, percent
from plot_align.doctor.model import context_of, measure
from plot_align.doctor.pairs import Pair, open_data, prompts_of
from plot_align.doctor.tallies import Sample
from plot_align.doctor.verdict import Advice, judge
from plot_align.environment import fast_bf16
from plot_align.errors import InputError
from plot_align.inference.load import load_model, load_tokenizer
from plot_align.preference.distribution import tokenizer_name
from plot_align.preference.estimation import progress_bar, window
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
        model: :class:`~plot_align.doctor.model.ModelMeasures` as a dict, with the measured ``rows``; or None.
    """

    source: str
    tokenizer: str
    config: dict[str, Any]
    seconds: float
    examination: Examination
    verdict: list[Advice]
    model: dict[str, Any] | None = None

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
            "model": self.model,
            "seconds": self.seconds,
        }

    def as_text(self) -> str:
        """For people, in 80 columns: the findings, worst first, and the verdict."""
        of = self.examination
        lines = [
            f"{of.pairs:,} {'pair' if of.pairs == 1 else 'pairs'} of {self.source}, read with {self.tokenizer}",
            "",
        ]
        for finding in of.findings:
            lines += _wrapped(f"{finding.severity:<8} ", f"{finding.sentence} {_rows(finding)}".strip())
        if not of.findings:
            lines.append("no check found anything")
        if of.preference is not None:
            lines += ["", *_wrapped("", preference_sentence(of.preference))]
            for side in ("preferred", "rejected"):
                words = "  ".join(readable(token["text"]) for token in of.preference[side][:8])
                lines += _wrapped(f"{side:<10}", words)
        if self.model is not None:
            lines += ["", *_wrapped("", model_sentence(self.model))]
            lines += [f"  {name:<9} {said}" for name, said in forecasts(self.model).items()]
        return "\n".join([*lines, "", *(line for advice in self.verdict for line in _wrapped("- ", advice.sentence))])

    def reaches(self, severity: Severity) -> bool:
        """Whether a finding or a sentence of the verdict is ``severity`` or worse."""
        lowest = SEVERITIES.index(severity)
        said = any(SEVERITIES.index(advice.severity) >= lowest for advice in self.verdict)
        return said or at_least(self.examination.findings, severity)

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the record, a ``.json`` file; returns its path. Errors: :func:`plot_align.records.write_record`."""
        return records.write_record(path, KIND, self.to_dict(), config=self.config)


def diagnose(
    dataset: Any,
    model_or_tokenizer: Any,
    *,
    tokenizer: Any = None,
    name: str | None = None,
    split: str = "train",
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    strict: bool = False,
    overlap: str | os.PathLike[str] | None = None,
    batch_size: int = 1000,
    progress: bool = True,
    trust_remote_code: bool = False,
    sample: int = 1000,
    device: str | None = None,
    dtype: str = "auto",
    partial: Path | None = None,
    salvage: Callable[[Diagnosis], object] | None = None,
) -> Diagnosis:
    """Look for what is wrong with a preference data set, and with a model on it, before a run.

    Rows that are no pairs are counted and left out. One batch of rows is in memory at a time, and of the rest hashes
    and counters, and the sample on which the model is measured (:func:`plot_align.doctor.measure`).

    Args:
        dataset: a ``datasets.Dataset`` or ``IterableDataset`` of pairs, or what :func:`plot_align.load_pairs` opens.
        model_or_tokenizer: a model, its hub id or its folder; or a tokenizer, and no model is measured.
        tokenizer: beside a model, the one that training is to use: its name, folder or itself; None: the model's own.
        name: configuration of a Hub data set that is opened here.
        split: its split.
        max_length: as in ``DPOConfig``; pairs longer than the model's context are cut there, and the verdict says so.
        truncation_mode: as in ``DPOConfig``.
        strict: refuse the first row that is no pair.
        overlap: file of prompts that should not be among those of the data, e.g. a benchmark's.
        batch_size: rows tokenised at a time.
        progress: show a progress bar on standard error.
        trust_remote_code: allow a model's own code.
        sample: so many pairs, drawn at random, are put to the model; 0: none, and it is not loaded.
        device: where a model that is loaded here goes.
        dtype: of such a model.
        partial: journal of the model's measures, so that an interrupted run goes on.
        salvage: called with what was found in the data if the model cannot be measured, before that error is raised.

    Raises:
        InputError: ``sample`` below 0; what :func:`plot_align.load_pairs` and :func:`plot_align.estimate` refuse of a
            whole data set; no row is a pair; with ``strict``, a row that is none; a file of prompts or a model that
            cannot be read.
        RunError: the model's measures are not finite, or the device is out of memory.
    """
    if sample < 0:
        raise InputError(f"sample is {sample}, expected 0 or more; give a number of pairs")
    model, tokenizer = _opened(model_or_tokenizer, tokenizer, sample > 0, device, dtype, trust_remote_code)
    context = context_of(model, tokenizer)
    cut_at = (
        max_length if model is None or context is None else min(context, context if max_length is None else max_length)
    )
    kept = Sample(sample)
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
        max_length=cut_at,
        truncation_mode=truncation_mode,
        strict=strict,
        overlap=() if overlap is None else prompts_of(overlap),
        batch_size=batch_size,
        progress=progress,
        source=source,
        sample=kept,
    )
    config: dict[str, Any] = {
        "data": source,
        "tokenizer": tokenizer_name(tokenizer),
        "name": name,
        "split": split,
        "max_length": max_length,
        "context": context,
        "truncation_mode": truncation_mode,
        "overlap": None if overlap is None else Path(overlap).name,
        "sample": sample if model is not None else 0,
    }

    def result(of_model: dict[str, Any] | None) -> Diagnosis:
        values = {**measured(found), "capped": cut_at != max_length, **({} if of_model is None else ruled(of_model))}
        verdict = judge(values if context is None else {**values, "context": context})
        seconds = time.perf_counter() - start
        return Diagnosis(source, config["tokenizer"], config, seconds, found, verdict, of_model)

    if model is None:
        return result(None)
    try:
        of_model = _measured_model(model, tokenizer, kept.pairs(), cut_at, truncation_mode, progress, partial)
    except Exception:
        if salvage is not None:
            salvage(result(None))
        raise
    return result(of_model)


def _measured_model(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    max_length: int | None,
    truncation_mode: str,
    progress: bool,
    partial: Path | None,
) -> dict[str, Any]:
    sequences = []
    for pair in pairs:
        chosen, rejected = (
            window(ids, *scored, max_length, truncation_mode)
            for ids, scored in zip(pair.ids, pair.scored, strict=True)
        )
        sequences.append((chosen, rejected))
    with ExitStack() as stack, torch.autocast(model.device.type, torch.bfloat16, enabled=fast_bf16()):
        found = measure(
            model,
            tokenizer,
            sequences,
            partial=partial,
            bar=lambda label, total: stack.enter_context(progress_bar(label, progress, total, "steps")),
        )
    return {"rows": [pair.row for pair in pairs], **found.to_dict()}


def ruled(model: Mapping[str, Any]) -> dict[str, Any]:
    """What the verdict's rules read of a model's measures, with 95 % intervals: Wilson's of shares."""
    n, mean, below = model["pairs"], model["ches_mean"], model["on_policy"]["chosen_below"]

    def share(value: float | None) -> dict[str, Any] | None:
        return None if value is None else records.measure(value, n, interval=records.wilson(value, n))

    return {
        "accuracy": share(model["accuracy"]),
        "accuracy_per_token": share(model["accuracy_per_token"]),
        "ches_mean": None if mean is None else records.measure(mean, n, interval=model["ches_interval"]),
        "on_policy": None if below is None else share(1 - below),
        "own_answers": model["on_policy"]["answers"],
        "forecast": {name: value for name, value in model["forecast"].items() if value is not None},
        "forecast_interval": model["forecast_interval"],
    }


def model_sentence(model: Mapping[str, Any]) -> str:
    """What the model makes of the pairs, in a few sentences."""
    said = [f"The model on {model['pairs']:,} of the pairs, drawn at random:"]
    if model["accuracy"] is not None:
        said.append(
            f"it ranks {percent(model['accuracy'])} rightly, {percent(model['accuracy_per_token'])} per token; "
            f"mean length-normalised CHES {model['ches_mean']:.3g}."
        )
    below, above = (model["on_policy"][f"chosen_{place}"] for place in ("below", "above"))
    if below is not None:
        said.append(
            f"{percent(1 - below)} of the chosen answers are at least as likely as its own, {percent(above)} likelier."
        )
    if forecasts(model):
        said.append(f"What a first step at a learning rate of {model['step']['learning_rate']:g} does to them:")
    return " ".join(said)


def forecasts(model: Mapping[str, Any]) -> dict[str, str]:
    """Loss → its forecast in words."""
    found = {}
    for name, value in model["forecast"].items():
        if value is not None:
            interval = model["forecast_interval"][name]
            spread = f" ({interval[0]:+.2g} to {interval[1]:+.2g})" if interval else ""
            falls = percent(model["forecast_falls"][name])
            found[name] = f"{value:+.2g} nats{spread}, {falls} fall"
    return found


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


def _opened(
    given: Any, tokenizer: Any, measured: bool, device: str | None, dtype: str, trust_remote_code: bool
) -> tuple[Any, Any]:
    """The model, if it is to be measured, and the tokenizer."""
    from transformers import PreTrainedTokenizerBase

    if isinstance(given, PreTrainedTokenizerBase):
        if tokenizer is not None:
            raise InputError(
                "model_or_tokenizer is a tokenizer and there is another one in tokenizer, expected a model beside it; "
                "leave one of them out"
            )
        return None, given
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = load_tokenizer(str(tokenizer), trust_remote_code=trust_remote_code)
    name = getattr(getattr(given, "config", None), "name_or_path", given)  # of a model, where it was loaded from
    named = isinstance(name, str | os.PathLike) and bool(str(name))
    if not named and (tokenizer is None or not isinstance(given, torch.nn.Module)):
        raise InputError(
            f"model_or_tokenizer is a {type(given).__name__}, expected a tokenizer, a model that was loaded by its "
            "name, a hub id or a folder; pass the tokenizer"
        )
    if measured and name is given:
        model, own = load_model(str(name), device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        return model, own if tokenizer is None else tokenizer
    if tokenizer is None:
        tokenizer = load_tokenizer(str(name), trust_remote_code=trust_remote_code)
    return given if measured else None, tokenizer


def _rows(finding: Finding) -> str:
    more = ", …" if finding.count > len(finding.rows) else "."
    return f"Rows {', '.join(map(str, finding.rows))}{more}" if finding.rows else ""


def _wrapped(start: str, text: str) -> list[str]:
    return textwrap.wrap(text, 80, initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False)
