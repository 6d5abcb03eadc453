"""The output distribution from logits against a materialised softmax, finite differences, and a value by hand."""

from __future__ import annotations

import pytest
import torch

from plot_align.errors import InputError
from plot_align.head import block_torch, output_distribution, target_log_probs
from plot_align.transport import make_divergence
from plot_align.transport.geometry import line

B, T, V = 4, 6, 53


def problem(dtype=torch.float64, seed=0):
    """Logits (B, T, V), weights with unselected positions in between, a sequence id each, and a W1."""
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(B, T, V, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    weights = torch.rand(B, T, generator=generator, dtype=torch.float64) * (torch.arange(T) % 3 != 1)
    weights[2] = 0  # a sequence of which nothing is selected
    segments = torch.arange(B).unsqueeze(-1).expand(B, T)
    target = torch.rand(V, generator=generator, dtype=torch.float64)
    embeddings = torch.randn(V, 5, generator=generator, dtype=torch.float64)
    return logits, weights, segments, make_divergence("w1", target / target.sum(), line(embeddings))


def materialised(logits, weights, segments, divergence=None):
    """The specification: ``softmax`` of everything in the logits' own precision (fp32 at least), then one sum."""
    p = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))  # (B, T, V)
    count = 1 if segments is None else B
    distributions = p.new_zeros(count, V)
    for b in range(B):
        for t in range(T):
            if weights[b, t] > 0:
                distributions[0 if segments is None else segments[b, t]] += weights[b, t].to(p.dtype) * p[b, t]
    return distributions, None if divergence is None else divergence.value(p) * (weights > 0)


def upstream(shape):
    """A different gradient into every entry of the result."""
    size = torch.Size(shape).numel()
    return torch.linspace(-1, 2, size, dtype=torch.float64).reshape(shape).sin()


@pytest.mark.parametrize("rows", [1, 2, 1000], ids=lambda rows: f"{rows} rows a slice")
@pytest.mark.parametrize("granularity", ["batch", "sequence", "token"])
def test_equals_materialised(monkeypatch, granularity, rows):
    monkeypatch.setitem(block_torch._SLICE_ELEMENTS, "cpu", rows * V)
    logits, weights, segments, divergence = problem()
    segments = segments if granularity == "sequence" else None
    divergence = divergence if granularity == "token" else None
    got = output_distribution(logits, weights, segments, 1 if segments is None else B, divergence)
    want = materialised(logits, weights, segments, divergence)
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-14)
    if divergence is not None:
        torch.testing.assert_close(got[1], want[1], rtol=1e-12, atol=1e-14)
        assert not got[0].requires_grad
    index = 0 if divergence is None else 1
    weight = upstream(got[index].shape)
    (found,) = torch.autograd.grad((got[index] * weight).sum(), logits)
    (wanted,) = torch.autograd.grad((want[index] * weight).sum(), logits)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)
    assert (found[weights == 0] == 0).all()
    assert (found[weights > 0].abs().sum(-1) > 0).all()


def test_gradcheck():
    """Finite differences through a non-linear function of the distributions; a flat (N, V) batch."""
    logits, weights, segments, _ = problem()
    flat = logits.detach().flatten(0, 1).requires_grad_()

    def function(z):
        return output_distribution(z, weights.flatten(), segments.flatten(), B)[0].square()

    assert torch.autograd.gradcheck(function, (flat,), fast_mode=True)


def test_by_hand():
    """z = (ln 3, 0) gives p = (3/4, 1/4); with (0, 0) and weights 1/2 each, p̄ = (5/8, 3/8).

    ∂p̄_0/∂z_t = w·p_0·(1 − p_0)·(1, −1): 1/2·3/16 = 3/32 at the first position, 1/2·1/4 = 1/8 at the second.
    """
    logits = torch.tensor([[3.0, 1.0], [1.0, 1.0], [9.0, 9.0]]).log().requires_grad_()
    distributions, values = output_distribution(logits, torch.tensor([0.5, 0.5, 0.0]))
    assert values is None
    torch.testing.assert_close(distributions, torch.tensor([[5 / 8, 3 / 8]]))
    distributions[0, 0].backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[3 / 32, -3 / 32], [1 / 8, -1 / 8], [0.0, 0.0]]))


