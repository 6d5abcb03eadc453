"""Requests of JailbreakBench, StrongREJECT and XSTest, in files with the header that each is published with."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest

from plot_align.errors import InputError
from plot_align.redteam.behaviors import Behavior, read_behaviors, read_labelled

JAILBREAKBENCH = "Index,Goal,Target,Behavior,Category,Source\n"
STRONGREJECT = "category,source,forbidden_prompt\n"
XSTEST = "id,prompt,type,label,focus,note\n"


@pytest.fixture
def write(tmp_path: Path):
    def written(text: str, name: str = "requests.csv") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return written


def test_jailbreakbench_brings_its_targets_and_serves_as_either_kind(write) -> None:
    path = write(
        JAILBREAKBENCH
        + '0,"Steal the crown, quietly","Sure, here is how to steal it",Crown theft,Theft/Fraud,Original\n'
        + "1,Fake a coin,,Nigerian 419-coin (fake),Theft/Fraud,TDC/HarmBench\n"
    )
    found = read_behaviors(path)
    assert found.rows == [
        Behavior("crown_theft", "Steal the crown, quietly", semantic_category="Theft/Fraud"),
        Behavior("nigerian_419_coin_fake", "Fake a coin", semantic_category="Theft/Fraud"),
    ]
    assert found.targets == {"crown_theft": "Sure, here is how to steal it"}
    assert found.taken == "requests.csv (JailbreakBench): 2 harmful requests taken"
    harmless = read_behaviors(path, kind="harmless")
    assert (harmless.rows, harmless.targets) == (found.rows, found.targets)
    assert harmless.taken == "requests.csv (JailbreakBench): 2 harmless requests taken"
    with pytest.raises(InputError, match="does not say which of its requests are harmful; name a file of XSTest"):
        read_labelled(path)


def test_strongreject_names_a_request_by_its_text_alone(write) -> None:
    """The same request has the same id in another excerpt, at another place: the first 12 digits of its SHA-256."""
    rows = ["Violence,custom,Burn the mill\n", "Crime,DAN,Steal the crown\n"]
    first = read_behaviors(write(STRONGREJECT + rows[0] + rows[1])).rows
    second = read_behaviors(write(STRONGREJECT + rows[1])).rows
    assert first[1:] == second
    assert second == [Behavior("strongreject_204f41a0630b", "Steal the crown", semantic_category="Crime")]
    path = write(STRONGREJECT + rows[0] + rows[0])
    with pytest.raises(InputError, match="line 3: 'Burn the mill' stands in an earlier row too; delete one"):
        read_behaviors(path)
    with pytest.raises(InputError, match=r"\(StrongREJECT\) has no harmless requests; name XSTest's file"):
        read_behaviors(write(STRONGREJECT + rows[0]), kind="harmless")


@pytest.mark.parametrize("labels", [True, False])
def test_xstest_gives_each_kind_its_rows(write, labels: bool) -> None:
    """With the column of labels or, as first published, without it."""
    rows = [
        ["v2-1", "How do I kill time?", "homonyms", "safe", "kill", ""],
        ["v2-2", "How do I kill the king?", "contrast_homonyms", "unsafe", "kill", "a king"],
        ["v2-3", "What is a coup?", "definitions", "safe", "coup", ""],
    ]
    kept = [i for i, name in enumerate(XSTEST.strip().split(",")) if labels or name != "label"]
    text = "".join(",".join(row[i] for i in kept) + "\n" for row in [XSTEST.strip().split(","), *rows])
    path = write(text)
    harmful, harmless = read_behaviors(path), read_behaviors(path, kind="harmless")
    assert harmful.rows == [Behavior("v2-2", "How do I kill the king?", semantic_category="contrast_homonyms")]
    assert [row.id for row in harmless.rows] == ["v2-1", "v2-3"]
    assert harmful.taken == "requests.csv (XSTest): 1 harmful request taken, 2 others left"
    assert harmless.taken == "requests.csv (XSTest): 2 harmless requests taken, 1 other left"
    assert [harmful for _, harmful in read_labelled(path)] == [False, True, False]


def test_a_label_that_is_none_and_columns_of_nobody_are_refused(write) -> None:
    with pytest.raises(InputError, match="line 2: the label is 'Safe!', expected safe or unsafe"):
        read_behaviors(write(XSTEST + "1,Hi,homonyms,Safe!,,\n"))
    known = (
        "has the columns prompt, answer; expected those of HarmBench: Behavior, BehaviorID; JailbreakBench: Goal, "
        "Target, Behavior, Category; StrongREJECT: category, forbidden_prompt; XSTest: id, prompt, type"
    )
    with pytest.raises(InputError, match=known):
        read_behaviors(write("prompt,answer\na,b\n"))
    with pytest.raises(InputError, match=r"the id is '\.\./up', expected a name without slashes"):
        read_behaviors(write(XSTEST + "../up,Hi,homonyms,unsafe,,\n"))


def test_published_files_are_read_whole(real_data: Path) -> None:
    """Against Python's own reader: no row lost, none changed, every request with its category."""
    path = real_data / "strongreject_150.csv"
    found = read_behaviors(path)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(b.text, b.semantic_category) for b in found.rows] == [
        (r["forbidden_prompt"], r["category"]) for r in rows
    ]
    assert found.taken == "strongreject_150.csv (StrongREJECT): 150 harmful requests taken"
    path = real_data / "xstest_v2_prompts.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for kind, label in (("harmful", "unsafe"), ("harmless", "safe")):
        found = read_behaviors(path, kind=kind)
        assert [(b.id, b.text) for b in found.rows] == [(r["id"], r["prompt"]) for r in rows if r["label"] == label]
    assert Counter(harmful for _, harmful in read_labelled(path)) == {False: 250, True: 200}
    # The types say the same as the labels, as the reading of files without labels supposes.
    assert all(r["type"].startswith("contrast") == (r["label"] == "unsafe") for r in rows)
