"""SFS with a scripted attacker, and a scripted victim whose loss of a case is the number written in it."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from scipy.stats import chisquare

from plot_align.errors import InputError
from plot_align.inference.endpoint import EndpointError
from plot_align.redteam import sfs
from plot_align.redteam.attack import Request
from plot_align.redteam.behaviors import Behavior
from plot_align.redteam.sfs import SFS, draw
from plot_align.redteam.victim import Victim

KING = Behavior("king", "How?")
TEMPLATES = {"template": "{behavior}|{shots}", "zero_shot_template": "zero {behavior}"}


@dataclass
class Scripted:
    """Writes the numbers of ``pool`` when asked without examples, then those of ``later``; an exception is raised."""

    pool: Sequence[str]
    later: Sequence[str | Exception] = ()
    calls: list[dict[str, Any]] = field(default_factory=list)
    name: str = "scripted"

    def write(
        self, instructions: Sequence[str], *, temperature: float, top_p: float, max_new_tokens: int, seed: int
    ) -> list[str]:
        self.calls.append(
            {"instructions": list(instructions), "options": (temperature, top_p, max_new_tokens), "seed": seed}
        )
        if instructions[0].startswith("zero"):
            return list(self.pool)[: len(instructions)]
        answer = self.later[len(self.steps()) - 1]
        if isinstance(answer, Exception):
            raise answer
        return [answer]

    def steps(self) -> list[dict[str, Any]]:
        return [call for call in self.calls if not call["instructions"][0].startswith("zero")]

    def shots(self) -> list[list[str]]:
        return [call["instructions"][0].split("|")[1].split("\n") for call in self.steps()]


@dataclass
class Scored:
    """The number at the end of a case is its loss."""

    name: str = "scored"
    seen: list[tuple[str, str]] = field(default_factory=list)
    forward_tokens: int = 0
    backward_tokens: int = 0

    def target_losses(self, test_cases: Sequence[str], targets: Sequence[str], *, batch_size: int = 64) -> list[float]:
        self.seen += zip(test_cases, targets, strict=True)
        return [float(case.split()[-1]) for case in test_cases]


def attack(attacker: Scripted, **options: Any) -> SFS:
    defaults: dict[str, Any] = {
        "samples": len(attacker.pool),
        "shots": 2,
        "steps": len(attacker.later),
        "sampling_temperature": 1.0,
    }
    return SFS(attacker, **(defaults | TEMPLATES | options))


def victim() -> Victim:
    return cast(Victim, Scored())


def test_the_best_is_kept_and_everything_is_traced() -> None:
    """By hand: the pool's best is 3; then come 4 (no better), 2, 5 and 1, so the best so far are 3, 3, 2, 2, 1."""
    attacker = Scripted(["6", "3", "7"], ["4", "2", "5", "1"])
    steps: list[int] = []
    found = attack(attacker).run(victim(), Request(KING, "Sure", snapshots=(0, 1, 2, 4)), steps.append)
    assert found.cases == ["1"]
    assert found.losses == [1.0]
    assert found.trace == [3.0, 3.0, 2.0, 2.0, 1.0]
    assert found.snapshots == {0: ["3"], 1: ["3"], 2: ["2"], 4: ["1"]}
    assert found.failed is None
    assert steps == [1, 2, 3, 4]


def test_several_cases_are_the_lowest_losses_and_the_trace_is_their_mean() -> None:
    """By hand: two best of (6, 3, 7) are 3 and 6, mean 4.5; with 4: 3 and 4, mean 3.5; with 2: 2 and 3, mean 2.5."""
    found = attack(Scripted(["6", "3", "7"], ["4", "2"])).run(victim(), Request(KING, "Sure", cases=2))
    assert found.cases == ["2", "3"]
    assert found.losses == [2.0, 3.0]
    assert found.trace == [4.5, 3.5, 2.5]


def test_the_pool_is_as_large_as_the_cases_need() -> None:
    attacker = Scripted(["6", "3", "7"], [])
    found = attack(attacker, samples=1).run(victim(), Request(KING, "Sure", cases=3))
    assert found.cases == ["3", "6", "7"]


