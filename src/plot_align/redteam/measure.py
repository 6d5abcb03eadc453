"""Measure one model: success under each attack, and what happens to benign requests."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from plot_align.errors import InputError, RunError
from plot_align.parallel import on_main
from plot_align.redteam.attack import Answering, Attack
from plot_align.redteam.behaviors import Behavior
from plot_align.redteam.curves import snapshot_cases, success_at_cases, success_of_samples, success_within
from plot_align.redteam.direct import DirectRequest
from plot_align.redteam.harmbench import Layout, Rows, read_test_cases, success_by_behavior
from plot_align.redteam.judges import Judge, Judged, agreement
from plot_align.redteam.run import (
    OnBehavior,
    OnUpdate,
    complete,
    label,
    label_benign,
    make_test_cases,
    spent_on_answers,
    spent_on_cases,
)
from plot_align.redteam.spent import Limit, Spent
from plot_align.redteam.victim import Victim
from plot_align.results import ATTACK_CURVES, BUDGET_CURVES
from plot_align.statistics import proportion

BENIGN = "benign requests"
Bar = Callable[[str, int], tuple[OnBehavior, OnUpdate]]


@dataclass(frozen=True)
class Judges:
    """Judges by name, of ``attacks`` and of ``benign`` requests. The first of each decides; how far the others agree
    with it is measured."""

    attacks: Mapping[str, Judge]
    benign: Mapping[str, Judge]


@dataclass(frozen=True)
class Budget:
    """What every model of a comparison is given equally.

    Args:
        cases: test cases per behaviour; None: HarmBench's number for each attack.
        seed: of the attacks.
        snapshots: update steps of the curve, ascending.
        max_new_tokens: of an answer. batch_size: answers a pass.
        limit: of what a test case may cost.
    """

    cases: int | None = None
    seed: int = 0
    snapshots: tuple[int, ...] = ()
    max_new_tokens: int = 512
    batch_size: int = 32
    limit: Limit = field(default_factory=Limit)


def _no_bar(description: str, total: int) -> tuple[OnBehavior, OnUpdate]:
    return (lambda behavior: None), (lambda behavior, step: None)


@dataclass(frozen=True)
class JudgedAttack:
    """One attack on one victim, answered and judged.

    Attributes:
        layout: where its files lie.
        steps: update steps after which the best test cases were kept.
        failed: behaviour → why it has no test case.
        answers: as :func:`plot_align.redteam.run.complete` returns them.
        results: judge → as ``label`` returns them. success: judge → behaviour → rate of success. Both begin with the
            judge that decides.
    """

    layout: Layout
    steps: tuple[int, ...]
    failed: dict[str, str]
    answers: Rows
    results: dict[str, Rows]
    success: dict[str, dict[str, float]]

    def undecided(self, judge: str) -> list[str]:
        """Why a judge decided nothing, one reason per undecided answer."""
        return [row.get("reason", "") for rows in self.results[judge].values() for row in rows if row["label"] == -1]

    @property
    def agreements(self) -> dict[str, dict[str, Any]]:
        """Each other judge's agreement with the first, over all answers."""
        return agreements({j: [row["label"] for of in r.values() for row in of] for j, r in self.results.items()})


def agreements(labels: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Any]]:
    """Judge → :func:`agreement` with the first of ``labels`` (judge → labels of the same cases), and the two names."""
    first, *others = labels
    return {judge: {"judges": [first, judge], **agreement(labels[first], labels[judge])} for judge in others}


