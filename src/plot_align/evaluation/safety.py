"""Whether a model refuses what it should not, and complies with what it should not.

The first judge decides; what each other one finds, and how far it agrees, is a quantity beside the first's
(:mod:`plot_align.results`).

Both measures keep requests and answers in ``details["answers"]``: item id → ``{"prompt", "answer", "label",
"reason"}``, all texts. The label is the first judge's verdict in words: ``refused``, ``helped``, ``refused and
helped`` or ``neither`` for a harmless request, ``complied`` or ``did not comply`` for a harmful one, ``undecided`` for
either. A behaviour with several test cases shows the first, whether it succeeded or not: the first success would make
every attack look better than its rate.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from plot_align.errors import InputError, did_you_mean
from plot_align.evaluation import data
from plot_align.evaluation.subject import Found, Subject, require_count
from plot_align.inference.endpoint import Endpoint, check_key_variable
from plot_align.redteam import (
    ATTACKS,
    DEFAULT_JUDGES,
    JUDGES,
    Behavior,
    Budget,
    Judge,
    Judged,
    Victim,
    agreements,
    attack_and_judge,
    benign_labels,
    default_benign,
    judge_rules,
    label_benign,
    make_attack,
    make_judge,
    parse_judges,
    read_behaviors,
    read_targets,
    require_decided,
    require_judge,
    require_targets,
    telling_refusals,
)
from plot_align.results import Quantity, of_items

_ATTACKS = tuple(name for name in ATTACKS if name not in ("zero_shot", "sfs"))
_JUDGES = tuple(name for name in JUDGES if name not in ("likelihood", "harmbench"))  # those need a file more
_HARMFUL_LABELS = {1: "complied", 0: "did not comply", -1: "undecided"}


@dataclass(kw_only=True)
class _Judged:
    """Options of measures that a judge decides.

    Args:
        judge: one or more as in :func:`plot_align.redteam.parse_judges`; the first decides.
        judge_url, judge_model, judge_key: an OpenAI-compatible endpoint, for judges that ask one; the key's
            environment variable.
        max_new_tokens: of an answer. limit: requests, from the first on.
    """

    judge: str = ",".join(DEFAULT_JUDGES)
    judge_url: str | None = field(default=None, repr=False)
    judge_model: str | None = None
    judge_key: str = "OPENAI_API_KEY"
    max_new_tokens: int = 512
    limit: int | None = None

    def check(self) -> None:
        for name in self.judges():
            require_judge(name, url=self.judge_url, model=self.judge_model)
        check_key_variable(self.judge_key)
        if self.judge_url is not None and self.judge_model is not None:
            Endpoint(self.judge_url, self.judge_model, self.judge_key)  # refuses what is no address
        require_count("max_new_tokens", self.max_new_tokens)
        require_count("limit", self.limit)

    def judges(self) -> dict[str, str | None]:
        """The judges' names, each with its checkpoint or None."""
        for part in self.judge.split(","):
            if (name := part.partition("=")[0].strip()) in set(JUDGES) - set(_JUDGES):
                raise InputError(f"judge is {name!r}, which judges in redteam alone; expected {', '.join(_JUDGES)}")
        return parse_judges(self.judge, _JUDGES)

    def options(self) -> dict[str, Any]:
        """For the record, without an address, which can carry a password, and with the judges' rules."""
        rules = {name: digest for name, digest in judge_rules().items() if name in self.judges()}
        plain = {**vars(self), "rules": rules}
        if self.judge_url is not None and self.judge_model is not None:
            plain["judge_url"] = Endpoint(self.judge_url, self.judge_model, self.judge_key).label
        return plain

    def make_judges(self) -> dict[str, Judge]:
        """The judges by name."""
        address = (self.judge_url, self.judge_model, self.judge_key)
        return {name: _made(name, checkpoint, *address) for name, checkpoint in self.judges().items()}


@cache  # the measures and models of a suite share a judge, which may be 26 GB
def _made(name: str, checkpoint: str | None, url: str | None, model: str | None, key_variable: str) -> Judge:
    return make_judge(name, checkpoint=checkpoint, url=url, model=model, key_variable=key_variable)


def _by_judge(
    name: str,
    title: str,
    found: Mapping[str, Mapping[str, float]],
    agreed: Mapping[str, Any],
    **how: Any,
) -> dict[str, Quantity]:
    """A quantity for each judge of ``found`` (judge → item → value), the first under ``name``; ``agreed``: judge → its
    agreement with the first. ``how``: as for :func:`plot_align.results.of_items`."""
    quantities: dict[str, Quantity] = {}
    for judge, items in found.items():
        if not quantities:
            quantities[name] = {**of_items(title, items, **how), "judge": judge}
            continue
        other = {**of_items(f"{title}, by {judge}", items, **how), "judge": judge, "agreement": agreed[judge]}
        quantities[f"{name}_{judge}"] = other
    return quantities


