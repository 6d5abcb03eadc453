"""From behaviours to results, in HarmBench's folders: test cases, completions, labels. Each step resumes where it
stopped.

A behaviour's test cases, and a block of completions, are on disk completely or not at all. Nothing depends on what ran
before, so an interrupted run gives the same files as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from plot_align.errors import InputError
from plot_align.io import (
    check_seal,
    json_digest,
    json_or_none,
    match_or_write,
    plain_json,
    write_json,
    write_sealed_json,
)
from plot_align.parallel import each, on_main
from plot_align.redteam import harmbench
from plot_align.redteam.attack import Answering, Attack, Attacked, Request
from plot_align.redteam.attackers import EndpointAttacker
from plot_align.redteam.behaviors import Behavior, require_targets
from plot_align.redteam.harmbench import Layout, Rows, TestCases
from plot_align.redteam.judges import Judge, Judged
from plot_align.redteam.spent import Limit, Meter, Spent
from plot_align.redteam.victim import Question, Victim

OnBehavior = Callable[[str], None]
OnUpdate = Callable[[str, int], None]
BLOCK = 32  # behaviours answered together; fixed, because the batch can change a rounding and so an answer


def make_test_cases(
    victim: Victim,
    attack: Attack,
    behaviors: Sequence[Behavior],
    targets: Mapping[str, str],
    layout: Layout,
    *,
    cases: int | None = None,
    seed: int = 0,
    snapshots: Sequence[int] = (),
    limit: Limit | None = None,
    on_behavior: OnBehavior = lambda behavior: None,
    on_update: OnUpdate = lambda behavior, step: None,
) -> tuple[TestCases, dict[str, str]]:
    """Attack every behaviour that has no test cases yet. Each process attacks one at a time; the main one writes.

    Args:
        targets: BehaviorID to how a complying answer begins; may be empty for an attack that needs none.
        cases: test cases per behaviour; None: HarmBench's number.
        snapshots: update steps after which the best cases are kept in the behaviour's ``logs.json``, and what they
            cost until then in its ``spent.json``.
        limit: of what a case may cost.
        on_behavior: called with the id of each one that is finished.
        on_update: called with the id of the one under attack and its update step.

    Returns:
        All test cases, and for each behaviour without any why its attack failed; the next run tries again.

    Raises:
        InputError: a target is missing, or the folder holds cases made with other options or for other weights.
    """
    if attack.needs_target:
        require_targets(behaviors, targets, attack.name)
    count = attack.default_cases if cases is None else cases
    if count < 1:
        raise InputError(f"cases is {cases}, expected how many test cases per behaviour, 1 or more")
    made_by = {
        "attack": {"name": attack.name, **attack.identity},
        "victim": victim.identity if attack.white_box else None,
        "cases": count,
        "seed": seed,
        "snapshots": list(snapshots),
        "limit": asdict(limit) if limit and limit != Limit() and attack.steps else None,  # else it decides nothing
    }
    wanted = [
        Request(
            b, targets.get(b.id, "") if attack.needs_target else "", count, seed, tuple(snapshots), limit or Limit()
        )
        for b in behaviors
    ]

    def unfinished() -> list[bool]:
        match_or_write(layout.folder / "options.json", made_by, layout.folder)
        return [not _is_attacked(layout, request) for request in wanted]

    requests = []
    for request, missing in zip(wanted, on_main(unfinished), strict=True):
        if missing:
            requests.append(request)
        else:
            on_behavior(request.behavior.id)

    def attacked(request: Request) -> Attacked:
        meter = Meter(victim, getattr(attack, "attacker", None))
        found = attack.run(victim, request, partial(on_update, request.behavior.id))
        return found if found.spent or not found.cases else replace(found, spent=meter.read().shares(len(found.cases)))

    if isinstance(getattr(attack, "attacker", None), EndpointAttacker):
        # One process sends all requests to the endpoint, several at a time.
        made: Iterator[Attacked] = (on_main(partial(attacked, request)) for request in requests)
    else:
        made = each(attacked, requests)
    failed: dict[str, str] = {}
    for request, result in zip(requests, made, strict=True):
        if result.failed is not None:
            failed[request.behavior.id] = result.failed
        else:
            on_main(partial(_write_attacked, layout, request, result))
        on_behavior(request.behavior.id)
    return on_main(lambda: harmbench.merge_test_cases(layout, [behavior.id for behavior in behaviors])), failed


def _is_attacked(layout: Layout, request: Request) -> bool:
    """Whether test cases for the same request exist."""
    folder = layout.behavior_folder(request.behavior.id)
    written = [folder / name for name in ("logs.json", "spent.json", "test_cases.json")]
    if not all(path.exists() for path in written):
        return False
    match_or_write(folder / "request.json", _request_json(request), folder)
    for path in written:
        check_seal(path)
    return True


def _write_attacked(layout: Layout, request: Request, result: Attacked) -> None:
    folder = layout.behavior_folder(request.behavior.id)
    log = {"losses": result.losses, "trace": result.trace, "snapshots": result.snapshots}
    write_sealed_json(folder / "request.json", _request_json(request))
    write_sealed_json(folder / "logs.json", log)
    by_step = {step: [cost.plain for cost in costs] for step, costs in result.spent_by_step.items()}
    write_sealed_json(folder / "spent.json", {"cases": [cost.plain for cost in result.spent], "by_step": by_step})
    write_sealed_json(
        folder / "test_cases.json", {request.behavior.id: result.cases}
    )  # last: its presence means finished


def _request_json(request: Request) -> dict[str, Any]:
    return {"behavior": asdict(request.behavior), "target": request.target}


def complete(
    victim: Victim,
    test_cases: Mapping[str, Sequence[str]],
    path: Path,
    *,
    answering: Answering | None = None,
    max_new_tokens: int = 512,
    batch_size: int = 32,
    limit: Limit | None = None,
    on_behavior: OnBehavior = lambda behavior: None,
) -> Rows:
    """The model's answers to all test cases; those in ``path`` are reused.

    An answer is reused only if its test case and prefix are unchanged. Samples are drawn in rounds, one per test case:
    the batches of the first rounds do not depend on the number of samples, so a run can be extended.

    Args:
        answering: None decodes greedily, without a prefix.
        max_new_tokens: of what follows a prefix.
        limit: of what the samples of a behaviour may cost; none is begun once it is reached, and what the file holds
            beyond it is left there and not returned. The first answer to every test case is always given.
        on_behavior: called with a behaviour's id for each finished sample of it.

    Raises:
        InputError: ``path`` holds answers of other weights, another chat template, dtype, length or sampling.
    """
    answering = answering or Answering()
    identity = {**victim.identity, "max_new_tokens": max_new_tokens, **answering.identity}

    def earlier() -> Rows:
        answered_by = _beside(path, "answered_by")
        if not path.exists():
            answered_by.unlink(missing_ok=True)
        match_or_write(answered_by, identity, path)
        return harmbench.read_completions(path) if path.exists() else {}

    found = on_main(earlier)
    costs: dict[str, list[dict[str, float] | None]] = on_main(
        lambda: _costs(_beside(path, "spent")) if path.exists() else {}
    )
    unanswered: dict[str, list[dict[str, str]]] = {}  # the rows without their answers
    for name, cases in test_cases.items():
        ids = answering.prefixes.get(name, ())
        prefix = {"prefix": victim.tokenizer.decode(ids, skip_special_tokens=True)} if ids else {}
        unanswered[name] = [{"test_case": case, **prefix} for case in cases] * answering.samples

    def current(part: list[tuple[str, int]]) -> bool:
        return all(
            row.get(key) == unanswered[name][i].get(key)
            for name, i in part
            for row in (found.get(name, [])[i : i + 1] or [{}])
            for key in ("test_case", "prefix")
        )

    names = list(test_cases)
    parts: list[list[tuple[str, int]]] = []  # answered together: behaviour and index of the row
    for start in range(0, len(names), BLOCK):
        for n in range(answering.samples):
            of_each = [(name, len(test_cases[name])) for name in names[start : start + BLOCK]]
            parts.append([(name, i) for name, count in of_each for i in range(n * count, (n + 1) * count)])
    limited = limit is not None and limit != Limit() and answering.samples > 1

    def within(name: str, i: int) -> bool:
        """Whether the answers before the ``i``-th leave something of the limit."""
        if limit is None or not limited or i < len(test_cases[name]):
            return True
        return not limit.reached(sum((Spent.of(cost) for cost in costs.get(name, [])[:i] if cost), Spent()))

    # What a limit leaves to ask is known part by part. Otherwise all batches are known, and divided, at once.
    for group in [[part] for part in parts] if limited else [parts]:
        asked = [[at for at in part if within(*at) and not current([at])] for part in group] if limited else group
        questions = [
            [
                Question(
                    unanswered[name][i]["test_case"], answering.prefixes.get(name, ()), answering.seed_of(name, i)
                )
                for name, i in part
            ]
            for part in asked
            if not current(part)
        ]
        answered = victim.answers_to_each(
            questions, max_new_tokens=max_new_tokens, batch_size=batch_size, temperature=answering.temperature
        )
        for whole, part in zip(group, asked, strict=True):
            if not current(part):
                for (name, i), answer in zip(part, next(answered), strict=True):
                    found.setdefault(name, [])[i : i + 1] = [{**unanswered[name][i], "generation": answer.text}]
                    known = costs.setdefault(name, [])
                    known += [None] * (i + 1 - len(known))  # answers of before costs were written have none
                    known[i] = Spent(answer.tokens, seconds=answer.seconds).plain
                on_main(partial(write_sealed_json, _beside(path, "spent"), costs))
                on_main(partial(write_sealed_json, path, found))
            for name in dict.fromkeys(name for name, _ in whole):
                on_behavior(name)
    return {
        name: [row for i, row in enumerate(found.get(name, [])[: len(unanswered[name])]) if within(name, i)]
        for name in names
    }


def spent_on_cases(layout: Layout, behaviors: Iterable[str], step: int | None = None) -> dict[str, list[Spent]]:
    """What the test cases of each behaviour cost to make, in all or until an update step.

    A behaviour attacked before costs were written is left out; one that ended before the step has its whole cost.
    """
    found = {}
    for behavior in behaviors:
        content = _costs(layout.behavior_folder(behavior) / "spent.json")
        costs = content.get("by_step", {}).get(str(step), content.get("cases"))
        if costs:
            found[behavior] = list(map(Spent.of, costs))
    return found


def spent_on_answers(path: Path, answers: Rows) -> dict[str, list[Spent]]:
    """What each of ``answers``, returned by :func:`complete` of ``path``, cost; a behaviour without is left out."""
    costs = _costs(_beside(path, "spent"))
    found = {name: costs.get(name, [])[: len(rows)] for name, rows in answers.items()}
    return {
        name: list(map(Spent.of, of)) for name, of in found.items() if of and all(of) and len(of) == len(answers[name])
    }


def _costs(path: Path) -> dict[str, Any]:
    check_seal(path)
    return json_or_none(path) or {}


def label(judge: Judge, behaviors: Sequence[Behavior], completions: Rows, path: Path) -> Rows:
    """The judge's labels, in HarmBench's results file, with a ``reason`` if the judge gives one.

    ``path`` holds the labels of these behaviours and answers alone. All that the judge ever gave, except −1, are kept
    beside it and reused: a call for fewer behaviours, or by another judge, loses none. Each block of behaviours is on
    disk before the next, as a judge may cost money.
    """
    identity = plain_json(_identity(judge))
    judged_by = _beside(path, "judged_by")
    kept = _kept(judge, identity, path.parent.parent) / path.name

    def earlier() -> tuple[Rows, Rows]:
        if not path.exists() or json_or_none(judged_by) != identity:
            path.unlink(missing_ok=True)  # first, so that a run killed here leaves no label of another judge
            write_json(judged_by, identity)
        first, second = (harmbench.read_results(x) if x.exists() else {} for x in (kept, path))
        return first, second

    first, second = on_main(earlier)
    known = _labels(first) | _labels(second)
    wanted = [behavior for behavior in behaviors if behavior.id in completions]
    results: Rows = {}
    for start in range(0, len(wanted), BLOCK):
        block = wanted[start : start + BLOCK]
        flat = [(behavior, row) for behavior in block for row in completions[behavior.id]]
        # Equal answers are judged once.
        new = {key: (b, row) for b, row in flat if (key := _key(b.id, row)) not in known}
        verdicts = judge.judge(
            [b for b, _ in new.values()],
            [row["test_case"] for _, row in new.values()],
            [_read(judge, row) for _, row in new.values()],
        )
        for key, verdict in zip(new, verdicts, strict=True):
            known[key] = {"label": verdict.label, **({"reason": verdict.reason} if verdict.reason else {})}
        results.update({behavior.id: [] for behavior in block})
        for behavior, row in flat:
            results[behavior.id].append({**row, **known[_key(behavior.id, row)]})
        if new:
            on_main(partial(write_sealed_json, kept, _rows(known)))
    on_main(partial(write_sealed_json, path, results))
    return results


def label_benign(judge: Judge, requests: Sequence[Behavior], answers: Sequence[str], folder: Path) -> list[Judged]:
    """The judge's verdicts on the answers to benign requests; those it gave, except undecided ones, are kept in
    ``folder`` and reused, as :func:`label` does."""
    path = _kept(judge, plain_json(_identity(judge)), folder) / "benign.json"
    known = _labels(on_main(lambda: harmbench.read_results(path) if path.exists() else {}))
    verdicts = []
    for start in range(0, len(requests), BLOCK):
        block = [
            (b, {"test_case": b.prompt, "generation": answer})
            for b, answer in zip(requests[start : start + BLOCK], answers[start : start + BLOCK], strict=True)
        ]
        new = {key: (b, row) for b, row in block if (key := _key(b.id, row)) not in known}
        found = judge.judge_benign(
            [b for b, _ in new.values()],
            [b.prompt for b, _ in new.values()],
            [row["generation"] for _, row in new.values()],
        )
        known.update(zip(new, map(asdict, found), strict=True))
        verdicts += [Judged(**known[_key(b.id, row)]) for b, row in block]
        if new:
            on_main(partial(write_sealed_json, path, _rows(known)))
    return verdicts


def _kept(judge: Judge, identity: Any, folder: Path) -> Path:
    """Where all labels of a judge are, by its name and the digest of its identity."""
    return folder / "labels" / f"{judge.name}-{json_digest(identity)}"


def _beside(path: Path, what: str) -> Path:
    """The file that says what made ``path``, outside HarmBench's own folders, whose files a program may list."""
    return path.parent.parent / what / path.parent.name / path.name


