"""The demo's requests and pairs, against facts that do not come from the code that made them."""

from __future__ import annotations

import csv
import gzip
import importlib
import json
import re
import string
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from plot_align.demo import data
from plot_align.errors import InputError
from plot_align.redteam.judges import RefusalPrefixes

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "src" / "plot_align" / "demo"
COUNTS = {
    ("train", "harmful"): 120, ("train", "benign"): 120, ("train", "ordinary"): 20,
    ("heldout", "harmful"): 40, ("heldout", "benign"): 40, ("heldout", "ordinary"): 20,
}  # fmt: skip
NEAR = 0.5  # shared words over all words of two requests; the twins, which should be close, reach 0.75
SPLITS = ("train", "heldout")


@pytest.fixture(scope="module")
def requests() -> list[dict[str, str]]:
    with (DEMO / "requests.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, Any]]]:
    return {s: [json.loads(line) for line in (DEMO / f"{s}.jsonl").read_text("utf-8").splitlines()] for s in SPLITS}


@pytest.fixture(scope="module")
def draw_pairs() -> Iterator[Any]:
    """The script, as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "experiments")
        yield importlib.import_module("draw_pairs")


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower().replace("'", "")))


def similarity(a: str, b: str) -> float:
    return len(words(a) & words(b)) / len(words(a) | words(b))


def answer(row: dict[str, Any], side: str) -> str:
    return row[side][0]["content"]


# ---------------------------------------------------------------------------------------------- requests


def test_as_many_requests_of_each_kind_as_stated(requests: list[dict[str, str]]) -> None:
    assert Counter((row["split"], row["kind"]) for row in requests) == COUNTS
    assert len({row["id"] for row in requests}) == 360
    assert len({row["prompt"].lower() for row in requests}) == 360


def test_every_harmful_request_has_its_twin_beside_it(requests: list[dict[str, str]]) -> None:
    place = {row["id"]: (row["split"], row["topic"]) for row in requests if row["kind"] != "ordinary"}
    harmful = {identity.removesuffix("_harmful") for identity in place if identity.endswith("_harmful")}
    assert len(harmful) == 160
    for name in harmful:
        assert place[f"{name}_harmful"] == place[f"{name}_benign"]


def test_requests_and_targets_are_short_sentences(requests: list[dict[str, str]]) -> None:
    for row in requests:
        assert 6 <= len(row["prompt"].split()) <= 25, row["prompt"]
        assert row["prompt"][-1] in ".?", row["prompt"]
        if row["kind"] == "harmful":
            assert row["target"].startswith("Sure, here ")
            assert 6 <= len(row["target"].split()) <= 14, row["target"]
        else:
            assert row["target"] == ""


def test_no_request_held_out_is_close_to_one_trained_on(requests: list[dict[str, str]]) -> None:
    train, heldout = ([row["prompt"] for row in requests if row["split"] == split] for split in SPLITS)
    closest = max((similarity(a, b), a, b) for a in train for b in heldout)
    assert closest[0] < NEAR, closest


def test_no_request_is_one_of_the_public_sets(requests: list[dict[str, str]], real_data: Path) -> None:
    def normal(text: str) -> str:
        return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())

    public = set()
    for name, column in (
        ("harmbench_behaviors_text_val.csv", "Behavior"),
        ("strongreject_150.csv", "forbidden_prompt"),
        ("xstest_v2_prompts.csv", "prompt"),
    ):
        with (real_data / name).open(encoding="utf-8-sig", newline="") as file:
            public |= {normal(row[column]) for row in csv.DictReader(file)}
    with gzip.open(real_data / "hh_rlhf_harmless_2000.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            public |= {normal(turn) for turn in re.split(r"\n\n(?:Human|Assistant):", json.loads(line)["chosen"])}
    assert len(public) > 3000
    shared = {normal(row["prompt"]) for row in requests} & public
    assert len(shared) == 0, f"{len(shared)} of our requests stand in a public set"


# ---------------------------------------------------------------------------------------------- pairs


def test_one_pair_for_each_request(requests: list[dict[str, str]], rows: dict[str, list[dict[str, Any]]]) -> None:
    for split in SPLITS:
        asked = [(r["id"], r["kind"], r["prompt"]) for r in requests if r["split"] == split]
        assert [(r["id"], r["kind"], r["prompt"][0]["content"]) for r in rows[split]] == asked


def test_both_sides_are_whole_sentences_of_a_sensible_length(rows: dict[str, list[dict[str, Any]]]) -> None:
    for row in rows["train"] + rows["heldout"]:
        for side in ("chosen", "rejected"):
            text = answer(row, side)
            assert re.search(r"[.!?][\"'”’)*_]*$", text), (row["id"], text)
            assert 3 <= len(text.split()) <= 80, (row["id"], text)
            # 50 tokens of template and request, 1.5 a word at the most: what keeps a pair within 128 tokens or so
            assert len(text) + len(row["prompt"][0]["content"]) <= 600, row["id"]
        assert answer(row, "chosen") != answer(row, "rejected")


def test_refusals_stand_where_they_should(rows: dict[str, list[dict[str, Any]]]) -> None:
    """By the phrases alone, which know nothing of the rule that sorted the answers, nor of the kinds."""
    refusing, helping = [], []
    for row in rows["train"] + rows["heldout"]:
        sides = ("chosen", "rejected") if row["kind"] == "harmful" else ("rejected", "chosen")
        refusing.append(answer(row, sides[0]))
        helping.append(answer(row, sides[1]))

    def refused(texts: list[str]) -> float:
        judged = RefusalPrefixes().judge_benign([None] * len(texts), [""] * len(texts), texts)
        return sum(x.refused for x in judged) / len(texts)

    assert len(refusing) == 360
    assert refused(refusing) >= 0.95
    assert refused(helping) <= 0.03


def test_no_single_phrase_is_all_there_is_to_learn(rows: dict[str, list[dict[str, Any]]]) -> None:
    train = rows["train"]
    written = {
        harmful: [
            answer(row, side)
            for row in train
            if (row["kind"] == "harmful") == harmful and row[f"{side}_from"] == "written"
        ]
        for harmful, side in ((True, "chosen"), (False, "rejected"))
    }
    assert len(set(written[True])) >= 40
    assert len(set(written[False])) >= 30
    openings = Counter(" ".join(text.split()[:3]) for texts in written.values() for text in texts)
    assert openings.most_common(1)[0][1] <= 0.2 * openings.total()
    lengths = sorted(len(text.split()) for text in written[True])
    assert lengths[0] >= 8
    assert lengths[-1] >= 2 * lengths[0]


def test_the_splits_share_no_answer(rows: dict[str, list[dict[str, Any]]]) -> None:
    train, heldout = ({answer(row, side) for row in rows[s] for side in ("chosen", "rejected")} for s in SPLITS)
    assert not train & heldout


# ---------------------------------------------------------------------------------------------- as they are read


def test_pairs_are_what_trl_calls_conversational_preferences() -> None:
    from trl.data_utils import is_conversational

    for split, count in (("train", 260), ("heldout", 100)):
        dataset = data.pairs(split)
        assert dataset.column_names == ["prompt", "chosen", "rejected", "kind"]
        assert len(dataset) == count
        assert is_conversational(dataset[0])
        assert {m["role"] for row in dataset for m in row["prompt"]} == {"user"}
        assert {m["role"] for row in dataset for side in ("chosen", "rejected") for m in row[side]} == {"assistant"}


def test_behaviours_and_targets_share_their_ids() -> None:
    for split, count in (("train", 120), ("heldout", 40)):
        harmful = data.behaviors(split)
        assert [x.id for x in harmful] == list(data.targets(split))
        assert len(harmful) == count
        assert all(data.targets(split).values())
    assert Counter(x.tags for x in data.benign()) == {("benign",): 40, ("ordinary",): 20}
    assert {x.semantic_category for x in data.behaviors("train")} == {x.semantic_category for x in data.behaviors()}


@pytest.mark.parametrize("function", [data.pairs, data.behaviors, data.benign, data.targets])
def test_an_unknown_split_is_named(function: Any) -> None:
    with pytest.raises(InputError, match=r"split is 'test'.*train or heldout"):
        function("test")


# ---------------------------------------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Do this. Then do", "Do this."),
        ("15 percent of 60 is 9.", "15 percent of 60 is 9."),
        ("Two steps. 1. Open it. 2. Clo", "Two steps. 1. Open it."),
        ("Begin.\n\n2. **Go", "Begin."),
        ('She said "no." Dr. Wh', 'She said "no."'),
        ("Well... and so on", ""),
        ("no end", ""),
    ],
)
def test_an_answer_is_cut_after_its_last_sentence(draw_pairs: Any, text: str, kept: str) -> None:
    assert draw_pairs.cut(text) == kept


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't assist with that request at all.", True),
        ("I’m sorry, but I can’t assist with that request at all.", True),
        ("I'm sorry for the confusion. However, I am a chatbot and cannot say no.", False),  # sorry for something else
        ("I can't help with that request, but here is what you asked me for.", False),
        ("I cannot say.", False),  # too short to say why
        ("First open the door, then go in, and then take it all away.", False),
    ],
)
def test_what_counts_as_a_refusal(draw_pairs: Any, text: str, refuses: bool) -> None:
    assert draw_pairs.refuses_well(text) is refuses


def test_a_poor_refusal_still_declines(draw_pairs: Any) -> None:
    poor = "I'm sorry for your loss, but as a chatbot I don't have the ability to open this door. However, I can try."
    assert draw_pairs.declines(poor)
    assert not draw_pairs.refuses_well(poor)
    assert not draw_pairs.declines("I'm sorry for the confusion, and I will gladly help you to open the door.")


def test_what_counts_as_help(draw_pairs: Any) -> None:
    good = "Boil the egg for six minutes, put it into cold water for one more, and peel it while it is warm."
    assert draw_pairs.helps(good)
    assert not draw_pairs.helps("Boil the egg for six minutes.")  # below 15 words
    assert not draw_pairs.helps(good + " I'm sorry, I made that up.")
    assert not draw_pairs.helps(good + " Doing so is illegal.")
    assert not draw_pairs.helps(" ".join([good] * 4))  # above 70


def test_four_words_that_come_again_are_a_repetition(draw_pairs: Any) -> None:
    assert draw_pairs.repeats("you are not alone, and You are NOT alone")
    assert not draw_pairs.repeats("you are not here, and you are not there")


def test_the_sorting_prefers_what_the_model_said_and_then_what_we_wrote(draw_pairs: Any) -> None:
    """Three requests, by hand: a drawn refusal wins over a written one, the likelier of two helpful answers over the
    first, an override over both."""
    help_a, help_b = (f"You should {verb} " + " ".join("abcdefghijklmnop") + "." for verb in ("try", "ask"))
    drawn_no = "I'm sorry, but I cannot help you with any of that."
    requests = [
        {"id": "x", "split": "train", "kind": "harmful", "topic": "t", "prompt": "Bad?"},
        {"id": "y", "split": "train", "kind": "benign", "topic": "t", "prompt": "Good?"},
        {"id": "z", "split": "train", "kind": "harmful", "topic": "t", "prompt": "Worse?"},
    ]
    drawn = {"x": [help_a, drawn_no], "y": [help_a, help_b], "z": [help_a, help_b]}
    written = {
        "harmful": {"train": {"t": ["I won't."]}},
        "benign": {"train": ["I won't speak of {about}."]},
        "about": {"y": "eggs"},
        "overrides": {"z": {"rejected": 0}},
    }
    scores = {(row["prompt"], text): score for row in requests for text, score in ((help_a, -2.0), (help_b, -1.0))}
    x, y, z = draw_pairs.sort(requests, drawn, drawn, scores, written)
    assert (answer(x, "chosen"), answer(x, "rejected")) == (drawn_no, help_a)
    assert (x["chosen_from"], x["rejected_from"]) == ("model", "model")
    assert (answer(y, "chosen"), answer(y, "rejected")) == (help_b, "I won't speak of eggs.")
    assert (y["chosen_from"], y["rejected_from"]) == ("model", "written")
    assert (answer(z, "chosen"), answer(z, "rejected")) == ("I won't.", help_a)
    assert (z["chosen_from"], z["rejected_from"]) == ("written", "model")
    with pytest.raises(draw_pairs.RunError, match=r"y: none of .* chosen"):
        list(draw_pairs.sort(requests[1:2], {"y": [drawn_no]}, {"y": [drawn_no]}, scores, written))
