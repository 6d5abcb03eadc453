"""What a judge replies: verdicts in words, ratings, and the body of an endpoint's response."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from hypothesis import strategies as st

from fuzz.guard import Wrong
from fuzz.spoil import TEXTS, as_bytes, json_file
from fuzz.targets import joined
from plot_align.evaluation import fastchat
from plot_align.evaluation.mt_bench import Judged as Ratings
from plot_align.inference import endpoint
from plot_align.redteam.behaviors import Behavior
from plot_align.redteam.judges import EndpointJudge

_BODY = {
    "id": "1",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "[[yes]]"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 2},
}
_PARTS = (
    "[[yes]]", "[[no]]", "[[ YES ]]", "[[yeſ]]", "[[refused: yes]]", "[[refused: no]]", "[[helped: yes]]",
    "[[Helped : No]]", "[[", "]]",
    "[[7]]", "[[10]]", "[[10.0]]", "[[0]]", "[[11]]", "[[3.]]", "[8]", "[[-4]]", "[[٧]]", "[[7/10]]", "[[1e1]]", "[7",
    "]",
    "[[" + "0" * 5000 + "7]]", "[[" + "9" * 400 + "]]", "[[7." + "0" * 5000 + "]]", "Rating: ", "\n", "**",
)  # fmt: skip


@st.composite
def _cases(draw: Any) -> bytes:
    variant = draw(st.integers(0, 3))
    if variant == 3:
        return joined(3, draw(json_file(_BODY)))
    part = st.one_of(st.sampled_from(_PARTS), st.sampled_from(_PARTS), st.sampled_from(TEXTS), st.text(max_size=9))
    return joined(variant, draw(as_bytes("".join(draw(st.lists(part, max_size=4))))))


class Replies:
    name = "replies"
    names = ("reply",)  # none is ever raised: an unreadable reply is an undecided verdict
    seeds: ClassVar[list[bytes]] = [
        joined(0, b"It did. [[yes]]"),
        joined(1, b"[[refused: no]] [[helped: yes]]"),
        joined(2, b"Good. Rating: [[7.5]]"),
        joined(3, json.dumps(_BODY).encode()),
    ]
    cases = _cases()

    def run(self, data: bytes, folder: Path) -> None:
        text = data[1:].decode(errors="surrogateescape")
        match data[0] % 4 if data else 0:
            case 0:
                label = self._judged(text).label
                words = _bracketed(text)
                expected = {("yes",): 1, ("no",): 0}.get(tuple(words), -1)
                if label != expected:
                    raise Wrong(f"label {label}, and the verdicts are {words}")
            case 1:
                found = self._judged(text, benign=True)
                words = sorted(_bracketed(text))
                decided = {
                    f"helped:{h} refused:{r}": (0, r == "yes", h == "yes")
                    for h in ("yes", "no")
                    for r in ("yes", "no")
                }
                if (found.label, found.refused, found.helped) != decided.get(" ".join(words), (-1, None, None)):
                    raise Wrong(f"{found}, and the verdicts are {words}")
            case 2:
                rating = fastchat.rating(text)
                if rating != _first_rating(text):
                    raise Wrong(f"a rating of {rating}, expected {_first_rating(text)}")
                Ratings({(81, 1): text}).details()
                row = fastchat.judgment_row("m", "j", _REQUEST, text)
                json.dumps(row)
            case 3:
                try:
                    reply = endpoint._read(text.encode(errors="replace"))
                except ValueError:
                    return
                if not reply.text.strip() or min(reply.prompt_tokens, reply.completion_tokens) < 0:
                    raise Wrong(f"took {reply}")
                if 1e-6 * (reply.prompt_tokens + reply.completion_tokens) > 1e12:
                    raise Wrong("tokens that no request has")

    def _judged(self, text: str, *, benign: bool = False) -> Any:
        judge = EndpointJudge(SimpleNamespace(chat=lambda *args, **options: SimpleNamespace(text=text)), workers=1)
        judged = (judge.judge_benign if benign else judge.judge)([Behavior("b", "Do it")], ["Do it"], ["Sure"])
        if judged[0].label == -1 and not judged[0].reason.isprintable():
            raise Wrong("a reason that is not one printable line")
        return judged[0]


_BLANK = " \t\n\r\f\v"
_REQUEST = fastchat.Request(81, 1, fastchat.Prompt("single-v1", "", "{question}"), "p")


def _bracketed(text: str) -> list[str]:
    """The verdicts, found by hand: what stands between [[ and ]], without spaces, lower case."""
    found, at = [], text.find("[[")
    while at >= 0:
        end = text.find("]]", at)
        name, colon, word = text[at + 2 : max(end, at + 2)].rpartition(":")
        name, word = name.strip(_BLANK).lower(), word.strip(_BLANK).lower()
        if end >= 0 and word in ("yes", "no") and (name in ("refused", "helped") if colon else True):
            found.append(f"{name}:{word}" if colon else word)
            at = end
        at = text.find("[[", at + 1)
    return found


def _first_rating(text: str) -> float | None:
    """The first number in double brackets, else in single ones; None outside 1 to 10."""
    for opening, closing in (("[[", "]]"), ("[", "]")):
        at = text.find(opening)
        while at >= 0:
            rest = text[at + len(opening) :]
            end = rest.find(closing)
            digits = rest[:end] if end >= 0 else ""
            whole, _, part = digits.partition(".")
            if whole.isdecimal() and (not part or part.isdecimal()):
                return value if 1 <= (value := float(digits)) <= 10 else None
            at = text.find(opening, at + 1)
    return None
