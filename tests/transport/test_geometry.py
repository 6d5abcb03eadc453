"""Coordinates against NumPy, hand-derived values and the inequality they exist for."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plot_align.errors import InputError
from plot_align.transport import geometry
from plot_align.transport.geometry import Geometry, gini_mean_difference, line, slices


def embeddings(seed, rows=40, width=6, dtype=torch.float64):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_norm_coordinates_by_hand():
    """Rows (3,4), (0,0), (6,8) have norms 5, 0, 10.

    The pairs differ by 5, 5 and 10, so Gini's mean difference is 20/3 and the scaled coordinates are 3/4, 0, 3/2.
    """
    g = line(torch.tensor([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]]))
    assert g.unit == pytest.approx(20 / 3)
    torch.testing.assert_close(g.coordinates, torch.tensor([0.75, 0.0, 1.5], dtype=torch.float64))
    assert (g.kind, g.norm_order, g.valid, g.vocab_size) == ("norm", 2.0, 3, 3)


def test_principal_coordinates_by_hand():
    """Points (0,0), (0,-2), (0,-4), (1,-2) have mean (1/4, -2); their covariance is diagonal with the larger entry in
    the second direction, and the sign rule makes the axis (0, 1). Coordinates are the centred second entries.
    """
    points = torch.tensor([[0.0, 0.0], [0.0, -2.0], [0.0, -4.0], [1.0, -2.0]])
    g = line(points, "principal", scaled=False)
    torch.testing.assert_close(g.coordinates, torch.tensor([2.0, 0.0, -2.0, 0.0], dtype=torch.float64))
    assert g.unit == 1.0


@pytest.mark.parametrize("order", [1, 1.5, 2, 3, math.inf])
def test_norms_equal_numpy(order):
    e = embeddings(0)
    expected = np.linalg.norm(e.numpy(), ord=order, axis=1)
    np.testing.assert_allclose(line(e, norm_order=order, scaled=False).coordinates, expected, rtol=1e-14)


def test_large_order_does_not_underflow():
    """0.001**200 is 1e-600, zero in float64; the norm is 0.001 * (1 + 2**-200)**(1/200) = 0.001."""
    e = torch.tensor([[0.001, 0.0005], [0.002, 0.001]], dtype=torch.float64)
    g = line(e, norm_order=200, scaled=False)
    torch.testing.assert_close(g.coordinates, torch.tensor([0.001, 0.002], dtype=torch.float64))


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("valid", [40, 25])
def test_principal_equals_svd(offset, valid):
    e = embeddings(1) * torch.tensor([1.0, 3.0, 0.5, 1.0, 1.2, 1.0]) + offset
    centred = e.numpy() - e[:valid].numpy().mean(axis=0)
    axis = np.linalg.svd(centred[:valid])[2][0]
    axis = axis * np.sign(axis[np.abs(axis).argmax()])
    g = line(e, "principal", scaled=False, valid=valid)
    np.testing.assert_allclose(g.coordinates, centred @ axis, atol=1e-9 * (1 + offset))


@pytest.mark.parametrize("seed", range(4))
def test_principal_sign_is_settled(seed):
    """Mirrored embeddings have the same axis, because its largest entry is positive: the coordinates change sign."""
    e = embeddings(seed)
    torch.testing.assert_close(line(-e, "principal").coordinates, -line(e, "principal").coordinates)


@pytest.mark.parametrize("kind", ["norm", "principal"])
def test_chunks_do_not_show(kind, monkeypatch):
    e = embeddings(2, dtype=torch.bfloat16)
    whole = line(e, kind, valid=33)
    monkeypatch.setattr(geometry, "_CHUNK_ELEMENTS", 7 * e.shape[1])  # 40 rows in blocks of 7
    torch.testing.assert_close(line(e, kind, valid=33).coordinates, whole.coordinates, rtol=1e-12, atol=1e-12)
    assert whole.unit == pytest.approx(line(e.double(), kind, valid=33).unit, rel=1e-12)


@pytest.mark.parametrize("kind", ["norm", "principal"])
def test_large_vocabulary_needs_no_square_matrix(kind):
    """A V x V matrix for these 100,000 rows would be 80 GB."""
    assert line(embeddings(3, rows=100_000, width=4, dtype=torch.float32), kind).vocab_size == 100_000


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12))
def test_gini_equals_mean_over_pairs(values):
    n = len(values)
    brute = sum(abs(a - b) for a in values for b in values) / (n * (n - 1))
    assert gini_mean_difference(torch.tensor(values, dtype=torch.float64)) == pytest.approx(
        brute, rel=1e-12, abs=1e-12
    )


@pytest.mark.parametrize("kind", ["norm", "principal"])
def test_scale_makes_a_random_move_cost_one(kind):
    x = line(embeddings(4) * 37.0, kind, valid=30).coordinates[:30]
    pairs = (x[:, None] - x[None, :]).abs()
    assert float(pairs.sum() / (30 * 29)) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("kind", ["norm", "principal"])
def test_padding_changes_nothing_for_tokens(kind):
    e = embeddings(5)
    padded = torch.cat([e, 100.0 * embeddings(6, rows=9)])
    plain, g = line(e, kind), line(padded, kind, valid=40)
    assert g.unit == pytest.approx(plain.unit, rel=1e-12)
    torch.testing.assert_close(g.coordinates[:40], plain.coordinates)
    # and padding stands where its own embedding does
    swapped = line(torch.cat([e, padded[40:].flip(0)]), kind, valid=40)
    torch.testing.assert_close(swapped.coordinates[40:], g.coordinates[40:].flip(0))
    assert g.coordinates[40:].unique().numel() == 9


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    order=st.sampled_from([1.0, 1.3, 2.0, 5.0, math.inf]),
    kind=st.sampled_from(["norm", "principal"]),
    valid=st.sampled_from([5, 12]),
)
def test_coordinates_are_lipschitz_under_their_cost(seed, order, kind, valid):
    order = 2.0 if kind == "principal" else order
    e = embeddings(seed, rows=12, width=4)
    x = line(e, kind, norm_order=order, valid=valid).coordinates * line(e, kind, norm_order=order, valid=valid).unit
    x = x.numpy()
    cost = np.linalg.norm(e.numpy()[:, None] - e.numpy()[None], ord=order, axis=-1)
    assert (np.abs(x[:, None] - x[None, :]) <= cost * (1 + 1e-12) + 1e-13).all()


def test_detached_and_untouched():
    e = torch.nn.Parameter(embeddings(7, dtype=torch.float32))
    before = e.detach().clone()
    g = line(e, "principal")
    assert not g.coordinates.requires_grad
    assert g.coordinates.dtype == torch.float64
    assert torch.equal(e, before)


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        (torch.ones(5, 3), "norm"),
        (torch.ones(5, 3), "principal"),
        (torch.zeros(5, 3), "norm"),
        (torch.nn.functional.normalize(embeddings(8, dtype=torch.float32), dim=1), "norm"),
        (torch.full((7, 3), 0.1, dtype=torch.float64), "principal"),
    ],
)
def test_equal_coordinates_are_refused(rows, kind):
    for scaled in (True, False):
        with pytest.raises(InputError, match=f'embeddings give all .* the same "{kind}" coordinate.*use kind'):
            line(rows, kind, scaled=scaled)


def test_small_but_real_differences_are_kept():
    e = torch.nn.functional.normalize(embeddings(9, dtype=torch.float32), dim=1)
    e = e * (1 + 1e-4 * torch.arange(40)[:, None])
    x = line(e).coordinates
    assert (x.diff() > 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": torch.zeros(3)}, r"embeddings is a float32 tensor of shape \(3,\).*\(V, H\)"),
        ({"embeddings": torch.zeros(3, 0)}, r"embeddings is .*\(3, 0\)"),
        ({"embeddings": torch.ones(3, 2, dtype=torch.int64)}, "embeddings is a int64"),
        ({"embeddings": [[1.0]]}, "embeddings is a list"),
        ({"kind": "slices"}, 'kind is \'slices\'.*"norm", "principal" or "vocabulary"'),
        ({"norm_order": 0.5}, "norm_order is 0.5.*1 <= l"),
        ({"norm_order": math.nan}, "norm_order is nan"),
        ({"norm_order": "2"}, "norm_order is '2'"),
        ({"kind": "principal", "norm_order": 1}, 'norm_order is 1 with kind "principal"'),
        ({"kind": "vocabulary", "norm_order": 1}, 'norm_order is 1 with kind "vocabulary"'),
        ({"valid": 41}, "valid is 41 for 40 rows"),
        ({"valid": 1}, "valid is 1 for 40 rows"),
        ({"valid": 3.0}, "valid is 3.0"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"embeddings": embeddings(0), **change}
    with pytest.raises(InputError, match=message):
        line(arguments.pop("embeddings"), arguments.pop("kind", "norm"), **arguments)


@pytest.mark.parametrize("kind", ["norm", "principal"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [3, 38])  # 38 is padding
def test_non_finite_embeddings_are_refused(kind, bad, row):
    e = embeddings(0, dtype=torch.bfloat16)
    e[row, 2] = bad
    with pytest.raises(InputError, match=f"embeddings has a NaN or infinite entry in row {row}"):
        line(e, kind, valid=35)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coordinates": torch.zeros(2, 2)}, "coordinates is a float32 tensor"),
        ({"coordinates": torch.tensor([1, 2])}, "coordinates is a int64"),
        ({"coordinates": torch.tensor([1.0, math.nan])}, "coordinates has a NaN or infinite entry at row 1"),
        ({"unit": 0.0}, "unit is 0.0"),
        ({"unit": math.nan}, "unit is nan"),
        ({"valid": 3}, "valid is 3 for 2 rows"),
    ],
)
def test_geometry_of_your_own_is_checked(change, message):
    with pytest.raises(InputError, match=message):
        Geometry(**{"coordinates": torch.tensor([0.0, 1.0]), "kind": "mine", **change})


def test_vocabulary_by_hand():
    """Of the ids 0, 1, 2, 3 the first three are tokens: their pairs differ by 1, 1 and 2, so the unit is 4/3."""
    same = torch.ones(4, 2)  # the embeddings do not matter
    g = line(same, "vocabulary", valid=3)
    assert g.unit == pytest.approx(4 / 3)
    torch.testing.assert_close(g.coordinates, torch.tensor([0.0, 0.75, 1.5, 2.25], dtype=torch.float64))
    assert (g.kind, g.norm_order, g.valid) == ("vocabulary", None, 3)
    assert line(same, "vocabulary", scaled=False).coordinates.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_slices_have_one_unit():
    """Gini's mean difference is 1 on average over the slices, not on each: directions keep their relative lengths."""
    e = embeddings(10) * torch.tensor([10.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    made, raw = slices(e, 7, seed=3, valid=30), slices(e, 7, seed=3, scaled=False, valid=30)
    pairs = [(g.coordinates[:30, None] - g.coordinates[None, :30]).abs().sum().item() / (30 * 29) for g in made]
    assert np.mean(pairs) == pytest.approx(1.0, rel=1e-12)
    assert np.std(pairs) > 0.3
    assert len({g.unit for g in made}) == 1
    assert {(g.kind, g.norm_order, g.valid) for g in made} == {("slice", 2.0, 30)}
    for a, b in zip(made, raw, strict=True):
        assert b.unit == 1.0
        torch.testing.assert_close(a.coordinates * a.unit, b.coordinates)


def test_slices_are_unit_projections():
    """On the identity matrix the coordinates are the direction itself: a unit vector, another one for each slice."""
    found = torch.stack([g.coordinates for g in slices(torch.eye(6), 40, seed=1, scaled=False)])  # (40, 6)
    torch.testing.assert_close(found.square().sum(1), torch.ones(40, dtype=torch.float64))
    assert torch.linalg.matrix_rank(found) == 6
    assert found.mean(0).abs().max() < 0.25  # uniform on the sphere: no direction is preferred


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), valid=st.sampled_from([5, 12]))
def test_slices_are_lipschitz_under_the_euclidean_cost(seed, valid):
    e = embeddings(seed, rows=12, width=4)
    cost = torch.cdist(e, e)
    for g in slices(e, 3, seed=seed, valid=valid):
        x = g.coordinates * g.unit
        assert ((x[:, None] - x[None, :]).abs() <= cost + 1e-9).all()


def test_slices_are_reproducible_and_leave_the_global_generator_alone(monkeypatch):
    e = embeddings(11, dtype=torch.bfloat16)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = slices(e, 4, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(geometry, "_CHUNK_ELEMENTS", 7 * e.shape[1])
    for a, b, other in zip(first, slices(e, 4, seed=5), slices(e, 4, seed=6), strict=True):
        torch.testing.assert_close(a.coordinates, b.coordinates, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(a.coordinates, other.coordinates)


@pytest.mark.parametrize("count", [0, -1, 2.0, True])
def test_slices_refuse_a_wrong_count(count):
    with pytest.raises(InputError, match=r"count is .* at least one slice"):
        slices(embeddings(0), count)


def test_slices_refuse_embeddings_without_differences():
    with pytest.raises(InputError, match="embeddings are the same for all 7 tokens"):
        slices(torch.full((7, 3), 0.1), 5)
    with pytest.raises(InputError, match="embeddings is a float32 tensor"):
        slices(torch.zeros(3), 5)
