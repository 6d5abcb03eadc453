"""The forecast against TRL's own gradients, and against what a small step really does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from plot_align.config import PlotConfig
from plot_align.doctor.forecast import (
    EPSILON,
    LOSSES,
    OPTIMIZERS,
    Step,
    directions,
    effects,
    first_gradients,
    forecast,
)
from plot_align.errors import InputError, RunError
from plot_align.plot import BalancedAlpha, PlotLoss
from plot_align.preference.distribution import PreferenceDistribution
from plot_align.preference.estimation import ScoredSequence, scored_pairs
from plot_align.trl import attach

BETA = 0.3


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    """In float64, with a head that has opinions, and dropout that evaluation turns off."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64, attention_dropout=0.5)
    model.get_output_embeddings().weight.data.mul_(20)
    return model.eval()


@pytest.fixture(scope="module")
def pairs(tiny_llama: Path, pair_rows: list[dict[str, str]]) -> list[Any]:
    return list(scored_pairs(Dataset.from_list(pair_rows[:12]), AutoTokenizer.from_pretrained(tiny_llama)))


@pytest.fixture
def plot(model: Any, preference: PreferenceDistribution) -> PlotLoss:
    return PlotLoss(preference, model.get_input_embeddings().weight.detach())


def of_batch(inputs: dict[str, Any]) -> list[Any]:
    """The pairs of a DPO trainer's batch."""
    sides = []
    columns = [inputs[name] for name in ("input_ids", "attention_mask", "completion_mask")]
    for ids, attention, scored in zip(*columns, strict=True):
        where = scored.nonzero().flatten().tolist()
        sides.append(ScoredSequence(ids[attention.bool()].numpy().astype(np.int32), where[0], where[-1] + 1))
    half = len(sides) // 2
    return list(zip(sides[:half], sides[half:], strict=True))


def naive(model: Any, batch: list[Any], plot: PlotLoss) -> dict[str, torch.Tensor]:
    """The losses of the first step in plain torch, from whole logits of one padded batch."""
    sequences = [pair[side] for side in (0, 1) for pair in batch]
    labels = torch.full((len(sequences), max(len(s.ids) for s in sequences)), -100)
    ids = torch.zeros_like(labels)
    for row, s in enumerate(sequences):
        ids[row, : len(s.ids)] = torch.from_numpy(s.ids.astype(np.int64))
        labels[row, s.start : s.stop] = ids[row, s.start : s.stop]
    scored = labels[:, 1:] != -100
    outputs = model(ids, attention_mask=(ids > 0).long(), output_hidden_states=True)
    logps = outputs.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1) * scored
    chosen, rejected = (logps.sum(-1) - logps.sum(-1).detach()).chunk(2)
    dpo = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()
    roles = torch.tensor([1, -1]).repeat_interleave(len(batch))
    term = plot(outputs.logits, labels, roles, reference_logits=outputs.logits.detach())
    alpha = BalancedAlpha(plot.config.ratio)(dpo, term, outputs.hidden_states[-1])
    sft = -logps[: len(batch)].sum() / scored[: len(batch)].sum()
    return {"DPO": dpo, "DPO+SFT": dpo + sft, "DPO+PLOT": dpo + alpha * term}


def first_of(loss: str, model: Any, batch: list[Any], plot: PlotLoss) -> list[torch.Tensor]:
    return next(gradients for name, gradients in first_gradients(model, batch, plot, BETA) if name == loss)


