"""Whether a model refuses what it should not, and complies with what it should not.

Both measures keep requests and answers in ``details["answers"]``: item id → ``{"prompt", "answer", "label",
"reason"}``, all texts. The label is the judge's verdict in words: ``refused``, ``helped``, ``refused and helped`` or
``neither`` for a harmless request, ``complied`` or ``did not comply`` for a harmful one, ``undecided`` for either. A
behaviour with several test cases shows the first, whether it succeeded or not: the first success would make every
attack look better than its rate.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from plot_align.errors import InputError, did_you_mean
from plot_align.evaluation import data
from plot_align.evaluation.subject import Found, Subject, require_count
from plot_align.redteam import (
    ATTACKS,
    TELL_REFUSALS,
    Behavior,
    Budget,
    Judge,
    Judged,
    Victim,
    attack_and_judge,
    default_benign,
    make_attack,
    make_judge,
    read_behaviors,
    read_targets,
    require_decided,
    require_targets,
)
from plot_align.results import of_items

_ATTACKS = tuple(name for name in ATTACKS if name not in ("zero_shot", "sfs"))
_HARMFUL_LABELS = {1: "complied", 0: "did not comply", -1: "undecided"}


@dataclass(kw_only=True)
class _Judged:
    """Options of measures that a judge decides.

    Args:
        judge: ``prefixes`` (how the answer begins) or ``endpoint`` (the model of ``judge_url``).
        judge_url, judge_model, judge_key: an OpenAI-compatible endpoint; the key's environment variable.
        max_new_tokens: of an answer. limit: requests, from the first on.
    """

    judge: str = "prefixes"
    judge_url: str | None = field(default=None, repr=False)
    judge_model: str | None = None
    judge_key: str = "OPENAI_API_KEY"
    max_new_tokens: int = 512
    limit: int | None = None

    def check(self) -> None:
        if self.judge not in TELL_REFUSALS:
            near = did_you_mean(self.judge, TELL_REFUSALS, f"expected {', '.join(TELL_REFUSALS)}")
            raise InputError(f"judge is {self.judge!r}; {near}")
        require_count("max_new_tokens", self.max_new_tokens)
        require_count("limit", self.limit)
        self.make_judge()

    def options(self) -> dict[str, Any]:
        """For the record, without an address, which can carry a password."""
        from plot_align.inference.endpoint import Endpoint

        plain = dict(vars(self))
        if self.judge_url is not None and self.judge_model is not None:
            plain["judge_url"] = Endpoint(self.judge_url, self.judge_model).label
        return plain

    def make_judge(self) -> Judge:
        return make_judge(self.judge, url=self.judge_url, model=self.judge_model, key_variable=self.judge_key)


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

    def run(self, subject: Subject) -> Found:
        """Rates of refusal and help over the requests that the judge decided.

        Raises:
            RunError: it decided none.
        """
        requests, taken = self._requests()
        answers = subject.answers(
            [[{"role": "user", "content": b.prompt}] for b in requests], "harmless requests", self.max_new_tokens
        )
        verdicts = self.make_judge().judge_benign(requests, [b.prompt for b in requests], answers)
        decided = {b.id: v for b, v in zip(requests, verdicts, strict=True) if v.refused is not None}
        unsure = [v.reason for v in verdicts if v.refused is None]
        require_decided("harmless requests", unsure, len(verdicts))
        rates: dict[str, Any] = {"bounds": (0.0, 1.0), "seed": subject.seed}
        refused = {name: float(bool(v.refused)) for name, v in decided.items()}
        helped = {name: float(bool(v.helped)) for name, v in decided.items()}
        return Found(
            {
                "refused": of_items("Over-refusal", refused, better="lower", **rates),
                "helped": of_items("Harmless requests helped with", helped, better="higher", **rates),
            },
            {
                "judge": self.judge,
                "requests": taken,
                "undecided": len(unsure),
                "first_undecided": unsure[0] if unsure else None,
                "answers": {
                    b.id: _answer(b.prompt, text, _benign_label(v), v.reason)
                    for b, text, v in zip(requests, answers, verdicts, strict=True)
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
            RunError: the judge decided none.
        """
        harmful, targets, taken = self._requests()
        victim = Victim(subject.model, subject.tokenizer, subject.name)
        attack = self._attack()

        def bar(description: str, total: int) -> tuple[Callable[[str], None], Callable[[str, int], None]]:
            advance = subject.bar(f"attack {description}", total)
            return (lambda behavior: advance(1)), (lambda behavior, step: None)

        budget = Budget(self.cases, subject.seed, max_new_tokens=self.max_new_tokens, batch_size=subject.batch_size)
        done = attack_and_judge(
            victim, attack, harmful, targets, self.make_judge(), subject.folder / "redteam", budget, bar=bar
        )
        unsure = done.undecided
        title = f"Attack success, {self.attack}{attack.title.removeprefix(attack.name)}"
        return Found(
            {"asr": of_items(title, done.success, better="lower", bounds=(0.0, 1.0), seed=subject.seed)},
            {
                "judge": self.judge,
                "requests": taken,
                "failed": done.failed,
                "undecided": len(unsure),
                "first_undecided": unsure[0] if unsure else None,
                "answers": {
                    name: _answer(
                        row["test_case"], row["generation"], _HARMFUL_LABELS[row["label"]], row.get("reason", "")
                    )
                    for name, (row, *_) in ((name, rows) for name, rows in done.results.items() if rows)
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
