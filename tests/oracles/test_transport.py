"""The oracle itself: values derived by hand, and NumPy."""

import math

import numpy as np
import ot
import pytest
import torch

from oracles.transport import cost_matrix, exact_cost


def test_by_hand():
    """Corners of a 3-4-5 triangle; half the mass at A and half at B must reach C, over 3 and 4: cost 7/2.

    Second pair: a quarter must go from A to B, straight over 5 and not by way of C over 3 + 4: cost 5/4.
    """
    corners = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 0.0]])
    cost = cost_matrix(corners)
    assert cost.tolist() == [[0.0, 5.0, 3.0], [5.0, 0.0, 4.0], [3.0, 4.0, 0.0]]
    at_c = torch.tensor([0.0, 0.0, 1.0])
    assert exact_cost(torch.tensor([0.5, 0.5, 0.0]), at_c, cost) == pytest.approx(3.5)
    assert exact_cost(torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25]), cost) == pytest.approx(1.25)


def test_asymmetric_cost_goes_from_p_to_target():
    cost = torch.tensor([[0.0, 7.0], [1.0, 0.0]])
    assert exact_cost(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), cost) == pytest.approx(7.0)


@pytest.mark.parametrize("order", [1, 1.5, 2, 4, math.inf])
def test_cost_matrix_equals_numpy(order):
    e = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    e[1] = e[0] + 1e-9  # a distance that the matmul trick would lose
    expected = np.linalg.norm(e.numpy()[:, None] - e.numpy()[None], ord=order, axis=-1)
    np.testing.assert_allclose(cost_matrix(e, norm_order=order), expected, rtol=1e-12)


def test_an_unfinished_solver_is_no_result(monkeypatch):
    monkeypatch.setattr(ot, "emd2", lambda *args, **kwargs: (0.1, {"warning": "numItermax reached"}))
    half = torch.tensor([0.5, 0.5])
    with pytest.raises(RuntimeError, match="numItermax reached"):
        exact_cost(half, half, torch.zeros(2, 2))