def attack_and_judge(
    victim: Victim,
    attack: Attack,
    harmful: Sequence[Behavior],
    targets: Mapping[str, str],
    judges: Mapping[str, Judge],
    output: Path,
    budget: Budget,
    *,
    transfer_from: str | None = None,
    bar: Bar = _no_bar,
) -> JudgedAttack:
    """Attack every behaviour, answer the test cases and judge the answers; finished parts are not done again.

    Args: as :func:`measure`; ``judges`` by name, the one that decides first.

    Raises:
        InputError: as in :mod:`plot_align.redteam.run`.
        RunError: a judge decided nothing.
    """
    replayed = transfer_from is not None and attack.white_box  # other attacks make cases that fit any model
    layout = Layout(output, attack.name, str(transfer_from) if replayed else attack.experiment(victim))
    answering = attack.answering(victim, harmful, targets, budget.seed)
    advance, update = bar(attack.title, (1 + answering.samples) * len(harmful))
    steps = () if replayed else tuple(s for s in budget.snapshots if s <= attack.steps)
    if replayed:
        failed: dict[str, str] = {}
        cases = on_main(partial(_replayed, layout, harmful))
    else:
        cases, failed = make_test_cases(
            victim, attack, harmful, targets, layout,
            cases=budget.cases, seed=budget.seed, snapshots=steps, limit=budget.limit,
            on_behavior=advance, on_update=update,
        )  # fmt: skip
    answers = complete(
        victim,
        cases,
        layout.completions(victim.name),
        answering=answering,
        max_new_tokens=budget.max_new_tokens,
        batch_size=budget.batch_size,
        limit=budget.limit,
        on_behavior=advance,
    )
    results: dict[str, Rows] = {}
    for name, judge in judges.items():
        path = layout.results(victim.name, judge.name if results else None)
        results[name] = label(judge, harmful, answers, path)
    success = {name: success_by_behavior(of, any_answer=attack.any_answer) for name, of in results.items()}
    found = JudgedAttack(layout, steps, failed, answers, results, success)
    for name in judges:
        require_decided(f"{attack.title}'s cases", found.undecided(name), sum(map(len, answers.values())), name)
    return found


