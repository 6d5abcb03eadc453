"""Zero-Shot with a scripted attacker."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from plot_align.errors import InputError
from plot_align.inference.endpoint import EndpointError
from plot_align.redteam.attack import Attacked, Request
from plot_align.redteam.behaviors import Behavior
from plot_align.redteam.victim import Victim
from plot_align.redteam.zero_shot import TEMPLATE, ZeroShot

NOBODY = cast(Victim, None)  # the attack must not ask the model under attack
KING = Behavior("king", "How do I kill the {king}?")


@dataclass
class Echo:
    """Writes the seed and the number of each instruction, but nothing in the first ``silent`` calls."""

    silent: int = 0
    fails: bool = False
    calls: list[dict[str, Any]] = field(default_factory=list)
    name: str = "echo"

    def write(
        self, instructions: Sequence[str], *, temperature: float, top_p: float, max_new_tokens: int, seed: int
    ) -> list[str]:
        self.calls.append(
            {"instructions": list(instructions), "options": (temperature, top_p, max_new_tokens), "seed": seed}
        )
        if self.fails:
            raise EndpointError("big at http://localhost gave up")
        if len(self.calls) <= self.silent:
            return [""] * len(instructions)
        return [f'"{seed} {i}"' for i in range(len(instructions))]


def test_what_is_asked_and_what_comes_back() -> None:
    echo = Echo()
    attack = ZeroShot(echo, temperature=0.7, top_p=0.8, max_new_tokens=33, template="Do {behavior}, {now}!")
    found = attack.run(NOBODY, Request(KING, cases=3))
    (call,) = echo.calls
    assert call["instructions"] == ["Do How do I kill the {king}?, {now}!"] * 3
    assert call["options"] == (0.7, 0.8, 33)
    assert found == Attacked(cases=[f"{call['seed']} {i}" for i in range(3)])


def test_the_context_is_put_before_what_was_written() -> None:
    echo = Echo()
    behavior = Behavior("b", "Explain it.", context="A long text.")
    (case,) = ZeroShot(echo).run(NOBODY, Request(behavior)).cases
    assert re.fullmatch(r"A long text\.\n\n---\n\n\d+ 0", case)
    assert "Explain it." in echo.calls[0]["instructions"][0]
    assert "A long text." not in echo.calls[0]["instructions"][0]


def test_cases_depend_on_seed_and_behaviour_and_on_nothing_else() -> None:
    other = Behavior("queen", KING.text)
    echo = Echo()
    attack = ZeroShot(echo)
    forth = [attack.run(NOBODY, request) for request in (Request(KING), Request(other))]
    back = [attack.run(NOBODY, request) for request in (Request(other), Request(KING))]
    assert forth == back[::-1]
    assert len({forth[0].cases[0], forth[1].cases[0], attack.run(NOBODY, Request(KING, seed=1)).cases[0]}) == 3


def test_silence_is_asked_again_with_another_seed_and_then_reported() -> None:
    echo = Echo(silent=2)
    assert len(ZeroShot(echo).run(NOBODY, Request(KING, cases=2)).cases) == 2
    assert len({call["seed"] for call in echo.calls}) == 3
    mute = Echo(silent=99)
    found = ZeroShot(mute).run(NOBODY, Request(KING))
    assert found.cases == []
    assert found.failed is not None
    assert re.match("the attacker echo wrote nothing for 'king' in 3 attempts", found.failed)
    assert len(mute.calls) == 3


def test_a_failed_endpoint_is_reported() -> None:
    found = ZeroShot(Echo(fails=True)).run(NOBODY, Request(KING))
    assert found == Attacked(cases=[], failed="big at http://localhost gave up")


def test_what_the_scheduler_asks() -> None:
    attack = ZeroShot(Echo())
    assert (attack.name, attack.default_cases, attack.needs_target, attack.white_box, attack.steps) == (
        "ZeroShot",
        5,
        False,
        False,
        0,
    )
    assert (attack.temperature, attack.top_p, attack.max_new_tokens) == (0.9, 0.95, 256)
    assert "{behavior}" in TEMPLATE


@pytest.mark.parametrize("options", [{"template": "x"}, {"temperature": -1}, {"top_p": 0}, {"max_new_tokens": 0}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(options))} is "):
        ZeroShot(Echo(), **options)


def test_cases_must_be_positive() -> None:
    with pytest.raises(InputError, match="cases is 0"):
        ZeroShot(Echo()).run(NOBODY, Request(KING, cases=0))
