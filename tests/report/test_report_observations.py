"""Reading records: what is found, what is refused and why, which of two is shown."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plot_align.errors import InputError
from plot_align.report.observations import collect
from plot_align.report.page import build, render
from plot_align.results import of_items


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    content.pop("digest", None)  # as another program might write it
    change(content)
    path.write_text(json.dumps(content))


def test_a_folder_is_searched_and_other_json_passed_over(tmp_path: Path, evaluation: Any) -> None:
    path = evaluation("m", path="deep/er/a.json")
    (path.parent / "answers.json").write_text('{"format": 1}')
    (path.parent / "list.json").write_text('["plot-align record"]')
    (path.parent / "half.json").write_text('{"a": [1,')
    (path.parent / ".part.0a1b.a.json").touch()  # of a command that was killed while it wrote
    (path.parent / "binary.json").write_bytes(b"\xff\xfe")
    found = collect([tmp_path / "records"])
    assert [record.name for record in found.records] == [str(path)]
    assert found.models == ["m"]


def test_a_file_that_is_named_must_be_a_record(tmp_path: Path) -> None:
    other = tmp_path / "answers.json"
    other.write_text("{}")
    with pytest.raises(InputError, match=r"answers\.json is not a plot-align record"):
        collect([other])
    with pytest.raises(InputError, match="is not there, expected a record or a folder"):
        collect([tmp_path / "none"])
    with pytest.raises(InputError, match="holds no record that a report shows"):
        collect([tmp_path])


def _quantity(content: dict[str, Any]) -> dict[str, Any]:
    return content["results"]["quantities"]["score"]


def _answers(content: dict[str, Any], answers: Any) -> None:
    content["results"]["details"]["answers"] = answers


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "the value is another": (lambda c: _quantity(c).update(value=0.9), "its items average to 0.5"),
    "an item was changed": (lambda c: _quantity(c)["items"].update(a=0.0), "its items average to"),
    "an item is no number": (lambda c: _quantity(c)["items"].update(a="x"), "items is no number"),
    "an item is outside": (lambda c: _quantity(c)["items"].update(a=7), "outside its bounds"),
    "an item is missing": (lambda c: _quantity(c)["items"].pop("a"), "n is 4, and it has 3 items"),
    "the value is NaN": (lambda c: _quantity(c).update(value={"$float": "NaN"}, items=None), "value is not a number"),
    "the value is a truth": (lambda c: _quantity(c).update(value=True), "value is no number"),
    "the value is huge": (lambda c: _quantity(c).update(value=10**400), "too large"),
    "an interval turned": (lambda c: _quantity(c).update(interval=[0.9, 0.1]), "interval runs from 0.9 to 0.1"),
    "a direction unknown": (lambda c: _quantity(c).update(better="bigger"), "better is none of"),
    "a title gone": (lambda c: _quantity(c).pop("title"), "'title' is missing"),
    "weights of other items": (lambda c: _quantity(c).update(weights={"z": 1}), "weights are not those"),
    "a weight negative": (
        lambda c: _quantity(c).update(weights={"a": -1, "b": 1, "c": 1, "d": 1}),
        "negative or not finite",
    ),
    "no quantities": (lambda c: c["results"].update(quantities={}), "quantities is empty"),
    "a section unknown": (lambda c: c["config"].update(section="charm"), "section is 'charm'"),
    "no model": (lambda c: c["config"].update(model="m"), "config.model is no mapping"),
    "a time that is none": (lambda c: c.update(created="yesterday"), "isoformat"),
    "a list for a config": (lambda c: c.update(config=[]), "config is no mapping"),
    "a token that is none": (
        lambda c: c["results"].update(details={"moved": [{"token": 3, "change": 1}]}),
        "moved.token is no text",
    ),
    "answers that are none": (lambda c: _answers(c, ["yes"]), "details.answers is no mapping"),
    "an answer that is a text": (lambda c: _answers(c, {"a": "yes"}), "details.answers.a is no mapping"),
    "an answer cut off": (lambda c: _answers(c, {"a": {"label": "helped", "prompt": "?"}}), "'answer' is missing"),
    "a prompt that is a number": (
        lambda c: _answers(c, {"a": {"label": "helped", "prompt": 1, "answer": "", "reason": ""}}),
        "details.answers.a.prompt is no text",
    ),
    "a label that says nothing": (lambda c: _answers(c, {"a": {"label": ""}}), "details.answers.a.label is no text"),
    "an interval beside its value": (
        lambda c: _quantity(c).update(interval=[0.6, 0.9]),
        "does not hold its value 0.5",
    ),
    "a list for the hardware": (lambda c: c.update(hardware=[]), "hardware is no mapping"),
    "a graphics card that is a text": (lambda c: c["hardware"].update(gpus=["H100"]), "hardware.gpus is no mapping"),
    "a text for the graphics cards": (lambda c: c["hardware"].update(gpus="two"), "hardware.gpus is no list"),
    "a version that is a number": (lambda c: c["versions"].update(torch=2.5), "versions.torch is no text"),
    "a list for the commit": (lambda c: c.update(commit=["abc"]), "commit is no mapping"),
    "a seed that is a text": (lambda c: c.update(seed="one"), "seed is no whole number"),
    "a huge count": (lambda c: _quantity(c).update(n=10**400, items=None), "n is no count"),
    "unfinished by a number": (lambda c: c["results"].update(unfinished=3), "unfinished is no text"),
    "undecided by a text": (lambda c: c["results"].update(details={"undecided": "3"}), "undecided is no whole number"),
    "ratings lost by half": (
        lambda c: c["results"].update(details={"unparsable": {"n": 0.5}}),
        "unparsable.n is no whole number",
    ),
    "a schema of tomorrow": (lambda c: c.update(schema=2), "upgrade plot-align"),
    "a record without seed": (lambda c: c.pop("seed"), "lacks seed"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_is_refused_by_name_or_left_out(evaluation: Any, damage: str) -> None:
    good = evaluation("good")
    bad = evaluation("bad", items={"a": 1.0, "b": 0.0, "c": 1.0, "d": 0.0})
    change, reason = DAMAGE[damage]
    edit(bad, change)
    with pytest.raises(InputError) as caught:
        collect([good, bad])
    assert str(bad) in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    found = collect([good, bad], skip_bad=True)
    assert found.models == ["good"]
    assert found.left_out == [str(caught.value)]


def test_a_truncated_record_in_a_folder_is_no_other_json(tmp_path: Path, evaluation: Any) -> None:
    evaluation("good")
    cut = evaluation("cut")
    cut.write_text(cut.read_text()[:700])
    with pytest.raises(InputError, match="damaged or was cut off"):
        collect([tmp_path / "records"])
    assert len(collect([tmp_path / "records"], skip_bad=True).left_out) == 1


@pytest.mark.parametrize("kept", [0, 1, 5, 12, 25, 40])
def test_a_record_cut_off_before_its_name_is_no_other_json(tmp_path: Path, evaluation: Any, kept: int) -> None:
    evaluation("good")
    cut = evaluation("cut")
    cut.write_text(cut.read_text()[:kept])
    with pytest.raises(InputError, match=f"{cut}.* damaged or was cut off"):
        collect([tmp_path / "records"])
    assert len(collect([tmp_path / "records"], skip_bad=True).left_out) == 1


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_is_put_into_a_record_there_is_a_page_or_a_sentence(all_kinds: Path, data: st.DataObject) -> None:
    source = data.draw(st.sampled_from(sorted(all_kinds.rglob("*.json"))))
    content = json.loads(source.read_text())
    content.pop("digest", None)  # which would refuse everything
    at, here = data.draw(st.sampled_from(list(_places(content))))
    here[at] = data.draw(st.sampled_from(OTHERS))
    with tempfile.TemporaryDirectory() as folder:
        bad = Path(folder) / "bad.json"
        bad.write_text(json.dumps(content))
        try:
            said = render(build(collect([bad]), paper=True), "files")
        except InputError as error:
            said = str(error)
    assert said.endswith("</html>") or "\n" not in said


OTHERS: list[Any] = [None, 3, -1, True, 0.5, "x", "", [], [1, "a"], {}, {"a": 1}, 10**400, {"$float": "NaN"}]


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every (key or index, its holder) below a node; of a list its first four."""
    for at, inner in list(node.items() if isinstance(node, dict) else enumerate(node[:4])):
        yield at, node
        if isinstance(inner, dict | list):
            yield from _places(inner)


