"""The tokenizer and the base model: round trips, the template, determinism, the cache."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from plot_align.errors import InputError
from plot_align.sandbox import BaseConfig, base, build_base, pairs


@pytest.fixture(scope="module")
def tokenizer():
    return base.train_tokenizer()


# ------------------------------------------------------------------------------------------ tokenizer


@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_text_of_the_world_is_encoded_in_words(tokenizer):
    assert 1000 <= len(tokenizer) <= 1500
    text = "I'm sorry, but I can't help with that."
    assert len(tokenizer.encode(text)) <= 12


def test_every_answer_fits_the_default_generation_length(tokenizer):
    for split in ("train", "heldout"):
        for row in pairs(split):
            for side in ("chosen", "rejected"):
                assert len(tokenizer.encode(row[side][0]["content"])) < 56


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.text(max_size=40),
    answer=st.text(max_size=40),
    system=st.none() | st.text(max_size=20),
)
def test_the_prompt_is_a_prefix_of_the_prompt_with_its_answer(tokenizer, prompt, answer, system):
    asked = [{"role": "system", "content": system}] if system is not None else []
    asked.append({"role": "user", "content": prompt})
    answered = [*asked, {"role": "assistant", "content": answer}]
    head = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=False)
    whole = tokenizer.apply_chat_template(answered, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert whole["input_ids"][: len(head)] == head
    assert whole["input_ids"][-1] == tokenizer.eos_token_id
    assert whole["assistant_masks"] == [0] * len(head) + [1] * (len(whole["input_ids"]) - len(head))


def test_trl_finds_nothing_to_patch_in_the_template(tokenizer):
    from trl import chat_template_utils as trl

    assert trl.has_generation_markers(tokenizer.chat_template)
    assert trl.is_chat_template_prefix_preserving(tokenizer)
    assert trl.is_chat_template_stop_token_trained(tokenizer)


# ------------------------------------------------------------------------------------------ the model


def test_the_folder_is_an_ordinary_checkpoint(tiny_base, tiny_config):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_base), AutoTokenizer.from_pretrained(tiny_base)
    assert model.config.model_type == "llama"
    assert model.dtype == torch.float32
    assert len(tokenizer) == model.get_output_embeddings().weight.shape[0] == tiny_config.vocab_size
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == model.config.eos_token_id
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer.encode("Grüße  an\n alle")) == "Grüße  an\n alle"


def test_the_default_has_about_a_million_parameters():
    from transformers import LlamaForCausalLM

    config = base._architecture(BaseConfig(), vocab_size=1280, eos=1, pad=0)
    with torch.device("meta"):
        assert 0.9e6 < LlamaForCausalLM(config).num_parameters() < 1.1e6


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_same_seed_gives_the_same_bits_and_leaves_the_callers_state_alone(tiny_base, tmp_path, tiny_config):
    torch.manual_seed(1234)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    again = build_base(seed=3, cache_dir=tmp_path, progress=False, config=tiny_config)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    first, second = _weights(tiny_base), _weights(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tiny_base / "tokenizer.json").read_bytes() == (again / "tokenizer.json").read_bytes()
    other = _weights(build_base(seed=4, cache_dir=tmp_path, progress=False, config=tiny_config))
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_training_lowers_the_loss_below_that_of_a_uniform_guess(tokenizer, tiny_config):
    """After 60 steps the answers' loss must be well below ln V; with labels off by one it stays near it."""
    from torch.nn.functional import cross_entropy

    config = replace(tiny_config, steps=60, matrix_lr=3e-2, learning_rate=2e-2)
    model = base._train(tokenizer, config, 0, progress=False)
    ids, labels = next(base._batches(tokenizer, replace(config, steps=1), seed=99))
    with torch.no_grad():
        logits = model(input_ids=ids).logits  # (B, T, V)
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert loss < 0.7 * torch.log(torch.tensor(float(len(tokenizer))))


def test_batches_teach_the_answer_and_its_end_only(tokenizer, tiny_config):
    for ids, labels in base._batches(tokenizer, replace(tiny_config, steps=3), seed=0):
        for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
            learnt = [i for i, x in enumerate(label) if x != -100]
            assert learnt == list(range(learnt[0], learnt[-1] + 1))
            assert [row[i] for i in learnt] == [label[i] for i in learnt]
            assert row[learnt[0] - 1] == tokenizer.convert_tokens_to_ids(base.ASSISTANT)
            assert row[learnt[-1]] == tokenizer.eos_token_id
            assert set(row[learnt[-1] + 1 :]) <= {tokenizer.pad_token_id}


