"""Find and check records, and split them into observations: one quantity of one model each."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from plot_align.errors import InputError
from plot_align.io import PART, parse_json
from plot_align.records import FORMAT, read_record
from plot_align.report.checks import (
    check_demo,
    check_estimate,
    check_evaluation,
    check_frame,
    check_inspect,
    check_redteam,
    check_sweep,
    check_training,
)
from plot_align.report.tables import count
from plot_align.results import EVALUATION, GUARDS, Quantity, kappa_text
from plot_align.statistics import proportion

TRAINING = ("dpo", "sft", "pro")
_SHOWN = (EVALUATION, "redteam", *TRAINING, "sweep", "demo", "estimate", "inspect")
_RELATIVE = ("kl", "drift", "displacement")  # measures whose numbers are relative to a reference model
# Options in which comparable red-team runs may differ; a rate is that of one judge, whichever others there are.
_NOT_ASKED = (
    "model", "compare", "output", "batch_size", "device", "dtype", "trust_remote_code", "attacks", "judge",
    "second_judge", "classifier", "rules",
)  # fmt: skip
_HEAD = f'{{"format":"{FORMAT}"'  # a record's first bytes, without spaces


@dataclass(frozen=True)
class Record:
    """A record read from a file. ``name`` is its path as shown; ``at`` is when it was written."""

    name: str
    content: dict[str, Any]
    at: datetime

    @property
    def kind(self) -> str:
        return str(self.content["kind"])

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.content["config"])

    @property
    def results(self) -> dict[str, Any]:
        return dict(self.content["results"])

    @property
    def seed(self) -> int | None:
        return self.content["seed"]


@dataclass(frozen=True)
class Observation:
    """One quantity of one model.

    Attributes:
        model: its name.
        section: of :data:`plot_align.results.SECTIONS`.
        measure, name: of the measure, and of the quantity in it.
        quantity: see :mod:`plot_align.results`.
        score: whether it is the measure's first quantity, its score.
        alike: what must be equal for the items of two models to be comparable, as text.
        record: its source.
        gaps: what its record lacks, in a few words each: unreadable ratings, undecided answers.
    """

    model: str
    section: str
    measure: str
    name: str
    quantity: Quantity
    score: bool
    alike: str
    record: Record
    gaps: tuple[str, ...] = ()

    @property
    def judged(self) -> tuple[str, ...]:
        """Whose verdict it is, and how far that judge agrees with the one that decides; in a few words each."""
        judge, agreement = self.quantity.get("judge"), self.quantity.get("agreement")
        by = (f"by {judge}",) if judge else ()
        return (*by, f"{kappa_text(agreement)} with {agreement['judges'][0]}, n {agreement['n']}") if agreement else by

    @property
    def key(self) -> tuple[str, str, str]:
        """Its row in the tables."""
        return self.section, self.measure, self.name


@dataclass
class Collected:
    """What the records hold.

    Attributes:
        records: those shown, in the order of the paths; within a folder oldest first, then by path.
        observations: of each model and measure those of the newest record.
        not_shown: records of kinds that the report does not show.
        left_out: one sentence per bad record.
        replaced: one sentence per measure that was measured again.
        references: the reference model's name in each evaluation record that has one.
    """

    records: list[Record] = field(default_factory=list)
    observations: list[Observation] = field(default_factory=list)
    not_shown: list[Record] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)

    @property
    def models(self) -> list[str]:
        """Models in the order of their records."""
        return list(dict.fromkeys(observation.model for observation in self.observations))

    def of_kind(self, *kinds: str) -> list[Record]:
        """Records of the given kinds, in order."""
        return [record for record in self.records if record.kind in kinds]


def collect(paths: Sequence[str | os.PathLike[str]], *, skip_bad: bool = False) -> Collected:
    """Read records from files or folders.

    Args:
        paths: records, or folders that are searched recursively; other JSON files in them are ignored.
        skip_bad: leave out damaged records and say so, instead of raising.

    Raises:
        InputError: a path does not exist, a record is damaged (without ``skip_bad``), or there is no record at all.
    """
    found = Collected()
    records: list[Record] = []
    for given in paths:
        of_path = []
        for path in _files(Path(given)):
            try:
                of_path.append(_read(path))
            except InputError as error:
                if not skip_bad:
                    raise
                found.left_out.append(str(error))
        records += sorted(of_path, key=lambda record: record.at)
    records = list({record.name: record for record in records}.values())
    found.not_shown = [record for record in records if record.kind not in _SHOWN]
    shown = [record for record in records if record.kind in _SHOWN]
    found.records = _of_one_checkpoint_each(shown, found, skip_bad)
    if not found.records:
        given = ", ".join(map(str, paths)) or "nothing"
        reason = f"; {found.left_out[0]}" if found.left_out else ", expected one or more; name what a command wrote"
        raise InputError(f"{given} holds no record that a report shows{reason}")
    observations: dict[tuple[str, ...], list[Observation]] = {}
    for observation in (o for record in found.records for o in _observations(record)):
        place = (observation.model, observation.section, observation.measure)
        observations.setdefault(place, []).append(observation)
    for of in observations.values():
        # All or none of a record's: what two judges of one record say must not stand beside what a third one says.
        records = list({o.record.name: o.record for o in of}.values())
        newest = max(reversed(records), key=lambda record: record.at)
        found.replaced += [
            f"{of[0].measure} of {of[0].model}: {record.name} is older than {newest.name}, which is shown"
            for record in records
            if record is not newest
        ]
        found.observations += [o for o in of if o.record is newest]
    found.references = [
        str(record.config["reference"]["name"])
        for record in found.of_kind(EVALUATION)
        if record.config.get("reference")
    ]
    return found


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from (
            file
            for file in sorted(path.rglob("*.json"))
            if not file.name.startswith(PART) and file.is_file() and _is_record(file)
        )
    elif path.exists():
        yield path
    else:
        raise InputError(f"{path} is not there, expected a record or a folder of records; check the path")


def _is_record(path: Path) -> bool:
    """Whether a file in a folder is a record, possibly a truncated one."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    start = re.sub(r"\s*([{}:,\"])\s*", r"\1", text[:1000])
    if start.startswith(_HEAD) or _HEAD.startswith(start):  # the latter: truncated within its first lines, or empty
        return True
    if f'"{FORMAT}"' not in text:
        return False
    try:
        content = parse_json(text)
    except ValueError:
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def _read(path: Path) -> Record:
    """Read the record in one file.

    Raises:
        InputError: it is damaged; the message names the file and the place.
    """
    content = read_record(path)
    checks: dict[str, Callable[[Any], None]] = {
        EVALUATION: check_evaluation, "redteam": check_redteam, "sweep": check_sweep,
        "demo": check_demo, "estimate": check_estimate, "inspect": check_inspect,
        **dict.fromkeys(TRAINING, check_training),
    }  # fmt: skip
    try:
        at = datetime.fromisoformat(content["created"])
        if at.tzinfo is None:
            raise ValueError("created has no time zone")
        check_frame(content)
        checks.get(content["kind"], lambda content: None)(content)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"{path} is damaged or was changed by hand: {said}; run the command that wrote it again, or leave it out "
            "with --skip_bad"
        ) from None
    return Record(str(path), content, at)


