"""Who writes prompts, and what is made of what they write."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from plot_align.errors import InputError
from plot_align.inference.endpoint import Endpoint, EndpointError, Reply
from plot_align.redteam.attackers import (
    EndpointAttacker,
    LocalAttacker,
    Sampling,
    clean,
    fill,
    require_slots,
    with_context,
    written,
)
from plot_align.redteam.behaviors import Behavior

SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def local(tiny_base: Path) -> LocalAttacker:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return LocalAttacker(
        AutoModelForCausalLM.from_pretrained(tiny_base), AutoTokenizer.from_pretrained(tiny_base), "tiny"
    )


def test_a_local_attacker_writes_one_text_an_instruction(local: LocalAttacker) -> None:
    """Same seed, same texts, whatever the global random state; another seed, others; the state stays as it was."""
    asked = ["Hello.", "How do I make tea, and what comes after that?", "Hello."]
    torch.manual_seed(1)
    first = local.write(asked, **SAMPLING, seed=5)
    state = torch.get_rng_state()
    second = local.write(asked, **SAMPLING, seed=5)
    assert first == second
    assert torch.equal(state, torch.get_rng_state())
    assert len(first) == 3
    assert first[0] != first[2]
    assert local.write(asked, **SAMPLING, seed=6) != first


def test_a_local_attacker_asks_through_the_chat_template(local: LocalAttacker) -> None:
    """At temperature 0 it writes what transformers' own greedy decoding gives after the rendered conversation."""
    rendered = local.tokenizer.apply_chat_template(
        [{"role": "user", "content": "How do I make tea?"}], add_generation_prompt=True, tokenize=False
    )
    ids = local.tokenizer(rendered, return_tensors="pt", add_special_tokens=False)
    out = local.model.generate(**ids, max_new_tokens=8, do_sample=False)
    expected = local.tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
    assert local.write(["How do I make tea?"], temperature=0.0, top_p=1.0, max_new_tokens=8, seed=0) == [expected]


def test_no_instructions_no_texts(local: LocalAttacker) -> None:
    assert local.write([], **SAMPLING, seed=0) == []


def test_a_local_attacker_needs_a_template_and_a_batch(local: LocalAttacker, tiny_llama: Path) -> None:
    from transformers import AutoTokenizer

    with pytest.raises(InputError, match="chat template"):
        LocalAttacker(local.model, AutoTokenizer.from_pretrained(tiny_llama), "plain")
    with pytest.raises(InputError, match="batch_size is 0"):
        LocalAttacker(local.model, local.tokenizer, "tiny", batch_size=0)


class Remote(Endpoint):
    """Answers with what it was asked and the seed; the first of two answers comes last."""

    def chat(self, messages: Sequence[Mapping[str, str]], **options: Any) -> Reply:
        content = messages[0]["content"]
        if content == "bad":
            raise EndpointError("no")
        asked = (content, messages[0]["role"], len(messages), options.pop("seed"), tuple(sorted(options.items())))
        with LOCK:
            ASKED.append(asked)
        if content == "slow":
            assert QUICK.wait(5), "quick was not asked while slow waited"
        if content == "quick":
            QUICK.set()
        return Reply(content.upper(), 1, 1)


ASKED: list[tuple[Any, ...]] = []
LOCK = threading.Lock()
QUICK = threading.Event()


@pytest.fixture
def remote() -> EndpointAttacker:
    ASKED.clear()
    QUICK.clear()
    return EndpointAttacker(Remote("http://localhost/v1", "big"), workers=2)


def test_an_endpoint_attacker_keeps_the_order_and_asks_at_the_same_time(remote: EndpointAttacker) -> None:
    """The slow one answers only once the quick one was asked, and gives up after five seconds."""
    assert remote.write(["slow", "quick"], **SAMPLING, seed=1) == ["SLOW", "QUICK"]
    assert QUICK.is_set()
    assert remote.name == "big"


def test_an_endpoint_attacker_asks_one_user_turn_with_all_options(remote: EndpointAttacker) -> None:
    remote.write(["x"], **SAMPLING, seed=1)
    ((content, role, turns, _, options),) = ASKED
    assert (content, role, turns) == ("x", "user", 1)
    assert options == (("max_tokens", 8), ("temperature", 1.0), ("top_p", 0.9))


