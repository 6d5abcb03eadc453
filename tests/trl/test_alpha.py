"""α over the steps: schedules by hand, the balance against norms taken independently, and a resumed run."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import TrainerState

import plot_align.trl.gradients as gradients
from plot_align.config import PlotConfig
from plot_align.errors import InputError
from plot_align.trl import attach
from plot_align.trl.alpha import AlphaSchedule


def logged(trainer, key):
    return [record[key] for record in trainer.state.log_history if key in record]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"alpha": 2.0}, [2.0, 2.0, 2.0, 2.0]),
        ({"alpha": 2.0, "alpha_schedule": "linear"}, [2.0, 1.5, 1.0, 0.5]),
        ({"alpha": 0.0, "alpha_schedule": "linear", "alpha_end": 4.0}, [0.0, 1.0, 2.0, 3.0]),
        ({"alpha": 2.0, "alpha_schedule": "cosine"}, [2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)]),
        (
            {"alpha": 1.0, "alpha_schedule": "cosine", "alpha_end": 3.0},
            [1.0, 2 - math.sqrt(0.5), 2.0, 2 + math.sqrt(0.5)],
        ),
    ],
)
def test_schedules_by_hand(make_trainer, preference, options, expected):
    assert [AlphaSchedule(PlotConfig.from_options(**options)).value(step, 4) for step in range(4)] == pytest.approx(
        expected
    )
    trainer = make_trainer("dpo", max_steps=4)
    attach(trainer, preference, PlotConfig.from_options(**options))
    trainer.train()
    assert logged(trainer, "plot/alpha") == pytest.approx(expected)


def test_balance_by_hand():
    """ρ = 0.5. Norms (8, 4): 0.5·8/4 = 1. Then (2, 4): vanilla 0.9·0.8 + 0.2 = 0.92, plot 0.9·0.4 + 0.4 = 0.76."""
    alpha = AlphaSchedule(PlotConfig(alpha=7.0, alpha_schedule="balance", balance_ratio=0.5))
    assert alpha.value(0, 10) == 7.0
    alpha.observe(0, 8.0, 4.0)
    assert alpha.value(0, 10) == pytest.approx(1.0)
    alpha.observe(1, 2.0, 4.0)
    assert alpha.value(1, 10) == pytest.approx(0.5 * 0.92 / 0.76)
    for nothing in ((0.0, 4.0), (4.0, 0.0), (math.nan, 4.0), (4.0, math.inf)):
        alpha.observe(2, *nothing)
        assert alpha.value(2, 10) == pytest.approx(0.5 * 0.92 / 0.76)


def test_measured_often_at_first_and_once_a_step():
    alpha = AlphaSchedule(PlotConfig(alpha_schedule="balance"))
    measured = []
    for step in range(22):
        for _ in range(3):  # micro-batches
            if alpha.wants_measurement(step):
                alpha.observe(step, 1.0, 1.0)
                measured.append(step)
    assert measured == [*range(10), 10, 15, 20]
    assert not AlphaSchedule(PlotConfig(alpha=1.0)).wants_measurement(0)


@pytest.mark.parametrize("method", ["dpo", "sft", "kto"])
def test_balance_holds_the_ratio(make_trainer, preference, monkeypatch, method):
    """α of the first step is ρ times the norms' ratio by autograd through the whole head; later the mean holds."""
    monkeypatch.setattr(gradients, "_SAMPLED_ROWS", 10_000)
    trainer = make_trainer(method, max_steps=10)
    config = PlotConfig(alpha_schedule="balance", balance_ratio=0.3, grad_ratio_steps=0)
    handle = attach(trainer, preference, config)
    measure, wanted = handle._measure, []

    def measured_twice(vanilla, loss, result):
        norms = [
            torch.autograd.grad(x, result.hidden, retain_graph=True)[0].norm().item() for x in (vanilla, loss)
        ]  # fmt: skip
        wanted.append(0.3 * norms[0] / norms[1])
        return measure(vanilla, loss, result)

    monkeypatch.setattr(handle, "_measure", measured_twice)
    trainer.train()
    assert logged(trainer, "plot/alpha")[0] == pytest.approx(wanted[0], rel=1e-4)
    ratios = logged(trainer, "plot/grad_ratio")
    assert len(ratios) == 10
    assert torch.tensor(ratios).log().mean().exp().item() == pytest.approx(0.3, rel=0.3)
    assert len(set(logged(trainer, "plot/alpha"))) > 1


