"""How well the refusal judge does on the labelled answers, beside RefusalPrefixes; what docs/redteam.md shows.

    python experiments/refusals/measure.py            # tables
    python experiments/refusals/measure.py --mistakes # and every answer that it gets wrong

An answer of a set that the weights are fitted on is judged by weights fitted without its writer's sets (the cues have
been read on the first writer's, though). Answers of the other sets are judged by the judge as it is shipped.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import fit
from answers import read

from plot_align.records import proportion_of
from plot_align.redteam.judges import RefusalJudge, RefusalPrefixes

NEW = ("drawn_test", "last_test", "roles_test", "hard_test")  # never fitted on
USUAL = tuple(f"writer_{number}" for number in range(1, 6))  # the sixth wrote what is hard to tell
Row = dict[str, Any]


def judged() -> list[Row]:
    """All answers, each with ``ours`` and ``prefixes``: whether the judge calls it a refusal."""
    rows = read(*fit.SPLITS, *NEW)
    fitted = [row for row in rows if row["split"] in fit.SPLITS]
    for row, p in zip(fitted, fit.by_others(fitted), strict=True):
        row["p"] = float(p)
    ours, prefixes = RefusalJudge(), RefusalPrefixes()
    for row in rows:
        row.setdefault("p", ours.probability(row["answer"]))
        row["ours"] = row["p"] >= ours.threshold
        row["prefixes"] = prefixes.refusal(row["answer"]) is not None
    return rows


def table(rows: list[Row], by: Callable[[Row], str], title: str) -> str:
    """Markdown: for each group, how many refusals each judge finds, and how often it calls a compliant answer one."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[by(row)].append(row)
    lines = [
        f"| {title} | refusals found | by `prefixes` | false alarms | by `prefixes` | partial ones called refusals |",
        "|---|---|---|---|---|---|",
    ]
    for name, group in groups.items():
        cells = [_share(group, label, judge) for label in ("refusal", "compliance") for judge in ("ours", "prefixes")]
        lines.append(f"| {name} | {' | '.join(cells)} | {_share(group, 'partial', 'ours', interval=False)} |")
    return "\n".join(lines)


def _share(rows: Iterable[Row], label: str, judge: str, interval: bool = True) -> str:
    calls = [row[judge] for row in rows if row["label"] == label]
    if not calls:
        return "–"
    count = f"{sum(calls)} of {len(calls)}"
    if not interval:
        return count
    low, high = proportion_of(sum(calls), len(calls))["interval"]
    return f"{100 * sum(calls) / len(calls):.1f} % ({100 * low:.0f}–{100 * high:.0f}; {count})"


def kinds(rows: list[Row]) -> str:
    """Markdown: the kinds of ten answers or more with a mistake, those of refusals first."""
    lines = ["| kind | label | wrong | by `prefixes` |", "|---|---|---|---|"]
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row["label"] != "partial":
            groups[row["label"], row["kind"]].append(row)
    for (label, kind), group in sorted(groups.items(), key=lambda x: (x[0][0] != "refusal", x[0][1])):
        wrong = [sum(row[judge] != (label == "refusal") for row in group) for judge in ("ours", "prefixes")]
        if any(wrong) and len(group) >= 10:
            lines.append(f"| {kind} | {label} | {wrong[0]} of {len(group)} | {wrong[1]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mistakes", action="store_true", help="show every answer that the judge gets wrong")
    options = parser.parse_args()
    rows = judged()
    print(table(rows, lambda row: row["split"], "set"))
    usual = [row for row in rows if row["split"] in USUAL]
    print("\n" + table(usual, lambda row: "writers 1 to 5", "answers as models write them"))
    print("\n" + kinds(rows))
    for row in rows if options.mistakes else []:
        if row["label"] != "partial" and row["ours"] != (row["label"] == "refusal"):
            print(f"\n{row['split']}, {row['kind']}, {row['label']}, p = {row['p']:.2f}: {row['answer']}")


if __name__ == "__main__":
    main()
