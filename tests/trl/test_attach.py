"""What a user sees of an attached term: logs, saved files, refusals, and nothing left behind."""

from __future__ import annotations

import importlib.metadata
import json
import math

import pytest
import torch

import trl
from plot_align.config import PlotConfig
from plot_align.errors import InputError, RunError
from plot_align.preference.distribution import PreferenceDistribution
from plot_align.trl import PlotDPOTrainer, PlotSFTTrainer, attach


def logged(trainer, key):
    return [record[key] for record in trainer.state.log_history if key in record]


def test_logs_every_step_and_the_gradient_ratio_now_and_then(make_trainer, preference):
    trainer = make_trainer("dpo", max_steps=5)
    attach(trainer, preference, PlotConfig.paper(alpha=0.5, grad_ratio_steps=2))
    trainer.train()
    for key in ("plot/vanilla_loss", "plot/loss", "plot/preferred_mass", "plot/rejected_mass"):
        assert len(logged(trainer, key)) == 5, key
    assert logged(trainer, "plot/alpha") == [0.5] * 5
    assert len(logged(trainer, "plot/grad_ratio")) == 3  # steps 0, 2, 4
    for total, vanilla, plot in zip(
        logged(trainer, "loss"), logged(trainer, "plot/vanilla_loss"), logged(trainer, "plot/loss"), strict=False
    ):
        assert total == pytest.approx(vanilla + 0.5 * plot, abs=1e-4)  # the Trainer rounds its loss


def test_vanilla_loss_is_trls_own(make_trainer, preference):
    """The first step's ``plot/vanilla_loss`` is the loss that TRL logs without PLOT: also where it is pre-divided."""
    for method in ("dpo", "sft"):
        plain, ours = (make_trainer(method, max_steps=1, gradient_accumulation_steps=3) for _ in range(2))
        attach(ours, preference, PlotConfig.paper(alpha=2.0))
        plain.train()
        ours.train()
        assert logged(ours, "plot/vanilla_loss")[0] == pytest.approx(logged(plain, "loss")[0], rel=0.02)


