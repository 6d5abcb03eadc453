"""What can be wrong with one pair: pure functions of it, one a check of :data:`plot_align.doctor.findings.CHECKS`."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from plot_align.doctor.pairs import Pair
from plot_align.preference.completions import Rules

NEAR = 0.9  # of the words in common
_DECODED = 200  # pairs whose tokens are decoded again; of the others only equal tokens are looked at
_SCRIPT_OF = 500  # characters of an answer
_KANA = 0.05  # of Kana and Han, from which a text is Japanese: Chinese has a の in a name, and no more
_SHORT = 30  # Han letters of which Japanese may consist as well, such as a list of names
SHORT_HAN = "short Han"


def empty(pair: Pair, rules: Rules) -> bool:
    return not all(answer.strip() for answer in pair.answers)


def identical(pair: Pair, rules: Rules) -> bool:
    """Whether the answers are equal but for white space, and so is what a chat template makes of them.

    A message may have more than its text and its calls, such as a reasoning: only the tokens tell.
    """
    if not _alike(pair):
        return False
    return pair.ids[0] == pair.ids[1] or _read_back(pair, 0, rules) == _read_back(pair, 1, rules)


def _alike(pair: Pair) -> bool:
    return pair.chosen.split() == pair.rejected.split()


def _read_back(pair: Pair, side: int, rules: Rules) -> str:
    """An answer as its tokens have it, without white space."""
    return "".join(rules.tokenizer.decode(pair.ids[side][pair.border :]).split())


def similarity(pair: Pair) -> float:
    """Sørensen's and Dice's coefficient of the two bags of words, 0 to 1: ``2·|A ∩ B| / (|A| + |B|)``."""
    chosen, rejected = Counter(pair.chosen.split()), Counter(pair.rejected.split())
    total = chosen.total() + rejected.total()
    return 2 * (chosen & rejected).total() / total if total else 1.0


def near_identical(pair: Pair, rules: Rules) -> bool:
    # A bag cannot be nine tenths of another that is a quarter longer: most pairs need no counting.
    short, long = sorted(map(len, (pair.chosen.split(), pair.rejected.split())))
    possible = long and 2 * short / (short + long) >= NEAR
    return bool(possible) and similarity(pair) >= NEAR and not _alike(pair)


def truncated(pair: Pair, rules: Rules) -> bool:
    return rules.max_length is not None and max(map(len, pair.ids)) > rules.max_length


def difference_lost(pair: Pair, rules: Rules) -> bool:
    """Whether truncation leaves nothing to tell the answers apart by, or TRL drops the pair."""
    if not truncated(pair, rules) or pair.ids[0] == pair.ids[1]:
        return False
    chosen, rejected = (ids[start:stop] for ids, (start, stop) in zip(pair.ids, pair.scored, strict=True))
    return chosen == rejected


def eos_missing(pair: Pair, rules: Rules) -> bool:
    """Whether an answer ends with no special token, white space after it aside (ChatML ends a turn with a break)."""
    return not all(_end(ids, rules) in _special(rules.tokenizer) for ids in pair.ids)


def eos_other(pair: Pair, rules: Rules) -> bool:
    """Whether an answer ends with another special token than EOS, as Gemma's do."""
    return not eos_missing(pair, rules) and any(_end(ids, rules) != rules.tokenizer.eos_token_id for ids in pair.ids)


def _end(ids: list[int], rules: Rules) -> int | None:
    """The last token that is not white space; None where it is not among the last four."""
    if ids and ids[-1] == rules.tokenizer.eos_token_id:
        return ids[-1]
    return next((token for token in reversed(ids[-4:]) if rules.tokenizer.decode([token]).strip()), None)


@lru_cache(maxsize=1)
def _special(tokenizer: Any) -> frozenset[int]:
    known = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(known if tokenizer.eos_token_id is None else {tokenizer.eos_token_id, *known})


def eos_doubled(pair: Pair, rules: Rules) -> bool:
    eos = rules.tokenizer.eos_token_id
    return any(
        ids[-4:].count(eos) > 1
        and all(
            token == eos or not rules.tokenizer.decode([token]).strip() for token in ids[-4:][ids[-4:].index(eos) :]
        )
        for ids in pair.ids
    )


def template(pair: Pair, rules: Rules) -> bool:
    """Whether a chat template drops what the answers differ in or, of the first pairs, any of an answer's text."""
    if not rules.conversational:
        return False
    if pair.ids[0] == pair.ids[1]:
        return pair.chosen.strip() != pair.rejected.strip()
    if pair.row >= _DECODED:
        return False
    return not all(_kept(pair, side, rules) for side in range(2))


def _kept(pair: Pair, side: int, rules: Rules) -> bool:
    """Whether the texts of the answer's messages are in its tokens, one after the other, and the names it calls."""
    rest = written = _read_back(pair, side, rules)
    contents = pair.contents[side] if pair.contents else ()
    for text in filter(None, ("".join(content.split()) for content in contents)):
        _, found, rest = rest.partition(text)
        if not found:
            return False
    return all("".join(name.split()) in written for name in pair.called[side])


def border(pair: Pair, rules: Rules) -> bool:
    """Whether the prompt's own ids are no prefix of those of prompt + answer."""
    return pair.border < len(pair.prompt_ids)


def raw_dialogue(pair: Pair, rules: Rules) -> bool:
    return pair.raw


def scripts(pair: Pair, rules: Rules) -> bool:
    chosen, rejected = map(script, pair.spoken)
    if SHORT_HAN in (chosen, rejected) and {chosen, rejected} <= {SHORT_HAN, "Han", "Japanese"}:
        return False
    return chosen != rejected and "" not in (chosen, rejected)


def script(text: str) -> str:
    """The script of most letters of the text's beginning, e.g. ``"Latin"``, ``"Han"``; empty without a letter.

    Han and Kana together are ``"Japanese"``; a few Han letters alone are :data:`SHORT_HAN`, Chinese or Japanese.
    """
    beginning = text[:_SCRIPT_OF]
    if beginning.isascii():
        return "Latin" if any(map(str.isalpha, beginning)) else ""
    found = Counter(_script_of(character) for character in beginning if character.isalpha())
    han, kana = found["Han"], found.pop("Kana", 0)
    if kana and kana >= _KANA * (han + kana):
        found["Japanese"] = found.pop("Han", 0) + kana
    most = found.most_common(1)[0][0] if found else ""
    return SHORT_HAN if most == "Han" and han < _SHORT else most


@lru_cache(maxsize=65536)
def _script_of(letter: str) -> str:
    name = unicodedata.name(letter, "OTHER").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ")
    first = name.split()[0].split("-")[0].capitalize()
    return {"Cjk": "Han", "Ideographic": "Han", "Hiragana": "Kana", "Katakana": "Kana"}.get(first, first)


FAULTS: dict[str, Callable[[Pair, Rules], bool]] = {
    "empty": empty,
    "identical": identical,
    "near-identical": near_identical,
    "truncated": truncated,
    "difference-lost": difference_lost,
    "eos-missing": eos_missing,
    "eos-other": eos_other,
    "eos-doubled": eos_doubled,
    "template": template,
    "border": border,
    "raw-dialogue": raw_dialogue,
    "scripts": scripts,
}
