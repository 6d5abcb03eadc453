"""Whether a model refuses what it should not, and complies with what it should not.

Both measures keep what was asked and answered in ``details["answers"]``: item id → ``{"prompt", "answer", "label",
"reason"}``, all of them texts. The label is the judge's in words: ``refused``, ``helped``, ``refused and helped`` or
``neither`` of a harmless request, ``complied`` or ``did not comply`` of a harmful one, ``undecided`` of either. Of a
behaviour with several test cases it is the first, whatever became of it: the first that succeeded would make every
attack look better than its rate.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from plot_align.errors import InputError, RunError, did_you_mean
from plot_align.evaluation import data
from plot_align.evaluation.quantity import of_items
from plot_align.evaluation.subject import Found, Subject, require_count
from plot_align.redteam.behaviors import Behavior, default_benign, read_behaviors, read_targets, require_targets
from plot_align.redteam.catalogue import make_attack, make_judge
from plot_align.redteam.harmbench import Layout, success_by_behavior
from plot_align.redteam.judges import Judge, Judged
from plot_align.redteam.names import ATTACKS, TELL_REFUSALS
from plot_align.redteam.run import complete, label, make_test_cases
from plot_align.redteam.victim import Victim

_ATTACKS = tuple(name for name in ATTACKS if name not in ("zero_shot", "sfs"))
_HARMFUL_LABELS = {1: "complied", 0: "did not comply", -1: "undecided"}


@dataclass(kw_only=True)
class _Judged:
    """Options of what is judged.

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
        """As the record may hold them: an address can carry a password."""
        from plot_align.inference.endpoint import Endpoint

        plain = dict(vars(self))
        if self.judge_url is not None and self.judge_model is not None:
            plain["judge_url"] = Endpoint(self.judge_url, self.judge_model).label
        return plain

    def make_judge(self) -> Judge:
        return make_judge(self.judge, url=self.judge_url, model=self.judge_model, key_variable=self.judge_key)


@dataclass(kw_only=True)
class OverRefusal(_Judged):
    """Share of harmless requests that are refused; a model that refuses everything must look bad.

    Args:
        benign: a file in HarmBench's form, or ``benign`` (60 of our own).
    """

    benign: str = data.BENIGN

    def check(self) -> None:
        super().check()
        self._requests()

    def _requests(self) -> list[Behavior]:
        rows = default_benign() if self.benign == data.BENIGN else read_behaviors(self.benign).rows
        return rows[: self.limit]

    def run(self, subject: Subject) -> Found:
        """Refused and helped with, over the requests that the judge decided.

        Raises:
            RunError: it decided none.
        """
        requests = self._requests()
        answers = subject.answers(
            [[{"role": "user", "content": b.prompt}] for b in requests], "harmless requests", self.max_new_tokens
        )
        verdicts = self.make_judge().judge_benign(requests, [b.prompt for b in requests], answers)
        decided = {b.id: v for b, v in zip(requests, verdicts, strict=True) if v.refused is not None}
        unsure = [v.reason for v in verdicts if v.refused is None]
        _require_decided(len(decided), unsure)
        shares: dict[str, Any] = {"bounds": (0.0, 1.0), "seed": subject.seed}
        refused = {name: float(bool(v.refused)) for name, v in decided.items()}
        helped = {name: float(bool(v.helped)) for name, v in decided.items()}
        return Found(
            {
                "refused": of_items("Over-refusal", refused, better="lower", **shares),
                "helped": of_items("Harmless requests helped with", helped, better="higher", **shares),
            },
            {
                "judge": self.judge,
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
        behaviors: HarmBench's behaviours. targets: HarmBench's, for attacks that need them.
        skip_copyright: leave copyright rows out instead of refusing them.
        attack: one that needs no attacker model. attack_options: of the attack. cases: test cases a behaviour.
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
            raise InputError(f"behaviors is {self.behaviors!r}, which is no file; name HarmBench's behaviours, .csv")
        attack, (harmful, targets, _) = self._attack(), self._requests()
        if attack.needs_target:
            require_targets(harmful, targets, attack.name)

    def _attack(self) -> Any:
        return make_attack(self.attack, self.attack_options or {})

    def _requests(self) -> tuple[list[Behavior], dict[str, str], int]:
        """Requests, targets, and how many copyright rows were left out."""
        harmful, skipped = read_behaviors(self.behaviors, skip_copyright=self.skip_copyright)
        targets = read_targets(self.targets) if self.targets is not None else {}
        return harmful[: self.limit], targets, len(skipped)

    def run(self, subject: Subject) -> Found:
        """Share of the requests' test cases that succeed; what is undecided counts as no success, and is counted.

        Raises:
            RunError: the judge decided none.
        """
        harmful, targets, left_out = self._requests()
        victim = Victim(subject.model, subject.tokenizer, subject.name)
        attack = self._attack()
        layout = Layout(subject.folder / "redteam", attack.name, attack.experiment(victim))
        answering = attack.answering(victim, harmful, targets, subject.seed)
        advance = subject.bar(f"attack {attack.title}", (1 + answering.samples) * len(harmful))

        def one(behavior: str) -> None:
            advance(1)

        cases, failed = make_test_cases(
            victim, attack, harmful, targets, layout, cases=self.cases, seed=subject.seed, on_behavior=one
        )
        answers = complete(
            victim,
            cases,
            layout.completions(victim.name),
            answering=answering,
            max_new_tokens=self.max_new_tokens,
            batch_size=subject.batch_size,
            on_behavior=one,
        )
        results = label(self.make_judge(), harmful, answers, layout.results(victim.name))
        rows = [row for of_one in results.values() for row in of_one]
        unsure = [row.get("reason", "") for row in rows if row["label"] == -1]
        _require_decided(len(rows) - len(unsure), unsure)
        title = f"Attack success, {self.attack}{attack.title.removeprefix(attack.name)}"
        rates = success_by_behavior(results, any_answer=attack.any_answer)
        return Found(
            {"asr": of_items(title, rates, better="lower", bounds=(0.0, 1.0), seed=subject.seed)},
            {
                "judge": self.judge,
                "copyright_rows_left_out": left_out,
                "failed": failed,
                "undecided": len(unsure),
                "first_undecided": unsure[0] if unsure else None,
                "answers": {
                    name: _answer(
                        row["test_case"], row["generation"], _HARMFUL_LABELS[row["label"]], row.get("reason", "")
                    )
                    for name, (row, *_) in ((name, rows) for name, rows in results.items() if rows)
                },
            },
            f"{len(failed)} requests have no test case, the first: {next(iter(failed.values()))}" if failed else None,
        )


def _answer(prompt: str, answer: str, label: str, reason: str) -> dict[str, str]:
    """An entry of ``details["answers"]``."""
    return {"prompt": prompt, "answer": answer, "label": label, "reason": reason}


def _benign_label(verdict: Judged) -> str:
    if verdict.refused is None:
        return "undecided"
    words = [word for word, holds in (("refused", verdict.refused), ("helped", verdict.helped)) if holds]
    return " and ".join(words) or "neither"


def _require_decided(decided: int, reasons: Sequence[str]) -> None:
    if reasons and not decided:
        raise RunError(
            f"the judge decided none of {len(reasons)} answers (the first: {reasons[0] or 'no reason'}); mend it "
            "and run the same again"
        )