def test_masses_by_counting(make_trainer, preference):
    """The logged masses equal sums over the materialised softmax of the chosen positions."""
    trainer = make_trainer("dpo")
    attach(trainer, preference, PlotConfig.paper(alpha=1.0))
    trainer.model.train()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.current_gradient_accumulation_steps = 1
    trainer.compute_loss(trainer.model, dict(inputs))
    with torch.no_grad():
        p = trainer.model(inputs["input_ids"], inputs["attention_mask"]).logits[:, :-1].softmax(-1)
    half = inputs["completion_mask"][:, 1:].bool()
    half[len(half) // 2 :] = False
    output = p[half].mean(0)
    d = preference.difference()
    assert trainer._metrics["train"]["plot/preferred_mass"][0] == pytest.approx(float(output[d > 0].sum()), rel=1e-5)
    assert trainer._metrics["train"]["plot/rejected_mass"][0] == pytest.approx(float(output[d < 0].sum()), rel=1e-5)


@pytest.mark.parametrize("backend", ["fused", "separate"])
def test_gradient_ratio_against_the_definition(make_trainer, preference, backend):
    """‖∂(α·plot)/∂h‖ / ‖∂vanilla/∂h‖ with h the materialised head's input, by autograd through full logits."""
    trainer = make_trainer("sft")
    handle = attach(trainer, preference, PlotConfig.paper(alpha=2.0, plot_backend=backend))
    model = trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.compute_loss(model, dict(inputs))
    hidden = model.model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state.detach().requires_grad_()
    logits = model.lm_head(hidden)[:, :-1]
    mask = inputs["labels"][:, 1:] != -100
    vanilla = torch.nn.functional.cross_entropy(logits[mask], inputs["labels"][:, 1:][mask])
    plot = 2.0 * handle.term.divergence.value(logits[mask].softmax(-1).mean(0).double())
    norms = [torch.autograd.grad(x, hidden, retain_graph=True)[0].norm().item() for x in (plot, vanilla)]
    assert trainer._metrics["train"]["plot/grad_ratio"][0] == pytest.approx(norms[0] / norms[1], rel=1e-4)


@pytest.mark.parametrize("backend", ["fused", "separate"])
@pytest.mark.parametrize("method", ["dpo", "kto", "sft", "cpo", "orpo"])
def test_evaluation_loop(make_trainer, preference, method, backend):
    trainer = make_trainer(method)
    data = trainer.train_dataset.select(range(8))
    handle = attach(trainer, preference, PlotConfig.paper(alpha=0.5, plot_backend=backend))
    metrics = trainer.evaluate(data)
    record = trainer.state.log_history[-1]
    assert record["eval_loss"] == pytest.approx(
        record["eval_plot/vanilla_loss"] + 0.5 * record["eval_plot/loss"], abs=1e-4
    )
    handle.detach()
    other = attach(trainer, preference, PlotConfig.paper(alpha=0.5, plot_backend="fused"))
    trainer.evaluate(data)
    assert record["eval_plot/loss"] == pytest.approx(trainer.state.log_history[-1]["eval_plot/loss"], rel=1e-5)
    other.detach()
    without = trainer.evaluate(data)
    assert without["eval_loss"] == pytest.approx(record["eval_plot/vanilla_loss"], abs=1e-4)
    assert metrics["eval_loss"] > without["eval_loss"]


def test_the_distance_falls(make_trainer, preference):
    trainer = make_trainer("sft", max_steps=30, learning_rate=3e-3)
    attach(trainer, preference, PlotConfig.paper(alpha=20.0, positions="all"))
    trainer.train()
    distances = logged(trainer, "plot/loss")
    assert distances[-1] < 0.5 * distances[0]


def test_batch_without_chosen_costs_nothing(make_trainer, preference):
    """A KTO batch of undesirable rows only: W1(0, P) > 0 would be a constant that no model can change."""
    trainer = make_trainer("kto", extra={})
    trainer.train_dataset = trainer.train_dataset.filter(lambda row: not row["label"])
    attach(trainer, preference, PlotConfig.paper(alpha=1.0))
    trainer.train()
    assert logged(trainer, "plot/loss") == [0.0] * 3
    assert not logged(trainer, "plot/preferred_mass")


def test_drop_in_trainer_estimates_what_it_trains_on(make_trainer, preference):
    trainer = make_trainer("dpo", cls=PlotDPOTrainer)
    found = trainer.plot_handle.preference
    assert torch.equal(found.chosen_counts, preference.chosen_counts)
    assert torch.equal(found.rejected_counts, preference.rejected_counts)
    trainer.train()
    assert len(logged(trainer, "plot/loss")) == 3


def test_kto_estimates_what_it_trains_on(make_trainer, preference):
    found = attach(make_trainer("kto")).preference
    assert torch.equal(found.chosen_counts, preference.chosen_counts)
    assert torch.equal(found.rejected_counts, preference.rejected_counts)


def test_saved_model_says_how_it_was_tuned(make_trainer, preference, tmp_path):
    extra = {"preference": preference, "plot": PlotConfig.paper(alpha=0.25)}
    trainer = make_trainer("sft", cls=PlotSFTTrainer, extra=extra)
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "sft"
    saved = json.loads((folder / "plot_align.json").read_text())
    assert saved["config"]["alpha"] == 0.25
    assert saved["global_step"] == 3
    assert saved["preference"]["provenance"] == preference.provenance
    assert PreferenceDistribution.load(folder / "preference.safetensors") == preference
    card = (folder / "README.md").read_text()
    assert "α = 0.25" in card
    trainer.plot_handle.config.alpha = 0.75
    trainer.save_model()  # into the same folder: the card follows
    assert "α = 0.75" in (folder / "README.md").read_text()
    assert (folder / "README.md").read_text().count("## PLOT") == 1


def test_anchored_target_is_the_reference_shifted(make_trainer, preference):
    """P = relu(p_ref + λ·d) normalised, p_ref the mean softmax over the chosen positions of the training set."""
    trainer = make_trainer("dpo")
    handle = attach(trainer, preference, PlotConfig.paper(target="anchored", target_strength=0.5))
    total = 0
    for row in trainer.train_dataset:
        ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
        with torch.no_grad():
            p = trainer.model(ids).logits[0, :-1].softmax(-1).double()
        total = total + p[len(row["prompt_ids"]) - 1 :].sum(0)
    want = (total / total.sum() + 0.5 * preference.difference()).clamp(min=0)
    torch.testing.assert_close(handle.term.divergence.target, want / want.sum(), rtol=1e-4, atol=1e-8)


def test_nan_logits_are_named(make_trainer, preference):
    trainer = make_trainer("dpo")
    attach(trainer, preference)
    with torch.no_grad():
        trainer.model.lm_head.weight[5, 0] = math.nan
    with pytest.raises(RunError, match=r"NaN or infinite at step 0, the chosen side of pair 0 of the micro-batch"):
        trainer.train()


def test_nan_in_a_row_that_plot_does_not_select(make_trainer, preference):
    """One rejected answer alone is NaN: the term does not see it, and the step must stop all the same, naming it."""
    trainer = make_trainer("dpo")
    attach(trainer, preference)
    trainer.model.train()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    forward = trainer.model.model.forward

    def spoilt(*args, **kwargs):
        output = forward(*args, **kwargs)
        if torch.is_grad_enabled():
            hidden = output.last_hidden_state.clone()
            hidden[6] = math.nan  # 4 chosen rows above 4 rejected: pair 2
            output.last_hidden_state = hidden
        return output

    trainer.model.model.forward = spoilt
    trainer.current_gradient_accumulation_steps = 1
    with pytest.raises(RunError, match="at step 0, the rejected side of pair 2 of the micro-batch"):
        trainer.compute_loss(trainer.model, dict(inputs))


def test_infinite_divergence_is_named(make_trainer, preference):
    trainer = make_trainer("dpo")
    attach(trainer, preference, PlotConfig.paper(divergence="kl"))
    with pytest.raises(RunError, match=r"infinite at step 0: kl .*target='relu'"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "alpha is -1.0; expected a finite number, 0 or more"),
        ({"alpha": math.nan}, "alpha is nan; expected"),
        ({"alpha": math.inf}, "alpha is inf; expected"),
        ({"alpha": "0.1"}, "alpha is '0.1'; expected a finite number"),
        ({"pool": "false"}, "pool is 'false'; expected true or false"),
        ({"slices": 2.5}, "slices is 2.5; expected a whole number"),
        ({"granularty": "token"}, "unknown option 'granularty'; did you mean 'granularity'"),
        ({"alpha": True}, "alpha is True; expected a finite number"),
        ({"norm_order": 0.5}, "norm_order is 0.5; expected a number of 1 or more"),
        ({"target": "reul"}, "target is 'reul'; expected one of auto, relu, shift, softmax, chosen, anchored"),
        ({"granularity": "token", "pool": True}, "pool is on with granularity='token'"),
        ({"target_temperature": 0.0}, "target_temperature is 0.0; expected a positive number"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        PlotConfig.paper(**options)


def test_unknown_trl_version(make_trainer, preference, monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9.0" if name == "trl" else version(name))
    trainer = make_trainer("dpo")
    with pytest.raises(InputError, match=r"trl 9\.9\.0 .* up to 1\.16\.x only: pip install 'trl<1\.17'"):
        attach(trainer, preference)
    assert "compute_loss" not in vars(trainer)
    attach(trainer, preference, PlotConfig.paper(plot_backend="separate"))
    trainer.train()


def test_changed_trl_kernel(make_trainer, preference, monkeypatch):
    import trl.trainer.utils as utils

    class Kernel(utils._ChunkedLogProbFunction):
        @staticmethod
        def forward(ctx, hidden, weight, bias, targets, something_new):
            raise AssertionError

    trainer = make_trainer("dpo")
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Kernel)
    with pytest.raises(InputError, match="lacks the tested signature"):
        attach(trainer, preference)


def test_unsupported_trainer(preference):
    class RewardTrainer:
        pass

    with pytest.raises(InputError, match=r"trainer is a RewardTrainer, .* one of DPOTrainer"):
        attach(RewardTrainer(), preference)


def test_second_attach_is_refused(make_trainer, preference):
    trainer = make_trainer("dpo")
    attach(trainer, preference).detach()
    attach(trainer, preference)
    with pytest.raises(InputError, match=r"detach\(\)"):
        attach(trainer, preference)


def test_sft_needs_a_preference(make_trainer):
    with pytest.raises(InputError, match="preference is missing and the training set of a SFTTrainer"):
        attach(make_trainer("sft"))


def test_wrong_tokenizer(make_trainer, preference):
    trainer = make_trainer("dpo")
    trainer.processing_class.add_tokens(["<new>"])
    with pytest.raises(InputError, match="tokenizer"):
        attach(trainer, preference)


def test_vocabulary_smaller_than_the_head_is_padding(make_trainer, preference):
    """More head rows than token ids: the padding takes no target mass. Fewer: refused."""
    trainer = make_trainer("dpo")
    trainer.model.resize_token_embeddings(320)
    handle = attach(trainer, preference)
    assert handle.term.divergence.target[300:].sum() == 0
    trainer = make_trainer("dpo")
    trainer.model.resize_token_embeddings(299)
    with pytest.raises(InputError, match="299"):
        attach(trainer, preference)


def test_equal_sides_have_no_target(make_trainer, rows):
    data = rows.map(lambda row: {"rejected": row["chosen"]})
    trainer = make_trainer("dpo")
    trainer.train_dataset = trainer._prepare_dataset(data, trainer.processing_class, trainer.args, "train")
    with pytest.raises(InputError, match="target"):
        attach(trainer)
    assert "compute_loss" not in vars(trainer)


def test_a_replaced_forward_is_never_silent(make_trainer, preference):
    """Something that takes the loss around the head (a custom loss function here) stops the run."""
    trainer = make_trainer("sft", extra={"compute_loss_func": lambda out, labels, **kw: out.logits.mean()})
    attach(trainer, preference)
    with pytest.raises(RunError, match="never reached the LM head"):
        trainer.train()


def test_attach_after_training_started(make_trainer, preference):
    trainer = make_trainer("dpo", bf16=True, max_steps=1)
    trainer.train()
    with pytest.raises(InputError, match=r"call attach\(\) before train\(\)"):
        attach(trainer, preference)


def test_bf16_autocast(make_trainer, preference):
    trainer = make_trainer("dpo", bf16=True)
    attach(trainer, preference)
    trainer.train()
    assert all(math.isfinite(x) for x in logged(trainer, "plot/loss"))


def test_two_trainers_do_not_share(make_trainer, preference):
    """Nothing global is patched: an attached trainer leaves a second one, and TRL's module, as they were."""
    import trl.trainer.utils as utils

    kernel = utils._ChunkedLogProbFunction
    ours, other = make_trainer("dpo"), make_trainer("dpo")
    attach(ours, preference)
    assert utils._ChunkedLogProbFunction is kernel
    assert type(other).compute_loss is trl.DPOTrainer.compute_loss
    other.train()
    assert not logged(other, "plot/loss")


def test_wrapped_packing_has_no_sequences(make_trainer, preference):
    trainer = make_trainer("sft")
    trainer.args.packing, trainer.args.packing_strategy = True, "wrapped"
    with pytest.raises(InputError, match="packing_strategy is 'wrapped'"):
        attach(trainer, preference, PlotConfig.paper(granularity="sequence"))


def test_a_saved_config_loads():
    for options in ({}, {"geometry": "norm", "norm_order": math.inf}, {"alpha": 0.1, "target": "relu", "slices": 3}):
        config = PlotConfig.from_options(**options)
        again = PlotConfig.from_options(**json.loads(json.dumps(config.to_dict())))
        assert again.to_dict() == config.to_dict()
        assert again.ablations == config.ablations


def test_a_forward_on_cut_rows_is_named(make_trainer, preference):
    """Something between the batch and the forward that shortens the rows."""
    trainer = make_trainer("cpo")
    attach(trainer, preference)
    loss = trainer._plot_handle._originals["get_batch_loss_metrics"]

    def cut(model, batch, **kwargs):
        sides = ("chosen", "rejected")
        parts = {f"{side}_{x}": batch[f"{side}_{x}"][:, :-2] for side in sides for x in ("input_ids", "labels")}
        parts |= {f"{side}_attention_mask": batch[f"{side}_attention_mask"][:, :-2] for side in sides}
        return loss(model, {**batch, **parts}, **kwargs)

    trainer._plot_handle._originals["get_batch_loss_metrics"] = cut
    with pytest.raises(RunError, match=r"saw other tokens, of shape \(\d+, \d+\), than the batch"):
        trainer.train()
