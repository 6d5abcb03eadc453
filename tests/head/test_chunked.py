"""The fused head against materialised logits, and against what no implementation of ours computes."""

from __future__ import annotations

import itertools

import pytest
import torch

from oracles.head import reference_head
from plot_align.head import HeadSpec, fused_head
from plot_align.head.fused import OPTIONAL_OUTPUTS
from plot_align.transport import make_divergence
from plot_align.transport.geometry import line

N, V, H, S = 13, 97, 8, 3


def problem(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator)
    weights = torch.rand(N, generator=generator) * (torch.arange(N) % 4 != 1)  # unselected rows in between
    segments = torch.arange(N) * S // N
    target = torch.rand(V, generator=generator, dtype=torch.float64)
    divergence = make_divergence("w1", target / target.sum(), line(weight.detach().double()))
    return hidden, weight, bias, targets, weights.to(torch.float64), segments, divergence


def scalar(out, weights, upstream):
    """A loss that sends a different gradient into every differentiable output."""
    loss = (out.log_probs * upstream[: out.log_probs.numel()]).sum()
    if out.entropy is not None:
        loss = loss + (out.entropy * upstream[: out.entropy.numel()].flip(0)).sum()
    if out.values is not None:
        loss = loss + (out.values * weights).sum()
    elif out.distributions is not None:
        loss = loss + (out.distributions.square() * upstream[0]).sum() + out.distributions[-1, 3]
    return loss


@pytest.mark.parametrize("spec", [
    HeadSpec(),
    HeadSpec(outputs=OPTIONAL_OUTPUTS),
    HeadSpec(temperature=0.7, softcap=3.0, logit_scale=1.3, outputs=("entropy",)),
], ids=["plain", "all outputs", "softcap"])  # fmt: skip
@pytest.mark.parametrize("granularity", ["none", "batch", "sequence", "token"])
@pytest.mark.parametrize("block_rows", [1, 4, 100])
def test_equals_materialised(spec, granularity, block_rows):
    spec = HeadSpec(spec.temperature, spec.softcap, spec.logit_scale, spec.outputs, block_bytes=block_rows * V * 8)
    hidden, weight, bias, targets, weights, segments, divergence = problem()
    plot = {
        "none": {},
        "batch": {"weights": weights},
        "sequence": {"weights": weights, "segments": segments, "num_segments": S},
        "token": {"weights": weights, "divergence": divergence},
    }[granularity]
    upstream = torch.linspace(-1, 2, 50, dtype=torch.float64)
    got = fused_head(hidden, weight, bias, targets, spec, **plot)
    want = reference_head(hidden, weight, bias, targets, spec, **plot)
    for field, a, b in zip(got.__dataclass_fields__, vars(got).values(), vars(want).values(), strict=True):
        assert (a is None) == (b is None), field
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, field=field: f"{field}: {m}")
    leaves = (hidden, weight, bias)
    got_grads = torch.autograd.grad(scalar(got, weights, upstream), leaves)
    want_grads = torch.autograd.grad(scalar(want, weights, upstream), leaves)
    for name, a, b in zip(("hidden", "weight", "bias"), got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_gradcheck():
    """Finite differences in float64, through log-probabilities, entropy and a non-linear function of p̄."""
    hidden, weight, bias, targets, weights, segments, _ = problem()

    def function(h, w, b):
        spec = HeadSpec(temperature=1.5, softcap=4.0, outputs=("entropy",))
        out = fused_head(h, w, b, targets, spec, weights=weights, segments=segments, num_segments=S)
        return out.log_probs, out.entropy, out.distributions.sqrt()

    assert torch.autograd.gradcheck(function, (hidden, weight, bias), fast_mode=True)


def test_marginal_by_hand():
    """Two tokens, zero hidden states but the first: z = (ln 3, 0) gives p = (3/4, 1/4), the others (1/2, 1/2).

    With weights (1/2, 1/2, 0): p̄ = (5/8, 3/8). ∂p̄_0/∂z_{0,0} = w·p_0·(1 − p_0) = 1/2 · 3/16 = 3/32, and the head
    is the identity on one feature, so that is the gradient of hidden.
    """
    hidden = torch.tensor([[torch.log(torch.tensor(3.0))], [0.0], [9.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]])
    out = fused_head(hidden, weight, None, torch.zeros(3, dtype=torch.long), weights=torch.tensor([0.5, 0.5, 0.0]))
    torch.testing.assert_close(out.distributions, torch.tensor([[5 / 8, 3 / 8]]))
    out.distributions[0, 0].backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[3 / 32], [1 / 8], [0.0]]))


def test_unselected_rows_are_free_of_plot():
    hidden, weight, bias, targets, weights, _, _ = problem()
    out = fused_head(hidden, weight, bias, targets, weights=weights)
    (grad,) = torch.autograd.grad(out.distributions.square().sum(), hidden)
    assert (grad[weights == 0] == 0).all()
    assert (grad[weights > 0].abs().sum(-1) > 0).all()