def _of_one_checkpoint_each(records: list[Record], found: Collected, skip_bad: bool) -> list[Record]:
    """The records without those of an older checkpoint of the same name.

    Raises:
        InputError: there are such records (without ``skip_bad``): a column of a table must not mix two models.
    """
    newest = {name: record for record in sorted(records, key=lambda record: record.at) for name in _digests(record)}
    kept = []
    for record in records:
        others = [name for name, digest in _digests(record).items() if _digests(newest[name])[name] != digest]
        if others:
            sentence = (
                f"{record.name} is of another checkpoint named {others[0]!r} than {newest[others[0]].name}, and a "
                "report would mix the two; give one of them another name and measure it again, or leave the older "
                "out with --skip_bad"
            )
            if not skip_bad:
                raise InputError(sentence)
            found.left_out.append(sentence)
        else:
            kept.append(record)
    return kept


def _digests(record: Record) -> dict[str, str]:
    """Digests of the weights behind each column's name."""
    if record.kind == EVALUATION:
        return {record.config["model"]["name"]: record.config["model"]["model"]}
    identities = (record.results.get("identities") or {}) if record.kind == "redteam" else {}
    return {name: identity["model"] for name, identity in identities.items()}


def _observations(record: Record) -> Iterator[Observation]:
    match record.kind:
        case "evaluation":
            yield from _of_evaluation(record)
        case "redteam":
            yield from _of_redteam(record)