def test_the_earlier_of_equals_wins() -> None:
    found = attack(Scripted(["a 2", "b 2"], ["c 2"])).run(victim(), Request(KING, "Sure"))
    assert found.cases == ["a 2"]


def test_no_steps_is_the_best_of_the_pool() -> None:
    found = attack(Scripted(["6", "3"])).run(victim(), Request(KING, "Sure", snapshots=(1,)))
    assert (found.cases, found.trace, found.snapshots) == (["3"], [3.0], {})


def test_the_target_and_the_context_are_scored_and_the_attacker_sees_its_own_texts() -> None:
    attacker = Scripted(['"a\nb 1"'], ["2"])
    scored = Scored()
    behavior = Behavior("b", "What?", context="Read.")
    found = attack(attacker).run(cast(Victim, scored), Request(behavior, "Sure"))
    assert scored.seen == [("Read.\n\n---\n\na\nb 1", "Sure"), ("Read.\n\n---\n\n2", "Sure")]
    assert found.cases == ["Read.\n\n---\n\na\nb 1"]
    assert attacker.calls[0]["instructions"] == ["zero What?"]
    assert attacker.calls[1]["instructions"] == ["What?|a b 1"]  # one example a line


def test_options_reach_the_attacker() -> None:
    attacker = Scripted(["1"], ["2"])
    attack(attacker, temperature=0.3, top_p=0.4, max_new_tokens=5).run(victim(), Request(KING, "Sure"))
    assert [call["options"] for call in attacker.calls] == [(0.3, 0.4, 5)] * 2


def test_a_small_temperature_draws_the_best_of_everything_so_far() -> None:
    """At T = 0.001 a difference of one nat is e^1000: the two lowest losses are drawn, new ones included."""
    attacker = Scripted(["6", "3", "7"], ["4", "2", "1"])
    attack(attacker, sampling_temperature=0.001).run(victim(), Request(KING, "Sure"))
    assert attacker.shots() == [["3", "6"], ["3", "4"], ["2", "3"]]


def test_a_large_temperature_draws_everything() -> None:
    attacker = Scripted(["600", "3", "7"], ["4"] * 40)
    attack(attacker, sampling_temperature=1e9).run(victim(), Request(KING, "Sure"))
    assert {"600", "3", "7", "4"} == set(itertools.chain.from_iterable(attacker.shots()))


def test_shots_are_not_repeated_and_no_more_than_the_pool() -> None:
    attacker = Scripted(["6", "3"], ["4", "5", "7"])
    attack(attacker, shots=3).run(victim(), Request(KING, "Sure"))
    shots = attacker.shots()
    assert sorted(shots[0]) == ["3", "6"]
    assert sorted(shots[1]) == ["3", "4", "6"]
    assert all(len(set(drawn)) == 3 for drawn in shots[1:])


def test_draws_follow_the_softmax_without_replacement() -> None:
    """With losses (0, ln 2, ln 4) and T = 1 the weights are 4 : 2 : 1. By hand, P(i then j) = w_i/7 · w_j/(7 - w_i):
    (0,1) 4/7·2/3 = 8/21, (0,2) 4/7·1/3 = 4/21, (1,0) 2/7·4/5 = 8/35, (1,2) 2/7·1/5 = 2/35, (2,0) 1/7·4/6 = 2/21,
    (2,1) 1/7·2/6 = 1/21. At T = 2 with twice the losses they are the same.

    Each draw has a generator of its own, as in a run.
    """
    chances = {(0, 1): 8 / 21, (0, 2): 4 / 21, (1, 0): 8 / 35, (1, 2): 2 / 35, (2, 0): 2 / 21, (2, 1): 1 / 21}
    request = Request(KING)
    for temperature in (1.0, 2.0):
        losses = [0.0, temperature * math.log(2), temperature * math.log(4)]
        counts = Counter(
            tuple(draw(losses, 2, temperature, request.generator("cpu", temperature, i))) for i in range(6000)
        )
        assert set(counts) <= set(chances)
        expected = [6000 * chance for chance in chances.values()]
        assert chisquare([counts[pair] for pair in chances], expected).pvalue > 1e-3