def measure(
    victim: Victim,
    harmful: Sequence[Behavior],
    benign: Sequence[Behavior],
    targets: Mapping[str, str],
    attacks: Sequence[Attack],
    judges: Judges,
    budget: Budget,
    output: Path,
    *,
    transfer_from: str | None = None,
    bar: Bar = _no_bar,
) -> dict[str, Any]:
    """Attack, answer and judge, in HarmBench's folders below ``output``; finished parts are not done again.

    Args:
        harmful, benign: what is requested with and without attacks.
        targets: as in :func:`plot_align.redteam.run.make_test_cases`.
        transfer_from: replay the white-box test cases made on the model of this name instead of making new ones.
        bar: called with a description and a total; returns the functions that move it.

    Returns:
        By attack: ``attacks`` (behaviour → success rate), ``titles`` and ``options``, ``failed`` (behaviour → why it
        has no case), the curves (:data:`plot_align.results.ATTACK_CURVES`, ``BUDGET_CURVES``), ``spent`` (mean
        :class:`~plot_align.redteam.spent.Spent` of a test case); ``undecided`` (n and the first reason); ``refused``
        and ``helped`` (benign behaviour → 0 or 1). All of this is the first judge's. ``judges`` names all, of
        ``attacks`` and ``benign`` requests. ``others`` has, by judge, ``attacks``, ``undecided``, ``refused`` and
        ``helped`` of those that do not decide, and their ``agreement`` with the one that does.

    Raises:
        InputError: as in :mod:`plot_align.redteam.run`, or an attack works through the answer and a judge reads none.
        RunError: a judge decided nothing.
    """
    length: dict[str, Any] = {"max_new_tokens": budget.max_new_tokens, "batch_size": budget.batch_size}
    kinds = ("attacks", "titles", "options", "failed", *ATTACK_CURVES, *BUDGET_CURVES, "spent", "undecided")
    found: dict[str, Any] = {kind: {} for kind in kinds}
    found["judges"] = {"attacks": list(judges.attacks), "benign": list(judges.benign)}
    (main, first), *_ = judges.attacks.items()
    found["others"] = {
        name: {"attacks": {}, "undecided": {}, "refused": {}, "helped": {}, "agreement": {}}
        for name in dict.fromkeys([*list(judges.attacks)[1:], *list(judges.benign)[1:]])
    }
    for attack in attacks:  # check all before the first, which may take hours
        answering = attack.answering(victim, harmful, targets, budget.seed)
        for judge in judges.attacks.values():
            if answering != Answering() and judge.reads == "nothing":
                raise InputError(
                    f"judge {judge.name} reads no answer, so {attack.title} would be a direct request to it; name "
                    "another judge, or leave that attack out"
                )

    def run(attack: Attack) -> JudgedAttack:
        found_here = attack_and_judge(
            victim, attack, harmful, targets, judges.attacks, output, budget, transfer_from=transfer_from, bar=bar
        )
        what = attack.name if attack in attacks else attack.title
        for name in judges.attacks:
            of = found if name == main else found["others"][name]
            of["undecided"][what] = _undecided(found_here.undecided(name))
        return found_here

    for attack in attacks:
        done = run(attack)
        rates = done.success[main]
        found["attacks"][attack.name] = rates
        found["titles"][attack.name] = attack.title
        found["options"][attack.name] = attack.identity
        found["failed"][attack.name] = done.failed
        found["by_samples" if attack.any_answer else "by_cases"][attack.name] = success_at_cases(done.results[main])
        for tokens, other in attack.by_tokens.items():
            then = rates if other == attack else success_by_behavior(run(other).results[main])
            found["by_tokens"].setdefault(attack.name, {})[tokens] = proportion(list(then.values()))
        by_step: dict[int, tuple[Path, Rows, dict[str, float]]] = {}
        final = {name: [row["test_case"] for row in rows] for name, rows in done.answers.items()}
        for step in done.steps:
            path = done.layout.folder / "steps" / f"{step}.json"
            cases = on_main(partial(snapshot_cases, done.layout, final, step))
            if not cases:
                break
            answers = complete(victim, cases, path, **length)
            then = success_by_behavior(label(first, harmful, answers, path.with_suffix(".results.json")))
            found["by_steps"].setdefault(attack.name, {})[step] = proportion(list(then.values()))
            by_step[step] = path, answers, then
        if transfer_from is None or not attack.white_box:  # the cost of replayed cases is that of another model
            for kind, of in on_main(partial(_budgets, victim, attack, done, main, by_step)).items():
                found[kind][attack.name] = of
        for name, entry in done.agreements.items():
            found["others"][name]["attacks"][attack.name] = done.success[name]
            found["others"][name]["agreement"][attack.name] = entry
    layout = Layout(output, "Benign", DirectRequest().experiment(victim))
    advance, _ = bar("benign requests", len(benign))
    cases, _ = make_test_cases(victim, DirectRequest(), benign, {}, layout)
    answers = complete(victim, cases, layout.completions(victim.name), **length, on_behavior=advance)
    generations = [answers[behavior.id][0]["generation"] for behavior in benign]
    judged = {name: label_benign(judge, benign, generations, layout.folder) for name, judge in judges.benign.items()}
    for place, (name, verdicts) in enumerate(judged.items()):
        unsure = [v.reason for v in verdicts if v.refused is None]
        require_decided(BENIGN, unsure, len(verdicts), name)
        of = found["others"][name] if place else found
        of["undecided"][BENIGN] = _undecided(unsure)
        decided = [(b.id, v) for b, v in zip(benign, verdicts, strict=True) if v.refused is not None]
        of["refused"] = {item: float(bool(v.refused)) for item, v in decided}
        of["helped"] = {item: float(bool(v.helped)) for item, v in decided}
    kinds_of_benign: tuple[Literal["refused", "helped"], ...] = ("refused", "helped")
    for what in kinds_of_benign:
        for name, entry in agreements({name: benign_labels(of, what) for name, of in judged.items()}).items():
            found["others"][name]["agreement"][what] = entry
    return found


