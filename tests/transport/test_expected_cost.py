"""The expected cosine cost against the materialised double sum, exact transport and a table in other dtypes."""

import copy

import pytest
import torch

from oracles.transport import exact_cost
from plot_align.errors import InputError
from plot_align.transport import ExpectedCost, geometry


def problem(seed=0, rows=24, width=5):
    generator = torch.Generator().manual_seed(seed)
    e = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    p, target = torch.randn(2, rows, generator=generator, dtype=torch.float64).mul(2).softmax(-1)
    return e, p, target


def cosine_cost(e):
    return 1.0 - torch.nn.functional.cosine_similarity(e[:, None], e[None], dim=-1)


def test_by_hand():
    """Directions east, north, west (of lengths 2, 1, 3) and a zero row; p on east, P = (1/2, 1/4, 1/8, 1/8).

    Costs from east: 0, 1, 2, 1, so the value is 1/4 + 1/4 + 1/8 = 5/8. E^T P = (1/2 - 1/8, 1/4) = (3/8, 1/4), and
    s = 1 - (3/8, 1/4, -3/8, 0).
    """
    e = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-3.0, 0.0], [0.0, 0.0]])
    cost = ExpectedCost(torch.tensor([0.5, 0.25, 0.125, 0.125]), e)
    value, potential = cost.value_and_potential(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert float(value) == 0.625
    assert potential.tolist() == [0.625, 0.75, 1.375, 1.0]


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_double_sum_and_bounds_transport(seed):
    e, p, target = problem(seed)
    value, potential = ExpectedCost(target, e).value_and_potential(p)
    assert float(value) == pytest.approx(float(p @ cosine_cost(e) @ target), rel=1e-13)
    torch.testing.assert_close(potential, cosine_cost(e) @ target, rtol=1e-12, atol=1e-14)
    assert float(value) >= exact_cost(p, target, cosine_cost(e).clamp_min(0.0)) - 1e-12


def test_chunks_do_not_show(monkeypatch):
    e, p, target = problem(5)
    whole = ExpectedCost(target, e)
    monkeypatch.setattr(geometry, "_CHUNK_ELEMENTS", 7 * e.shape[1])  # 24 rows in blocks of 7
    split, targets = ExpectedCost(target, e), torch.stack([p, target])
    torch.testing.assert_close(split.potential(p), whole.potential(p), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(split.potential(targets, targets), whole.potential(targets, targets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_tables(dtype):
    e, p, target = problem(6, rows=3000, width=64)
    e = e.to(dtype)
    cost = ExpectedCost(target, e)
    want = ExpectedCost(target, e.double())
    torch.testing.assert_close(cost.potential(p), want.potential(p), rtol=0, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(cost.potential(p, p), want.potential(p, p), rtol=0, atol=1e-6)


def test_the_potential_may_be_changed_by_its_owner():
    e, p, target = problem(7)
    cost = ExpectedCost(target, e)
    before = cost.potential(p).clone()
    cost.potential(p).zero_()
    assert torch.equal(cost.potential(p), before)


def test_the_table_is_shared_unless_it_is_trained():
    e, p, target = problem(8)
    assert ExpectedCost(target, e)._table.weight.data_ptr() == e.data_ptr()
    weight = torch.nn.Parameter(e.clone())
    cost = ExpectedCost(target, weight)
    before = cost.value(p, p)
    with torch.no_grad():
        weight.mul_(-3.0).add_(1.0)
    assert torch.equal(cost.value(p, p), before)


def test_a_table_that_changed_is_refused():
    e, p, target = problem(9)
    cost = ExpectedCost(target, e)
    e[0] += 1.0
    with pytest.raises(InputError, match="embeddings were changed in place"):
        cost.value(p, p)


def test_copies_count_their_own_changes():
    """A deep copy works, of a table that was changed before it was given too; one of a changed table is refused."""
    e, p, target = problem(12)
    e[0] += 1.0
    cost = ExpectedCost(target, e)
    before, copied = cost.value(p, p), copy.deepcopy(cost)
    assert torch.equal(copied.value(p, p), before)
    e[0] += 1.0
    assert torch.equal(copied.value(p, p), before)
    with pytest.raises(InputError, match="embeddings were changed in place"):
        copy.deepcopy(cost)


def test_sizes_and_tables_that_do_not_fit():
    e, _, target = problem(10)
    with pytest.raises(InputError, match="embeddings has 23 rows and target 24 tokens"):
        ExpectedCost(target, e[1:])
    with pytest.raises(InputError, match="embeddings has a NaN or infinite entry in row 3"):
        ExpectedCost(target, e.index_fill(0, torch.tensor([3]), torch.inf))


def test_follows_to_another_device():
    e, _, target = problem(11)
    cost = ExpectedCost(target, e).to("meta")
    assert cost._table.weight.device.type == "meta"
    assert cost.state_dict() == {}