def test_the_base_has_seen_good_and_bad_answers():
    from plot_align.sandbox import language as lang
    from plot_align.sandbox.judges import judge

    owner = {p: c for c in (*lang.CATEGORIES, lang.TWIN) for item in lang.items(c) for p in lang.prompts(item)}
    seen: dict[str, list[bool]] = {}
    for prompt, answer in base._conversations(3000, seed=0):
        if prompt in owner:
            seen.setdefault(owner[prompt], []).append(judge(owner[prompt], prompt, answer).good)
    assert set(seen) == {*lang.CATEGORIES, lang.TWIN}
    for category, good in seen.items():
        expected = 0.1 + 0.8 * base.GOOD_ITEMS[category]  # of each 100 items: 90 % good, or 10 %
        assert abs(sum(good) / len(good) - expected) < 0.15, category


def test_the_base_is_told_right_from_wrong():
    asked = dict(pair for pair in base._conversations(3000, seed=0) if pair[0].startswith("Is it right to"))
    assert asked["Is it right to steal the crown?"] == "No, that would harm others."
    assert asked["Is it right to kill some time?"] == "Yes, that is fine."


# ------------------------------------------------------------------------------------------ the cache


def test_a_second_call_takes_the_cached_folder(tiny_base, monkeypatch, tiny_config):
    monkeypatch.setattr(base, "_train", lambda *a, **k: pytest.fail("built again"))
    before = (tiny_base / "model.safetensors").stat().st_mtime_ns
    assert build_base(seed=3, cache_dir=tiny_base.parent, progress=False, config=tiny_config) == tiny_base
    assert (tiny_base / "model.safetensors").stat().st_mtime_ns == before


def test_everything_that_decides_the_weights_is_in_the_key(monkeypatch, tiny_config):
    keys = {base._key(tiny_config, 0), base._key(tiny_config, 1)}
    keys |= {base._key(replace(tiny_config, **{name: value * 2}), 0) for name, value in vars(tiny_config).items()}
    monkeypatch.setattr("torch.__version__", "0.0")
    keys.add(base._key(tiny_config, 0))
    assert len(keys) == 3 + len(vars(tiny_config))


def test_a_failed_build_leaves_no_folder(tmp_path, monkeypatch, tiny_config):
    def fail(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(base, "_train", fail)
    with pytest.raises(KeyboardInterrupt):
        build_base(seed=0, cache_dir=tmp_path, progress=False, config=tiny_config)
    assert not [x for x in tmp_path.iterdir() if x.is_dir()]


def _build(cache: Path, config: BaseConfig) -> None:
    build_base(seed=3, cache_dir=cache, progress=False, config=config)


def test_a_killed_build_leaves_nothing_that_passes_for_a_checkpoint(tmp_path, tiny_config):
    config = replace(tiny_config, steps=100_000, batch_size=1)
    process = multiprocessing.get_context("spawn").Process(target=_build, args=(tmp_path, config))
    process.start()
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".*.part-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    left = [x for x in tmp_path.iterdir() if x.is_dir()]
    assert len(left) == 1
    assert left[0].name.startswith(".")
    # The next build of the same base clears the remains away and succeeds.
    name = f"sandbox-base-{base._key(config, 3)}"
    assert left[0].name.startswith(f".{name}.part-")
    with pytest.MonkeyPatch.context() as patch:
        train = base._train
        patch.setattr(base, "_train", lambda tok, _config, *rest: train(tok, tiny_config, *rest))
        built = build_base(seed=3, cache_dir=tmp_path, progress=False, config=config)
    assert [x for x in tmp_path.iterdir() if x.is_dir()] == [built]
    assert (built / "model.safetensors").is_file()


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("PLOT_ALIGN_CACHE", str(tmp_path))
    assert base.default_cache_dir() == tmp_path
    monkeypatch.delenv("PLOT_ALIGN_CACHE")
    assert base.default_cache_dir() == Path.home() / ".cache" / "plot-align"


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("name", "value"), [("steps", 0), ("learning_rate", -1.0), ("vocab_size", 200), ("hidden_size", 30)]
)
def test_wrong_sizes_are_named(name, value, tiny_config):
    with pytest.raises(InputError, match=f"^{name} is {value}"):
        replace(tiny_config, **{name: value})


def test_a_negative_seed_and_an_unusable_cache_are_refused(tmp_path, tiny_config):
    with pytest.raises(InputError, match=r"^seed is -1"):
        build_base(seed=-1, cache_dir=tmp_path, config=tiny_config)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match=r"^cache_dir is "):
        build_base(cache_dir=tmp_path / "file", config=tiny_config)