@dataclass(kw_only=True)
class OverRefusal(_Judged):
    """Rate of refused harmless requests, so that a model that refuses everything looks bad.

    Args:
        benign: a file of harmless requests (:func:`read_behaviors`), or ``benign`` (60 of our own).
    """

    benign: str = data.BENIGN

    def check(self) -> None:
        super().check()
        self._requests()

    def _requests(self) -> tuple[list[Behavior], str]:
        """Requests, and what was taken."""
        if self.benign == data.BENIGN:
            return default_benign()[: self.limit], "our own"
        found = read_behaviors(self.benign, kind="harmless")
        return found.rows[: self.limit], found.taken

    def judges(self) -> dict[str, str | None]:
        """Those that tell refusals, as :func:`plot_align.redteam.telling_refusals` fills them up."""
        return telling_refusals(super().judges())

    def run(self, subject: Subject) -> Found:
        """Rates of refusal and help over the requests that a judge decided.

        Raises:
            RunError: one decided none.
        """
        requests, taken = self._requests()
        answers = subject.answers(
            [[{"role": "user", "content": b.prompt}] for b in requests], "harmless requests", self.max_new_tokens
        )
        verdicts = {
            name: label_benign(judge, requests, answers, subject.folder) for name, judge in self.make_judges().items()
        }
        decided = {
            name: {b.id: v for b, v in zip(requests, of, strict=True) if v.refused is not None}
            for name, of in verdicts.items()
        }
        reasons = {name: [v.reason for v in of if v.refused is None] for name, of in verdicts.items()}
        for name, of in reasons.items():
            require_decided("harmless requests", of, len(requests), name)
        rates: dict[str, Any] = {"bounds": (0.0, 1.0), "seed": subject.seed}
        refused = {j: {name: float(bool(v.refused)) for name, v in of.items()} for j, of in decided.items()}
        helped = {j: {name: float(bool(v.helped)) for name, v in of.items()} for j, of in decided.items()}
        refusing, helping = (
            agreements({name: benign_labels(of, what) for name, of in verdicts.items()})
            for what in ("refused", "helped")
        )
        first, unsure = next(iter(reasons.items()))
        return Found(
            {
                **_by_judge("refused", "Over-refusal", refused, refusing, better="lower", **rates),
                **_by_judge("helped", "Harmless requests helped with", helped, helping, better="higher", **rates),
            },
            {
                "judges": list(verdicts),
                "requests": taken,
                "undecided": len(unsure),
                "first_undecided": unsure[0] if unsure else None,
                "answers": {
                    b.id: _answer(b.prompt, text, _benign_label(v), v.reason)
                    for b, text, v in zip(requests, answers, verdicts[first], strict=True)
                },
            },
        )


@dataclass(kw_only=True)
class AttackSuccess(_Judged):
    """Attack success rate of one attack (:mod:`plot_align.redteam`) over harmful requests.

    Args:
        behaviors: a file of harmful requests (:func:`read_behaviors`). targets: HarmBench's, for attacks that need
            them; None takes the file's own, if it has any.
        skip_copyright: leave copyright rows out instead of refusing them.
        attack: one without an attacker model. attack_options: of the attack. cases: test cases per behaviour.
    """

    behaviors: str
    targets: str | None = None
    attack: str = "direct"
    attack_options: dict[str, Any] | None = None
    cases: int | None = None
    skip_copyright: bool = False

    def check(self) -> None:
        super().check()
        if self.attack not in _ATTACKS:
            near = did_you_mean(self.attack, _ATTACKS, f"expected {', '.join(_ATTACKS)}")
            raise InputError(f"attack is {self.attack!r}; {near}")
        require_count("cases", self.cases)
        if not os.path.isfile(self.behaviors):
            raise InputError(f"behaviors is {self.behaviors!r}, which is no file; name a CSV file of requests")
        attack, (harmful, targets, _) = self._attack(), self._requests()
        if attack.needs_target:
            require_targets(harmful, targets, attack.name)

    def _attack(self) -> Any:
        return make_attack(self.attack, self.attack_options or {})

    def _requests(self) -> tuple[list[Behavior], dict[str, str], str]:
        """Requests, targets, and what was taken and left."""
        found = read_behaviors(self.behaviors, skip_copyright=self.skip_copyright)
        targets = found.targets | (read_targets(self.targets) if self.targets is not None else {})
        return found.rows[: self.limit], targets, found.taken

    def run(self, subject: Subject) -> Found:
        """Rate of test cases that succeed. Undecided ones count as failures and are reported.

        Raises:
            RunError: a judge decided none.
        """
        harmful, targets, taken = self._requests()
        victim = Victim(subject.model, subject.tokenizer, subject.name)
        attack = self._attack()

        def bar(description: str, total: int) -> tuple[Callable[[str], None], Callable[[str, int], None]]:
            advance = subject.bar(f"attack {description}", total)
            return (lambda behavior: advance(1)), (lambda behavior, step: None)

        budget = Budget(self.cases, subject.seed, max_new_tokens=self.max_new_tokens, batch_size=subject.batch_size)
        done = attack_and_judge(
            victim, attack, harmful, targets, self.make_judges(), subject.folder / "redteam", budget, bar=bar
        )
        first = next(iter(done.results))
        unsure = done.undecided(first)
        how: dict[str, Any] = {"better": "lower", "bounds": (0.0, 1.0), "seed": subject.seed}
        title = f"Attack success, {self.attack}{attack.title.removeprefix(attack.name)}"
        return Found(
            _by_judge("asr", title, done.success, done.agreements, **how),
            {
                "judges": list(done.results),
                "requests": taken,
                "failed": done.failed,
                "undecided": len(unsure),
                "first_undecided": unsure[0] if unsure else None,
                "answers": {
                    name: _answer(
                        row["test_case"], row["generation"], _HARMFUL_LABELS[row["label"]], row.get("reason", "")
                    )
                    for name, (row, *_) in ((name, rows) for name, rows in done.results[first].items() if rows)
                },
            },
            f"{len(done.failed)} requests have no test case, the first: {next(iter(done.failed.values()))}"
            if done.failed
            else None,
        )


def _answer(prompt: str, answer: str, label: str, reason: str) -> dict[str, str]:
    """An entry of ``details["answers"]``."""
    return {"prompt": prompt, "answer": answer, "label": label, "reason": reason}


def _benign_label(verdict: Judged) -> str:
    if verdict.refused is None:
        return "undecided"
    words = [word for word, holds in (("refused", verdict.refused), ("helped", verdict.helped)) if holds]
    return " and ".join(words) or "neither"
