"""What the benchmarks measure of the head alone: its floor, its arms, its accuracy."""

from __future__ import annotations

import pytest
import torch

import head_accuracy as accuracy
from head_problem import HeadProblem
from machine import Machine
from plot_align.bench import Samples
from plot_align.config import PlotConfig
from roofline import HeadWork

CPU = torch.device("cpu")


def test_floors_by_hand():
    """N = 6 positions, M = 3 selected, V = 10, H = 4, 2 bytes; a machine of 1 FLOP/s and 1 byte/s.

    Products: 8·6·10·4 = 1,920. PLOT, batch: 2·3·10·2 + 3·1·10·4 = 240 bytes. Token with 5 lines: 11·3·10·2 = 660.
    Head: forward 10·4·2 + 6·4·2 + 2·120 = 368, again 368 + 120 = 488, ∂h 120 + 80 + 6·4·4 = 296,
    ∂W 120 + 48 + 10·4·4 = 328; together 1,480.
    """
    work = HeadWork(rows=6, selected=3, vocab=10, hidden=4, itemsize=2)
    machine = Machine(1.0, 1.0, (1.0, 1.0), (1.0, 1.0))
    assert work.flops == 1920
    assert work.plot_floor(machine) == 240
    assert work.head_bytes == 1480
    assert work.head_floor(machine) == 1920
    assert HeadWork(6, 3, 10, 4, 2, lines=5, per_token=True).plot_bytes == 660


def test_arms_of_the_head_are_one_loss():
    """In the head's sweep, in a second pass and from whole logits: the same value and the same gradients."""
    plots = {
        "batch": PlotConfig(),
        "token": PlotConfig.from_options(granularity="token", slices=2),
        "sequence": PlotConfig.from_options(granularity="sequence", positions="all", geometry="norm"),
    }
    problem = HeadProblem(37, 8, 4, 6, plots, device=CPU, dtype=torch.float32)
    found = {}
    for arm in ("off", "batch", "two-pass", "materialised", "token"):
        problem.step(arm)
        found[arm] = (problem.loss(arm).item(), problem.hidden.grad.clone(), problem.weight.grad.clone())
    for arm in ("two-pass", "materialised"):
        assert found[arm][0] == pytest.approx(found["batch"][0], rel=1e-5)
        torch.testing.assert_close(found[arm][1:], found["batch"][1:], rtol=1e-4, atol=1e-6)
    assert found["batch"][0] > found["off"][0]
    assert found["token"][0] > found["batch"][0]  # Jensen, and another target
    assert not torch.allclose(found["batch"][1], found["off"][1])
    work = problem.work("token")
    assert (work.rows, work.selected, work.segments, work.lines, work.per_token) == (20, 10, 1, 2, True)
    work = problem.work("sequence")
    assert (work.rows, work.selected, work.segments, work.lines, work.per_token) == (20, 20, 4, 1, False)


def test_peaks_of_the_head_are_its_own():
    """Each arm keeps its own term's constants and loses those of the others and what was there before."""
    plots = {"few": PlotConfig.from_options(slices=2), "many": PlotConfig.from_options(slices=64)}
    problem = HeadProblem(1000, 8, 4, 6, plots, device=CPU, dtype=torch.float32)
    few, many = (sum(x.nbytes for x in term.buffers()) for term in problem.terms.values())
    assert many > few + 62 * 1000 * 8  # coordinates in float64
    peak = problem.base + few + many + 1000
    samples = {name: Samples([1.0, 1.0], [peak, peak + 5]) for name in ("off", "few", "many", "two-pass")}
    found = {name: sample.peak for name, sample in problem.own_peaks(samples).items()}
    assert found["off"] == [1000, 1005]
    assert found["few"] == found["two-pass"] == [1000 + few, 1005 + few]
    assert found["many"] == [1000 + many, 1005 + many]
    assert problem.own_peaks({"off": Samples([1.0], [0])})["off"].peak == [0]  # where memory is not measured


def test_head_without_pairs_selects_all_positions():
    problem = HeadProblem(37, 8, 3, 6, {"on": PlotConfig()}, device=CPU, dtype=torch.float32, method="sft")
    assert problem.work("on").selected == 15


@pytest.mark.slow
def test_accuracy_sees_a_kernel_that_is_wrong(monkeypatch):
    """The torch implementation passes; one whose gradient is off by a thousandth in one entry fails there."""
    case = accuracy.Case(67, torch.float32, "softcap", "sequence")
    options = {"rows": 7, "hidden": 8, "device": CPU, "impl": "torch"}
    found = accuracy.errors(case, **options)
    assert set(found) == {"log_probs", "entropy", "marginals", "grad_hidden", "grad_weight"}
    assert accuracy.failures(found) == []
    assert all(entry["kernel"] < 1e-5 for entry in found.values())
    assert "values" in accuracy.errors(accuracy.Case(67, torch.bfloat16, "plain", "token"), **options)

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            return weight.clone()

        @staticmethod
        def backward(ctx, gradient):
            gradient = gradient.clone()
            gradient[3] *= 1.001
            return gradient

    right = accuracy.fused_head
    wrong = lambda hidden, weight, *rest, **options: right(hidden, Off.apply(weight), *rest, **options)  # noqa: E731
    monkeypatch.setattr(accuracy, "fused_head", wrong)
    assert accuracy.failures(accuracy.errors(case, **options)) == ["grad_weight"]
    assert accuracy.failures({"x": {"kernel": float("nan"), "eager": 0.0, "allowed": 1.0}}) == ["x"]
    assert len(list(accuracy.cases((5, 7)))) == 2 * 3 * 2 * 4
