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


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_the_area_is_the_share_of_pairs_in_the_right_order(positive: list[int], negative: list[int]) -> None:
    from study.report import auc

    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert auc(np.array(positive, float), np.array(negative, float)) == pytest.approx(np.mean(pairs))


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
    assert "No setting raises the AUC. Rule 4: **DPO+PLOT** " in said


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
