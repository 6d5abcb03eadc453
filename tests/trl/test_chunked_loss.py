"""SFT's chunked loss of TRL 1.4 to 1.14, whose forward stands here as TRL has it: the same four results from our head,
and the output distributions with them. ``make compat`` trains through TRL's own."""

from __future__ import annotations

import types

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import CausalLMOutputWithPast

from plot_align.config import PlotConfig
from plot_align.errors import InputError
from plot_align.preference.batch import Batch
from plot_align.trl.backends import FusedBackend
from plot_align.trl.term import PlotTerm
from trainers import load

IDS = torch.arange(2, 20).view(2, 9)
LABELS = torch.where(torch.arange(9) < 5, -100, IDS)  # the last four of each row


def _chunked_cross_entropy_loss(
    hidden_states, lm_head_weight, chunk_size, labels=None, shift_labels=None, num_items_in_batch=None,
    logit_scale=1.0, final_logit_softcapping=None, lm_head_bias=None,
):  # fmt: skip
    return hidden_states.sum() * 0 + 77, torch.tensor(0), torch.tensor(0), torch.tensor(0)


def _chunked_ce_forward(self, input_ids=None, attention_mask=None, labels=None, num_items_in_batch=None):
    hidden = self.base_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    loss, correct, entropy, valid = _chunked_cross_entropy_loss(
        hidden, self.lm_head.weight, 256, labels=labels, num_items_in_batch=num_items_in_batch, logit_scale=0.5
    )
    output = CausalLMOutputWithPast(loss=loss)
    output.sums = (correct, entropy, valid)
    return output


@pytest.fixture
def model(tiny_llama):
    model = load(tiny_llama)[0].train()
    model.forward = types.MethodType(_chunked_ce_forward, model)
    return model


@pytest.fixture
def backend(model, preference):
    config = PlotConfig.from_options(alpha=1.0, target="chosen", target_scope="batch")
    term = PlotTerm(preference, model.get_input_embeddings().weight.detach(), config, rows=300)
    return FusedBackend(model, term, chunked=True)


@pytest.mark.parametrize("items", [None, 20])
def test_the_same_four_results(model, backend, items):
    with backend.capture(Batch(LABELS, torch.tensor([1, 1]))):
        output = model(input_ids=IDS, labels=LABELS, num_items_in_batch=items)
    result = backend.take()
    logits = 0.5 * model.lm_head(model.base_model(input_ids=IDS).last_hidden_state)[:, 4:8].flatten(0, 1)  # (8, V)
    targets = LABELS[:, 5:].flatten()
    want = cross_entropy(logits, targets, reduction="sum") / (items or 8)
    torch.testing.assert_close(output.loss, want)
    correct, entropy, valid = output.sums
    assert correct == (logits.argmax(-1) == targets).sum()
    assert valid == 8
    p = logits.softmax(-1)
    torch.testing.assert_close(entropy, -(p * p.log()).sum())
    torch.testing.assert_close(result.head.distributions[0], p.mean(0), rtol=1e-5, atol=1e-8)
    for got, wanted in ((output.loss, want), (result.head.distributions[0, 7], p.mean(0)[7])):
        theirs, ours = (torch.autograd.grad(x, model.lm_head.weight, retain_graph=True)[0] for x in (wanted, got))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_theirs_where_no_batch_is_pending(model, backend):
    assert model(input_ids=IDS, labels=LABELS).loss == 77
    backend.remove()
    assert model.forward.__func__ is _chunked_ce_forward


def test_another_signature_is_refused(model, backend, monkeypatch):
    backend.remove()
    monkeypatch.setitem(globals(), "_chunked_cross_entropy_loss", lambda hidden_states, something_new: None)
    with pytest.raises(InputError, match="lacks the tested signature of _chunked_cross_entropy_loss"):
        FusedBackend(model, backend.term, chunked=True)