def test_nothing_left_says_why(evaluation: Any) -> None:
    path = evaluation("m")
    path.write_text(path.read_text()[:-40])
    with pytest.raises(InputError, match=r"holds no record that a report shows; .* cut off"):
        collect([path], skip_bad=True)


@pytest.mark.parametrize("kind", ["redteam", "sweep", "demo", "estimate", "inspect", "dpo"])
def test_other_kinds_are_checked_too(everything: Path, kind: str) -> None:
    spoil: dict[str, tuple[str, Callable[[dict[str, Any]], None]]] = {
        "redteam": ("redteam", lambda r: r["models"]["base"]["attacks"]["GCG"].update(a=2.0)),
        "sweep": ("sweep", lambda r: r["cells"][1]["metrics"]["rewards/margins"].update(value=None)),
        "demo": ("demo", lambda r: r["cost"]["time_ratio"].pop("value")),
        "estimate": ("estimate", lambda r: r.pop("rows")),
        "inspect": ("contexts", lambda r: r["contexts"][0].update(chosen_tokens=-1)),
        "dpo": ("dpo", lambda r: r.update(history="long")),
    }
    name, change = spoil[kind]
    path = everything / f"{name}.json"
    edit(path, lambda content: change(content["results"]))
    with pytest.raises(InputError, match="is damaged or was changed by hand") as caught:
        collect([everything])
    assert str(path) in str(caught.value)


