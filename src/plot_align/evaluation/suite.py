"""Suites of measures by sub-preference: read from YAML and checked completely before any model is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from plot_align.errors import InputError, did_you_mean
from plot_align.evaluation.subject import Measure
from plot_align.io import build, digest, read_yaml, require_distinct
from plot_align.redteam import ASKING
from plot_align.results import SECTIONS

SUITES = ("paper", "quick")
KINDS = (
    "lm_eval", "mt_bench", "preference_accuracy", "displacement", "perplexity", "diversity", "kl", "drift",
    "over_refusal", "attack_success",
)  # fmt: skip
NEED_REFERENCE = ("displacement", "kl", "drift")
_JUDGED = ("over_refusal", "attack_success")
_PATHS = (
    "pairs", "prompts", "texts", "benign", "behaviors", "targets", "preference", "folder", "include_path",
)  # fmt: skip


@dataclass(frozen=True)
class Given:
    """What a user adds to a suite on the command line.

    Args:
        reference: whether there is a reference model. preference: file of ``plot-align estimate``.
        judge: judges of refusals and attacks, as :func:`plot_align.redteam.parse_judges` reads them; None: the
            defaults.
        judge_url, judge_model, judge_key, judge_prices: an OpenAI-compatible endpoint.
        mt_bench: folder of FastChat's questions and prompts. behaviors, targets: files of redteam.
        allow_code_execution: whether code that a model wrote may be run.
        limit: at most so many items per measure.
    """

    reference: bool = False
    preference: str | None = None
    judge: str | None = None
    judge_url: str | None = None
    judge_model: str | None = None
    judge_key: str = "OPENAI_API_KEY"
    judge_prices: tuple[float, float] | None = None
    mt_bench: str | None = None
    behaviors: str | None = None
    targets: str | None = None
    allow_code_execution: bool = False
    limit: int | None = None


@dataclass(frozen=True)
class Entry:
    """One measure of a suite.

    Args:
        section: one of :data:`plot_align.results.SECTIONS`. name: of its record.
    """

    section: str
    name: str
    kind: str
    measure: Measure

    def options(self) -> dict[str, Any]:
        """The options for the record, with name and kind."""
        measure: Any = self.measure
        options = measure.options() if hasattr(measure, "options") else asdict(measure)
        return {**options, "name": self.name, "kind": self.kind}

    @cached_property
    def data(self) -> dict[str, str]:
        """Digests of the local files and folders that the measure reads, by option."""
        paths = {name: getattr(self.measure, name, None) for name in _PATHS}
        return {name: digest(Path(path)) for name, path in paths.items() if path is not None and os.path.exists(path)}


@dataclass(frozen=True)
class Suite:
    """``left_out`` maps each measure that cannot run to what it lacks; ``runs_code`` names those that run code written
    by the model."""

    name: str
    entries: tuple[Entry, ...]
    left_out: dict[str, str]

    @property
    def runs_code(self) -> list[str]:
        return [e.name for e in self.entries if getattr(e.measure, "executes_code", False)]


def read_suite(name: str, given: Given, *, only: Sequence[str] | None = None, skip: Sequence[str] = ()) -> Suite:
    """A suite with every option checked; no model is loaded.

    Args:
        name: one of :data:`SUITES`, or a YAML file: section → measure → ``{kind: …, option: value}``.
        given: fills in what the file leaves open.
        only, skip: measures by name, or all of a kind or section.

    Raises:
        InputError: an unknown suite, section, kind or option; a name twice; nothing left to measure.
    """
    if name in SUITES:
        with resources.as_file(resources.files("plot_align.evaluation") / "suites" / f"{name}.yaml") as path:
            content = read_yaml(str(path), "--suite")
    elif name.endswith((".yaml", ".yml")):
        content = read_yaml(name, "--suite")
    else:
        near = did_you_mean(name, SUITES, f"expected {', '.join(SUITES)} or a .yaml file")
        raise InputError(f"--suite is {name!r}; {near}")
    specs = list(_specs(content, name))
    require_distinct((measure for _, measure, _ in specs), f"suite {name}: the measures")
    names = {label for section, measure, spec in specs for label in (section, measure, spec["kind"])}
    for option, wanted in (("--only", only or ()), ("--skip", skip)):
        for label in wanted:
            if label not in names:
                raise InputError(f"{option} names {label!r}; {did_you_mean(label, names, 'see the suite')}")
    entries: list[Entry] = []
    left_out: dict[str, str] = {}
    for section, measure, spec in specs:
        labels = {section, measure, spec["kind"]}
        if (only and labels.isdisjoint(only)) or not labels.isdisjoint(skip):
            continue
        made = _made(f"{measure} in suite {name}", dict(spec), given)
        if isinstance(made, str):
            left_out[measure] = made
        else:
            entries.append(Entry(section, measure, spec["kind"], made))
    if not entries:
        why = "; ".join(f"{label}: {reason}" for label, reason in left_out.items())
        raise InputError(f"nothing of suite {name} is left to measure ({why or 'by --only and --skip'}); ask for more")
    return Suite(Path(name).stem, tuple(entries), left_out)


def _specs(content: dict[str, Any], name: str) -> Any:
    """(section, measure, options with kind) of each measure.

    Raises:
        InputError: the file has another structure.
    """
    seen: set[str] = set()
    for section, measures in content.items():
        if section not in SECTIONS:
            near = did_you_mean(str(section), SECTIONS, f"expected {', '.join(SECTIONS)}")
            raise InputError(f"suite {name} has the section {str(section)!r}; {near}")
        if not isinstance(measures, dict):
            raise InputError(f"{section} in suite {name} is no mapping; write 'name: {{kind: …}}' below it")
        for measure, spec in measures.items():
            measure = str(measure)
            if measure in seen:
                raise InputError(f"suite {name} has {measure!r} twice; rename one")
            if not measure or Path(measure).name != measure or measure.startswith("."):
                raise InputError(f"suite {name} has a measure called {measure!r}, which is no file name; rename it")
            seen.add(measure)
            if not isinstance(spec, dict) or spec.get("kind") not in KINDS:
                kind = spec.get("kind") if isinstance(spec, dict) else spec
                near = did_you_mean(str(kind), KINDS, f"expected {', '.join(KINDS)}")
                raise InputError(f"{measure} in suite {name} has the kind {kind!r}; {near}")
            yield str(section), measure, spec


def _made(what: str, spec: dict[str, Any], given: Given) -> Measure | str:
    """The measure, checked; or what it lacks. ``what``: it is called that in errors."""
    kind = spec.pop("kind")
    for option in ("judge_url", "judge_key"):
        if option in spec:  # else a suite of others could send any variable of the environment anywhere
            raise InputError(
                f"{what} names its {option}, and an endpoint and its key come from the command line alone; leave it "
                f"out and give --{option}"
            )
    lacking = _fill(kind, spec, given)
    if lacking is not None:
        return lacking
    cls = _class(kind)
    if given.limit is not None:
        own = spec.get("limit", cls.limit)
        is_count = isinstance(own, int) and own > 0  # not a fraction of the documents
        spec["limit"] = min(given.limit, own) if is_count else given.limit
    measure = build(cls, spec, what)
    if kind == "lm_eval":
        lacking = measure.lacks()
        if lacking is not None:
            return lacking
    try:
        measure.check()
    except InputError as error:  # several measures of a suite have options of one name
        raise InputError(f"{what}: {error}") from None
    return measure


def _fill(kind: str, spec: dict[str, Any], given: Given) -> str | None:
    """Fill in from ``given`` what the suite leaves open. Returns what is still lacking, in words."""
    if kind in NEED_REFERENCE and not given.reference:
        return "it compares with the model before tuning; give --reference"
    if kind in _JUDGED and given.judge is not None:
        spec.setdefault("judge", given.judge)
    judges = str(spec.get("judge") or "").split(",") if kind in _JUDGED else []
    if kind == "mt_bench" or not {name.strip() for name in judges}.isdisjoint(ASKING):
        for option in ("judge_url", "judge_model", "judge_key"):
            spec.setdefault(option, getattr(given, option))
        if spec["judge_url"] is None or spec["judge_model"] is None:
            return "it asks a judge; give --judge_url and --judge_model"
    match kind:
        case "mt_bench":
            spec.setdefault("folder", given.mt_bench)
            spec.setdefault("prices", given.judge_prices)
            if spec["folder"] is None:
                return "it needs FastChat's questions and judge prompts; give --mt_bench"
        case "drift":
            spec.setdefault("preference", given.preference)
        case "attack_success":
            spec.setdefault("behaviors", given.behaviors)
            spec.setdefault("targets", given.targets)
            if spec["behaviors"] is None:
                return "it needs a file of harmful requests, such as HarmBench's; give --behaviors"
        case "lm_eval":
            spec["allow_code_execution"] = given.allow_code_execution
    return None


def _class(kind: str) -> Any:
    """Imported on demand: lm-eval and openai are extras."""
    match kind:
        case "lm_eval":
            from plot_align.evaluation.harness import LMEval

            return LMEval
        case "mt_bench":
            from plot_align.evaluation.mt_bench import MTBench

            return MTBench
        case "preference_accuracy" | "displacement":
            from plot_align.evaluation.preference import Displacement, PreferenceAccuracy

            return PreferenceAccuracy if kind == "preference_accuracy" else Displacement
        case "perplexity" | "diversity":
            from plot_align.evaluation.fluency import Diversity, Perplexity

            return Perplexity if kind == "perplexity" else Diversity
        case "kl" | "drift":
            from plot_align.evaluation.drift import KL, Drift

            return KL if kind == "kl" else Drift
        case "over_refusal" | "attack_success":
            from plot_align.evaluation.safety import AttackSuccess, OverRefusal

            return OverRefusal if kind == "over_refusal" else AttackSuccess
    raise ValueError(kind)