@pytest.mark.parametrize("granularity", ["batch", "token"])
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf")])
def test_unselected_rows_are_not_read(granularity, junk):
    logits, weights, _, divergence = problem()
    divergence = divergence if granularity == "token" else None
    spoilt = logits.detach().masked_fill((weights == 0).unsqueeze(-1), junk).requires_grad_()
    results = []
    for z in (logits, spoilt):
        distributions, values = output_distribution(z, weights, divergence=divergence)
        value = distributions if values is None else values
        (gradient,) = torch.autograd.grad((value * upstream(value.shape)).sum(), z)
        results.append((distributions, value, gradient))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_nothing_selected():
    logits, weights, _, _ = problem()
    distributions, _ = output_distribution(logits, weights * 0)
    assert torch.equal(distributions, torch.zeros(1, V, dtype=torch.float64))
    distributions.sum().backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_error_is_no_larger_than_eager(dtype):
    """Both against float64 on the same rounded logits; under autocast, which must not round the sums."""
    logits, weights, segments, _ = problem(dtype)
    exact = logits.detach().double().requires_grad_()
    truth, _ = materialised(exact, weights, segments)
    weight = upstream(truth.shape)
    (true_gradient,) = torch.autograd.grad((truth * weight).sum(), exact)
    errors = []
    for function in (lambda: output_distribution(logits, weights, segments, B), lambda: eager(logits)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            distributions = function()[0]
            (gradient,) = torch.autograd.grad((distributions * weight.float()).sum(), logits)
        assert gradient.dtype == dtype
        pairs = ((distributions, truth), (gradient, true_gradient))
        errors.append([((a.double() - b).norm() / b.norm()).item() for a, b in pairs])

    for ours, theirs in zip(*errors, strict=True):
        assert ours <= theirs + 1e-6
    assert errors[0][0] < 1e-6  # fp32 statistics, whatever the logits are


def eager(logits):
    _, weights, segments, _ = problem()
    return materialised(logits, weights, segments)


def test_backward_keeps_the_logits_and_numbers_a_row():
    """What is saved for backward: the logits that exist anyway, and vectors; no softmax, no gathered rows."""
    logits, weights, segments, _ = problem()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        distributions, _ = output_distribution(logits, weights, segments, B)
    assert [x.data_ptr() for x in saved if x.numel() > B * T] == [logits.data_ptr()]
    distributions.sum().backward()


def test_second_derivatives_are_refused():
    logits, weights, _, _ = problem()
    distributions, _ = output_distribution(logits, weights)
    with pytest.raises(InputError, match="create_graph is True"):
        torch.autograd.grad(distributions[0, 0], logits, create_graph=True)


@pytest.mark.parametrize("rows_a_slice", [1, 1000])
def test_target_log_probs(monkeypatch, rows_a_slice):
    """Against log_softmax; a NaN row is NaN and an infinite one infinite or NaN, and they spoil no other row."""
    monkeypatch.setitem(block_torch._SLICE_ELEMENTS, "cpu", rows_a_slice * V)
    logits = problem()[0].detach()
    rows, targets = torch.tensor([0, 3, 4, 23]), torch.tensor([52, 0, 7, 7])
    want = logits.flatten(0, 1).log_softmax(-1)[rows, targets]
    torch.testing.assert_close(target_log_probs(logits, rows, targets), want, rtol=1e-12, atol=1e-12)
    logits[0, 3, 9], logits[0, 4, 9] = float("nan"), float("inf")
    got = target_log_probs(logits, rows, targets)
    assert torch.isfinite(got).tolist() == [True, False, False, True]
    torch.testing.assert_close(got[[0, 3]], want[[0, 3]])
    assert target_log_probs(logits.bfloat16(), rows, targets).dtype == torch.float32
