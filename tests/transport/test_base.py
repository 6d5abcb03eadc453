"""A target given with the call, for every divergence: the same as a divergence built with that target."""

import pytest
import torch

from plot_align.errors import InputError
from plot_align.transport import (
    ExpectedCost,
    JensenShannon,
    KullbackLeibler,
    MaxSlicedWasserstein,
    SinkhornClusters,
    SinkhornTopK,
    SlicedWasserstein,
    TotalVariation,
    Wasserstein1,
)
from plot_align.transport.geometry import line, slices

VOCAB = 12
EMBEDDINGS = torch.randn(VOCAB, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MAKERS = {
    "w1": lambda target: Wasserstein1(target, line(EMBEDDINGS)),
    "sliced": lambda target: SlicedWasserstein(target, slices(EMBEDDINGS, 3)),
    "max_sliced": lambda target: MaxSlicedWasserstein(target, slices(EMBEDDINGS, 3)),
    "emo": lambda target: ExpectedCost(target, EMBEDDINGS),
    "topk": lambda target: SinkhornTopK(target, EMBEDDINGS, size=4, tolerance=1e-13, max_iterations=1000),
    "clusters": lambda target: SinkhornClusters(target, EMBEDDINGS, size=5, tolerance=1e-13, max_iterations=1000),
    "kl": KullbackLeibler,
    "js": JensenShannon,
    "tv": TotalVariation,
}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def distributions(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, VOCAB, generator=generator, dtype=torch.float64).softmax(-1)


def test_equals_a_divergence_built_with_that_target(make):
    built, p, targets = make(distributions()), distributions(2, 3, seed=2), distributions(2, 3, seed=3)
    targets[0, 0, :4] = 0.0  # a target without some of p's support
    targets[0, 0] /= targets[0, 0].sum()
    for own in (targets[0, 0], targets[0], targets[:, :1], targets):
        value, potential = built.value_and_potential(p, own)
        assert value.shape == (2, 3)
        for i in range(2):
            for j in range(3):
                alone = make(own.expand(2, 3, VOCAB)[i, j]).value_and_potential(p[i, j])
                torch.testing.assert_close(value[i, j], alone[0], rtol=1e-14, atol=1e-15)
                torch.testing.assert_close(potential[i, j], alone[1], rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(built(p, targets), value)
    torch.testing.assert_close(built.potential(p, targets), potential)
    assert not torch.allclose(built.value(p), value)  # and it is not the built-in target that was compared


def test_gradient_flows_into_p_alone(make):
    built, target = make(distributions()), distributions(2, seed=3).requires_grad_()
    p = distributions(2, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: built.value(q, target.detach()), (p,))
    built.value(p, target).sum().backward()
    assert target.grad is None
    torch.testing.assert_close(p.grad, built.potential(p, target))


def test_neither_argument_is_modified_and_p_decides_the_dtype(make):
    built, p, target = make(distributions()), distributions(2, seed=2), distributions(2, seed=3)
    before = p.clone(), target.clone()
    want = built.value(p, target)
    assert built.value(p.float(), target).dtype == torch.float32
    torch.testing.assert_close(built.value(p.float(), target).double(), want, rtol=1e-5, atol=1e-6)
    assert built.value(p, target.float()).dtype == torch.float64
    torch.testing.assert_close(built.value(p, target.float()), want, rtol=1e-6, atol=1e-7)
    assert built.value(p.bfloat16(), target.bfloat16()).dtype == torch.float32
    assert torch.equal(p, before[0])
    assert torch.equal(target, before[1])


@pytest.mark.parametrize("shape", [(), (VOCAB - 1,), (1,), (3, VOCAB), (2, 2, VOCAB), (2, 1)])
def test_shapes_that_do_not_fit_are_named(make, shape):
    with pytest.raises(InputError, match=r"target has shape .* for p of shape \(2, 12\), but \(12,\) or"):
        make(distributions()).value(distributions(2), torch.ones(shape, dtype=torch.float64))