def test_no_rows():
    _, weight, bias, *_ = problem()
    out = fused_head(
        torch.zeros(0, H, dtype=torch.float64, requires_grad=True), weight, bias,
        torch.zeros(0, dtype=torch.long), HeadSpec(outputs=OPTIONAL_OUTPUTS), weights=torch.zeros(0),
    )  # fmt: skip
    assert out.log_probs.shape == (0,)
    assert out.distributions.shape == (1, V)
    (out.distributions.sum() + out.log_probs.sum()).backward()
    assert weight.grad is not None
    assert (weight.grad == 0).all()


def test_is_top1_takes_the_first_of_equals():
    """Tokens 1 and 2 tie for the maximum: argmax is 1, so predicting 2 is no hit, as in ``torch.argmax``."""
    hidden = torch.ones(2, 1)
    weight = torch.tensor([[0.0], [5.0], [5.0]])
    out = fused_head(hidden, weight, None, torch.tensor([1, 2]), HeadSpec(outputs=("is_top1",)))
    assert out.is_top1.tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_error_is_no_larger_than_eager(dtype):
    """Both against float64 on the same rounded inputs: our error is at most eager's plus one part in a thousand."""
    hidden, weight, bias, targets, weights, segments, _ = problem(dtype)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    plot = {"weights": weights, "segments": segments, "num_segments": S}
    upstream = torch.linspace(-1, 2, 50, dtype=torch.float64)
    truth = reference_head(*exact, targets, **plot)
    true_grads = torch.autograd.grad(scalar(truth, weights, upstream), exact)
    errors = {}
    for name, head in (("fused", fused_head), ("eager", reference_head)):
        out = head(hidden, weight, bias, targets, **plot)
        grads = torch.autograd.grad(scalar(out, weights, upstream.float()), (hidden, weight, bias))
        pairs = [
            (out.distributions, truth.distributions),
            (out.log_probs, truth.log_probs),
            *zip(grads, true_grads, strict=True),
        ]
        errors[name] = [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]
    for ours, eager in zip(errors["fused"], errors["eager"], strict=True):
        assert ours <= eager + 1e-3


@pytest.mark.parametrize("rows", [1, 16, 128])
def test_error_over_blocks_is_no_larger_than_eager(rows):
    """Products are rounded block by block on a CPU: the gradients' error stays that of eager's single rounding.

    Under autocast over fp32 weights, both against float64 on the rounded inputs.
    """
    n, v, h = 128, 512, 32
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, h, generator=generator).bfloat16().float() for size in (n, v))
    targets = torch.randint(v, (n,), generator=generator)
    weights = torch.full((n,), 1 / n)
    spec = HeadSpec(block_bytes=rows * v * 2)

    def gradients(head, dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float64):
            out = head(*leaves, None, targets, spec, weights=weights.to(dtype))
        loss = -out.log_probs.mean() + 100 * out.distributions.square().sum()
        return torch.autograd.grad(loss, leaves)

    exact = gradients(reference_head, torch.float64)
    ours, eager = gradients(fused_head, torch.float32), gradients(reference_head, torch.float32)
    for truth, a, b in zip(exact, ours, eager, strict=True):
        assert (a - truth).norm() <= (b - truth).norm() + 1e-3 * truth.norm()


def test_autocast_keeps_fp32_masters():
    """Under autocast the products run in bf16 and the gradients come back in the parameters' fp32."""
    hidden, weight, bias, targets, weights, _, _ = problem(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fused_head(hidden, weight, bias, targets, weights=weights)
    assert out.distributions.dtype == torch.float32
    rounded = [hidden.detach().bfloat16(), weight.detach().bfloat16(), bias.detach()]
    torch.testing.assert_close(
        out.distributions, fused_head(*rounded, targets, weights=weights).distributions, rtol=1e-6, atol=1e-7
    )
    out.distributions.square().sum().backward()
    assert weight.grad.dtype == torch.float32


def test_cast_in_groups_of_rows(monkeypatch):
    """A head that must be cast is cast a group of rows at a time; the groups must not show in the result."""
    import plot_align.head.fused as chunked

    results = []
    for rows in (1000, 10):
        monkeypatch.setitem(chunked._CAST_ROWS, "cpu", rows)
        hidden, weight, bias, targets, weights, _, _ = problem(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = fused_head(hidden, weight, bias, targets, weights=weights)
        grads = torch.autograd.grad(out.log_probs.sum() + out.distributions.square().sum(), (hidden, weight, bias))
        results.append((out.log_probs, out.distributions, *grads))
    for a, b in itertools.zip_longest(*results):
        assert (a - b).norm() <= 1e-2 * b.norm()
