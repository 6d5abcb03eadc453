"""What the study on a real model measures and decides, against plain loops and by hand."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"


@pytest.fixture(scope="module", autouse=True)
def _on_the_path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "study"]:
        del sys.modules[name]


def test_the_probability_of_a_refusal_is_that_of_a_plain_loop(tiny_base: Path) -> None:
    from plot_align.inference.chat import prompt_ids
    from study.measures import OPENERS, refusal_probability

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        model.get_output_embeddings().weight *= 30  # opinions, so that no opener is as likely as another
    prompts = ["What is the time?", "How do I bake bread for ten people?", "Why?", "Tell me of the sea."]
    found = refusal_probability(model, tokenizer, prompts, batch_size=3)
    for prompt, value in zip(prompts, found.tolist(), strict=True):
        asked = prompt_ids(tokenizer, [prompt])[0]
        expected = 0.0
        for opener in OPENERS:
            ids = tokenizer(opener, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                log_p = model(torch.tensor([asked + ids])).logits[0].double().log_softmax(-1)
            expected += float(sum(log_p[len(asked) - 1 + i, token] for i, token in enumerate(ids)).exp())
        assert value == pytest.approx(expected, rel=1e-4)


def test_casting_the_weights_once_changes_no_result_and_no_weight(tiny_base: Path) -> None:
    from study.measures import autocast_once, refusal_probability

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prompts = ["What is the time?", "Tell me of the sea."]
    with torch.autocast("cpu", torch.bfloat16):
        expected = refusal_probability(model, tokenizer, prompts)
        with autocast_once(model):
            assert model.lm_head.weight.dtype == torch.bfloat16
            assert torch.equal(refusal_probability(model, tokenizer, prompts), expected)
    assert not torch.equal(refusal_probability(model, tokenizer, prompts), expected)  # autocast does something
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with autocast_once(model):  # no autocast: nothing to do
        assert model.lm_head.weight.dtype == torch.float32


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_the_area_is_the_share_of_pairs_in_the_right_order(positive: list[int], negative: list[int]) -> None:
    from study.report import auc

    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert auc(np.array(positive, float), np.array(negative, float)) == pytest.approx(np.mean(pairs))


def test_a_draws_area_is_that_of_the_items_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    from study import report

    monkeypatch.setattr(report, "RESAMPLES", 50)
    generator = np.random.default_rng(3)
    positive, negative = generator.integers(0, 6, 9).astype(float), generator.integers(0, 6, 7).astype(float)  # ties
    drawn = report.resamples(9, 7)
    assert [side.sum(1).tolist() for side in drawn] == [[9.0] * 50, [7.0] * 50]
    taken = [[np.repeat(v, count.astype(int)) for v, count in zip((positive, negative), counts, strict=True)]
             for counts in zip(*drawn, strict=True)]  # fmt: skip
    expected = [report.auc(*sides) for sides in taken]
    assert len(set(expected)) > 10
    np.testing.assert_allclose(report.resampled_auc(positive, negative, drawn), expected, atol=1e-12)


def test_so_many_draws_that_a_clear_difference_passes_holm() -> None:
    """The least p-value of a draw times as many tests as the study has lies well below 0.05."""
    from study.arms import ARMS
    from study.report import compared

    found = compared({"DPO": runs(0.0, 0.1), "DPO+PLOT": runs(2.0, 0.1)})
    assert found["DPO+PLOT", "DPO"].p * 2 * len(ARMS) < 0.05


def test_the_standard_error_is_that_of_many_repetitions() -> None:
    """Items, seeds and both together vary by 1, 0.5 and 2: drawn anew 4,000 times, the mean varies as is said."""
    from study.report import standard_error

    generator = np.random.default_rng(0)
    seeds, items = 5, 40
    drawn = [
        generator.normal(0, 1, items) + generator.normal(0, 0.5, (seeds, 1)) + generator.normal(0, 2, (seeds, items))
        for _ in range(4000)
    ]
    said = np.mean([standard_error(values) ** 2 for values in drawn])
    assert said == pytest.approx(1 / 40 + 0.25 / 5 + 4 / 200, rel=0.03)
    assert said == pytest.approx(np.var([values.mean() for values in drawn]), rel=0.1)
    one = drawn[0][:1]
    assert standard_error(one) == pytest.approx(one.std(ddof=1) / np.sqrt(items))


def test_held_out_pairs_are_told_apart_by_kind(tmp_path: Path) -> None:
    """The first 24 are human ones."""
    from plot_align.records import write_record
    from study.report import read

    folder = tmp_path / "human" / "DPO"
    folder.mkdir(parents=True)
    scores = {"nll/chosen": [1.0] * 24 + [3.0] * 6, "nll/text": [2.0]}
    write_record(folder / "seed-0.json", "study", {"scores": scores}, config={"arm": "DPO"}, seed=0)
    runs = read(tmp_path)["human"]["DPO"]
    assert (runs.mean(["nll/chosen"]), runs.mean(["nll/chosen helpful"]), runs.mean(["nll/text"])) == (1.0, 3.0, 2.0)


def test_pairs_of_a_small_kind_come_again() -> None:
    """Ten of each kind: of the three all come three times, and one a fourth time; of the twenty each once at most."""
    from study.data import draw

    class Tokenizer:
        def apply_chat_template(self, sides: list[Any], **_: Any) -> list[list[int]]:
            return [[0] * len(side[-1]["content"]) for side in sides]

    def row(text: str) -> Any:
        side = [{"role": "assistant", "content": text}]
        return {"prompt": [{"role": "user", "content": "Why?"}], "chosen": side, "rejected": side}

    kinds = [[row("a" * i) for i in range(20)], [row("b" * i) for i in (1, 2, 3)]]
    drawn = [r["chosen"][0]["content"] for r in draw(kinds, 20, 4, 0, Tokenizer())]
    few = sorted(drawn.count("b" * i) for i in (1, 2, 3))
    assert few == [3, 3, 4]
    assert len({text for text in drawn if "b" not in text}) == 10


def runs(harmful: float, spread: float, **means: float) -> Any:
    """One arm of two seeds and 40 items: the refusal probability of harmful requests lies ``harmful`` above that of
    benign ones, other scores are at their means."""
    from study.report import HARMFUL, ITEM_MEASURES, ORDINARY, Runs

    generator = np.random.default_rng(0)
    scores = {f"refusal/{name}": generator.normal(0, 1, (2, 40)) for name in ORDINARY}
    scores |= {f"refusal/{name}": generator.normal(harmful, 1, (2, 40)) for name in HARMFUL}
    for keys, _ in ITEM_MEASURES.values():
        for key in keys:
            scores[key] = means.get(key.partition("/")[0], 0.0) + spread * generator.normal(0, 1, (2, 40))
    return Runs([0, 1], scores)


def test_the_rule_takes_the_setting_that_tells_requests_apart() -> None:
    from study.report import compared, outcome

    arms = {"DPO": runs(0.0, 0.1), "DPO+PLOT": runs(1.5, 0.1), "DPO+PLOT ρ 0.1": runs(0.8, 0.1)}
    found = compared(arms)
    assert found["DPO+PLOT", "DPO"].low > 0
    assert "Rule 3: **DPO+PLOT** " in outcome(arms, found)
    arms["DPO+PLOT"] = runs(1.5, 0.1, kl=1.0)  # the best, but further from the base
    assert "Rule 3: **DPO+PLOT ρ 0.1** " in outcome(arms, compared(arms))


def test_the_rule_falls_back_on_the_likelihood_at_equal_refusal() -> None:
    from study.report import compared, outcome

    arms = {
        "DPO": runs(0.5, 0.05, refuses=0.8, nll=2.0),
        "DPO+PLOT": runs(0.5, 0.05, refuses=0.8, nll=1.5),
        "DPO+PLOT ρ 1": runs(0.5, 0.05, refuses=0.2, nll=1.0),  # keeps more, by refusing less
    }
    said = outcome(arms, compared(arms))
    assert said.startswith("No setting raises the AUC. Rule 4: ")
    assert said.endswith("(1), **DPO+PLOT** keeps most of the chosen answers' likelihood: NLL 1.50, and 2.00 without.")


def test_arms_are_compared_on_the_seeds_that_both_have() -> None:
    """The second seed of DPO is another model; on the first the two arms are one."""
    from study.report import Runs, compared, worse_in

    first, second = runs(0.5, 0.1), runs(1.5, 0.1, kl=9.0)
    scores = {key: np.stack([value[0], second.scores[key][1]]) for key, value in first.scores.items()}
    arms = {"DPO": Runs([0, 1], scores), "DPO+PLOT": first.only([0])}
    found = compared(arms)["DPO+PLOT", "DPO"]
    assert found[:3] == (0.0, 0.0, 0.0)
    assert worse_in(arms["DPO"], arms["DPO+PLOT"]) == []


def test_attacks_count_on_the_seeds_that_were_attacked(tmp_path: Path) -> None:
    """Two seeds, of which the second was attacked: by hand, 3 of 4 and 1 of 4; ± √(p(1 − p)/3)."""
    from plot_align.records import write_record
    from study.report import attack_table, read

    for seed, attacks in ((0, {}), (1, {"attack/gcg": [1, 1, 0, 1], "attack/pez": [0, 0, 0, 1]})):
        folder = tmp_path / "human" / "DPO"
        folder.mkdir(parents=True, exist_ok=True)
        found = {"scores": {"kl": [0.5, seed]} | attacks}
        write_record(folder / f"seed-{seed}.json", "study", found, config={"arm": "DPO"}, seed=seed)
    runs = read(tmp_path)["human"]["DPO"]
    assert runs.scores["kl"].tolist() == [[0.5, 0], [0.5, 1]]
    assert runs.only([0]).attacks == {}
    assert attack_table({"DPO": runs, "base": runs.only([0])}).splitlines() == [
        "| arm | seeds | gcg ↓ | pez ↓ |", "|---|---|---|---|", "| DPO | 1 | 0.75 ± 0.25 | 0.25 ± 0.25 |",
    ]  # fmt: skip


@pytest.mark.slow
def test_attacks_are_run_by_the_command_and_leave_no_weights(tiny_base: Path, tmp_path: Path) -> None:
    from study.attacks import REQUESTS, attacked

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_base), AutoTokenizer.from_pretrained(tiny_base)
    found = attacked(model, tokenizer, tmp_path, 0)
    assert sorted(found) == ["attack/BestOfN", "attack/GCG", "attack/PEZ", "attack/Prefill"]
    assert all(len(values) == REQUESTS and set(values) <= {0, 1} for values in found.values())
    assert not (tmp_path / "model").exists()


def test_at_equal_refusal_only_remedies_with_all_seeds_of_the_arm_count() -> None:
    """Without the second seed DPO β 0.05 is no rival of an arm of two, and is one of an arm of one."""
    from study.report import equal_refusal_table

    arms = {
        "DPO β 0.05": runs(0.9, 0.1, kl=8.0).only([0]), "DPO": runs(0.5, 0.1, kl=3.0), "base": runs(0.0, 0.1, kl=1.0),
        "DPO+PLOT": runs(0.25, 0.1, kl=3.0), "JS": runs(0.7, 0.1, kl=3.0), "norm": runs(0.7, 0.1, kl=3.0).only([0]),
    }  # fmt: skip
    rows = [line.split(" | ")[:4] for line in equal_refusal_table(arms).splitlines()[2:]]
    assert [row[:3] for row in rows] == [["| DPO+PLOT", "2", "DPO by β"], ["| norm", "1", "DPO by β"]]
    assert [float(row[3].split()[0]) for row in rows] == pytest.approx([1.0, -2.5], abs=0.3)  # 3 − 2; 3 − 5.5


def test_tables_put_the_same_seeds_side_by_side() -> None:
    from study.report import Runs, by_seeds

    def of(*seeds: int) -> Any:
        return Runs(list(seeds), {"kl": np.array([[float(seed)] for seed in seeds])})

    found = by_seeds({"base": of(0, 1, 2, 3, 4), "DPO": of(0, 1, 2, 4), "JS": of(0), "norm": of(1, 2)})
    assert {number: {name: r.seeds for name, r in there.items()} for number, there in found.items()} == {
        1: {"base": [0], "DPO": [0], "JS": [0]},
        3: {"base": [0, 1, 2], "DPO": [0, 1, 2]},  # five seeds has the base alone
    }
    assert found[3]["DPO"].scores["kl"].tolist() == [[0.0], [1.0], [2.0]]


def test_at_equal_refusal_a_setting_on_the_line_of_the_remedy_gains_nothing() -> None:
    """A family refuses 0, 1, 2 at KL 0, 10, 30: at 1.5 a KL of 20 lies on its line, one of 14 lies 6 below."""
    from study.report import HARMFUL, Runs, at_equal_refusal

    noise = np.random.default_rng(1).normal(0, 0.1, (1, 50))

    def arm(refusal: float, kl: float) -> Any:
        scores = {f"refusal/{name}": refusal + noise - noise.mean() for name in HARMFUL}
        return Runs([0], scores | {"kl": np.full((1, 30), kl)})

    family = [arm(1.0, 10.0), arm(2.0, 30.0), arm(0.0, 0.0)]
    assert at_equal_refusal(arm(1.5, 20.0), family, ("kl",)).value == pytest.approx(0.0)
    below = at_equal_refusal(arm(1.5, 14.0), family, ("kl",))
    assert below.value == pytest.approx(-6.0)
    assert below.high < 0
    assert at_equal_refusal(arm(2.5, 14.0), family, ("kl",)) is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=12))
def test_rank_correlation_is_scipys(pairs: list[tuple[int, int]]) -> None:
    from scipy.stats import spearmanr

    from study.forecasts import spearman

    a, b = zip(*pairs, strict=True)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert np.isnan(spearman(a, b))
    else:
        assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)


def test_sets_of_sums(tmp_path: Path) -> None:
    """Two sums: their marks for a calculator are gone, and a chosen solution never stands on the other side."""
    import gzip
    import json

    from study.sets import other_numbers, other_solutions

    rows = [
        {"question": "1 + 1?", "answer": "1 + 1 is <<1+1=2>>2.\n#### 2"},
        {"question": "3 times 500?", "answer": "It is <<3*500=1500>>1,500.\n#### 1,500"},
    ]
    with gzip.open(tmp_path / "gsm8k_train.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)

    def sides(kinds: Any) -> list[tuple[str, ...]]:
        return [tuple(row[key][0]["content"] for key in ("prompt", "chosen", "rejected")) for row in kinds[0]]

    first, second = "1 + 1 is 2.\n= 2", "It is 1,500.\n= 1,500"
    assert sides(other_solutions(tmp_path, None)) == [("1 + 1?", first, second), ("3 times 500?", second, first)]
    assert sides(other_numbers(tmp_path, None)) == [
        ("1 + 1?", first, "1 + 1 is 2.\n= 3"),
        ("3 times 500?", second, "It is 1,500.\n= 1501"),
    ]


def test_the_table_of_forecasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four sets and three losses. AdamW's forecast has the order of what is measured, SGD's the reverse. Of each run's
    answers two are exchanged: ρ = 1 − 6·(0 + 1 + 1) / (3·8) = 1/2."""
    from plot_align.records import write_record
    from study import forecasts
    from study.forecasts import LOSSES, write

    monkeypatch.setattr(forecasts, "RESAMPLES", 20)

    config = {"steps": 20, "pairs": 8, "learning_rate": 4e-5}
    for i, name in enumerate("abcd"):
        measured = {loss: 10.0 * i + j - 9.5 for j, loss in enumerate(LOSSES)}  # -9.5, -8.5, -7.5, 0.5, ...
        sides = {
            "adamw": {loss: [v, v + 2, v + 1] for loss, v in measured.items()},
            "sgd": {loss: [-v, -v, -v] for loss, v in measured.items()},
        }
        found = {**sides, "ches_normalised": [-float(i)]}
        runs = {loss: {"held_out": [v, v + 1, v + 2]} for loss, v in measured.items()}
        for folder, scores in {"forecast": found, **runs}.items():
            path = tmp_path / folder / name / "seed-0.json"
            path.parent.mkdir(parents=True)
            write_record(path, "forecast study", {"scores": scores}, config={**config, "data": name}, seed=0)
    write(tmp_path, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "| a | DPO | 0.0 | -8.5 ± 0.58 | +9.5 ± 0 | -8.5 ± 0.58 |" in page
    assert "| all | 12 | 1.00 (1.00 to 1.00) | -1.00 (-1.00 to -1.00) | 0.50 (0.50 to 0.50) | 1.00 |" in page
    assert "| DPO, by −CHES | 4 | 1.00 (1.00 to 1.00) | | | |" in page
