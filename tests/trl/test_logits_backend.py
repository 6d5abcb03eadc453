"""The logits that a trainer builds, in the layouts that it may build them in: against softmax of the whole forward."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from plot_align.config import PlotConfig
from plot_align.errors import InputError
from plot_align.preference.batch import Batch
from plot_align.trl.backends import LogitsBackend
from plot_align.trl.term import PlotTerm
from trainers import load

IDS = torch.arange(2, 20).view(2, 9)
LABELS = torch.where(torch.arange(9) < 5, -100, IDS)  # the last four are scored
BATCH = Batch(LABELS, torch.tensor([1, -1]))


@pytest.fixture
def models(tiny_llama):
    policy, reference = load(tiny_llama)[0].train(), load(tiny_llama)[0].eval()
    with torch.no_grad():
        for weight in reference.model.layers.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    return policy, reference


@pytest.fixture
def backend(models, preference):
    policy, reference = models
    config = PlotConfig.from_options(alpha=1.0, target="anchored", target_scope="batch")
    term = PlotTerm(preference, policy.get_input_embeddings().weight.detach(), config, rows=300)
    return LogitsBackend(policy, term, policy, reference)


def outputs_by_hand(model):
    """The mean softmax where the chosen row's last four tokens are predicted."""
    return model(input_ids=IDS).logits[0, 4:8].softmax(-1).mean(0)


@pytest.mark.parametrize("options", [{}, {"logits_to_keep": 5}, {"logits_to_keep": 7}])
def test_policy_and_reference(models, backend, options):
    policy, reference = models
    with backend.capture(BATCH):
        policy(input_ids=IDS + 1)  # other tokens: not this batch
        policy(input_ids=IDS, **options)
        with torch.no_grad():
            reference(input_ids=IDS + 1, **options)
            reference(input_ids=IDS, **options)
    result = backend.take()
    backend.remove()
    torch.testing.assert_close(result.head.distributions[0], outputs_by_hand(policy), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(result.reference[0], outputs_by_hand(reference), rtol=1e-5, atol=1e-8)
    assert not result.reference.requires_grad
    wanted = policy(input_ids=IDS).logits[:, 4:8].log_softmax(-1).gather(-1, IDS[:, 5:, None]).flatten()
    torch.testing.assert_close(result.head.log_probs, wanted)
    want, got = (
        torch.autograd.grad((x * torch.arange(300)).sum(), policy.lm_head.weight)[0]
        for x in (outputs_by_hand(policy), result.head.distributions[0])
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_virtual_tokens_stand_before_the_row_s_own(models, backend):
    """Prompt-learning PEFT lengthens the logits at their start, by three here."""
    from peft import PromptTuningConfig, get_peft_model

    tuned = get_peft_model(models[0], PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    backend.remove()
    backend = LogitsBackend(models[0], backend.term, tuned)
    with backend.capture(BATCH):
        logits = tuned(input_ids=IDS).logits  # (2, 12, V)
    found = backend.take().head.distributions[0]
    torch.testing.assert_close(found, logits[0, 7:11].softmax(-1).mean(0), rtol=1e-5, atol=1e-8)


def test_logits_that_begin_after_the_first_label(models, backend):
    with backend.capture(BATCH), pytest.raises(InputError, match=r"logits of shape \(2, 4, 300\) for labels of shape"):
        models[0](input_ids=IDS, logits_to_keep=4)


def test_a_forward_without_logits(models, backend):
    policy = models[0]
    policy.forward = lambda input_ids: SimpleNamespace(logits=None)
    with backend.capture(BATCH), pytest.raises(InputError, match="returned no logits, as Liger's fused losses do"):
        policy(input_ids=IDS)


def test_nothing_is_left_on_the_models(models, backend):
    backend.remove()
    for model in models:
        assert not model._forward_hooks
        assert not model.lm_head._forward_pre_hooks
