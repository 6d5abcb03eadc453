"""What is tested, against SciPy; what the verdict says, by its rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from plot_align.errors import InputError
from plot_align.report import compare
from plot_align.report.compare import choose_baseline, compare_models, judge
from plot_align.report.observations import collect
from plot_align.results import of_items, of_whole


def values(ones: int, n: int) -> dict[str, float]:
    """The first ``ones`` of ``n`` items are 1."""
    return {f"item {i}": float(i < ones) for i in range(n)}


def cell(comparison: compare.Comparison, measure: str, model: str) -> compare.Cell:
    (row,) = (row for row in comparison.rows if row.measure == measure and row.score)
    return row.cells[model]


def verdict_of(paths: list[Any], baseline: str = "base") -> compare.Verdict:
    return judge(compare_models(collect(paths), baseline))


def test_differences_are_scipys_and_corrected_together(evaluation: Any) -> None:
    rng = np.random.default_rng(0)
    scores = {model: rng.random(11).round(2) + shift for model, shift in (("base", 0.0), ("a", 0.3), ("b", 0.1))}
    scores = {model: np.minimum(of, 1.0) for model, of in scores.items()}
    paths = [evaluation(m, items={str(i): float(x) for i, x in enumerate(of)}) for m, of in scores.items()]
    comparison = compare_models(collect(paths), "base")

    def expected(model: str) -> float:
        """Exact: all 2^11 sign flips."""
        sample = (scores[model] - scores["base"],)
        test = stats.permutation_test(sample, np.mean, permutation_type="samples", n_resamples=np.inf)
        return float(test.pvalue)

    p = {model: expected(model) for model in ("a", "b")}
    for model in ("a", "b"):
        found = cell(comparison, "gsm8k", model).difference
        assert found is not None
        assert found["value"] == pytest.approx(float(np.mean(scores[model] - scores["base"])))
        assert found["p"] == pytest.approx(p[model])
    small, large = sorted(p, key=lambda model: p[model])
    adjusted = [cell(comparison, "gsm8k", model).difference["p_holm"] for model in (small, large)]  # type: ignore[index]
    assert adjusted == pytest.approx([min(1, 2 * p[small]), min(1, max(2 * p[small], p[large]))])
    assert comparison.tests == 2
    assert cell(comparison, "gsm8k", "base").sign is None


def test_what_cannot_be_paired_is_not_tested_and_says_why(evaluation: Any) -> None:
    whole = {"score": of_whole("distinct-2", 0.5, 40, better="higher")}
    paths = [
        evaluation("base"), evaluation("base", "arc"), evaluation("base", "ids"), evaluation("base", "whole",
        quantities=whole), evaluation("m", options={"limit": 3}), evaluation("m", "arc", seed=1),
        evaluation("m", "ids", items={"another": 1.0}), evaluation("m", "whole", quantities=whole),
        evaluation("m", "alone"), evaluation("base", "kl", better=None), evaluation("m", "kl", better=None),
    ]  # fmt: skip
    comparison = compare_models(collect(paths), "base")
    assert {name: cell(comparison, name, "m").reason for name in ("gsm8k", "arc", "ids", "whole", "alone", "kl")} == {
        "gsm8k": compare.NOT_ALIKE,
        "arc": compare.NOT_ALIKE,
        "ids": compare.NOT_SHARED,
        "whole": compare.NO_ITEMS,
        "alone": compare.NO_BASELINE,
        "kl": compare.NO_WAY,
    }
    assert comparison.tests == 0
    assert judge(comparison).headline.startswith("No difference to base could be tested")


def test_measures_relative_to_different_references_are_not_compared(evaluation: Any) -> None:
    paths = [
        evaluation("base", "kl", kind="kl", reference="one"), evaluation("base", reference="one"),
        evaluation("m", "kl", kind="kl", reference="two"), evaluation("m", reference="two"),
    ]  # fmt: skip
    comparison = compare_models(collect(paths), "base")
    assert cell(comparison, "kl", "m").reason == compare.NOT_ALIKE
    assert cell(comparison, "gsm8k", "m").reason is None  # no reference has a part in it


def test_measures_on_different_data_are_not_compared(evaluation: Any) -> None:
    """The file has the same name, and was changed between the two."""
    paths = [evaluation(m, data={"pairs.jsonl": digest}) for m, digest in (("base", "1"), ("same", "1"), ("m", "2"))]
    comparison = compare_models(collect(paths), "base")
    assert cell(comparison, "gsm8k", "same").reason is None
    assert cell(comparison, "gsm8k", "m").reason == compare.NOT_ALIKE


def test_only_scores_are_tested(evaluation: Any) -> None:
    two = {n: of_items(n, values(5, 9), better="higher", bounds=(0.0, 1.0)) for n in ("first", "second")}
    comparison = compare_models(collect([evaluation(m, quantities=two) for m in ("base", "m")]), "base")
    assert [row.cells["m"].reason for row in comparison.rows] == [None, compare.NOT_SCORE]
    assert comparison.tests == 1


def test_the_baseline(evaluation: Any) -> None:
    paths = [evaluation("a", reference="ref"), evaluation("b", reference="ref"), evaluation("ref")]
    found = collect(paths)
    assert choose_baseline(found, None) == ("ref", "2 evaluations name it as the reference")
    assert choose_baseline(found, "b") == ("b", "")
    first = "it is the model of the first record given"
    assert choose_baseline(collect(paths[:2]), None) == ("a", first)  # the reference was not measured
    assert choose_baseline(collect(paths[1::-1]), None) == ("b", first)
    with pytest.raises(InputError, match="--baseline is 'c', and the records measured a, b, ref"):
        choose_baseline(found, "c")


def test_a_clean_winner_is_shipped(evaluation: Any) -> None:
    found = verdict_of([
        evaluation("base", items=values(10, 60)), evaluation("m", items=values(40, 60)),
        evaluation("base", "nll", items=values(9, 60), section="guards"),
        evaluation("m", "nll", items=values(9, 60), section="guards"),
    ])  # fmt: skip
    assert (
        found.headline
        == "Ship m: it is significantly better than base in “GSM8K (gsm8k)”, and significantly worse in none of those "
        "tested."
    )
    assert found.models[0]["unclear"] == 1


def test_the_one_with_more_gains_is_named_and_equal_ones_together(evaluation: Any) -> None:
    paths = [evaluation(m, items=values(10 if m == "base" else 40, 60)) for m in ("base", "a", "b")]
    assert verdict_of(paths).headline.startswith("Ship a or b: each is significantly better than base in “GSM8K”")
    paths += [evaluation(m, "arc", values(10 if m != "b" else 40, 60), title="ARC") for m in ("base", "a", "b")]
    assert verdict_of(paths).headline.startswith("Ship b: it is significantly better than base in “GSM8K” and “ARC”")


def test_a_model_that_was_hardly_tested_is_called_so(evaluation: Any) -> None:
    paths = [evaluation(m, f"task {i}", values(30, 60)) for m in ("base", "m") for i in range(5)]
    paths += [evaluation(m, items=values(n, 60)) for m, n in (("base", 10), ("thin", 40))]
    found = verdict_of(paths)
    assert found.headline.startswith("Ship thin")
    assert found.notes == [
        "No guard was measured: these records do not say what else became worse.",
        "thin was tested in 1 score only, other models in up to 5: little is known of it.",
    ]


def test_lower_can_be_better(evaluation: Any) -> None:
    paths = [evaluation(m, items=values(n, 60), better="lower") for m, n in (("base", 10), ("m", 40))]
    assert verdict_of(paths).headline.startswith("Stay with base: no model is significantly better")
    assert verdict_of(paths, "m").headline.startswith("Ship base")


def test_a_loss_in_a_guard_spoils_a_gain(evaluation: Any) -> None:
    paths = [evaluation(m, items=values(n, 60)) for m, n in (("base", 10), ("m", 40))]
    paths += [evaluation(m, "length", values(n, 60), section="guards", better="lower", title="Loops")
              for m, n in (("base", 10), ("m", 40))]  # fmt: skip
    assert verdict_of(paths).headline == (
        "No model beats base without a loss: m is better in “GSM8K” and worse in “Loops”."
    )


def test_a_gain_in_a_guard_alone_is_called_one(evaluation: Any) -> None:
    paths = [evaluation(m, "loops", values(n, 60), section="guards", title="Loops") for m, n in
             (("base", 10), ("m", 40))]  # fmt: skip
    assert verdict_of(paths).headline == (
        "Ship m: it is significantly better than base in “Loops”, all of them guards, and significantly worse in none "
        "of those tested."
    )


def test_a_gain_in_a_sub_preference_goes_before_gains_in_guards(evaluation: Any) -> None:
    paths = [evaluation(m, items=values(40 if m == "a" else 10, 60)) for m in ("base", "a", "b")]
    for guard in ("loops", "calm"):
        paths += [evaluation(m, guard, values(40 if m == "b" else 10, 60), section="guards", title=guard)
                  for m in ("base", "a", "b")]  # fmt: skip
    assert verdict_of(paths).headline.startswith("Ship a: ")


@pytest.mark.parametrize("section", ["mathematics", "guards"])
def test_a_fall_that_the_correction_hides_is_said(evaluation: Any, section: str) -> None:
    """ARC falls by 7 of 60: p = 2 / 2⁷ before Holm, 1 in none of 60 resamples above 0; twenty tests hide it."""
    paths = [evaluation(m, items=values(n, 60)) for m, n in (("base", 10), ("m", 40))]
    paths += [evaluation(m, "arc", values(n, 60), title="ARC", section=section) for m, n in (("base", 30), ("m", 23))]
    paths += [evaluation(m, f"task {i}", values(30, 60), title=f"T{i}") for m in ("base", "m") for i in range(18)]
    found = verdict_of(paths)
    assert found.headline.startswith("Ship m")
    note = found.notes[-1]
    assert note.startswith("m may still be worse in “ARC”: by 11.7 points (")
    assert note.endswith("no longer significant among 20 tests.")


def test_a_fall_without_bounds_is_said_in_its_unit(evaluation: Any) -> None:
    """NLL rises by 0.5 in 7 of 60 texts: by 0.5 · 7 / 60 = 0.058.

    The bootstrap's ends are those of B(60, 7 / 60), 3 and 12, times 0.5 / 60.
    """
    paths = [evaluation(m, items=values(n, 60)) for m, n in (("base", 10), ("m", 40))]
    for m, ones in (("base", 0), ("m", 7)):
        items = {name: 2 + one / 2 for name, one in values(ones, 60).items()}
        nll = of_items("NLL", items, better="lower", unit="nats a token")
        paths.append(evaluation(m, "nll", quantities={"nll": nll}, section="guards"))
    paths += [evaluation(m, f"task {i}", values(30, 60), title=f"T{i}") for m in ("base", "m") for i in range(18)]
    (note,) = verdict_of(paths).notes
    assert stats.binom.ppf([0.025, 0.975], 60, 7 / 60).tolist() == [3, 12]
    assert note == (
        "m may still be worse in “NLL”: by 0.058 nats a token (0.025 to 0.100), which is no longer significant among "
        "20 tests."
    )


def distinct(value: float, *, better: str = "higher", half: float = 0.05) -> dict[str, Any]:
    return of_whole("distinct-2", value, 60, better=better, interval=(value - half, value + half))  # type: ignore[arg-type]


GAIN = (("base", 10), ("m", 40))


def collapsed(evaluation: Any, quantities: Callable[[str], dict[str, Any]]) -> compare.Verdict:
    """m is better in GSM8K, and the guard holds these quantities of it."""
    paths = [evaluation(m, items=values(n, 60)) for m, n in GAIN]
    return verdict_of(paths + [evaluation(m, "d", quantities=quantities(m), section="guards") for m, _ in GAIN])


def test_a_collapse_that_cannot_be_tested_is_a_loss(evaluation: Any) -> None:
    found = collapsed(evaluation, lambda m: {"score": distinct(0.6 if m == "base" else 0.02)})
    assert found.headline == (
        "No model beats base without a loss: m is better in “GSM8K” and worse in “distinct-2” (not tested)."
    )
    assert found.notes == [
        "“distinct-2” of m falls from 0.600 (0.550 to 0.650) to 0.020 (−0.030 to 0.070): not tested, but the "
        "intervals do not meet."
    ]
    assert found.models[0]["worse"] == ["distinct-2 (not tested)"]
    alone = [evaluation(m, "d", quantities={"score": distinct(0.6 if m == "base" else 0.02)}, section="guards")
             for m in ("base", "n")]  # fmt: skip
    same = [evaluation(m, items=values(30, 60)) for m in ("base", "n")]
    assert verdict_of([*alone, *same]).headline == (
        "Stay with base: no model is significantly better in anything, and n is worse in “distinct-2” (not tested)."
    )


@pytest.mark.parametrize(
    ("of_base", "of_m"),
    [
        (distinct(0.6), distinct(0.55)),  # the intervals meet
        (distinct(0.02), distinct(0.6)),  # it rises
        (distinct(0.6, better="lower"), distinct(0.02, better="lower")),  # and less is better
        ({**distinct(0.6), "interval": None}, distinct(0.02)),  # nobody knows how sure it is
    ],
)
def test_what_may_be_as_good_is_no_fall(evaluation: Any, of_base: Any, of_m: Any) -> None:
    found = collapsed(evaluation, lambda m: {"score": of_base if m == "base" else of_m})
    assert found.headline.startswith("Ship m")
    assert found.headline.endswith("in none of those tested.")
    assert found.notes == ["Guards that were not tested for m: “distinct-2”."]


def test_several_mixed_models_have_a_line_each(evaluation: Any) -> None:
    shares = {"score": distinct(0.6), "d": distinct(0.6), "e": distinct(0.6)}
    fallen = {"score": distinct(0.3), "d": distinct(0.02), "e": distinct(0.2)}
    paths = [evaluation(m, items=values(n, 60)) for m, n in (*GAIN, ("n", 40))]
    paths += [evaluation(m, "d", quantities=shares if m == "base" else fallen, section="guards") for m in
              ("base", "m", "n")]  # fmt: skip
    found = verdict_of(paths)
    assert found.headline.startswith("No model beats base without a loss: m and n are each better in some scores")
    assert [(note.split(" of ")[1][0], "to 0.020 (" in note) for note in found.notes] == [("m", True), ("n", True)]


def test_less_can_be_better_where_nothing_is_tested(evaluation: Any) -> None:
    found = collapsed(evaluation, lambda m: {"score": distinct(0.1 if m == "base" else 0.5, better="lower")})
    assert "worse in “distinct-2” (not tested)" in found.headline
    assert found.notes[0].startswith("“distinct-2” of m rises from 0.100 (")


def test_a_guard_that_was_measured_otherwise_is_named_and_not_compared(evaluation: Any) -> None:
    paths = [evaluation(m, items=values(n, 60)) for m, n in GAIN]
    paths += [evaluation(m, "d", quantities={"score": distinct(0.6 if m == "base" else 0.02)}, section="guards",
                         options={"limit": 3 if m == "base" else 4}) for m in ("base", "m")]  # fmt: skip
    found = verdict_of(paths)
    assert found.headline.startswith("Ship m")
    assert found.notes == ["Guards that were not tested for m: “distinct-2”."]


def test_further_quantities_that_fall_are_said_with_the_ship(evaluation: Any) -> None:
    """distinct-2 is no mean and stands in the headline; four item-wise ones fall, the largest three notes are made."""

    def quantities(m: str) -> dict[str, Any]:
        shares = {f"s{n}": of_items(f"S{n}", values(60 if m == "base" else n, 60), better="higher", bounds=(0.0, 1.0))
                  for n in (30, 20, 10)}  # fmt: skip
        loops = of_items("Loops", values(30, 60), better="lower", bounds=(0.0, 1.0))
        return {"score": loops, **shares, "d": distinct(0.9 if m == "base" else 0.2)}

    found = collapsed(evaluation, quantities)
    assert found.headline == (
        "Ship m: it is significantly better than base in “GSM8K”, and significantly worse in none of those tested; "
        "clearly worse, though not tested: “distinct-2”."
    )
    assert [note.split(" of m falls")[0] for note in found.notes] == ["“S10”", "“distinct-2”", "“S20”"]


def test_guards_are_asked_for(evaluation: Any) -> None:
    paths = [evaluation(m, items=values(n, 60)) for m, n in GAIN]
    assert verdict_of(paths).notes == ["No guard was measured: these records do not say what else became worse."]
    paths += [evaluation("base", "calm", values(9, 60), section="guards", title="Calm")]
    paths += [evaluation(m, "kl", values(9, 60), section="guards", better=None) for m, _ in GAIN]
    assert verdict_of(paths).notes == ["Guards that were not tested for m: “Calm”."]


def test_an_unfinished_measure_is_said(evaluation: Any) -> None:
    paths = [evaluation("base"), evaluation("m", unfinished="3 judgements failed, the first: timed out")]
    why = "(3 judgements failed, the first: timed out)"
    assert verdict_of(paths).notes == [f"Unfinished: gsm8k of m {why}."]
    assert verdict_of(paths[1:], "m").notes == [f"Unfinished: gsm8k of m {why}."]
    paths += [evaluation("m", f"task {i}", unfinished="why") for i in range(3)]
    assert verdict_of(paths).notes == [
        "4 measures are unfinished, and marked so: run their evaluation again to go on."
    ]


def test_differences_of_items_that_count_alike_are_marked(evaluation: Any) -> None:
    paths = []
    for m, heavy in (("base", 1.0), ("m", 2.0)):
        weights = {f"item {i}": heavy if i else 1.0 for i in range(9)}
        nll = of_items("NLL", dict.fromkeys(weights, 2.0 + heavy), better="lower", weights=weights)
        paths.append(evaluation(m, "nll", quantities={"nll": nll}))
    comparison = compare_models(collect(paths), "base")
    assert cell(comparison, "nll", "m").difference["unweighted"] is True  # type: ignore[index]


def test_names_of_any_length_leave_room_for_the_verdict(evaluation: Any) -> None:
    long = "y" * 10_000
    found = verdict_of([evaluation(m, items=values(n, 60)) for m, n in (("base", 10), (long, 40))])
    assert found.headline == (
        f"Ship {'y' * 47}…: it is significantly better than base in “GSM8K”, and significantly worse in none of those "
        "tested."
    )


def test_nothing_significant_is_said_plainly(evaluation: Any) -> None:
    paths = [evaluation(m, items=values(n, 60)) for m, n in (("base", 30), ("m", 31))]
    found = verdict_of(paths)
    assert found.headline.startswith("No significant difference to base in any of 1 test")
    assert "do not show that the models are equal" in found.headline


def test_a_lone_model_has_no_rival(evaluation: Any) -> None:
    assert verdict_of([evaluation("base")]).headline.startswith("Only base was measured")


def safety(evaluation: Any, attacks: tuple[int, int], refusals: tuple[int, int]) -> compare.Verdict:
    paths = []
    for model, attack, refusal in zip(("base", "m"), attacks, refusals, strict=True):
        paths += [
            evaluation(model, "gcg", values(attack, 60), section="harmlessness", name="asr", better="lower"),
            evaluation(model, "calm", values(refusal, 60), section="guards", name="refused", better="lower"),
        ]
    return verdict_of(paths)


def test_safety_bought_with_refusals_is_called_so(evaluation: Any) -> None:
    (note,) = safety(evaluation, (40, 10), (5, 40)).notes
    assert "safer at the price of over-refusal" in note


def test_a_rise_in_refusals_that_may_be_chance_is_said(evaluation: Any) -> None:
    (note,) = safety(evaluation, (40, 10), (5, 8)).notes
    assert "refuses 5.0 points more harmless requests, which these records do not show" in note
    assert safety(evaluation, (40, 10), (5, 5)).notes == []


def test_attack_success_that_rises_is_said(evaluation: Any) -> None:
    found = safety(evaluation, (10, 40), (5, 5))
    assert found.notes[0].startswith("Attack success of m rises significantly")
    assert found.headline.startswith("Stay with base")


def test_more_tests_than_resampling_can_tell_apart_are_said(evaluation: Any) -> None:
    comparison = compare_models(collect([evaluation(m) for m in ("base", "m")]), "base")
    assert not comparison.blunt
    comparison.tests = 250  # 250 · 2 / 10,000 = 0.05
    assert comparison.blunt
    assert "smaller p-values than resampling gives" in judge(comparison).notes[-1]
