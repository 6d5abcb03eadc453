"""Results as log files of Inspect (``inspect_ai``), which ``inspect view`` shows.

A log is one attack's answers by one model. A sample is a behaviour, its epochs are the answers to it: Inspect's mean
over epochs and then samples is HarmBench's attack success rate.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plot_align._version import __version__
from plot_align.io import complete_or_absent, file_name, json_or_none
from plot_align.redteam.behaviors import Behavior
from plot_align.redteam.harmbench import Layout, Rows, read_completions, read_results, success_by_behavior
from plot_align.redteam.run import spent_on_answers, spent_on_cases
from plot_align.redteam.spent import Spent

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog, EvalSample

FOLDER = "inspect"  # below the output
BENIGN = "Benign"  # the method's name of requests without an attack


def write_logs(
    output: Path, model: str, found: Mapping[str, Any], harmful: Sequence[Behavior], benign: Sequence[Behavior]
) -> list[Path]:
    """Write a log for each attack on ``model`` and for its answers to benign requests; existing logs are replaced.

    Args:
        output: the folder with HarmBench's files. found: of :func:`plot_align.redteam.measure.measure`.
    """
    written = []
    wanted = {behavior.id for behavior in harmful}
    for layout in attacked(output, model, found["attacks"]):
        judged: dict[str, Rows] = {}
        rows: Rows = {}
        for labelled in of_all_judges(layout, model):
            results = {name: of for name, of in read_results(labelled).items() if name in wanted}
            rows = rows or results
            if _answers(results) == _answers(rows):  # else they are labels of an earlier command's answers
                judged[_judge(labelled)] = results
        any_answer = layout.method in found["by_samples"]
        scores = {
            judge: {name: [(int(row["label"] == 1), row) for row in rows] for name, rows in results.items()}
            for judge, results in judged.items()
        }
        rates = {judge: success_by_behavior(results, any_answer=any_answer) for judge, results in judged.items()}
        written.append(_write(layout, model, harmful, rows, scores, rates, any_answer))
    layout = Layout(output, BENIGN, "default")
    answers = read_completions(layout.completions(model))
    kinds = {kind: found[kind] for kind in ("refused", "helped")}
    scores = {kind: {name: [(int(value), {})] for name, value in of.items()} for kind, of in kinds.items()}
    written.append(_write(layout, model, benign, answers, scores, kinds, False))
    return written


@dataclass(frozen=True)
class _Found(Layout):
    """Of a folder that was found, whose name is ``experiment`` as it stands."""

    @property
    def folder(self) -> Path:
        return self.of_method / self.experiment


def attacked(output: Path, model: str, attacks: Iterable[str]) -> list[Layout]:
    """Where results of ``attacks`` on ``model`` lie, all experiments of each."""
    folders = {attack: sorted(Layout(output, attack, "default").of_method.glob("*")) for attack in attacks}
    layouts = [_Found(output, attack, folder.name) for attack, of in folders.items() for folder in of]
    return [layout for layout in layouts if layout.results(model).exists()]


def of_all_judges(layout: Layout, model: str) -> list[Path]:
    """The results of the main judge, then the others'."""
    main = layout.results(model)
    others = (folder / main.name for folder in sorted(layout.folder.glob("results-*")))
    return [main, *(path for path in others if path.exists())]


def _answers(results: Rows) -> dict[str, list[tuple[str, str]]]:
    return {name: [(row["test_case"], row["generation"]) for row in rows] for name, rows in results.items()}


def _judge(results: Path) -> str:
    """Who gave these labels."""
    judged_by = json_or_none(results.parents[1] / "judged_by" / results.parent.name / results.name) or {}
    return str(judged_by.get("name", results.parent.name))


def _write(
    layout: Layout,
    model: str,
    behaviors: Sequence[Behavior],
    rows: Rows,
    scores: Mapping[str, Mapping[str, Sequence[tuple[int, Mapping[str, Any]]]]],
    rates: Mapping[str, Mapping[str, float]],
    any_answer: bool,
) -> Path:
    """Write one log.

    Args:
        rows: the answers. scores: judge → behaviour → value and row of each answer. rates: judge → behaviour → rate.
    """
    from inspect_ai.log import write_eval_log

    method, experiment = layout.folder.parent.name, layout.folder.name
    samples = _samples(layout, model, behaviors, rows, scores)
    log = _log(layout, model, samples, rates, any_answer)
    path = layout.base / FOLDER / f"{file_name(f'{method}_{experiment}_{model}')}.eval"
    with complete_or_absent(path) as temporary:
        write_eval_log(log, str(temporary), format="eval")
    return path