def test_every_kind_is_taken_and_an_unknown_one_listed(everything: Path) -> None:
    found = collect([everything])
    assert [record.kind for record in found.not_shown] == ["filter"]
    assert {record.kind for record in found.records} == {
        "evaluation", "redteam", "dpo", "sweep", "demo", "estimate", "inspect"
    }  # fmt: skip
    attacked = next(o for o in found.observations if o.measure == "redteam GCG" and o.model == "base")
    assert attacked.quantity["value"] == 0.75  # of 1.0 and 0.5
    assert attacked.section == "harmlessness"
    assert attacked.quantity["title"] == "Attack success, GCG (as asked)"


def test_the_newest_is_shown_and_it_is_said(evaluation: Any) -> None:
    new = evaluation("m", items={"a": 1.0, "b": 1.0}, path="new.json")
    old = evaluation("m", items={"a": 0.0, "b": 0.0}, path="old.json")
    edit(old, lambda c: c.update(created="2020-01-01T00:00:00+00:00"))
    for order in ([new, old], [old, new]):
        found = collect(order)
        assert [o.quantity["value"] for o in found.observations] == [1.0]
        (sentence,) = found.replaced
        assert f"{old} is older than {new}" in sentence


def test_one_name_is_one_checkpoint(evaluation: Any) -> None:
    old = evaluation("m", "arc", digest="one", path="old.json")
    edit(old, lambda c: c.update(created="2020-01-01T00:00:00+00:00"))
    new = evaluation("m", "gsm8k", digest="two", path="new.json")
    with pytest.raises(InputError, match="another checkpoint named 'm'"):
        collect([old, new])
    found = collect([old, new], skip_bad=True)
    assert [o.measure for o in found.observations] == ["gsm8k"]
    assert len(found.left_out) == 1


