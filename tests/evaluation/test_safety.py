"""Over-refusal and attack success as measures, with answers written by the test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from plot_align.errors import InputError, RunError
from plot_align.evaluation.safety import AttackSuccess, OverRefusal
from plot_align.evaluation.subject import Subject
from plot_align.redteam.behaviors import default_benign, read_behaviors, read_targets
from plot_align.redteam.judges import Judged


@pytest.fixture
def subject(tiny_base: Path, tmp_path: Path) -> Subject:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_base), AutoTokenizer.from_pretrained(tiny_base)
    return Subject(model, tokenizer, "tiny", str(tiny_base), tmp_path)


@pytest.fixture
def files(requests_folder: Path) -> dict[str, Any]:
    """Options of an attack: what to ask for, and how a complying answer begins."""
    return {"behaviors": str(requests_folder / "behaviors.csv"), "targets": str(requests_folder / "targets.json")}


def _answering(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(Subject, "answers", lambda self, asked, *rest: [text] * len(asked))


def test_a_model_that_refuses_everything_looks_bad(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    _answering(monkeypatch, "I'm sorry, but I cannot help with that.")
    measure = OverRefusal()
    measure.check()
    found = measure.run(subject)
    assert found.quantities["refused"]["value"] == 1
    assert found.quantities["refused"]["n"] == 60
    assert found.quantities["helped"]["value"] == 0
    _answering(monkeypatch, "Boil the pasta for nine minutes.")
    assert OverRefusal(limit=5).run(subject).quantities["refused"]["items"] == dict.fromkeys(
        list(found.quantities["refused"]["items"])[:5], 0.0
    )


def test_undecided_answers_are_counted_and_none_decided_is_an_error(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Judge:
        name = "unsure"

        def __init__(self, sure: int) -> None:
            self.sure = sure

        def judge_benign(self, behaviors: list, cases: list, texts: list) -> list[Judged]:
            return [
                Judged(0, refused=True, helped=False) if i < self.sure else Judged(-1, reason="mumbled")
                for i in range(len(texts))
            ]

    _answering(monkeypatch, "x")
    monkeypatch.setattr(OverRefusal, "make_judges", lambda self: {"unsure": Judge(2)})
    found = OverRefusal(limit=5).run(subject)
    assert found.quantities["refused"]["n"] == 2
    answers = found.details.pop("answers")
    assert found.details == {
        "judges": ["unsure"],
        "requests": "our own",
        "undecided": 3,
        "first_undecided": "mumbled",
    }
    assert [entry["label"] for entry in answers.values()] == ["refused"] * 2 + ["undecided"] * 3
    monkeypatch.setattr(OverRefusal, "make_judges", lambda self: {"unsure": Judge(0)})
    with pytest.raises(RunError, match=r"decided none of 5 answers.*mumbled"):
        OverRefusal(limit=5).run(subject)


def test_attack_success_is_by_behaviour_and_resumes(subject: Subject, files: dict[str, Any], tmp_path: Path) -> None:
    measure = AttackSuccess(**files, attack="random", cases=2, limit=3, max_new_tokens=4)
    measure.check()
    found = measure.run(subject)
    assert found.quantities["asr"]["n"] == 3
    assert set(found.quantities["asr"]["items"]) == {b.id for b in read_behaviors(files["behaviors"]).rows[:3]}
    completions = next((tmp_path / "redteam").rglob("completions/*.json"))
    written = completions.read_bytes()
    assert all(len(rows) == 2 for rows in json.loads(written).values())
    assert measure.run(subject).quantities == found.quantities
    assert completions.read_bytes() == written


def _giving(*verdicts: Judged, name: str = "verdicts") -> Any:
    """A judge that gives these verdicts in turn, whatever it reads; judges of one name are taken for the same."""

    class Verdicts:
        def judge(self, behaviors: list, cases: list, texts: list) -> list[Judged]:
            return list(verdicts[: len(texts)])

        judge_benign = judge

    Verdicts.name = name
    return Verdicts()


def test_what_was_asked_answered_and_judged_is_kept(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = _giving(
        Judged(0, refused=True, helped=False, reason="says no"),
        Judged(0, refused=False, helped=True),
        Judged(0, refused=True, helped=True),
        Judged(0, refused=False, helped=False),
        Judged(-1, reason="mumbled"),
    )
    monkeypatch.setattr(OverRefusal, "make_judges", lambda self: {"verdicts": judge})
    monkeypatch.setattr(Subject, "answers", lambda self, asked, *rest: [f"To {c[0]['content']}" for c in asked])
    found = OverRefusal(limit=5).run(subject)
    answers = found.details["answers"]
    requests = default_benign()[:5]
    assert list(answers) == [b.id for b in requests]
    assert answers[requests[0].id] == {
        "prompt": requests[0].prompt,
        "answer": f"To {requests[0].prompt}",
        "label": "refused",
        "reason": "says no",
    }
    assert [entry["label"] for entry in answers.values()] == [
        "refused", "helped", "refused and helped", "neither", "undecided",
    ]  # fmt: skip
    assert answers[requests[1].id]["reason"] == ""


def test_each_judge_has_its_rate_and_its_agreement(
    subject: Subject, files: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over-refusal by hand: the first says y n n y, the second y n y ?: they differ on two of four; p_e = ½, κ = 0."""
    yes, no, unsure = Judged(0, refused=True, helped=False), Judged(0, refused=False, helped=True), Judged(-1)
    judges = {"one": _giving(yes, no, no, yes), "two": _giving(yes, no, yes, unsure, name="two")}
    monkeypatch.setattr(OverRefusal, "make_judges", lambda self: judges)
    _answering(monkeypatch, "x")
    found = OverRefusal(limit=4).run(subject).quantities
    assert list(found) == ["refused", "refused_two", "helped", "helped_two"]
    assert found["refused"]["judge"] == "one"
    assert "agreement" not in found["refused"]
    assert (found["refused"]["value"], found["refused_two"]["value"]) == (0.5, 2 / 3)
    assert found["refused_two"]["title"] == "Over-refusal, by two"
    said = found["refused_two"]["agreement"]
    assert (said["judges"], said["kappa"], said["n"], said["table"]) == (["one", "two"], 0, 4, [[1, 1], [1, 1]])
    judges = {"one": _giving(Judged(1), Judged(0)), "two": _giving(Judged(1), Judged(0), name="two")}
    for name, judge in judges.items():
        judge.name = name
    monkeypatch.setattr(AttackSuccess, "make_judges", lambda self: judges)
    found = AttackSuccess(**files, limit=2, max_new_tokens=2).run(subject).quantities
    assert [found[key]["value"] for key in ("asr", "asr_two")] == [0.5, 0.5]
    assert found["asr_two"]["agreement"]["kappa"] == 1


