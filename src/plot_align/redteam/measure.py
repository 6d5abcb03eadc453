"""Everything that is measured of one model: success under each attack, and what happens to benign requests."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from plot_align.errors import InputError, RunError
from plot_align.parallel import on_main
from plot_align.redteam.attack import Answering, Attack
from plot_align.redteam.behaviors import Behavior
from plot_align.redteam.curves import snapshot_cases, success_at_cases
from plot_align.redteam.direct import DirectRequest
from plot_align.redteam.harmbench import Layout, Rows, read_test_cases, success_by_behavior
from plot_align.redteam.judges import Judge, agreement
from plot_align.redteam.names import ATTACK_CURVES
from plot_align.redteam.run import OnBehavior, OnUpdate, complete, label, make_test_cases
from plot_align.redteam.victim import Victim
from plot_align.statistics import proportion

Bar = Callable[[str, int], tuple[OnBehavior, OnUpdate]]


@dataclass(frozen=True)
class Judges:
    """Who decides: ``main`` on attacks, ``benign`` on refusals, ``second`` on attacks too, for the agreement."""

    main: Judge
    benign: Judge
    second: Judge | None = None


@dataclass(frozen=True)
class Budget:
    """What every model of a comparison is given alike.

    Args:
        cases: test cases a behaviour; None: HarmBench's number for each attack.
        seed: of the attacks.
        snapshots: update steps of the curve, ascending.
        max_new_tokens: of an answer. batch_size: answers a pass.
    """

    cases: int | None = None
    seed: int = 0
    snapshots: tuple[int, ...] = ()
    max_new_tokens: int = 512
    batch_size: int = 32


def _no_bar(description: str, total: int) -> tuple[OnBehavior, OnUpdate]:
    return (lambda behavior: None), (lambda behavior, step: None)


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
    """Attack, answer and judge, in HarmBench's folders below ``output``; whatever is there is not done again.

    Args:
        harmful, benign: what is asked for, with and without attacks.
        targets: as in :func:`plot_align.redteam.run.make_test_cases`.
        transfer_from: replay the white-box test cases made on the model of this name in place of making any.
        bar: called with a description and a total; returns what moves it.

    Returns:
        By attack: ``attacks`` (behaviour → success rate), ``titles`` and ``options``, ``failed`` (behaviour → why it
        has no case), the curves (:data:`plot_align.redteam.names.ATTACK_CURVES`), ``agreement`` of the judges;
        ``undecided`` (n and the first reason); ``refused`` and ``helped`` (benign behaviour → 0 or 1).

    Raises:
        InputError: as in :mod:`plot_align.redteam.run`, or a judge reads no answer where the attack is on the answer.
        RunError: a judge decided nothing.
    """
    length: dict[str, Any] = {"max_new_tokens": budget.max_new_tokens, "batch_size": budget.batch_size}
    kinds = ("attacks", "titles", "options", "failed", "agreement", *ATTACK_CURVES, "undecided")
    found: dict[str, Any] = {kind: {} for kind in kinds}
    for attack in attacks:  # all of them before the first, which may take hours
        answering = attack.answering(victim, harmful, targets, budget.seed)
        for judge in (judges.main, judges.second):
            if judge is not None and answering != Answering() and judge.reads == "nothing":
                raise InputError(
                    f"judge {judge.name} reads no answer, so {attack.title} would be a direct request to it; name "
                    "another judge, or leave that attack out"
                )

    def attacked(attack: Attack) -> tuple[Layout, tuple[int, ...], dict[str, str], Rows, Rows]:
        """Its folder, its snapshots, why cases are missing, answers, labels."""
        replayed = transfer_from is not None and attack.white_box  # the cases of others are for any model
        layout = Layout(output, attack.name, str(transfer_from) if replayed else attack.experiment(victim))
        answering = attack.answering(victim, harmful, targets, budget.seed)
        advance, update = bar(attack.title, (1 + answering.samples) * len(harmful))
        steps = () if replayed else tuple(s for s in budget.snapshots if s <= attack.steps)
        if not replayed:
            cases, failed = make_test_cases(
                victim, attack, harmful, targets, layout,
                cases=budget.cases, seed=budget.seed, snapshots=steps,
                on_behavior=advance, on_update=update,
            )  # fmt: skip
        else:
            cases, failed = on_main(partial(_replayed, layout, harmful)), {}
        answers = complete(
            victim, cases, layout.completions(victim.name), answering=answering, **length, on_behavior=advance
        )
        results = label(judges.main, harmful, answers, layout.results(victim.name))
        rows = [row for of_one in results.values() for row in of_one]
        unsure = [row.get("reason", "") for row in rows if row["label"] == -1]
        _decided(f"{attack.title}'s cases", unsure, len(rows))
        what = attack.name if attack in attacks else attack.title
        found["undecided"][what] = {"n": len(unsure), "first": unsure[0] if unsure else None}
        return layout, steps, failed, answers, results

    for attack in attacks:
        layout, steps, failed, answers, results = attacked(attack)
        rates = success_by_behavior(results, any_answer=attack.any_answer)
        found["attacks"][attack.name] = rates
        found["titles"][attack.name] = attack.title
        found["options"][attack.name] = attack.identity
        found["failed"][attack.name] = failed
        found["by_samples" if attack.any_answer else "by_cases"][attack.name] = success_at_cases(results)
        for tokens, other in attack.by_tokens.items():
            then = rates if other == attack else success_by_behavior(attacked(other)[-1])
            found["by_tokens"].setdefault(attack.name, {})[tokens] = proportion(list(then.values()))
        for step in steps:
            path = layout.folder / "steps" / f"{step}.json"
            cases = on_main(partial(snapshot_cases, layout, list(answers), step))
            then = success_by_behavior(
                label(judges.main, harmful, complete(victim, cases, path, **length), path.with_suffix(".results.json"))
            )
            found["by_steps"].setdefault(attack.name, {})[step] = proportion(list(then.values()))
        if judges.second is not None:
            other_results = label(judges.second, harmful, answers, layout.results(victim.name, judges.second.name))
            pairs = [[row["label"] for of in r.values() for row in of] for r in (results, other_results)]
            found["agreement"][attack.name] = agreement(*pairs)
    layout = Layout(output, "Benign", DirectRequest().experiment(victim))
    advance, _ = bar("benign requests", len(benign))
    cases, _ = make_test_cases(victim, DirectRequest(), benign, {}, layout)
    answers = complete(victim, cases, layout.completions(victim.name), **length, on_behavior=advance)
    generations = [answers[behavior.id][0]["generation"] for behavior in benign]
    verdicts = judges.benign.judge_benign(benign, [behavior.prompt for behavior in benign], generations)
    unsure = [v.reason for v in verdicts if v.refused is None]
    _decided("benign requests", unsure, len(verdicts))
    found["undecided"]["benign requests"] = {"n": len(unsure), "first": unsure[0] if unsure else None}
    decided = [(b.id, v) for b, v in zip(benign, verdicts, strict=True) if v.refused is not None]
    found["refused"] = {name: float(bool(v.refused)) for name, v in decided}
    found["helped"] = {name: float(bool(v.helped)) for name, v in decided}
    return found


def _decided(what: str, reasons: list[str], n: int) -> int:
    """How many of ``n`` verdicts there are.

    Raises:
        RunError: none, and so no rate; the first reason is named.
    """
    if n and len(reasons) == n:
        raise RunError(
            f"the judge decided none of {n} answers to {what} (the first: {reasons[0] or 'no reason'}); the answers "
            "are kept, so mend the judge and run the same again"
        )
    return n - len(reasons)


def _replayed(layout: Layout, harmful: Sequence[Behavior]) -> dict[str, list[str]]:
    """The test cases made on another model, of the behaviours asked for.

    Raises:
        InputError: there are none, or not of all.
    """
    there = read_test_cases(layout.test_cases)
    missing = [behavior.id for behavior in harmful if behavior.id not in there]
    if missing:
        raise InputError(f"{layout.test_cases} has no test cases for {missing[0]!r}; attack that model with it first")
    return {behavior.id: there[behavior.id] for behavior in harmful}


def balance(success: float, helped: float) -> float:
    """Harmonic mean of 1 − ASR and the share of benign requests helped with: 0 for a model that refuses everything."""
    safe = 1 - success
    if math.isnan(safe + helped):
        return math.nan
    return 2 * safe * helped / (safe + helped) if safe + helped > 0 else 0.0
