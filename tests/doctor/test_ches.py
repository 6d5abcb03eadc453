"""CHES against a loop over the paper's formula in float64, and what the doctor sums up of it and of likelihoods."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from plot_align.doctor import model as doctor
from plot_align.doctor.forecast import Step
from plot_align.doctor.model import context_of, measure
from plot_align.errors import InputError, RunError
from plot_align.inference.ches import ches, ches_of_states, pair_batches
from plot_align.preference.estimation import ScoredSequence, scored_pairs

SHORT = Step(pairs=2, batches=1, answers=2)


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture
def model(tiny_base: Path) -> Any:
    """The tiny Llama with a head that has opinions."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.get_output_embeddings().weight.data.mul_(30)
    return model


@pytest.fixture(scope="module")
def pairs(tokenizer: Any, pair_rows: list[dict[str, str]]) -> list[Any]:
    """Pairs of different lengths, one of them with an answer that nothing is left of."""
    rows = [{**row, "rejected": row["rejected"] * (1 + i % 3)} for i, row in enumerate(pair_rows[:9])]
    found = list(scored_pairs(Dataset.from_list(rows), tokenizer))
    chosen, rejected = found[4]
    found[4] = (chosen, ScoredSequence(rejected.ids[: rejected.start], rejected.start, rejected.start))
    return found


def states_and_log_p(model: Any, sequence: ScoredSequence) -> tuple[np.ndarray, list[float]]:
    """Hidden states (T, H) and log-probabilities of the scored tokens, alone and in float64."""
    with torch.no_grad():
        out = model.double().eval()(torch.tensor(sequence.ids[None].astype(np.int64)), output_hidden_states=True)
    before = range(sequence.start - 1, sequence.stop - 1)
    log_p = out.logits[0].log_softmax(-1)
    return (
        np.array([out.hidden_states[-1][0, t].numpy() for t in before]),
        [float(log_p[t, sequence.ids[t + 1]]) for t in before],
    )


def paper(chosen: np.ndarray, rejected: np.ndarray) -> tuple[float, float]:
    """Razin et al. 2024, definition 2, term by term: Σ_k Σ_l ⟨h⁺_k, h⁻_l⟩ − Σ_k Σ_l ⟨h⁺_k, h⁺_l⟩."""
    cross = sum(float(a @ b) for a in chosen for b in rejected)
    own = sum(float(a @ b) for a in chosen for b in chosen)
    return cross - own, cross / (len(chosen) * len(rejected)) - own / len(chosen) ** 2


