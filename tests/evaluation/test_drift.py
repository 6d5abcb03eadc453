"""Transport plans and jackknife intervals against independent solvers; drift of a model from its reference."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import ot
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from plot_align import estimate, load_pairs
from plot_align.errors import InputError
from plot_align.evaluation.drift import KL, Drift, flows, jackknife, moved_tokens, partial_plan
from plot_align.evaluation.subject import Subject
from plot_align.preference.inspection import token_text
from plot_align.transport.geometry import line


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 6), m=st.integers(1, 6))
def test_a_partial_plan_costs_what_pot_says(seed: int, n: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    supply, demand, cost = rng.uniform(0.01, 1, n), rng.uniform(0.01, 1, m), rng.uniform(0, 1, (n, m))
    moved = min(supply.sum(), demand.sum())
    plan = partial_plan(supply, demand, cost)
    assert plan.sum() == pytest.approx(moved)
    assert (plan.sum(1) <= supply + 1e-9).all()
    assert (plan.sum(0) <= demand + 1e-9).all()
    # POT: the side with more has a sink of cost 0 for what stays.
    rest = abs(supply.sum() - demand.sum())
    if supply.sum() > demand.sum():
        demand, cost_full = np.append(demand, rest), np.hstack([cost, np.zeros((n, 1))])
    else:
        supply, cost_full = np.append(supply, rest), np.vstack([cost, np.zeros((1, m))])
    expected = ot.emd2(supply / supply.sum(), demand / demand.sum(), cost_full) * supply.sum()
    assert (plan * cost).sum() == pytest.approx(expected, abs=1e-6)


def test_tiny_masses_are_transported_too() -> None:
    """Changes of 1e-7: the solver's tolerances are absolute, so the masses are scaled."""
    plan = partial_plan(np.array([2e-7, 1e-7]), np.array([1e-7, 2e-7]), np.array([[0.0, 1.0], [1.0, 0.0]]))
    assert plan == pytest.approx(np.array([[1e-7, 1e-7], [0.0, 1e-7]]), abs=1e-12)


def test_flows_by_hand() -> None:
    """On a line, 0.2 goes from 0 to 1 and 0.1 from 10 to 9; token 4 keeps what it has."""
    embeddings = torch.tensor([[0.0], [1.0], [9.0], [10.0], [5.0]])
    q = torch.tensor([0.4, 0.1, 0.1, 0.2, 0.2], dtype=torch.float64)
    p = torch.tensor([0.2, 0.3, 0.2, 0.1, 0.2], dtype=torch.float64)
    found = flows(q, p, embeddings)
    assert [(i, j) for i, j, _, _ in found] == [(0, 1), (3, 2)]
    assert [mass for _, _, mass, _ in found] == pytest.approx([0.2, 0.1])
    assert [cost for _, _, _, cost in found] == pytest.approx([0.2, 0.2])  # of a mean distance of 5
    assert flows(q, q, embeddings) == []


def test_the_jackknife_of_a_linear_function_is_students_interval() -> None:
    """Groups of equal size: leaving one out is the mean of the others, so the interval is mean ± t s / √G."""
    rng = np.random.default_rng(0)
    first = rng.uniform(0.2, 0.8, size=10)
    after = torch.from_numpy(np.stack([first, 1 - first], axis=1))
    value, (low, high) = jackknife(lambda p, q: float(p[0] - q[0]), after, torch.full((10, 2), 0.5).double())
    half = scipy.stats.t.ppf(0.975, 9) * first.std(ddof=1) / math.sqrt(10)
    assert value == pytest.approx(first.mean() - 0.5)
    assert (low, high) == pytest.approx((value - half, value + half))


