"""DPO's batches in each form that TRL and the frameworks on it have given them, and SFT's packed ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from plot_align.errors import InputError
from plot_align.trl.batches import model_inputs, policy_batch

# Two pairs: prompts 1 2 and 3, answers 4 5 6 and 7 (chosen), 8 and 9 10 (rejected); 0 is padding.
CONCATENATED = {
    "prompt_input_ids": torch.tensor([[1, 2], [0, 3]]),
    "prompt_attention_mask": torch.tensor([[1, 1], [0, 1]]),
    "chosen_input_ids": torch.tensor([[4, 5, 6], [7, 0, 0]]),
    "chosen_attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
    "rejected_input_ids": torch.tensor([[8, 0], [9, 10]]),
    "rejected_attention_mask": torch.tensor([[1, 0], [1, 1]]),
}
IDS = torch.tensor([[1, 2, 4, 5, 6], [3, 7, 0, 0, 0], [1, 2, 8, 0, 0], [3, 9, 10, 0, 0]])
LABELS = [
    [-100, -100, 4, 5, 6], [-100, 7, -100, -100, -100], [-100, -100, 8, -100, -100], [-100, 9, 10, -100, -100]
]  # fmt: skip


def before_0_29(max_length=None, truncation_mode="keep_end"):
    """The two options that the trainer of TRL before 0.29 applies in its forward."""
    return SimpleNamespace(max_length=max_length, truncation_mode=truncation_mode)


@pytest.mark.parametrize(
    ("inputs", "trainer"),
    [
        ({"input_ids": IDS, "completion_mask": (torch.tensor(LABELS) != -100).long()}, None),
        ({"input_ids": IDS, "attention_mask": (IDS > 0).long(), "labels": torch.tensor(LABELS)}, None),
        (CONCATENATED, before_0_29()),
        (CONCATENATED, before_0_29(max_length=5)),
    ],
    ids=["TRL 0.29 and later", "labels alone", "TRL before 0.29", "TRL before 0.29, long enough"],
)
def test_pairs_of_every_form(inputs, trainer):
    batch = policy_batch("DPOTrainer", inputs, trainer)
    assert batch.labels.tolist() == LABELS
    assert batch.roles.tolist() == [1, 1, -1, -1]


def test_the_forward_s_tokens_before_0_29():
    inputs = model_inputs("DPOTrainer", CONCATENATED, before_0_29())
    assert inputs["input_ids"].tolist() == IDS.tolist()
    assert inputs["attention_mask"].tolist() == (IDS > 0).long().tolist()


@pytest.mark.parametrize(
    ("mode", "ids", "labels"),
    [
        (
            "keep_start",
            [[1, 2, 4], [3, 7, 0], [1, 2, 8], [3, 9, 10]],
            [[-100, -100, 4], [-100, 7, -100], [-100, -100, 8], [-100, 9, 10]],
        ),
        (
            "keep_end",
            [[4, 5, 6], [3, 7, 0], [1, 2, 8], [3, 9, 10]],
            [[4, 5, 6], [-100, 7, -100], [-100, -100, 8], [-100, 9, 10]],
        ),
    ],
)
def test_truncated_to_three_before_0_29(mode, ids, labels):
    assert model_inputs("DPOTrainer", CONCATENATED, before_0_29(3, mode))["input_ids"].tolist() == ids
    assert policy_batch("DPOTrainer", CONCATENATED, before_0_29(3, mode)).labels.tolist() == labels


def test_a_batch_of_another_form_is_refused():
    with pytest.raises(InputError, match="the DPO batch has the keys text; expected input_ids with completion_mask"):
        policy_batch("DPOTrainer", {"text": ["a"]})


def test_packed_sequences_are_told_apart():
    """position_ids 0 1 2 0 1 | 0 1 0 1 2 pack four documents: 3, 2, 2 and 3 tokens."""
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]])
    batch = policy_batch("SFTTrainer", {"labels": torch.ones(2, 5, dtype=torch.long), "position_ids": positions})
    assert batch.sequence_ids().tolist() == [[0, 0, 1, 1], [2, 3, 3, 3]]
