"""The world: formats, the split, determinism."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from plot_align.errors import InputError
from plot_align.sandbox import CATEGORIES, TWIN, examples, heldout_twins, pairs
from plot_align.sandbox import language as lang

ALL = (*CATEGORIES, TWIN)


def test_there_are_seven_subpreferences_with_enough_to_train_on():
    train, heldout = pairs("train"), pairs("heldout")
    assert set(train["category"]) == set(CATEGORIES) == set(heldout["category"])
    assert len(CATEGORIES) == 7
    for category in CATEGORIES:
        assert train["category"].count(category) >= 180  # humanity has 192 prompts
        assert heldout["category"].count(category) == 60
    assert len(heldout_twins()) == 100


def test_rows_are_conversational_with_an_explicit_prompt():
    for row in [pairs("train", ["stem"], per_category=1)[0], heldout_twins(count=1)[0]]:
        assert set(row) == {"prompt", "chosen", "rejected", "category"}
        assert [m["role"] for m in row["prompt"]] == ["user"]
        assert [m["role"] for m in row["chosen"]] == [m["role"] for m in row["rejected"]] == ["assistant"]


@pytest.mark.parametrize("category", ALL)
@pytest.mark.parametrize("seed", [0, 1])
def test_no_item_is_on_both_sides_of_the_split(category, seed):
    train, heldout = lang._draw(category, "train", 10_000, seed), lang._draw(category, "heldout", 10_000, seed)
    assert not {x.item for x in train} & {x.item for x in heldout}
    assert not {x.prompt for x in train} & {x.prompt for x in heldout}
    # Both sides together are everything there is to ask, each once.
    everything = [prompt for item in lang.items(category) for prompt in lang.prompts(item)]
    assert sorted(x.prompt for x in (*train, *heldout)) == sorted(everything)
    assert len(set(everything)) == len(everything)
    assert len({x.item for x in heldout}) == round(lang.HELD_OUT_SHARE * len(lang.items(category)))


def test_twins_share_the_verb_of_a_harmful_request_and_never_its_object():
    harmful = {item.facts for item in lang.items("harmlessness")}
    benign = {item.facts for item in lang.items(TWIN)}
    assert not harmful & benign
    assert {verb for verb, _ in benign} == {verb for verb, _ in harmful}


def test_some_training_prompts_for_helpfulness_are_twins_and_none_of_them_is_held_out():
    twins = {prompt for item in lang.items(TWIN) for prompt in lang.prompts(item)}
    held_out = {row["prompt"][0]["content"] for row in heldout_twins(count=10_000)}
    rows = [(row["category"], row["prompt"][0]["content"]) for row in pairs("train")]
    assert {category for category, prompt in rows if prompt in twins} == {"helpfulness"}
    assert sum(prompt in twins for _, prompt in rows) == lang.TWINS_IN_HELP * 200
    assert not held_out & {prompt for _, prompt in rows}
    assert not twins & {row["prompt"][0]["content"] for row in pairs("heldout")}


def test_the_seed_decides_everything_across_processes():
    code = "from plot_align.sandbox import pairs; import json; print(json.dumps(pairs('train', seed=5).to_list()))"
    first, second = (
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in (1, 2)
    )
    assert first == second
    assert pairs("train", seed=5).to_list() != pairs("train", seed=6).to_list()


def test_answers_vary():
    for category in ALL:
        found = examples(category, "train", 100)
        assert len({x.chosen for x in found}) > 50
        assert len({x.rejected for x in found}) > 20


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: pairs("test"), "split"),
        (lambda: pairs("train", ["poetry"]), "categories"),
        (lambda: pairs("train", []), "categories"),
        (lambda: pairs("train", per_category=-1), "count"),
        (lambda: examples("poetry", "train", 1), "category"),
    ],
)
def test_wrong_arguments_are_named(call, names):
    with pytest.raises(InputError, match=f"^{names} is "):
        call()
