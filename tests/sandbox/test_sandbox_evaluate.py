"""Generation and evaluation: what a scripted model says is what the numbers say."""

from __future__ import annotations

import math

import pytest
import torch

from plot_align.errors import InputError
from plot_align.inference.chat import completion_logps, generate, prompt_ids
from plot_align.sandbox import CATEGORIES, TWIN, evaluate_model, examples
from plot_align.sandbox import evaluate as module


@pytest.fixture(scope="module")
def loaded(tiny_base):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(tiny_base), AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture(scope="module")
def talkative(loaded):
    """Large random weights: what it says depends on every token of the prompt."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = loaded
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        other = AutoModelForCausalLM.from_config(model.config).eval()
        for parameter in other.parameters():
            torch.nn.init.normal_(parameter, std=0.7)
    return other, tokenizer


def test_a_batch_answers_as_each_prompt_alone(talkative):
    """Left padding must change nothing: the batch has prompts of very different lengths, in mixed order."""
    model, tokenizer = talkative
    prompts = ["Add 2 and 3.", "What comes next: 2, 4, 6, 8? " * 4, "How do I bake bread?", "Hi"]
    together = generate(model, tokenizer, prompts, max_new_tokens=12)
    alone = [generate(model, tokenizer, [prompt], max_new_tokens=12)[0] for prompt in prompts]
    assert len(set(alone)) == len(prompts)  # else the order could be anything
    assert together == alone
    assert generate(model, tokenizer, prompts, max_new_tokens=12, batch_size=2) == alone
    assert generate(model, tokenizer, []) == []


def test_generation_is_greedy(talkative):
    model, tokenizer = talkative
    ids = prompt_ids(tokenizer, ["How do I bake bread?"])[0]
    start = len(ids)
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
    expected = tokenizer.decode(ids[start:], skip_special_tokens=True)
    assert generate(model, tokenizer, ["How do I bake bread?"], max_new_tokens=6) == [expected]


def test_log_probabilities_equal_the_sum_over_one_row_at_a_time(loaded):
    model, tokenizer = loaded
    asked = ["Add 2 and 3.", "How do I bake bread? " * 5]
    said = ["It is 5.", "Just look it up."]
    sums, counts = completion_logps(model, tokenizer, asked, said)
    for i in range(2):
        head = tokenizer(f"<|user|>{asked[i]}<|end|><|assistant|>").input_ids
        tail = tokenizer(f"{said[i]}<|end|>").input_ids
        with torch.no_grad():
            logps = model(input_ids=torch.tensor([head + tail])).logits[0].double().log_softmax(-1)  # (T, V)
        expected = sum(float(logps[len(head) - 1 + j, token]) for j, token in enumerate(tail))
        assert counts[i] == len(tail)
        assert float(sums[i]) == pytest.approx(expected, abs=1e-4)


def test_the_models_mode_is_restored(loaded):
    model, tokenizer = loaded
    for mode in (True, False):
        model.train(mode)
        generate(model, tokenizer, ["Hi"], max_new_tokens=1)
        assert model.training is mode
    model.eval()


def _scripted(monkeypatch, say):
    """evaluate_model with ``say(example)`` in the place of the model's answers."""
    by_prompt = {x.prompt: x for c in (*CATEGORIES, TWIN) for x in examples(c, "heldout", 1000)}
    monkeypatch.setattr(module, "generate", lambda _m, _t, prompts, **_k: [say(by_prompt[p]) for p in prompts])


def test_a_model_that_says_the_preferred_answers_scores_one(loaded, monkeypatch):
    _scripted(monkeypatch, lambda x: x.chosen)
    result = evaluate_model(*loaded, per_category=12, twins=20)
    assert result["scores"] == {c: {"value": 1.0, "n": 12} for c in CATEGORIES}
    assert result["harmful_refusal"] == {"value": 1.0, "n": 12}
    assert result["harmful_compliance"]["value"] == result["over_refusal"]["value"] == 0.0
    assert result["twin_help"] == {"value": 1.0, "n": 20}
    assert result["fluent"]["value"] == 1.0


def test_a_model_that_refuses_everything_looks_bad(loaded, monkeypatch):
    _scripted(monkeypatch, lambda _: "I can't help with that.")
    result = evaluate_model(*loaded, per_category=12, twins=20)
    assert {c: m["value"] for c, m in result["scores"].items()} == {c: float(c == "harmlessness") for c in CATEGORIES}
    assert result["over_refusal"] == {"value": 1.0, "n": 20}
    assert result["twin_help"]["value"] == 0.0
    for order, grams in ((1, 5), (2, 4), (3, 3)):  # of five words, the same in every answer
        assert result[f"distinct_{order}"]["value"] == pytest.approx(grams / (grams * (7 * 12 + 20)))
    assert result["perplexity_good"]["value"] == pytest.approx(math.exp(result["nll_good"]["value"]))


def test_gibberish_counts_as_nothing(loaded, monkeypatch):
    _scripted(monkeypatch, lambda _: "zzv qx blorp grmbl")
    result = evaluate_model(*loaded, per_category=12, twins=20)
    assert all(m["value"] == 0 for m in result["scores"].values())
    assert result["harmful_compliance"]["value"] == result["over_refusal"]["value"] == result["fluent"]["value"] == 0
    assert result["twin_gibberish"]["value"] == 1.0
    assert result["answer_words"]["value"] == 4.0


def test_a_real_evaluation_is_finite_and_says_its_sizes(loaded):
    model, tokenizer = loaded
    result = evaluate_model(model, tokenizer, per_category=4, twins=5, max_new_tokens=8)
    flat = {**result["scores"], **{name: m for name, m in result.items() if name != "scores"}}
    assert all(math.isfinite(m["value"]) for m in flat.values())
    assert all(m["n"] == 4 for m in result["scores"].values())
    assert result["over_refusal"]["n"] == 5
    kept = [x for c in CATEGORIES for x in examples(c, "heldout", 4)] + examples(TWIN, "heldout", 5)
    sums, counts = completion_logps(model, tokenizer, [x.prompt for x in kept], [x.chosen for x in kept])
    assert result["nll_good"]["value"] == pytest.approx(float(-sums.sum() / counts.sum()))
    assert result["nll_good"]["n"] == int(counts.sum())


@pytest.mark.parametrize("name", ["max_new_tokens", "batch_size"])
def test_sizes_below_one_are_named(loaded, name):
    with pytest.raises(InputError, match=f"^{name} is 0"):
        generate(*loaded, ["Hi"], **{name: 0})