def test_seeds_of_an_endpoint_differ_and_fit_31_bits(remote: EndpointAttacker) -> None:
    for seed in (2**62 + 3, 2**62 + 4):
        remote.write(["x"] * 40, **SAMPLING, seed=seed)
    seeds = [asked[3] for asked in ASKED]
    assert len(set(seeds)) == 80
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert max(seeds) >= 2**30
    ASKED.clear()
    remote.write(["x"] * 40, **SAMPLING, seed=2**62 + 3)
    assert {asked[3] for asked in ASKED} == set(seeds[:40])


def test_a_failing_endpoint_stops_the_rest(remote: EndpointAttacker) -> None:
    with pytest.raises(EndpointError):
        remote.write(["bad"] * 2 + ["x"] * 500, **SAMPLING, seed=0)
    assert len(ASKED) < 500


def test_workers_must_be_positive(remote: EndpointAttacker) -> None:
    with pytest.raises(InputError, match="workers is 0"):
        EndpointAttacker(remote.endpoint, workers=0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  How?  ", "How?"),
        ("1. How?", "How?"),
        ("12) How?", "How?"),
        ("Prompt: How?", "How?"),
        ("**Prompt:** How?", "How?"),
        ("**Prompt**: How?", "How?"),
        ("Test prompt 2: How?", "How?"),
        ('"How?"', "How?"),
        ("“How?”", "How?"),
        ("'I don't know how'", "I don't know how"),
        ('1. Prompt: "How?"', "How?"),
        ('"Prompt: How?"', "How?"),
        ("<think>What\nnow?</think>\n\nHow?", "How?"),
        ("<think>What now", ""),
        ('"a" or "b"', '"a" or "b"'),
        ("1.5 litres?", "1.5 litres?"),
        ("1984. How?", "1984. How?"),
        ("Prompt answers help: how?", "Prompt answers help: how?"),
        ('Say "Prompt: x"', 'Say "Prompt: x"'),
        ('"', '"'),
        ('""', ""),
        ("", ""),
    ],
)
def test_clean(text: str, expected: str) -> None:
    assert clean(text) == expected
    assert clean(clean(text)) == clean(text)


def test_fill_replaces_each_slot_once() -> None:
    """Neither other braces nor slots inside the values are touched."""
    assert fill("{a} {b} {c} {", {"a": "{b}", "b": r"\1"}) == r"{b} \1 {c} {"


def test_a_missing_slot_is_named() -> None:
    require_slots("template", "x {behavior}", "behavior")
    with pytest.raises(InputError, match=r"^template is 'x', but must hold \{behavior\}"):
        require_slots("template", "x", "behavior")


def test_the_context_goes_before() -> None:
    assert with_context(Behavior("b", "text", context="read this"), "Why?") == "read this\n\n---\n\nWhy?"
    assert with_context(Behavior("b", "text"), "Why?") == "Why?"


@pytest.mark.parametrize(
    ("options", "named"),
    [((-0.1, 1, 1), "temperature"), ((1, 0, 1), "top_p"), ((1, 1.1, 1), "top_p"), ((1, 1, 0), "max")],
)
def test_sampling_out_of_range(options: tuple[float, float, int], named: str) -> None:
    with pytest.raises(InputError, match=f"^{named}"):
        Sampling(*options)


@dataclass
class Scripted:
    """Answers of each call, one list a call."""

    answers: list[list[str]]
    calls: list[tuple[list[str], int]] = field(default_factory=list)
    name: str = "scripted"

    def write(
        self, instructions: Sequence[str], *, temperature: float, top_p: float, max_new_tokens: int, seed: int
    ) -> list[str]:
        self.calls.append((list(instructions), seed))
        return self.answers[len(self.calls) - 1]


def test_only_what_is_empty_is_asked_for_again() -> None:
    attacker = Scripted([["a", " ", "c", '""'], ["", "Prompt: d"], ["b"]])
    assert written(attacker, "go", 4, Sampling(1, 1, 9), [7, 8, 9, 10]) == ["a", "b", "c", "d"]
    assert attacker.calls == [(["go"] * 4, 7), (["go"] * 2, 8), (["go"], 9)]


def test_the_silent_are_given_up() -> None:
    attacker = Scripted([["a", ""], [""]])
    assert written(attacker, "go", 2, Sampling(1, 1, 9), [7, 8]) == ["a"]
    assert len(attacker.calls) == 2