def _read(judge: Judge, row: Mapping[str, Any]) -> str:
    """What the judge reads of an answer; see :attr:`plot_align.redteam.judges.Judge.reads`."""
    prefix = row.get("prefix", "")
    return row["generation"].removeprefix(prefix) if prefix and judge.reads == "continuation" else row["generation"]


def _key(behavior: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    return behavior, row["test_case"], row.get("prefix", ""), row["generation"]


def _labels(results: Rows) -> dict[tuple[str, ...], dict[str, Any]]:
    """Labels by behaviour, test case and answer, except undecided ones."""
    return {
        _key(behavior, row): {name: row[name] for name in ("label", "refused", "helped", "reason") if name in row}
        for behavior, rows in results.items()
        for row in rows
        if row["label"] != -1
    }


def _rows(labels: Mapping[tuple[str, ...], dict[str, Any]]) -> Rows:
    """The inverse of :func:`_labels`, in an order that does not depend on when each label was given."""
    results: Rows = {}
    for (behavior, case, prefix, generation), of in sorted(labels.items(), key=lambda item: item[0]):
        row = {"test_case": case, **({"prefix": prefix} if prefix else {}), "generation": generation, **of}
        results.setdefault(behavior, []).append(row)
    return results


def _identity(judge: Judge) -> dict[str, Any]:
    """The judge's name and options as JSON; models and endpoints appear by name."""
    found: dict[str, Any] = {"name": judge.name}
    for name, value in vars(judge).items():
        if isinstance(value, Victim):
            value = value.identity
        elif hasattr(value, "label"):  # an endpoint, whose address may hold a password
            value = value.label
        elif is_dataclass(value) and not isinstance(value, type):
            value = asdict(value)
        elif not isinstance(value, (str, int, float, dict, list, tuple, type(None))):
            value = str(getattr(value, "name_or_path", type(value).__name__))
        found[name] = value
    return found