@pytest.fixture(scope="module")
def pair(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, Subject]:
    """A model and the reference it was moved from."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    reference = AutoModelForCausalLM.from_pretrained(tiny_base)
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("drift")
    base = Subject(reference, tokenizer, "base", "base", folder)
    return Subject(model, tokenizer, "moved", "moved", folder, reference=base), base


def test_drift_against_materialised_outputs(
    pair: tuple[Subject, Subject], chat_pairs_file: Path, tmp_path: Path
) -> None:
    subject, base = pair
    pairs = load_pairs(chat_pairs_file)
    preference = estimate(pairs.select(range(12)), subject.tokenizer, progress=False)
    path = preference.save(tmp_path / "preference.safetensors")
    measure = Drift(pairs=str(chat_pairs_file), limit=12, preference=str(path))
    measure.check()
    found = measure.run(subject)

    def output(model: torch.nn.Module) -> torch.Tensor:
        rows = pairs.shuffle(seed=0).select(range(12))
        total = 0.0
        for row in rows:
            whole = subject.tokenizer.apply_chat_template([*row["prompt"], *row["chosen"]], return_dict=False)
            start = len(subject.rows([row["prompt"]])[0])
            with torch.no_grad():
                p = model(input_ids=torch.tensor([whole])).logits[0].double().softmax(-1)
            total = total + p[start - 1 : len(whole) - 1].sum(0)
        return total / total.sum()

    p, q = output(subject.model), output(base.model)
    quantities = found.quantities
    assert quantities["tv"]["value"] == pytest.approx(float((p - q).abs().sum() / 2), rel=1e-4)
    d = preference.difference()
    assert quantities["preferred_mass"]["value"] == pytest.approx(float(p[d > 0].sum()), rel=1e-4)
    assert quantities["rejected_mass"]["value"] == pytest.approx(float(p[d < 0].sum()), rel=1e-4)
    x = line(base.model.get_input_embeddings().weight).coordinates.numpy()
    expected = scipy.stats.wasserstein_distance(x, x, p.numpy(), preference.target("relu").numpy())
    assert quantities["target_distance"]["value"] == pytest.approx(expected, rel=1e-4)
    low, high = quantities["tv"]["interval"]
    assert low < quantities["tv"]["value"] < high
    moved = found.details["moved"]
    assert moved[0]["change"] == pytest.approx(float((p - q).max()), rel=1e-3)
    assert moved[-1]["change"] == pytest.approx(float((p - q).min()), rel=1e-3)
    assert moved[0]["d"] == pytest.approx(float(d[moved[0]["id"]]))
    assert found.details["masses"]["reference"]["preferred"] == pytest.approx(float(q[d > 0].sum()), rel=1e-4)
    change = {token_text(subject.tokenizer, i): float(p[i] - q[i]) for i in range(len(p))}
    for flow in found.details["flows"]:  # from what lost to what gained
        assert change[flow["from"]] < 0 < change[flow["to"]]
    assert len(found.details["flows"]) >= 10


def test_a_model_does_not_drift_from_itself(pair: tuple[Subject, Subject], chat_pairs_file: Path) -> None:
    _, base = pair
    base.reference = base
    found = Drift(pairs=str(chat_pairs_file), limit=6).run(base)
    assert found.quantities["tv"]["value"] == 0
    assert found.details["moved"] == []
    assert KL(prompts=str(chat_pairs_file), limit=3, max_new_tokens=4).run(base).quantities["kl"][
        "value"
    ] == pytest.approx(0, abs=1e-6)
    base.reference = None


def test_kl_is_positive_where_a_model_moved(pair: tuple[Subject, Subject], chat_pairs_file: Path) -> None:
    found = KL(prompts=str(chat_pairs_file), limit=3, max_new_tokens=4).run(pair[0])
    assert found.quantities["kl"]["value"] > 1e-4
    assert found.quantities["kl"]["n"] == 3


def test_without_a_reference_drift_says_so(pair: tuple[Subject, Subject], chat_pairs_file: Path) -> None:
    with pytest.raises(InputError, match="name it with --reference"):
        Drift(pairs=str(chat_pairs_file), limit=3).run(pair[1])


def test_moved_tokens_are_the_extremes_in_order(pair: tuple[Subject, Subject]) -> None:
    q = torch.full((400,), 1 / 400, dtype=torch.float64)
    p = q.clone()
    p[7] += 0.02
    p[9] += 0.01
    p[300] -= 0.002
    found = moved_tokens(p, q, pair[0].tokenizer, None)
    assert [entry["id"] for entry in found] == [7, 9, 300]
    assert [entry["change"] for entry in found] == pytest.approx([0.02, 0.01, -0.002])