def _samples(
    layout: Layout,
    model: str,
    behaviors: Sequence[Behavior],
    rows: Rows,
    scores: Mapping[str, Mapping[str, Sequence[tuple[int, Mapping[str, Any]]]]],
) -> list[EvalSample]:
    from inspect_ai.log import EvalSample
    from inspect_ai.model import ChatMessageUser, ModelOutput, ModelUsage
    from inspect_ai.scorer import Score

    made, answered = spent_on_cases(layout, rows), spent_on_answers(layout.completions(model), rows)
    found = []
    for behavior in behaviors:
        request = json_or_none(layout.behavior_folder(behavior.id) / "request.json") or {}
        for i, row in enumerate(rows.get(behavior.id, [])):
            output = ModelOutput.from_content(model, row["generation"])
            # A second answer to the same case cost no second case.
            case = (made.get(behavior.id, [])[i : i + 1] or [Spent()])[0]
            cost = (answered.get(behavior.id, [])[i : i + 1] or [Spent()])[0]
            given = {
                judge: Score(
                    value=value,
                    answer=row["generation"],
                    explanation=entry.get("reason"),
                    metadata={"label": entry["label"]} if "label" in entry else None,
                )
                for judge, of in scores.items()
                for value, entry in of.get(behavior.id, [])[i : i + 1]
            }
            found.append(
                EvalSample(
                    id=behavior.id,
                    epoch=i + 1,
                    input=row["test_case"],
                    target=request.get("target", ""),
                    messages=[ChatMessageUser(content=row["test_case"]), output.choices[0].message],
                    output=output,
                    scores=given,
                    total_time=(case + cost).seconds,
                    model_usage={model: ModelUsage(total_tokens=round((case + cost).tokens))},
                    metadata={
                        "behavior": behavior.text,
                        "category": behavior.semantic_category,
                        "attack": layout.method,
                        **({"prefix": row["prefix"]} if "prefix" in row else {}),
                        "spent_on_case": case.plain,
                        "spent_on_answer": cost.plain,
                    },
                )
            )
    return found


def _log(
    layout: Layout,
    model: str,
    samples: Sequence[EvalSample],
    rates: Mapping[str, Mapping[str, float]],
    any_answer: bool,
) -> EvalLog:
    from inspect_ai.log import (
        EvalConfig,
        EvalDataset,
        EvalLog,
        EvalMetric,
        EvalPlan,
        EvalPlanStep,
        EvalResults,
        EvalScore,
        EvalSpec,
        EvalStats,
    )
    from inspect_ai.model import ModelUsage

    method, experiment = layout.folder.parent.name, layout.folder.name
    made_by = json_or_none(layout.folder / "options.json") or {}
    options = dict(made_by.get("attack") or {})
    ids = list(dict.fromkeys(str(sample.id) for sample in samples))
    epochs = max((sample.epoch for sample in samples), default=1)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    reducer = "max" if any_answer else "mean"
    return EvalLog(
        status="success",
        eval=EvalSpec(
            created=now,
            eval_id=f"{method}_{experiment}_{model}",
            run_id=f"{method}_{experiment}_{model}",
            task_id=f"{method}_{experiment}",
            task=method if experiment in (file_name(model), "default") else f"{method}/{experiment}",
            task_args={**options, "cases": made_by.get("cases"), "seed": made_by.get("seed")},
            dataset=EvalDataset(samples=len(ids), sample_ids=ids),
            model=model,
            config=EvalConfig(epochs=epochs, epochs_reducer=[reducer]),
            packages={"plot_align": __version__},
        ),
        plan=EvalPlan(steps=[EvalPlanStep(solver=method, params=options)]),
        results=EvalResults(
            total_samples=len(samples),
            completed_samples=len(samples),
            scores=[
                EvalScore(
                    name=judge,
                    scorer=judge,
                    reducer=reducer,
                    scored_samples=len(of),
                    metrics={
                        metric: EvalMetric(name=metric, value=value)
                        for metric, value in (
                            (judge if method == BENIGN else "attack_success_rate", statistics.fmean(of.values())),
                            ("stderr", statistics.stdev(of.values()) / math.sqrt(len(of)) if len(of) > 1 else 0.0),
                        )
                    },
                )
                for judge, of in rates.items()
                if of
            ],
        ),
        stats=EvalStats(
            started_at=now,
            completed_at=now,
            model_usage={model: ModelUsage(total_tokens=sum(s.model_usage[model].total_tokens for s in samples))},
        ),
        samples=list(samples),
    )