def _of_evaluation(record: Record) -> Iterator[Observation]:
    config = record.config
    measure = config["measure"]
    shared = [measure, record.seed, config.get("data") or {}]
    if measure["kind"] in _RELATIVE:
        shared.append((config.get("reference") or {}).get("model"))
    alike = json.dumps(shared, sort_keys=True)
    gaps = tuple(_gaps(record))
    for place, (name, quantity) in enumerate(record.results["quantities"].items()):
        yield Observation(
            config["model"]["name"],
            config["section"],
            measure["name"],
            name,
            quantity,
            place == 0,
            alike,
            record,
            gaps,
        )


def _gaps(record: Record) -> Iterator[str]:
    """What an evaluation lacks."""
    details = record.results["details"]
    if record.results.get("unfinished"):
        yield "unfinished"
    unreadable, failed = (_counted(details.get(name)) for name in ("unparsable", "failed"))
    judged = details.get("judgments")
    of = f" of {judged + failed:,}" if isinstance(judged, int) else ""
    if unreadable:
        yield f"{unreadable:,}{of} ratings unreadable"
    if failed:
        yield f"{failed:,}{of} ratings failed"
    if details.get("undecided"):
        yield f"{count(details['undecided'], 'verdict')} undecided"


def _counted(entry: Any) -> int:
    """``n`` of an entry with a count; 0 if there is none."""
    return int(entry.get("n") or 0) if isinstance(entry, dict) else 0


def _of_redteam(record: Record) -> Iterator[Observation]:
    """An attack is a measure of harmlessness; what happens to benign requests is a guard."""
    shared = {name: value for name, value in record.config.items() if name not in _NOT_ASKED}
    asked = {part.partition("=")[0]: part for part in str(record.config.get("judge") or "").split(",")}
    rules = record.config.get("rules") or {}
    # Records from before there were several judges name one, and prefixes judged refusals where it could not.
    (only, *_) = asked
    alone = {"attacks": [only], "benign": [only if only == "endpoint" else "prefixes"]}

    def observation(
        model: str, section: str, measure: str, name: str, title: str, better: str, items: Any, made: Any,
        judge: str, *gaps: str, agreement: Any = None,
    ) -> Observation:  # fmt: skip
        alike = json.dumps([shared, record.seed, made, asked.get(judge, judge), rules.get(judge)], sort_keys=True)
        quantity = {
            "title": title, "better": better, **proportion(list(items.values())), "bounds": [0.0, 1.0], "items": items,
            "weights": None, "judge": judge,
        }  # fmt: skip
        if agreement is not None:
            quantity |= {"title": f"{title}, by {judge}", "agreement": agreement}
            name = f"{name}_{judge}"
        return Observation(model, section, measure, name, quantity, agreement is None, alike, record, gaps)

    def undecided(found: Any, what: str) -> Iterator[str]:
        n = _counted((found.get("undecided") or {}).get(what))
        if n:
            yield f"{count(n, 'verdict')} undecided"

    for model, found in record.results["models"].items():
        judges = found.get("judges") or alone
        main, of_benign = judges["attacks"][0], judges["benign"][0]
        others = found.get("others") or {}
        for attack, rates in found["attacks"].items():
            made = [(found.get(key) or {}).get(attack) for key in ("titles", "options")]
            title = f"Attack success, {made[0] or attack}"
            gaps = [*undecided(found, attack)]
            failed = (found.get("failed") or {}).get(attack)
            if failed:
                gaps.append(f"{count(len(failed), 'request')} without a test case")
            place = (model, "harmlessness", f"redteam {attack}", "asr", title, "lower")
            yield observation(*place, rates, made, main, *gaps)
            for judge, of in others.items():
                if attack in of["attacks"]:
                    gaps, agreement = [*undecided(of, attack)], of["agreement"][attack]
                    yield observation(*place, of["attacks"][attack], made, judge, *gaps, agreement=agreement)
        for name, title, better in (
            ("refused", "Over-refusal", "lower"),
            ("helped", "Harmless requests helped with", "higher"),
        ):
            gaps = [*undecided(found, "benign requests")]
            place = (model, GUARDS, f"redteam {name}", name, title, better)
            yield observation(*place, found[name], None, of_benign, *gaps)
            for judge, of in others.items():
                if of[name]:
                    gaps, agreement = [*undecided(of, "benign requests")], of["agreement"][name]
                    yield observation(*place, of[name], None, judge, *gaps, agreement=agreement)
