"""The measures of the doctor against other code: SciPy, NumPy, dictionaries, values by hand."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, mannwhitneyu

from plot_align.doctor.faults import SHORT_HAN, near_identical, script, scripts, similarity
from plot_align.doctor.pairs import Pair
from plot_align.doctor.tallies import FirstWords, Lengths, Overlap, Refusals, Scripts, _quantile, exact


def pair(chosen: str = "a", rejected: str = "b", *, row: int = 0, prompt: str = "", tokens=(1, 1)) -> Pair:
    ids = tuple([0] * (2 + count) for count in tokens)
    return Pair(row, (prompt,), prompt, chosen, rejected, False, [0, 0], 2, ids, ((2, 2), (2, 2)))


# --- similarity -----------------------------------------------------------------------------------------------------


def test_similarity_by_hand():
    """{a, a, b, c} and {a, b, d}: a and b in common, 2·2 / (4 + 3)."""
    assert similarity(pair("a a b c", "d b a")) == pytest.approx(4 / 7)


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcdefghij"), max_size=25), st.lists(st.sampled_from("abcdefghij"), max_size=25))
def test_similarity_is_dice_s_and_near_is_ninety_percent_of_it(one, other):
    """Removing what is shared word by word, from a list."""
    left, shared = list(other), 0
    for word in one:
        if word in left:
            left.remove(word)
            shared += 1
    expected = 2 * shared / (len(one) + len(other)) if one or other else 1.0
    found = pair(" ".join(one), " ".join(other))
    assert similarity(found) == pytest.approx(expected)
    assert near_identical(found, None) == (expected >= 0.9 and one != other)


# --- length ---------------------------------------------------------------------------------------------------------


def lengths_of(tokens: list[tuple[int, int]]) -> Lengths:
    lengths = Lengths()
    for count in tokens:
        lengths.add(pair(tokens=count))
    return lengths


def test_auc_of_length_within_pairs():
    """The mean of 1, ½ and 0 over pairs and s/√n, by NumPy; and the AUC of SciPy where pairs do not matter."""
    rng = random.Random(0)
    tokens = [(rng.randint(1, 30), rng.randint(1, 25)) for _ in range(300)]
    found = lengths_of(tokens).measures()
    scores = np.array([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in tokens])
    gaps = np.array([a - b for a, b in tokens])
    assert found["length_auc"]["value"] == pytest.approx(scores.mean())
    near = binomtest(round(scores.sum()), 300).proportion_ci()  # ties may make it half a win more or less
    assert found["length_auc"]["interval"] == pytest.approx(list(near), abs=2e-3)
    difference = found["length_difference"]
    assert difference["value"] == pytest.approx(gaps.mean())
    assert difference["error"] == pytest.approx(gaps.std(ddof=1) / math.sqrt(300))
    assert difference["interval"][1] == pytest.approx(gaps.mean() + 1.959964 * difference["error"])
    chosen, rejected = zip(*tokens, strict=True)
    alone = mannwhitneyu(chosen, rejected).statistic / 300**2
    assert found["length_auc"]["value"] == pytest.approx(alone, abs=0.03)


@pytest.mark.parametrize("confidence", [0.95, 0.975])
@pytest.mark.parametrize("n", [1, 2, 17, 1000])
def test_the_exact_interval_is_scipy_s(n, confidence):
    for count in {0, 1, n // 3, n - 1, n}:
        expected = binomtest(count, n).proportion_ci(confidence, method="exact")
        assert exact(count, n, confidence) == pytest.approx(tuple(expected), abs=1e-9)


def test_equal_differences_have_no_interval_of_no_width():
    difference = lengths_of([(9, 3)] * 40).measures()["length_difference"]
    assert difference == {"value": 6.0, "n": 40, "unit": "tokens"}


def test_shorter_answers_that_win_are_a_bias_too():
    lengths = lengths_of([(3, 9)] * 90 + [(9, 3)] * 10)
    (finding,) = lengths.findings(lengths.measures())
    assert finding.share == pytest.approx(0.1)
    assert "tells the label in 90.0 % of the pairs" in finding.sentence
    assert "4.8 tokens shorter; the shorter one wins" in finding.sentence


def test_few_pairs_prove_no_bias():
    lengths = lengths_of([(9, 3)] * 7 + [(3, 9)] * 3)
    assert lengths.findings(lengths.measures()) == []


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.sampled_from([0.01, 0.5, 0.99, 1.0]))
def test_quantile(values, share):
    assert _quantile(Counter(values), share) == np.quantile(values, share, method="inverted_cdf")


# --- first words ----------------------------------------------------------------------------------------------------


def naive_accuracy(pairs: list[Pair], parts: list[int]) -> float:
    """The classifier of the docstring, with dictionaries."""
    right = 0.0
    for part in set(parts):
        counts: dict[str, Counter] = {"chosen": Counter(), "rejected": Counter()}
        for one, of in zip(pairs, parts, strict=True):
            if of != part:
                for side, count in counts.items():
                    count.update(enumerate(getattr(one, side).lower().split()[:5]))

        def score(text: str, counts: Any = counts) -> float:
            features = enumerate(text.lower().split()[:5])
            return sum(math.log((counts["chosen"][word] + 1) / (counts["rejected"][word] + 1)) for word in features)

        for one, of in zip(pairs, parts, strict=True):
            if of == part:
                gap = score(one.chosen) - score(one.rejected)
                right += 0.5 if abs(gap) < 1e-9 else float(gap > 0)
    return right / len(pairs)


def test_accuracy_of_the_first_words():
    rng = random.Random(1)
    words = ["Yes", "no", "I", "you", "it's", "well", "maybe", "cannot"]

    def answer(bias: int) -> str:
        return " ".join(rng.choices(words, [1 + bias * (at % 2) for at in range(8)], k=rng.randint(1, 8)))

    pairs = [pair(answer(1), answer(0), row=row, prompt=f"prompt {row % 100}") for row in range(400)]
    tally = FirstWords()
    for one in pairs:
        tally.add(one)
    accuracy = tally.accuracy()
    assert accuracy["value"] == pytest.approx(naive_accuracy(pairs, list(tally._parts)), abs=1e-12)
    assert 0.55 < accuracy["value"] < 0.8
    interval = binomtest(round(accuracy["value"] * 400), 400).proportion_ci(method="wilson")
    assert accuracy["interval"] == pytest.approx([interval.low, interval.high], abs=2e-3)
    assert len({part for one, part in zip(pairs, tally._parts, strict=True) if one.prompt == "prompt 3"}) == 1


def test_words_that_say_nothing_have_an_accuracy_of_a_half():
    tally = FirstWords()
    for row in range(50):
        tally.add(pair("the same beginning, then this", "The same beginning, then that"[:28], row=row))
    assert tally.accuracy()["value"] == 0.5
    assert tally.findings(tally.accuracy()) == []


def test_table_of_first_words():
    tally = FirstWords()
    for row in range(9):
        tally.add(pair("Sorry, I cannot" if row < 6 else "Yes", "Yes" if row < 8 else "Well", row=row))
    assert tally.table() == [
        {"word": "sorry", "chosen": 6, "rejected": 0},
        {"word": "yes", "chosen": 3, "rejected": 8},
        {"word": "well", "chosen": 0, "rejected": 1},
    ]


# --- refusals, scripts, overlap -------------------------------------------------------------------------------------


NO, YES = "I’m sorry, but no.", "Here you are."


def refusals_of(*counted: tuple[str, str, int]) -> Refusals:
    refusals = Refusals()
    for chosen, rejected, count in counted:
        for _ in range(count):
            refusals.add(pair(chosen, rejected))
    return refusals


def test_refusals_by_hand():
    """30 of 100: only the chosen refuses; 10: only the rejected; 5: both. The gap is 0.2, of two exact intervals."""
    refusals = refusals_of((NO, YES, 30), (YES, NO, 10), (NO, NO, 5), (YES, YES, 55))
    found = refusals.measures()
    assert (found["refusals_chosen"]["value"], found["refusals_rejected"]["value"]) == (0.35, 0.15)
    assert found["refusal_gap"]["value"] == pytest.approx(0.2)
    own, other = (binomtest(count, 100).proportion_ci(0.975) for count in (30, 10))
    assert found["refusal_gap"]["interval"] == pytest.approx([own.low - other.high, own.high - other.low])
    assert refusals.findings(found) == []  # 0.01 at the low end


@pytest.mark.parametrize(("own", "other"), [(0.5, 0.0), (0.3, 0.1), (0.02, 0.02), (0.9, 0.05)])
@pytest.mark.parametrize("n", [1, 4, 30, 300])
def test_the_interval_of_the_refusals_holds_the_gap(own, other, n):
    """In 95 % of 300 draws at least, less four standard errors: however small n is, and where all pairs are alike."""
    rng = np.random.default_rng(0)
    held = 0
    for one, two, _ in rng.multinomial(n, [own, other, 1 - own - other], size=300):
        refusals = Refusals()
        refusals.counts = [[n - one - two, two], [one, 0]]
        low, high = refusals.measures()["refusal_gap"]["interval"]
        held += low <= own - other <= high
    assert held / 300 >= 0.95 - 4 * math.sqrt(0.95 * 0.05 / 300)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_a_few_pairs_that_all_go_one_way_prove_nothing(n):
    """Five of five come up one time in sixteen by chance, which is no 95 %."""
    for tokens in ((9, 3), (3, 9)):
        lengths = lengths_of([tokens] * n)
        assert lengths.findings(lengths.measures()) == []
    for sides in ((NO, YES), (YES, NO)):
        refusals = refusals_of((*sides, n))
        assert refusals.findings(refusals.measures()) == []


def test_twenty_pairs_that_all_go_one_way_do():
    lengths, refusals = lengths_of([(9, 3)] * 20), refusals_of((NO, YES, 20))
    for tally in (lengths, refusals):
        (finding,) = tally.findings(tally.measures())
        assert finding.severity == "warning"
    assert (
        "in 100.0 % of the pairs (95 % interval 83.2 % to 100.0 %)" in lengths.findings(lengths.measures())[0].sentence
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello — world", "Latin"),
        ("naïve café", "Latin"),
        ("Привет, world", "Cyrillic"),
        ("你好,世界 hi", SHORT_HAN),
        ("你好,世界 hi" * 8, "Han"),
        ("ひらがな カタカナ", "Japanese"),
        ("日本国憲法施行令の改正", "Japanese"),
        ("ﾃﾞｰﾀ転送装置 ＵＳＢ", "Japanese"),
        ("人々" * 15, "Han"),
        ("我今天在优の良品买了很多好吃的东西，然后和朋友一起坐地铁慢慢地回家了。", "Han"),
        ("Ｈｅｌｌｏ 世界", "Latin"),
        ("안녕하세요", "Hangul"),
        ("مرحبا", "Arabic"),
        ("1 + 1 = 2 🙂", ""),
        ("", ""),
    ],
)
def test_script(text, expected):
    assert script(text) == expected


MOST_KANA = "東京はとても大きな街で、たくさんの人がここに住んでいます。"
MOST_HAN = "東京都庁舎の展望室は年末年始を除き毎日入場可能です。"
NAMES = "東京都、大阪府、京都府"
CHINESE = "东京是日本的首都，也是世界上人口最多的城市之一，每年都有很多游客来到这里参观游览。"


@pytest.mark.parametrize(
    ("one", "other", "differ"),
    [
        (MOST_KANA, MOST_HAN, False),
        (MOST_KANA, NAMES, False),  # an answer without Kana may be Japanese, if it is short
        (NAMES, CHINESE, False),
        (MOST_HAN, CHINESE, True),
        (MOST_KANA, CHINESE, True),
        (NAMES, "Tokyo, Osaka, Kyoto", True),
        (NAMES, "서울특별시, 부산광역시", True),
    ],
)
def test_japanese_is_han_and_kana(one, other, differ):
    assert scripts(pair(one, other), None) == scripts(pair(other, one), None) == differ


@pytest.mark.parametrize(("long", "others"), [(MOST_KANA, 0), (CHINESE, 0), ("Tokyo is a large city.", 50)])
def test_short_answers_in_han_are_in_the_language_of_the_others(long, others):
    tally = Scripts()
    for row in range(50):
        tally.add(pair(NAMES if row < 25 else long, NAMES if row < 25 else long, row=row))
    assert sum(finding.count for finding in tally.findings()) == others


def test_chinese_among_japanese_is_seen():
    tally = Scripts()
    for row in range(50):
        tally.add(pair(MOST_KANA, CHINESE if row < 10 else MOST_HAN, row=row))
    (finding,) = tally.findings()
    assert finding.sentence == "The answers' scripts: Japanese 90.0 %, Han 10.0 %."


@pytest.mark.parametrize(("shared", "count"), [(12, 0), (13, 1), (14, 1)])
@pytest.mark.parametrize("place", ["start", "end"])
def test_overlap_of_thirteen_words(shared, count, place):
    words = [f"w{at}" for at in range(20)]
    others = [f"x{at}" for at in range(20 - shared)]
    tally = Overlap([" ".join(words)])
    tally.add(pair(prompt=" ".join(words[:shared] + others if place == "start" else others + words[-shared:])))
    assert tally.rows.count == count


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=30), st.lists(st.sampled_from("abc"), max_size=30))
def test_overlap_is_equality_or_thirteen_words(one, other):
    def runs(words: list[str]) -> set[str]:
        return {" ".join(words[at : at + 13]) for at in range(len(words)) if at + 13 <= len(words)}

    tally = Overlap([" ".join(one)])
    tally.add(pair(prompt=" ,".join(other).upper() + "?"))
    assert bool(tally.rows.count) == ((bool(one) and one == other) or bool(runs(one) & runs(other)))