def test_a_resumed_run_goes_on_with_the_averages(make_trainer, preference, tmp_path):
    config = PlotConfig(alpha_schedule="balance", balance_ratio=0.3)
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "output_dir": str(tmp_path / "run")}
    whole = make_trainer("dpo", **options)
    attach(whole, preference, config)
    whole.train()
    resumed = make_trainer("dpo", **options)
    attach(resumed, preference, config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert logged(resumed, "plot/alpha") == logged(whole, "plot/alpha")
    for want, got in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(got, want)


def test_a_new_run_starts_afresh(make_trainer, preference):
    """A second ``train()`` of the same trainer does not begin with the first one's averages."""
    trainer = make_trainer("dpo", max_steps=4)
    handle = attach(trainer, preference, PlotConfig())
    trainer.train()
    assert handle.alpha.balance.plot > 0
    handle.alpha.on_train_begin(None, TrainerState(), None)
    assert (handle.alpha.balance.vanilla, handle.alpha.balance.plot, handle.alpha.last_step) == (0.0, 0.0, -1)


@pytest.mark.parametrize("alpha", [0.0, None])
def test_resuming_from_a_run_without_plot(make_trainer, preference, tmp_path, alpha):
    """The checkpoint knows nothing of the averages; the run goes on, measures afresh and saves again."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path / "run")}
    make_trainer("dpo", **options).train()
    resumed = make_trainer("dpo", **options, restore_callback_states_from_checkpoint=True)
    attach(resumed, preference, PlotConfig(alpha=alpha))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    again = make_trainer("dpo", **{**options, "max_steps": 6}, restore_callback_states_from_checkpoint=True)
    attach(again, preference, PlotConfig(alpha=alpha))
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert again.state.global_step == 6


def test_an_unusable_micro_batch_does_not_use_up_the_step():
    """GRPO with one row a micro-batch: the first has no chosen position, the second is measured."""
    alpha = AlphaSchedule(PlotConfig())
    alpha.observe(0, 3.0, 0.0)
    assert alpha.wants_measurement(0)
    alpha.observe(0, 3.0, 2.0)
    assert not alpha.wants_measurement(0)
    assert alpha.value(0, 10) == pytest.approx(0.5 * 3 / 2)


def test_nothing_pulls_where_policy_and_target_agree(make_trainer, preference):
    """λ = 0 at the first step: the target is the output itself; W1's sign must not turn rounding into a gradient."""
    for divergence, geometry in (("w1", "norm"), ("w1", "sliced"), ("tv", "norm"), ("js", "norm")):
        config = PlotConfig.from_options(
            alpha=10.0, target="anchored", target_scope="batch", target_strength=0.0, divergence=divergence,
            geometry=geometry,
        )  # fmt: skip
        trainer = make_trainer("dpo", max_steps=1)
        attach(trainer, preference, config)
        trainer.train()
        assert abs(logged(trainer, "plot/loss")[0]) < 1e-12
        assert logged(trainer, "plot/grad_ratio")[0] == pytest.approx(0.0, abs=1e-6)


def test_an_evaluation_is_comparable_with_the_next(make_trainer, preference):
    """Under a weight that moves, ``eval_loss`` is the vanilla loss; under a constant one it holds the term."""
    for config in (PlotConfig(), PlotConfig(alpha=2.0)):
        trainer = make_trainer("dpo", max_steps=2)
        attach(trainer, preference, config)
        trainer.train()
        metrics = trainer.evaluate(trainer.train_dataset.select(range(8)))
        vanilla, plot = (trainer.state.log_history[-1][f"eval_plot/{name}"] for name in ("vanilla_loss", "loss"))
        assert plot > 0
        weight = 0.0 if config.alpha is None else 2.0
        assert metrics["eval_loss"] == pytest.approx(vanilla + weight * plot, abs=1e-4)


def test_sampled_rows_estimate_the_norms(make_trainer, preference, monkeypatch):
    """Over all offsets of the sample, the mean of the squares is the square over all rows."""
    trainer = make_trainer("dpo")
    handle = attach(trainer, preference, PlotConfig(alpha=1.0))
    kept = {}
    run_head = handle._backend.run_head

    def keep(*args):
        head = run_head(*args)
        kept["result"] = handle._backend.result
        return head

    monkeypatch.setattr(handle._backend, "run_head", keep)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    total = trainer.compute_loss(trainer.model, dict(inputs))
    result = kept["result"]
    rows = result.hidden.size(0)
    monkeypatch.setattr(gradients, "_SAMPLED_ROWS", 10_000)
    exact = gradients.gradient_norms(total, result.head.distributions.square().sum(), result).double()
    stride = next(k for k in range(2, rows + 1) if rows % k == 0)
    monkeypatch.setattr(gradients, "_SAMPLED_ROWS", rows // stride)
    loss = result.head.distributions.square().sum()
    squares = [gradients.gradient_norms(total, loss, result, offset=k).double().square() for k in range(stride)]
    torch.testing.assert_close(torch.stack(squares).mean(0).sqrt(), exact, rtol=1e-5, atol=0)
    assert max(squares[0][0] / squares[1][0], squares[1][0] / squares[0][0]) > 1.001  # they are different rows


def test_alpha_zero_with_a_schedule():
    assert PlotConfig(alpha=0.0).is_off
    assert PlotConfig(alpha=0.0, alpha_schedule="balance").is_off
    assert not PlotConfig(alpha=0.0, alpha_schedule="linear", alpha_end=0.1).is_off


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha_schedule": "step"}, "alpha_schedule is 'step'; expected one of constant, linear, cosine, balance"),
        ({"alpha_end": -1.0}, "alpha_end is -1.0; expected a finite number, 0 or more"),
        ({"balance_ratio": 0.0}, "balance_ratio is 0.0; expected a positive number"),
        ({"alpha": 0.1, "alpha_end": 1.0}, "alpha_end is 1 with alpha_schedule='constant', which has no end"),
        ({"target_strength": -0.5}, "target_strength is -0.5; expected a finite number, 0 or more"),
        ({"target_scope": "batch", "granularity": "token"}, "target_scope is 'batch' with granularity='token'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(InputError, match=message):
        PlotConfig.from_options(**options)


@pytest.mark.parametrize(
    ("method", "target", "options", "message"),
    [
        (
            "kto",
            "relu",
            {"per_device_train_batch_size": 1, "loss_type": "apo_zero_unpaired"},
            "one row of a KTOTrainer",
        ),
        ("sft", "anchored", {}, "this SFTTrainer makes no reference forward"),
        ("grpo", "anchored", {}, "this GRPOTrainer makes no reference forward"),
        ("dpo", "anchored", {"precompute_ref_log_probs": True}, "this DPOTrainer makes no reference forward"),
        ("sft", "relu", {}, "an SFTTrainer's micro-batch holds no rejected completion"),
    ],
)
def test_no_target_in_the_micro_batch(make_trainer, preference, method, target, options, message):
    trainer = make_trainer(method, **options)
    with pytest.raises(InputError, match=message):
        attach(trainer, preference, PlotConfig.from_options(target=target, target_scope="batch"))
    assert "compute_loss" not in vars(trainer)


def test_a_side_missing_in_the_micro_batch_costs_nothing(make_trainer, preference):
    """KTO rows of one kind only: no preference can be counted, so the step is TRL's own."""
    trainer = make_trainer("kto")
    trainer.train_dataset = trainer.train_dataset.filter(lambda row: row["label"])
    attach(trainer, preference, PlotConfig.from_options(alpha=1.0, target="relu", target_scope="batch"))
    trainer.train()
    assert logged(trainer, "plot/loss") == [0.0] * 3