def test_a_red_teamed_model_is_the_evaluated_one(everything: Path) -> None:
    """Where the record of the attacks says which checkpoint it is."""
    path = everything / "redteam.json"
    assert collect([everything]).models[0] == "base"
    edit(path, lambda c: c["results"]["identities"]["tuned"].update(model="another"))
    edit(path, lambda c: c.update(created="2020-01-01T00:00:00+00:00"))
    with pytest.raises(InputError, match=r"redteam\.json is of another checkpoint named 'tuned' than .*\.json"):
        collect([everything])
    found = collect([everything], skip_bad=True)
    assert len(found.left_out) == 1
    assert not [o for o in found.observations if o.measure.startswith("redteam")]
    edit(path, lambda c: c["results"].pop("identities"))  # an older record says nothing
    assert [o for o in collect([everything]).observations if o.measure.startswith("redteam")]


def test_what_a_record_lacks_is_told(everything: Path) -> None:
    gaps = {(o.model, o.measure): o.gaps for o in collect([everything]).observations}
    assert gaps["tuned", "mt_bench"] == ("unfinished", "5 of 24 ratings unreadable", "4 of 24 ratings failed")
    assert gaps["base", "redteam GCG"] == ("1 verdict undecided", "1 request without a test case")
    assert gaps["base", "redteam refused"] == gaps["base", "redteam helped"] == ("2 verdicts undecided",)
    assert gaps["base", "gsm8k"] == ()


def test_records_of_one_second_come_in_the_order_given(evaluation: Any, tmp_path: Path) -> None:
    first, second = evaluation("z", path="a/z.json"), evaluation("a", path="b/a.json")
    for path in (first, second):
        edit(path, lambda c: c.update(created="2026-01-01T00:00:00+00:00"))
    assert collect([second, first]).models == ["a", "z"]
    assert collect([first, second]).models == ["z", "a"]
    assert collect([tmp_path / "records"]).models == ["z", "a"]  # by path
    edit(second, lambda c: c.update(created="2025-01-01T00:00:00+00:00"))
    assert collect([tmp_path / "records"]).models == ["a", "z"]  # the older first


def test_an_infinite_perplexity_is_no_damage(evaluation: Any) -> None:
    from plot_align.results import of_whole

    path = evaluation("m", quantities={"perplexity": of_whole("Perplexity", math.inf, 9, better="lower")})
    assert collect([path]).observations[0].quantity["value"] == math.inf


def test_weighted_means_are_checked_with_their_weights(evaluation: Any) -> None:
    weighted = of_items("NLL", {"a": 1.0, "b": 4.0}, better="lower", weights={"a": 3.0, "b": 1.0})
    assert weighted["value"] == 1.75  # (3 · 1 + 1 · 4) / 4
    path = evaluation("m", quantities={"score": weighted})
    assert collect([path]).models == ["m"]
    edit(path, lambda c: _quantity(c)["weights"].update(a=1.0))
    with pytest.raises(InputError, match=r"its items average to 2\.5"):
        collect([path])


@pytest.mark.parametrize(("key", "other"), [("titles", "GCG (any of 2)"), ("options", {"temperature": 0.5})])
def test_an_attack_made_otherwise_is_not_the_same_measurement(
    everything: Path, tmp_path: Path, key: str, other: object
) -> None:
    def alike() -> dict[str, str]:
        return {o.measure: o.alike for o in collect([tmp_path]).observations if o.model == "base"}

    content = json.loads((everything / "redteam.json").read_text())
    del content["digest"]
    (tmp_path / "redteam.json").write_text(json.dumps(content))
    before = alike()
    content["results"]["models"]["base"].setdefault(key, {})["GCG"] = other
    (tmp_path / "redteam.json").write_text(json.dumps(content))
    assert {measure for measure, text in alike().items() if text != before[measure]} == {"redteam GCG"}