@pytest.mark.parametrize("name", LOSSES)
def test_first_gradients_are_trls(
    name: str, make_trainer: Any, preference: PreferenceDistribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step of TRL's trainer, with the term attached as users attach it; norms over all rows."""
    monkeypatch.setattr("plot_align.trl.gradients._SAMPLED_ROWS", 10_000)
    losses = ["sigmoid", "sft"] if name == "DPO+SFT" else ["sigmoid"]
    trainer = make_trainer("dpo", loss_type=losses, beta=BETA)
    if name == "DPO+PLOT":
        attach(trainer, preference, PlotConfig())
    trainer.model.eval()
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    model = copy.deepcopy(trainer.model).eval()
    plot = PlotLoss(preference, model.get_input_embeddings().weight.detach())
    found = first_of(name, model, of_batch(inputs), plot)
    trainer.compute_loss(trainer.model, dict(inputs)).backward()
    for ours, (key, theirs) in zip(found, trainer.model.named_parameters(), strict=True):
        scale = theirs.grad.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(ours / scale, theirs.grad / scale, rtol=0, atol=5e-5, msg=key)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_direction_is_what_the_optimizer_does(
    model: Any, pairs: list[Any], plot: PlotLoss, optimizer: str
) -> None:
    """torch's own optimizers take the first step of each batch; the direction is the mean over both, per unit rate."""
    step = Step(beta=BETA, pairs=3, batches=2)
    batches = [pairs[:3], pairs[3:6]]
    found = directions(model, batches, plot, step, OPTIMIZERS)
    rate = 1e-3
    near = {"sgd": 1e-5, "adamw": 2e-2}[optimizer]  # Adam divides a gradient near 0, and its rounding, by itself
    for name in LOSSES:
        moved = [torch.zeros_like(p) for p in model.parameters()]
        for batch in batches:
            copied = copy.deepcopy(model)
            make = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
            taken = make(copied.parameters(), lr=rate, weight_decay=0)
            naive(copied, batch, plot)[name].backward()
            taken.step()
            for total, new, old in zip(moved, copied.parameters(), model.parameters(), strict=True):
                total += (new.detach() - old.detach()) / rate / 2
        for ours, theirs in zip(found[optimizer, name], moved, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=near)
    assert torch.optim.AdamW([torch.zeros(1)]).defaults["eps"] == EPSILON


def test_effects_are_what_a_small_step_does(model: Any, pairs: list[Any], plot: PlotLoss) -> None:
    """Central differences of the log-probabilities along the direction, from whole logits."""
    step = Step(beta=BETA, pairs=3, batches=2)
    steps = directions(model, [pairs[:3], pairs[3:6]], plot, step)
    answers = [chosen for chosen, _ in pairs[6:9]]
    found = effects(model, answers, steps, learning_rate=2.0)

    def log_p(answer: ScoredSequence) -> float:
        with torch.no_grad():
            logits = model(torch.tensor(answer.ids[None].astype(np.int64))).logits[0].log_softmax(-1)
        return float(sum(logits[t - 1, answer.ids[t]] for t in range(answer.start, answer.stop)))

    size = 5e-6  # smaller, and the rounding of norms, which Llama takes in float32, would show
    for name, u in steps.items():
        ends = []
        for sign in (1, -1, 0):
            for parameter, direction in zip(model.parameters(), u, strict=True):
                parameter.data.add_(direction.double(), alpha={1: size, -1: -2 * size, 0: size}[sign])
            ends.append([log_p(answer) for answer in answers])
        slopes = [2.0 * (up - down) / (2 * size) for up, down in zip(ends[0], ends[1], strict=True)]
        assert found[name] == pytest.approx(slopes, rel=3e-4)
        assert max(map(abs, slopes)) > 1


def test_sft_raises_the_chosen_most(model: Any, pairs: list[Any], plot: PlotLoss) -> None:
    found = forecast(model, pairs, plot, Step(pairs=3, batches=2, answers=4))
    assert [len(values) for values in found.values()] == [4, 4, 4]
    assert min(found["DPO+SFT"]) > 0
    assert sum(found["DPO+SFT"]) > sum(found["DPO"])


def test_a_forecast_follows_the_learning_rate_and_leaves_the_model(
    model: Any, pairs: list[Any], plot: PlotLoss
) -> None:
    before = copy.deepcopy(model.state_dict())
    one, two = (
        forecast(model.train(), pairs, plot, Step(pairs=2, batches=1, answers=2, learning_rate=rate))
        for rate in (1e-3, 2e-3)
    )
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    for name in one:
        assert two[name] == pytest.approx([2 * value for value in one[name]])


def test_only_what_trains_steps(model: Any, pairs: list[Any], plot: PlotLoss) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    found = directions(model, [pairs[:2]], plot, Step())["adamw", "DPO"]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert [u.shape for u in found] == [p.shape for p in trained]
    assert 0 < len(found) < len(list(model.parameters()))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(InputError, match="no parameter of the model requires a gradient"):
        forecast(model, pairs, plot)


@pytest.fixture(params=[1, 2, 5, 12])
def some(request: pytest.FixtureRequest, pairs: list[Any]) -> list[Any]:
    return pairs[: request.param]


def test_answers_are_of_other_pairs(some: list[Any]) -> None:
    """Four pairs step; of fewer than eight at most half; of one pair both."""
    batches, answers = Step(pairs=2, batches=2, answers=3).split(some, seed=1)
    stepped = [pair for batch in batches for pair in batch]
    assert len(stepped) == {1: 1, 2: 1, 5: 2, 12: 4}[len(some)]
    assert len(answers) == {1: 1, 2: 1, 5: 3, 12: 3}[len(some)]
    assert all(len(batch) <= 2 for batch in batches)
    if len(some) > 1:
        chosen = {id(pair[0]) for pair in stepped}
        assert not chosen & {id(answer) for answer in answers}
        assert len(chosen) == len(stepped)


def test_refused(model: Any, pairs: list[Any], plot: PlotLoss, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="optimizer is 'adam', expected adamw or sgd"):
        Step(optimizer="adam")
    with pytest.raises(InputError, match="batches is 0, expected 1 or more"):
        Step(batches=0)

    def exhausted(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("plot_align.doctor.forecast.fused_head", exhausted)
    with pytest.raises(RunError, match=r"out of memory at the gradients of 8 pairs; use fewer pairs a step"):
        forecast(model, pairs, plot)
    monkeypatch.undo()
    model.lm_head.weight.data[3, 3] = torch.nan
    with pytest.raises(RunError, match="the forecast is not finite"):
        forecast(model, pairs, plot, Step(pairs=2, batches=1, answers=1))