def _budgets(
    victim: Victim,
    attack: Attack,
    done: JudgedAttack,
    main: str,
    by_step: Mapping[int, tuple[Path, Rows, dict[str, float]]],
) -> dict[str, Any]:
    """``spent``, the mean cost of a test case and its answers, and the curves of success against a budget.

    Nothing if a behaviour's costs are unknown, because it was attacked before they were written.
    """
    made = spent_on_cases(done.layout, done.answers)
    path = done.layout.completions(victim.name)
    answered = spent_on_answers(path, done.answers)
    if not done.answers or not made.keys() == answered.keys() == done.answers.keys():
        return {}
    points = [
        (spent_on_cases(done.layout, answers, step), spent_on_answers(path, answers), answers, then)
        for step, (path, answers, then) in sorted(by_step.items())
    ]
    if any(not until.keys() == since.keys() == made.keys() for until, since, *_ in points):
        return {}
    points.append((made, answered, done.answers, done.success[main]))
    rungs: dict[str, list[tuple[Spent, float]]] = {name: [] for name in done.results[main]}
    for name, rung in rungs.items():
        if attack.any_answer:
            base, each = Spent.mean(made[name]), Spent.mean(answered[name])
            rates = success_of_samples(done.results[main][name])
            rung += [(base + each * k, rate) for k, rate in enumerate(rates, 1)]
            continue
        asked: list[str] = []
        answer = Spent()
        for until, since, answers, then in points:
            cases = [row["test_case"] for row in answers[name]]
            if cases != asked:  # else it was answered again, in other seconds
                asked, answer = cases, Spent.mean(since[name])
            cost = Spent.mean(until[name]) + answer
            if rung and rung[-1][0] == cost:  # no step lies between them
                cost, _ = rung.pop()
            rung.append((cost, then[name]))
    units = {"by_forward_tokens": lambda cost: cost.tokens, "by_seconds": lambda cost: cost.seconds}
    curves = {
        kind: success_within({name: [(unit(cost), rate) for cost, rate in of] for name, of in rungs.items()})
        for kind, unit in units.items()
    }
    return {"spent": Spent.mean(of[-1][0] for of in rungs.values()).plain, **curves}


def benign_labels(verdicts: Sequence[Judged], what: Literal["refused", "helped"]) -> list[int]:
    """1 refused (or helped), 0 not, −1 undecided."""
    said = [v.refused if what == "refused" else v.helped for v in verdicts]
    return [-1 if x is None else int(x) for x in said]


def _undecided(reasons: list[str]) -> dict[str, Any]:
    return {"n": len(reasons), "first": reasons[0] if reasons else None}


def require_decided(what: str, reasons: Sequence[str], n: int, judge: str) -> None:
    """Check that ``judge`` decided at least one of ``n`` answers to ``what``.

    Args:
        reasons: why it could not decide, one per undecided answer.

    Raises:
        RunError: it decided none, so there is no rate.
    """
    if n and len(reasons) == n:
        raise RunError(
            f"judge {judge} decided none of {n} answers to {what} (the first: {reasons[0] or 'no reason'}); remove "
            "that cause and run again"
        )


def _replayed(layout: Layout, harmful: Sequence[Behavior]) -> dict[str, list[str]]:
    """The test cases made on another model for ``harmful``.

    Raises:
        InputError: some are missing.
    """
    there = read_test_cases(layout.test_cases)
    missing = [behavior.id for behavior in harmful if behavior.id not in there]
    if missing:
        raise InputError(f"{layout.test_cases} has no test cases for {missing[0]!r}; attack that model with it first")
    return {behavior.id: there[behavior.id] for behavior in harmful}


def balance(success: float, helped: float) -> float:
    """Harmonic mean of 1 − ASR and the rate of benign requests helped with: 0 for a model that refuses everything."""
    safe = 1 - success
    if math.isnan(safe + helped):
        return math.nan
    return 2 * safe * helped / (safe + helped) if safe + helped > 0 else 0.0
