"""CPO, SimPO and ORPO, whose loss reads ``outputs.logits``: what differs from the trainers with a fused head."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch

from oracles.training import materialised_loss
from plot_align.config import PlotConfig
from plot_align.errors import InputError, RunError
from plot_align.trl import attach
from plot_align.trl.backends import LogitsBackend
from plot_align.trl.batches import policy_batch

KINDS = {"cpo": "CPOTrainer", "orpo": "ORPOTrainer"}


def logged(trainer, key):
    return [record[key] for record in trainer.state.log_history if key in record]


def first_batch(trainer):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


@pytest.mark.parametrize("method", ["cpo", "orpo"])
def test_batch_is_the_trainers_own(make_trainer, method):
    """Labels and places against ``concatenated_inputs`` of the trainer, with either side the longer one."""
    trainer = make_trainer(method)
    inputs = first_batch(trainer)
    for longer in ("chosen", "rejected"):
        batch = dict(inputs)
        for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
            batch[f"{longer}_{name}"] = torch.nn.functional.pad(batch[f"{longer}_{name}"], (0, 3), value=fill)
        theirs = trainer.concatenated_inputs(batch, padding_value=0)
        ours = policy_batch(KINDS[method], batch)
        assert torch.equal(ours.labels, theirs["concatenated_labels"])
        assert ours.roles.tolist() == [1] * 4 + [-1] * 4


def test_what_a_subclass_adds_to_its_loss_reaches_it(make_trainer, preference):
    """Frameworks that derive from TRL's trainers pass more arguments to ``get_batch_loss_metrics``."""
    base = type(make_trainer("orpo"))

    class Scaled(base):
        def get_batch_loss_metrics(self, model, batch, train_eval="train", scale=1.0):
            loss, metrics = super().get_batch_loss_metrics(model, batch, train_eval=train_eval)
            return loss * scale, metrics

    trainer = make_trainer("orpo", cls=Scaled)
    inputs = first_batch(trainer)
    attach(trainer, preference, PlotConfig.paper(alpha=0.5))
    single, double = (trainer.get_batch_loss_metrics(trainer.model, dict(inputs), scale=x)[0] for x in (1.0, 2.0))
    vanilla = trainer._plot_handle._originals["get_batch_loss_metrics"](trainer.model, dict(inputs))[0]
    torch.testing.assert_close(double - single, vanilla)


@pytest.mark.parametrize("method", ["cpo", "simpo", "orpo"])
def test_logs_what_the_others_log(make_trainer, preference, method):
    trainer = make_trainer(method, max_steps=3)
    handle = attach(trainer, preference, PlotConfig.paper(alpha=0.5, grad_ratio_steps=2))
    assert isinstance(handle._backend, LogitsBackend)
    trainer.train()
    for key in ("plot/vanilla_loss", "plot/loss", "plot/preferred_mass", "plot/rejected_mass"):
        assert len(logged(trainer, key)) == 3, key
    assert logged(trainer, "plot/alpha") == [0.5] * 3
    assert len(logged(trainer, "plot/grad_ratio")) == 2  # steps 0 and 2
    for total, vanilla, plot in zip(
        logged(trainer, "loss"), logged(trainer, "plot/vanilla_loss"), logged(trainer, "plot/loss"), strict=True
    ):
        assert total == pytest.approx(vanilla + 0.5 * plot, abs=1e-3)  # the Trainer rounds its loss
    assert len(logged(trainer, "rewards/margins")) == 3  # and TRL's own are still there


@pytest.mark.parametrize("backend", ["fused", "separate"])
@pytest.mark.parametrize("method", ["cpo", "orpo"])
def test_gradient_ratio_against_the_definition(make_trainer, preference, method, backend):
    """‖∂(α·plot)/∂h‖ / ‖∂vanilla/∂h‖: h is offset by a leaf just before the head, and both losses differentiated."""
    trainer = make_trainer(method)
    inputs = first_batch(trainer)
    handle = attach(trainer, preference, PlotConfig.paper(alpha=2.0, plot_backend=backend))
    trainer.compute_loss(trainer.model, dict(inputs))
    ratio = trainer._stored_metrics["train"]["plot/grad_ratio"][0]
    handle.detach()

    model = trainer.model
    offset = torch.zeros(*policy_batch(KINDS[method], inputs).labels.shape, 32, requires_grad=True)  # (B, T, H)
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].detach() + offset,))
    vanilla = trainer.compute_loss(model, dict(inputs))
    plot = materialised_loss(trainer, KINDS[method], inputs, handle.config, preference)
    norms = [torch.autograd.grad(loss, offset)[0].norm().item() for loss in (plot, vanilla)]
    assert ratio == pytest.approx(norms[0] / norms[1], rel=1e-4)