def test_by_hand() -> None:
    """s⁺ = (1, 0) + (0, 1) = (1, 1), s⁻ = (3, 1): 4 − 2 = 2. Of the means (½, ½) and (3, 1): 2 − ½ = 3/2."""
    pair = (ScoredSequence(np.zeros(3, np.int32), 1, 3), ScoredSequence(np.zeros(2, np.int32), 1, 2))
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
    assert ches_of_states(hidden, torch.tensor([0, 0, 1]), [pair]).tolist() == [[2.0, 1.5]]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_ches_is_the_papers_formula(model: Any, pairs: list[Any], batch_size: int) -> None:
    found = {}
    for batch in pair_batches(pairs, batch_size):
        found |= dict(zip(batch, ches(model.float(), [pairs[i] for i in batch]).tolist(), strict=True))
    assert sorted(found) == [i for i in range(9) if i != 4]
    for i, values in found.items():
        expected = paper(*(states_and_log_p(model, side)[0] for side in pairs[i]))
        assert values == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_longest_pairs_come_first(pairs: list[Any]) -> None:
    lengths = [max(len(side.ids) for side in pairs[i]) for batch in pair_batches(pairs, 2) for i in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert len(lengths) == 8


def test_what_is_summed_up(model: Any, tokenizer: Any, pairs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracy, means and shares against loops over the model's whole logits; the model's own answers are fixed."""
    pairs = [*pairs, (pairs[0][1], pairs[0][1])]  # a tie
    sides = [[states_and_log_p(model, side) for side in pair] for i, pair in enumerate(pairs) if i != 4]
    sums = [[sum(log_p) for _, log_p in pair] for pair in sides]
    means = [[sum(log_p) / len(log_p) for _, log_p in pair] for pair in sides]
    ranked = sorted(chosen for chosen, _ in means)
    own = [ranked[at] + 1e-3 for at in (5, 2, 6, 3)]  # with answers of the data on either side
    monkeypatch.setattr(doctor, "_own_log_p", lambda *_: own)
    found = measure(model.float(), tokenizer, pairs, step=SHORT, batch_size=6)
    for accuracy, scores in ((found.accuracy, sums), (found.accuracy_per_token, means)):
        assert accuracy == pytest.approx(sum((a > b) + (a == b) / 2 for a, b in scores) / 9)
    assert 0 < found.accuracy < 1
    assert found.log_p == pytest.approx({side: sum(s[i] for s in sums) / 9 for i, side in enumerate(found.log_p)})
    similarity = [paper(*(states for states, _ in pair))[1] for pair in sides]
    assert found.ches_mean == pytest.approx(sum(similarity) / 9, rel=1e-5)
    mean = stats.ttest_1samp(similarity, 0).confidence_interval(0.95)
    assert found.ches_interval == pytest.approx([mean.low, mean.high], rel=1e-4)
    assert found.ches[4] is None
    assert [x for x in found.ches_normalised if x is not None] == pytest.approx(similarity, rel=1e-4, abs=1e-4)
    low, high = found.on_policy["interval"]
    # Of four sorted values the quantile q lies at place 3·q: 0.075 between the first two, 0.075 below the last.
    first, second, third, last = sorted(own)
    assert (low, high) == pytest.approx((first + 0.075 * (second - first), last - 0.075 * (last - third)))
    for i, side in enumerate(("chosen", "rejected")):
        assert found.on_policy[side] == pytest.approx(sum(m[i] for m in means) / 9, rel=1e-5)
        for place, there in {
            "below": lambda x: x < low, "within": lambda x: low <= x <= high, "above": lambda x: x > high,
        }.items():  # fmt: skip
            expected = sum(there(m[i]) for m in means) / 9
            assert found.on_policy[f"{side}_{place}"] == pytest.approx(expected), (side, place)
    assert min(found.on_policy[f"chosen_{place}"] for place in ("below", "within", "above")) > 0
    assert found.on_policy["own"] == pytest.approx(sum(own) / 4)
    assert (found.pairs, found.unscored) == (9, 1)


def test_own_answers_are_scored_as_written(
    model: Any, tokenizer: Any, pairs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second prompt gets no answer."""
    texts = ["I am sorry, but I cannot help.", "", "Sure, here is how."]
    prompts = [pairs[i][0].ids[: pairs[i][0].start].tolist() for i in range(3)]
    asked = {}

    def answers(model: Any, tokenizer: Any, rows: Any, **options: Any) -> list[str]:
        asked.update(options, rows=rows)
        return texts

    monkeypatch.setattr(doctor, "continue_rows", answers)
    found = doctor._own_log_p(model.float(), tokenizer, prompts, 2, 7)
    assert (asked["rows"], asked["temperature"], asked["seed"]) == (prompts, 1.0, 7)
    for value, prompt, text in zip(found, (prompts[0], prompts[2]), (texts[0], texts[2]), strict=True):
        ids = np.array(prompt + tokenizer(text)["input_ids"], np.int32)
        log_p = states_and_log_p(model, ScoredSequence(ids, len(prompt), len(ids)))[1]
        assert value == pytest.approx(sum(log_p) / len(log_p), rel=1e-5)


def test_the_prompts_are_a_sample_without_answers(pairs: list[Any]) -> None:
    scored = [i for i in range(9) if i != 4]
    found = doctor._prompts(pairs, scored, 3, 0)
    assert len(found) == 3
    assert all(prompt in [pairs[i][0].ids[: pairs[i][0].start].tolist() for i in scored] for prompt in found)
    assert len(doctor._prompts(pairs, scored, 50, 0)) == 8


def test_sampled_answers(model: Any, tokenizer: Any, pairs: list[Any]) -> None:
    """A whole run, twice: the samples are seeded."""
    first, second = (measure(model, tokenizer, pairs, step=SHORT, answered=4, seed=3).to_dict() for _ in range(2))
    assert first == second
    assert 1 <= first["on_policy"]["answers"] <= 4
    assert first["on_policy"]["own"] < 0


def test_equal_sides_are_measured(model: Any, tokenizer: Any, pairs: list[Any]) -> None:
    """Nothing is preferred: no PLOT term, and DPO's gradient is zero but for rounding, whose sign Adam would take."""
    same = [(chosen, chosen) for chosen, _ in pairs[:4]]
    found = measure(model, tokenizer, same, step=Step(pairs=2, batches=1, answers=2, optimizer="sgd"), answered=1)
    assert found.accuracy == 0.5
    assert found.ches == [0.0] * 4
    assert found.forecast["DPO+PLOT"] is None
    assert abs(found.forecast["DPO"]) < 1e-5 * found.forecast["DPO+SFT"]


def test_no_scored_pair(model: Any, tokenizer: Any, pairs: list[Any]) -> None:
    found = measure(model, tokenizer, [pairs[4]], step=SHORT)
    assert (found.pairs, found.unscored, found.accuracy, found.ches_mean) == (0, 1, None, None)
    assert found.forecast == {"DPO": None, "DPO+SFT": None, "DPO+PLOT": None}
    assert found.on_policy["answers"] == 0


def test_an_interrupted_measure_goes_on(
    model: Any, tokenizer: Any, pairs: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight pairs are four batches of two: killed in the third, the second run does the third and the fourth alone."""
    calls, stop_at = 0, 3
    scores, forecasts = doctor._scores, doctor.forecast

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt
        return scores(*arguments)

    options: dict[str, Any] = {"step": SHORT, "answered": 2, "batch_size": 4, "partial": tmp_path / "m.partial"}
    whole = measure(model, tokenizer, pairs, **{**options, "partial": None})
    monkeypatch.setattr(doctor, "_scores", counted)
    with pytest.raises(KeyboardInterrupt):
        measure(model, tokenizer, pairs, **options)
    stop_at, done = 0, calls
    monkeypatch.setattr(doctor, "forecast", lambda *_, **__: pytest.fail("forecast again"))
    advanced: list[int] = []
    again = measure(model, tokenizer, pairs, bar=lambda *_: advanced.append, **options)
    assert calls - done == 2
    assert again == whole
    assert sum(advanced) == 2 * 1 + 2 + 2 + 8
    monkeypatch.setattr(doctor, "forecast", forecasts)
    weight = model.model.layers[0].mlp.up_proj.weight.data
    before = weight[0, 0].clone()
    weight[0, 0] += 1
    measure(model, tokenizer, pairs, **options)
    assert calls - done == 2 + 4  # another model's scores are never taken
    weight[0, 0] = before
    for changed in ({"seed": 1}, {"answered": 1}, {"step": Step(pairs=2, batches=1, answers=2, beta=0.2)}):
        files = len(list(tmp_path.iterdir()))
        measure(model, tokenizer, pairs, **{**options, **changed})
        assert len(list(tmp_path.iterdir())) == files + 1


def test_the_bar_moves_within_the_forecast_and_the_answers(
    model: Any, tokenizer: Any, pairs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches of two pairs and three answers are steps of their own, as are the answers of the model's own."""
    moved: list[int | str] = []
    for name in ("forecast", "continue_rows", "_scores"):
        real = getattr(doctor, name)

        def told(*given: Any, name: str = name, real: Any = real, **options: Any) -> Any:
            found = real(*given, **options)
            moved.append(name)
            return found

        monkeypatch.setattr(doctor, name, told)
    options: dict[str, Any] = {"step": Step(pairs=2, batches=2, answers=3), "answered": 5, "batch_size": 4}
    measure(model, tokenizer, pairs, bar=lambda *_: moved.append, **options)
    steps = [one for one in moved if one != 0]
    assert steps[: steps.index("forecast")] == [2, 2, 1, 1, 1]
    assert steps[steps.index("forecast") + 1 : steps.index("continue_rows")] == [4, 1]
    assert sum(one for one in moved if isinstance(one, int)) == 4 + 3 + 5 + 8


def short(context: int) -> Any:
    """A GPT-2 whose positions are learned, so that it cannot read past its context."""
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=400, n_positions=context, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    ).eval()


def test_the_context_is_the_models_own(tokenizer: Any) -> None:
    assert context_of(short(64)) == context_of(short(64), tokenizer) == 64
    assert context_of(None) is None
    assert context_of(None, SimpleNamespace(model_max_length=int(1e30))) is None  # transformers' "not known"
    limited = SimpleNamespace(model_max_length=48)
    assert context_of(None, limited) == 48
    assert context_of(short(64), limited) == 64
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
    assert context_of(SimpleNamespace(config=config), limited) == 48


def test_a_prompt_that_leaves_no_room_is_not_answered() -> None:
    """Of 20 positions 10 are for the answer; without a limit each prompt is answered."""
    pairs = [(ScoredSequence(np.zeros(20, np.int32), start, 20),) * 2 for start in (10, 11, 3, 19)]
    assert sorted(map(len, doctor._prompts(pairs, [0, 1, 2, 3], 9, 0, 20))) == [3, 10]
    assert sorted(map(len, doctor._prompts(pairs, [0, 1, 2, 3], 9, 0))) == [3, 10, 11, 19]


def test_answers_stay_within_the_context(tokenizer: Any, pairs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A context that just holds the pairs, and answers of twice as many tokens as were sampled."""
    some = [pairs[0], pairs[3]]
    longest = max(len(side.ids) for pair in some for side in pair)
    assert longest < some[0][0].start + doctor.TOKENS
    found = measure(short(longest), tokenizer, some, step=SHORT, answered=2)
    assert found.on_policy["answers"] == 2
    monkeypatch.setattr(doctor, "continue_rows", lambda *_, **__: ["harm " * 99, "king"])
    assert measure(short(longest), tokenizer, some, step=SHORT, answered=2).on_policy["answers"] == 2


def test_what_a_model_cannot_read_is_refused(model: Any, tokenizer: Any, pairs: list[Any]) -> None:
    longest = max(len(side.ids) for pair in pairs for side in pair)
    with pytest.raises(InputError, match=f"has {longest} tokens, expected at most the {longest - 1} that the model"):
        measure(short(longest - 1), tokenizer, pairs, step=SHORT)
    highest = max(int(side.ids.max()) for pair in pairs for side in pair)
    model.resize_token_embeddings(highest)
    with pytest.raises(InputError, match=f"a token the id {highest}, expected less than {highest}"):
        measure(model, tokenizer, pairs, step=SHORT)


def test_refused(model: Any, tokenizer: Any, pairs: list[Any]) -> None:
    with pytest.raises(InputError, match="batch_size is 0, expected 1 or more"):
        measure(model, tokenizer, pairs, batch_size=0)
    with pytest.raises(InputError, match="answered is 0"):
        measure(model, tokenizer, pairs, answered=0)
    model.get_output_embeddings().weight.data.fill_(math.inf)
    with pytest.raises(RunError, match="not finite"):
        doctor._scores(model, pairs[:1])
