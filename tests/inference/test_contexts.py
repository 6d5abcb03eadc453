"""What is preferred where, against contexts that are known beforehand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from plot_align.cli.main import main
from plot_align.errors import InputError
from plot_align.inference.contexts import preferences_by_context
from plot_align.preference.estimation import ScoredSequence, estimate, load_pairs, scored_pairs
from plot_align.records import read_record


class Words:
    """A tokenizer of 40 numbered words."""

    def get_vocab(self) -> dict[str, int]:
        return {f"w{i}": i for i in range(40)}

    def convert_ids_to_tokens(self, index: int) -> str:
        return f"w{index}"

    def decode(self, ids: list[int], **_: object) -> str:
        return f"w{ids[0]}"


def by_last_token() -> LlamaForCausalLM:
    """A model without layers: its last hidden state is the direction of the token that was read last. Even tokens have
    one direction, odd tokens another."""
    config = LlamaConfig(vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=0, num_attention_heads=1)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight[:] = 0.01 * torch.randn(40, 8)
        for token in range(40):
            model.get_input_embeddings().weight[token, token % 2] = 1.0
    return model


def sequence(*ids: int, start: int = 1) -> ScoredSequence:
    return ScoredSequence(np.array(ids, np.int32), start, len(ids))


def test_tokens_are_counted_where_the_model_is_in_one_state() -> None:
    # After an even token people prefer 20 to 30, after an odd one 30 to 20: over all there is no preference.
    pairs = [
        (sequence(2, 20), sequence(4, 30)),
        (sequence(3, 30), sequence(5, 20)),
    ] * 12  # fmt: skip
    found = preferences_by_context(by_last_token(), Words(), iter(pairs), contexts=2, batch_size=5)
    told = {(tuple(t.id for t in c.preferred), tuple(t.id for t in c.rejected)) for c in found}
    assert told == {((20,), (30,)), ((30,), (20,))}
    assert [(c.chosen_tokens, c.rejected_tokens) for c in found] == [(12, 12), (12, 12)]
    (token,) = found[0].preferred
    assert (token.chosen, token.rejected, token.difference) == (12, 0, 1.0)
    assert token.z == pytest.approx(12 / np.sqrt(24 * 0.25))  # two proportions, 1 and 0, pooled 0.5


def test_the_prompt_and_the_padding_are_not_counted() -> None:
    long = sequence(2, 20, 2, 21, 3, 30, start=3)  # counts 21, 3 and 30
    pairs = [(long, sequence(4, 31, start=1)), (sequence(7, 30), sequence(9, 22))] * 16
    found = preferences_by_context(by_last_token(), Words(), pairs, contexts=2, batch_size=3)
    counted = {frozenset(t.id for t in c.preferred): c.chosen_tokens for c in found}
    # After an even token: 21 (after 2); after an odd one: 3 (after 21), 30 (after 3), 30 (after 7).
    assert counted == {frozenset({21}): 16, frozenset({3, 30}): 48}


def test_tokens_within_chance_are_not_shown() -> None:
    pairs = [(sequence(2, 20), sequence(4, 21)), (sequence(3, 22), sequence(5, 23))]
    found = preferences_by_context(by_last_token(), Words(), pairs, contexts=2)
    assert [(c.preferred, c.rejected) for c in found] == [([], []), ([], [])]


@pytest.mark.parametrize(("contexts", "pairs"), [(1, [(sequence(2, 20), sequence(4, 30))]), (3, []), (40, [])])
def test_too_few_contexts_or_tokens_are_refused(contexts: int, pairs: list) -> None:
    with pytest.raises(InputError, match=str(contexts)):
        preferences_by_context(by_last_token(), Words(), pairs, contexts=contexts)


def test_the_command_shows_and_records_them(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": f"question {i}", "chosen": "I am sorry, I can not help", "rejected": "Sure, this is how"}
        for i in range(12)
    ]
    Dataset.from_list(rows).to_json(tmp_path / "pairs.jsonl")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    estimate(load_pairs(str(tmp_path / "pairs.jsonl")), tokenizer, progress=False).save(tmp_path / "p.safetensors")
    command = ["inspect", str(tmp_path / "p.safetensors"), "--tokenizer", str(tiny_llama)]
    record = tmp_path / "contexts.record.json"
    assert main([*command, "--record", str(record)]) == 2  # nothing to record without the pairs
    assert "--pairs" in capsys.readouterr().err
    command += ["--pairs", str(tmp_path / "pairs.jsonl"), "--contexts", "3", "--rows", "10"]
    assert main([*command, "--json", "--record", str(record)]) == 0
    contexts = json.loads(capsys.readouterr().out)["contexts"]
    assert contexts == read_record(record, "inspect")["results"]["contexts"]
    counted = sum(context["chosen_tokens"] for context in contexts)
    some = list(scored_pairs(load_pairs(str(tmp_path / "pairs.jsonl")), tokenizer))[:10]
    assert 0 < counted <= sum(chosen.stop - chosen.start for chosen, _ in some)
    assert main(command) == 0
    assert "preferred where" in capsys.readouterr().out