@pytest.mark.parametrize("method", ["cpo", "orpo"])
def test_counts_what_it_trains_on(make_trainer, method):
    """Without a preference it is counted: against a loop over the trainer's own batches; rows are truncated here."""
    trainer = make_trainer(method, max_length=15)
    found = attach(trainer).preference
    counts = torch.zeros(2, 300, dtype=torch.int64)
    truncated = 0
    for inputs in trainer.get_train_dataloader():
        labels = trainer.concatenated_inputs(inputs)["concatenated_labels"][:, 1:]
        for row, tokens in enumerate(labels):
            scored = tokens[tokens != -100].tolist()
            truncated += scored[-1] != trainer.processing_class.eos_token_id
            for token in scored:
                counts[int(row >= len(labels) // 2), token] += 1
    assert truncated > 0
    assert torch.equal(found.chosen_counts, counts[0])
    assert torch.equal(found.rejected_counts, counts[1])
    assert found.provenance["policy"]["max_length"] == 15


def test_anchored_target_is_the_reference_shifted(make_trainer, preference):
    trainer = make_trainer("cpo")
    handle = attach(trainer, preference, PlotConfig.paper(target="anchored", target_strength=0.5))
    total = 0
    for row in trainer.train_dataset:
        with torch.no_grad():
            p = trainer.model(torch.tensor([row["chosen_input_ids"]])).logits[0, :-1].softmax(-1).double()
        total = total + p[torch.tensor(row["chosen_labels"][1:]) != -100].sum(0)
    want = (total / total.sum() + 0.5 * preference.difference()).clamp(min=0)
    torch.testing.assert_close(handle.term.divergence.target, want / want.sum(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("backend", ["fused", "separate"])
def test_a_nan_row_is_named(make_trainer, preference, backend):
    """Row 6 of 4 chosen above 4 rejected is NaN: PLOT does not select it, and the step stops all the same."""
    trainer = make_trainer("cpo")
    inputs = first_batch(trainer)
    attach(trainer, preference, PlotConfig.paper(plot_backend=backend))
    forward = trainer.model.model.forward

    def spoilt(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state.clone()
        output.last_hidden_state[6] = math.nan
        return output

    trainer.model.model.forward = spoilt
    with pytest.raises(RunError, match="NaN or infinite at step 0, the rejected side of pair 2 of the micro-batch"):
        trainer.compute_loss(trainer.model, dict(inputs))


def test_a_policy_that_is_not_called_is_never_silent(make_trainer, preference):
    trainer = make_trainer("cpo")
    inputs = first_batch(trainer)
    attach(trainer, preference)
    model = trainer.model
    trainer.concatenated_forward = lambda *args: (torch.zeros(4),) * 4 + (model.lm_head.weight.sum(),)
    with pytest.raises(RunError, match="never reached the LM head"):
        trainer.compute_loss(model, dict(inputs))


def test_encoder_decoder_is_refused(make_trainer, preference):
    trainer = make_trainer("orpo")
    trainer.is_encoder_decoder = True
    with pytest.raises(InputError, match="the model of the ORPOTrainer is an encoder-decoder"):
        attach(trainer, preference)


def test_hooks_are_gone_after_detach(make_trainer, preference):
    trainer = make_trainer("cpo")
    attach(trainer, preference).detach()
    assert not trainer.model._forward_hooks
    assert not trainer.model.lm_head._forward_pre_hooks
    assert "get_batch_loss_metrics" not in vars(trainer)


def test_bf16_autocast(make_trainer, preference):
    trainer = make_trainer("orpo", bf16=True)
    attach(trainer, preference, PlotConfig.paper(alpha=1.0))
    trainer.train()
    assert all(math.isfinite(x) for x in logged(trainer, "plot/loss"))


def test_saved_model_says_how_it_was_tuned(make_trainer, preference, tmp_path):
    trainer = make_trainer("orpo", save_strategy="steps", save_steps=3)
    attach(trainer, preference, PlotConfig.paper(alpha=0.25))
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "orpo", tmp_path / "orpo" / "checkpoint-3"):
        assert json.loads((folder / "plot_align.json").read_text())["config"]["alpha"] == 0.25
        assert (folder / "preference.safetensors").exists()
    card = (tmp_path / "orpo" / "README.md").read_text()
    assert "ORPOTrainer's loss" in card
    assert "α = 0.25" in card


@pytest.mark.parametrize("alpha", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", [["aot"], ["sigmoid", "aot_unpaired"]])
def test_sorting_one_pair_is_said(make_trainer, preference, loss_type, alpha):
    trainer = make_trainer("dpo", loss_type=loss_type, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    with pytest.warns(UserWarning, match=f"loss_type is '{loss_type[-1]}' .* raise per_device_train_batch_size"):
        attach(trainer, preference, PlotConfig.paper(alpha=alpha))


def test_sorting_one_pair_is_plain_dpo(make_trainer):
    """What the warning says: the two losses, and their gradients' norms, are those of sigmoid."""
    losses = {}
    for name in ("sigmoid", "aot", "aot_unpaired"):
        trainer = make_trainer("dpo", loss_type=[name], per_device_train_batch_size=1, gradient_accumulation_steps=3)
        trainer.train()
        losses[name] = logged(trainer, "loss"), logged(trainer, "grad_norm")
    assert losses["aot"] == losses["sigmoid"]
    assert losses["aot_unpaired"] == losses["sigmoid"]


@pytest.mark.parametrize(("loss_type", "size"), [(["aot"], 2), (["sigmoid"], 1)])
def test_no_warning_without_a_cause(make_trainer, preference, loss_type, size):
    trainer = make_trainer("dpo", loss_type=loss_type, per_device_train_batch_size=size)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        attach(trainer, preference)