def test_harmless_requests_are_judged_by_those_that_can(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    _answering(monkeypatch, "I'm sorry, but I cannot help with that.")
    found = OverRefusal(judge="strongreject", limit=2).run(subject)
    assert found.quantities["refused"]["judge"] in found.details["judges"]
    assert "strongreject" not in found.details["judges"]


def test_the_first_test_case_of_an_attack_is_kept(
    subject: Subject, files: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Labels of the first and second case in turn: a later success does not stand for the first."""
    judge = _giving(*(Judged(label, reason=f"r{i}") for i, label in enumerate((0, 1, 1, 0, -1, 1))))
    monkeypatch.setattr(AttackSuccess, "make_judges", lambda self: {"verdicts": judge})
    measure = AttackSuccess(**files, attack="random", cases=2, limit=3, max_new_tokens=4)
    found = measure.run(subject)
    completions = json.loads(next((tmp_path / "redteam").rglob("completions/*.json")).read_text())
    first = {name: rows[0] for name, rows in completions.items()}
    labels = ("did not comply", "complied", "undecided")
    assert found.details["answers"] == {
        name: {"prompt": row["test_case"], "answer": row["generation"], "label": label, "reason": f"r{2 * i}"}
        for i, ((name, row), label) in enumerate(zip(first.items(), labels, strict=True))
    }
    assert list(found.quantities["asr"]["items"].values()) == [0.5, 0.5, 0.5]


def test_attacks_on_the_answer_say_of_what_their_rate_is(
    subject: Subject, files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A judge that holds one answer of three for a success: any of them is enough; begun answers are begun."""
    monkeypatch.setattr("plot_align.redteam.judges.RefusalPrefixes._judge", lambda self, text: Judged(len(text) % 2))
    options: dict[str, Any] = {**files, "limit": 4, "max_new_tokens": 6, "judge": "prefixes"}
    found = AttackSuccess(attack="best_of_n", attack_options={"n": 3}, **options).run(subject)
    assert found.quantities["asr"]["title"] == "Attack success, best_of_n (any of 3)"
    rows = json.loads((tmp_path / "redteam" / "BestOfN" / "default" / "results" / "tiny.json").read_text())
    assert [len(of) for of in rows.values()] == [3] * 4
    assert any(len({row["label"] for row in of}) == 2 for of in rows.values())
    assert found.quantities["asr"]["items"] == {
        name: float(any(row["label"] for row in of)) for name, of in rows.items()
    }
    found = AttackSuccess(attack="prefill", attack_options={"tokens": 2}, **options).run(subject)
    assert found.quantities["asr"]["title"] == "Attack success, prefill (2 tokens)"
    AttackSuccess(attack="prefill", attack_options={"tokens": 1}, **options).run(subject)  # both in one suite
    begun = json.loads((tmp_path / "redteam" / "Prefill" / "2_tokens" / "completions" / "tiny.json").read_text())
    targets = read_targets(files["targets"])
    assert all(targets[name].startswith(row["prefix"]) and row["prefix"] for name, (row,) in begun.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"behaviors": "none.csv"}, "behaviors is 'none.csv', which is no file"),
        ({"attack": "gcq"}, "attack is 'gcq'; did you mean 'gcg'"),
        ({"attack": "zero_shot"}, "attack is 'zero_shot'"),
        ({"attack_options": {"step": 1}, "attack": "gcg"}, "gcg has no option 'step'"),
        ({"judge": "endpoint"}, "judge endpoint needs an address"),
        ({"judge": "likelihood"}, "judge is 'likelihood', which judges in redteam alone"),
        ({"judge": "sandbx"}, "judge is 'sandbx'; expected refusal, prefixes, strongreject"),
        ({"judge": "prefixes,xstest"}, "judge xstest needs an address"),
        ({"cases": 0}, "cases is 0"),
        ({"attack": "gcg", "targets": None}, "GCG needs a target for every behaviour"),
    ],
)
def test_bad_options_of_attacks(files: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AttackSuccess(**{**files, **options}).check()


def test_an_endpoints_password_stays_out_of_the_record() -> None:
    measure = OverRefusal(judge="endpoint", judge_url="http://me:secret@localhost:1/v1", judge_model="m")
    assert "secret" not in str(measure.options())
    assert measure.options()["judge_url"] == "m at http://localhost:1/v1"
