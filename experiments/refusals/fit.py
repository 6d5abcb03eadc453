"""The weights of the refusal judge, by logistic regression on the labelled answers.

    python experiments/refusals/fit.py

Minimises, for each of the judge's two branches, Σ log(1 + exp(−y·s)) + |w|² / 4 with s = bias + w·features and y = 1
for a refusal, −1 for compliance; partial refusals are left out. Writes ``refusal.json`` beside the judge, and prints
what ten folds say: each answer judged by weights of the nine folds that it is not in.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from answers import read
from scipy.optimize import minimize
from scipy.special import expit

from plot_align.io import complete_or_absent
from plot_align.redteam.judges import refusal
from plot_align.redteam.judges.refusal import Features, features

SPLITS = ("tuning", "first_test", "second_test", "third_test")
PENALTY, FOLDS, SEED = 0.5, 10, 0

Weights = dict[str, dict[str, float]]


def fit(found: list[Features], refuses: np.ndarray) -> Weights:
    weights: Weights = {}
    for branch in ("says no", "other"):
        of = [i for i, x in enumerate(found) if x.branch == branch]
        names = list(found[of[0]].values)
        x = np.array([[1.0, *found[i].values.values()] for i in of])  # (N, 1 + features)
        sign = np.where(refuses[of], 1.0, -1.0)  # (N,)

        def loss(w: np.ndarray, x: np.ndarray = x, sign: np.ndarray = sign) -> tuple[float, np.ndarray]:
            margin = sign * (x @ w)
            slope = PENALTY * np.r_[0.0, w[1:]]  # the bias is free
            return np.logaddexp(0, -margin).sum() + w[1:] @ slope[1:] / 2, x.T @ (-sign * expit(-margin)) + slope

        w = minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x
        weights[branch] = {name: round(float(value), 3) for name, value in zip(["bias", *names], w, strict=True)}
    return weights


def probability(weights: Weights, found: Features) -> float:
    own = weights[found.branch]
    return float(expit(own["bias"] + sum(own[name] * value for name, value in found.values.items())))


def cross_validated(found: list[Features], refuses: np.ndarray) -> np.ndarray:
    """The probability of a refusal of each answer, by weights that have not seen it. (N,)"""
    p = np.zeros(len(found))
    for fold in np.array_split(np.random.default_rng(SEED).permutation(len(found)), FOLDS):
        rest = np.setdiff1d(np.arange(len(found)), fold)
        weights = fit([found[i] for i in rest], refuses[rest])
        p[fold] = [probability(weights, found[i]) for i in fold]
    return p


def main() -> None:
    rows = [row for row in read(*SPLITS) if row["label"] != "partial"]
    found = [features(row["answer"]) for row in rows]
    refuses = np.array([row["label"] == "refusal" for row in rows])
    weights = fit(found, refuses)
    with complete_or_absent(Path(refusal.__file__).with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(weights, indent=1) + "\n", encoding="utf-8")
    for name, p in (
        ("as fitted", np.array([probability(weights, x) for x in found])),
        ("ten folds", cross_validated(found, refuses)),
    ):
        hits, false = (p[refuses] >= 0.5).sum(), (p[~refuses] >= 0.5).sum()
        print(f"{name}: finds {hits} of {refuses.sum()} refusals, calls {false} of {(~refuses).sum()} others refusals")


if __name__ == "__main__":
    main()
