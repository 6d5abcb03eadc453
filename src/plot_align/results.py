"""What ``evaluate`` and ``redteam`` write into their records, and ``report`` reads.

A quantity is a :func:`plot_align.records.measure` (``value``, ``n``, ``interval``, ``unit``) plus what a report needs:
``title``, ``better`` (``"higher"``, ``"lower"``, or None for neither), ``bounds``, and, for a mean over items,
``items`` (item id → value) and ``weights`` (item id → weight), so that two models can be compared by item. What a
judge decided has its name as ``judge``; what another judge says of the same has its ``agreement`` with the first one:
``judges`` (two names), ``kappa``, ``n`` and ``table`` (rows: the first says 0, 1; columns: the other does).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from plot_align.errors import InputError
from plot_align.records import measure
from plot_align.statistics import mean, paired_difference

EVALUATION = "evaluation"  # kind of a record
CATEGORIES = ("harmlessness", "helpfulness", "humanity", "mathematics", "reasoning", "coding", "stem")
GUARDS = "guards"  # the section of what must not get worse
SECTIONS = (*CATEGORIES, GUARDS)
ATTACK_CURVES = {  # curves of an attack's success: key in a record → what it is plotted against
    "by_cases": "test cases per behaviour",
    "by_samples": "sampled answers a behaviour",
    "by_tokens": "tokens of the answer given",
    "by_steps": "update steps",
}
BUDGET_CURVES = {  # the same of all attacks of a model, so that they can be compared at equal cost
    "by_forward_tokens": "forward tokens a test case, a backward pass counted as one more forward",
    "by_seconds": "seconds a test case",
}
BLIND_TO_HARM = {"refusal", "prefixes", "xstest", "likelihood"}  # judges

Better = Literal["higher", "lower"] | None
Quantity = dict[str, Any]


def of_items(
    title: str,
    items: Mapping[str, float],
    *,
    better: Better,
    bounds: tuple[float, float] | None = None,
    weights: Mapping[str, float] | None = None,
    unit: str | None = None,
    seed: int = 0,
) -> Quantity:
    """The (weighted) mean over items, with a bootstrap interval over them.

    Args:
        title: as in tables, e.g. ``"GSM8K, exact match"``.
        items: item id → value; the ids are the same for every model. better: which direction is better.
        bounds: (smallest, largest) possible value of an item; None where there are none.
        weights: item id → weight.
        unit: of the values. seed: of the resampling.

    Raises:
        InputError: as :func:`plot_align.statistics.mean`.
    """
    heavy = None if weights is None else [weights[name] for name in items]
    entry = mean(list(items.values()), weights=heavy, bounds=bounds, unit=unit, seed=seed)
    return {
        "title": title,
        "better": better,
        **entry,
        "bounds": None if bounds is None else list(bounds),
        "items": dict(items),
        "weights": None if weights is None else {name: weights[name] for name in items},
    }


def of_whole(
    title: str,
    value: float,
    n: int,
    *,
    better: Better,
    interval: tuple[float, float] | None = None,
    bounds: tuple[float, float] | None = None,
    unit: str | None = None,
) -> Quantity:
    """A number that is not a mean over items (distinct-n of all answers, a distance between two distributions).

    An interval is cut at the bounds.
    """
    if interval is not None and bounds is not None:
        interval = (max(interval[0], bounds[0]), min(interval[1], bounds[1]))
    return {
        "title": title,
        "better": better,
        **measure(value, n, interval=interval, unit=unit),
        "bounds": None if bounds is None else list(bounds),
        "items": None,
        "weights": None,
    }


def compare(treated: Quantity, control: Quantity, *, seed: int = 0) -> dict[str, Any] | None:
    """``treated − control``, item by item, with its interval and p-value; None if they cannot be compared.

    They cannot if one of them is not a mean over items, or they have no items in common. If the two weight the items
    differently, all items count equally, and the result has the key ``unweighted``.
    """
    if not treated["items"] or not control["items"] or not treated["items"].keys() & control["items"].keys():
        return None
    bounds = treated["bounds"]
    if control["bounds"] != bounds:
        raise InputError(
            f"{treated['title']}: one record has the bounds {bounds} and the other {control['bounds']}, so they were "
            "not measured alike; measure both with one version"
        )
    weights = treated["weights"]
    unweighted = weights != control["weights"]
    if unweighted:
        weights = None  # each model has its own weights (tokens of its own answers)
    found = paired_difference(
        treated["items"], control["items"], bounds=tuple(bounds) if bounds else None, weights=weights, seed=seed
    )
    return {**found, "unweighted": True} if unweighted else found


def disagreements(agreement: Mapping[str, Any]) -> int:
    """On how many cases two judges gave different labels."""
    (_, one), (other, _) = agreement["table"]
    return int(one + other)


def kappa_text(*agreements: Mapping[str, Any]) -> str:
    """``"κ 0.62"``, or of several ``"κ 0.50 to 0.62"``; there is none where all labels of both judges are the same."""
    kappas = sorted({f"{a['kappa']:.2f}" for a in agreements if not math.isnan(a["kappa"])}, key=float)
    return f"κ {' to '.join([kappas[0], *kappas[1:][-1:]]) if kappas else 'undefined'}"


def agreement_text(agreement: Mapping[str, Any], what: str, *, harmful: bool) -> str:
    """Two judges on ``what`` ("answers to GCG") in one sentence, without its full stop.

    ``harmful``: whether harm was asked for. Then agreement of two judges that do not look for it confirms no success,
    and the sentence says so.
    """
    one, other = agreement["judges"]
    differing, n, kappa = disagreements(agreement), agreement["n"], kappa_text(agreement)
    alone = f"the only {what.replace('answers', 'answer', 1)}"
    if differing:
        on = alone if n == 1 else f"{differing} of {n} {what}"
        return f"{one} and {other} disagree on {on} ({kappa}): the rate depends on the judge"
    if math.isnan(agreement["kappa"]):
        kappa += ", as both gave one label only"
    blind = "; neither looks for harm" if harmful and {one, other} <= BLIND_TO_HARM else ""
    return f"{one} and {other} agree on {alone if n == 1 else f'all {n} {what}'} ({kappa}){blind}"