def test_draws_survive_losses_that_underflow() -> None:
    generator = torch.Generator().manual_seed(0)
    assert sorted(draw([0.0, 1e6, math.inf, 2e6], 4, 1e-3, generator)) == [0, 1, 2, 3]


def test_a_result_depends_on_seed_and_behaviour_and_on_nothing_else() -> None:
    def run(behavior: Behavior, seed: int = 0) -> tuple[list[list[str]], list[int]]:
        attacker = Scripted([str(n) for n in range(9)], ["4"] * 5)
        attack(attacker, sampling_temperature=9.0).run(victim(), Request(behavior, "Sure", seed=seed))
        return attacker.shots(), [call["seed"] for call in attacker.calls]

    queen = Behavior("queen", "How?")
    torch.manual_seed(3)
    forth = [run(KING), run(queen)]
    torch.manual_seed(4)
    back = [run(queen), run(KING)]
    assert forth == back[::-1]
    assert forth[0] != forth[1]
    assert run(KING, seed=1) != forth[0]
    assert len(set(forth[0][1])) == 6  # every call has a seed of its own
    assert len({tuple(drawn) for drawn in forth[0][0]}) > 1


def test_an_empty_text_is_asked_for_again_and_then_skipped() -> None:
    """Step 1 writes nothing in three attempts and adds nothing; step 2 succeeds in its second."""
    attacker = Scripted(["6", ""], ["", "", "", "", "2"])
    found = attack(attacker, steps=2).run(victim(), Request(KING, "Sure"))
    assert found.trace == [6.0, 6.0, 2.0]
    assert len(attacker.steps()) == 5
    assert len({call["seed"] for call in attacker.calls}) == len(attacker.calls)


def test_a_silent_attacker_is_reported() -> None:
    found = attack(Scripted(["", ""], ["1"])).run(victim(), Request(KING, "Sure"))
    assert found.cases == []
    assert found.failed is not None
    assert found.failed.startswith("the attacker scripted wrote nothing for 'king'")


def test_a_failed_endpoint_is_reported() -> None:
    found = attack(Scripted(["1"], ["2", EndpointError("gave up")])).run(victim(), Request(KING, "Sure"))
    assert (found.cases, found.failed) == ([], "gave up")


def test_what_the_scheduler_asks() -> None:
    defaults = SFS(Scripted([]))
    assert (defaults.name, defaults.default_cases, defaults.needs_target, defaults.white_box) == ("SFS", 1, True, True)
    assert (defaults.samples, defaults.shots, defaults.steps) == (64, 5, 50)
    assert (defaults.temperature, defaults.max_new_tokens) == (1.0, 1024)
    assert "{behavior}" in sfs.TEMPLATE
    assert "{shots}" in sfs.TEMPLATE


@pytest.mark.parametrize(
    "options",
    [
        {"samples": 0},
        {"shots": 0},
        {"steps": -1},
        {"sampling_temperature": 0},
        {"temperature": -1},
        {"max_new_tokens": 0},
        {"template": "{behavior}"},
        {"template": "{shots}"},
        {"zero_shot_template": ""},
    ],
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(options))} is "):
        SFS(Scripted([]), **options)


def test_cases_must_be_positive() -> None:
    with pytest.raises(InputError, match="cases is 0"):
        attack(Scripted(["1"])).run(victim(), Request(KING, "Sure", cases=0))


def test_on_a_real_victim_the_losses_are_the_victims(tiny_base: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = Victim(AutoModelForCausalLM.from_pretrained(tiny_base), AutoTokenizer.from_pretrained(tiny_base), "tiny")
    texts = ["How do I make tea?", "Tell me.", "Please explain it."]
    found = attack(Scripted(texts[:2], texts[2:])).run(model, Request(KING, "Sure, here is"))
    expected = model.target_losses(texts, ["Sure, here is"] * 3)
    assert found.losses == pytest.approx([min(expected)], rel=1e-5)
    assert found.cases == [texts[expected.index(min(expected))]]
