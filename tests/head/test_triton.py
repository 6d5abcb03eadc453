"""The Triton kernels: their error against float64 is no larger than that of eager torch in the same dtype.

They run on a GPU where there is one, else in Triton's interpreter.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from oracles.head import reference_head
from plot_align.errors import InputError
from plot_align.head import HeadSpec, fused_head
from plot_align.head.fused import OPTIONAL_OUTPUTS
from plot_align.transport import make_divergence
from plot_align.transport.geometry import line, slices

pytest.importorskip("triton")
from plot_align.head import block_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, H, S = 11, 16, 3
# What the kernels may lose beyond eager torch, relative to the largest entry of each result: rounding in another
# order of summation. Eager's own error is some 1e-7, 4e-3 and 1e-3. The interpreter cuts bfloat16 off where a GPU
# rounds it, and sums up one by one where a GPU does it in a tree: there it may lose more.
INTERPRETED = DEVICE == "cpu"
TOLERANCE = {
    torch.float32: 1e-5 if INTERPRETED else 2e-6,
    torch.bfloat16: 8e-3 if INTERPRETED else 2e-3,
    torch.float16: 3e-4,
}
SPECS = {
    "plain": HeadSpec(outputs=OPTIONAL_OUTPUTS),
    "softcap": HeadSpec(temperature=0.7, softcap=3.0, logit_scale=1.3, outputs=OPTIONAL_OUTPUTS),
}
GRANULARITIES = ("none", "batch", "sequence", "token", "token sliced")


class Problem:
    """One head pass in float64, from which copies in narrower dtypes are made."""

    def __init__(self, vocab: int, dtype: torch.dtype, *, bias: bool, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(vocab)

        def normal(*shape: int) -> torch.Tensor:  # rounded to the dtype at once: all sides get the same input
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).double()

        self.leaves = [normal(N, H) * scale, normal(vocab, H)] + ([normal(vocab)] if bias else [])
        self.targets = torch.randint(vocab, (N,), generator=generator)
        self.targets[0], self.targets[1] = vocab - 1, 0  # the last column, and the first
        self.weights = torch.rand(N, generator=generator) * (torch.arange(N) % 4 != 1)  # unselected rows in between
        self.segments = torch.arange(N) * S // N
        self.target = torch.rand(vocab, generator=generator, dtype=torch.float64)
        self.target /= self.target.sum()
        self.up = torch.randn(5, N, generator=generator, dtype=torch.float64)
        self.potential = torch.randn(S, vocab, generator=generator, dtype=torch.float64)

    def run(self, head, dtype: torch.dtype, granularity: str, spec: HeadSpec) -> dict[str, torch.Tensor]:
        """All outputs and all gradients of ``head`` in ``dtype``, in float64 on the CPU."""
        leaves = [leaf.to(DEVICE, dtype, copy=True).requires_grad_() for leaf in self.leaves]
        hidden, weight, *bias = leaves
        plot = {"weights": self.weights.to(DEVICE)}
        if granularity == "sequence":
            plot |= {"segments": self.segments.to(DEVICE), "num_segments": S}
        if granularity.startswith("token"):
            lines = line(self.leaves[1]) if granularity == "token" else slices(self.leaves[1], 3, seed=0)
            plot["divergence"] = make_divergence("w1", self.target, lines).to(DEVICE)
        if granularity == "none":
            plot = {}
        out = head(hidden, weight, bias[0] if bias else None, self.targets.to(DEVICE), spec, **plot)
        up = self.up.to(DEVICE)
        loss = (out.log_probs * up[0]).sum() + (out.entropy * up[1]).sum()
        if out.values is not None:
            loss = loss + (out.values * up[2]).sum()
        elif out.distributions is not None:
            loss = loss + (out.distributions * self.potential[: len(out.distributions)].to(DEVICE)).sum()
        loss.backward()
        found = {name: x for name, x in vars(out).items() if x is not None and name != "is_top1"}
        found |= {f"grad {i}": leaf.grad for i, leaf in enumerate(leaves)}
        return {name: x.detach().double().cpu() for name, x in found.items()} | {"is_top1": out.is_top1.cpu()}


def check(problem: Problem, dtype: torch.dtype, granularity: str, spec: HeadSpec) -> None:
    exact = problem.run(reference_head, torch.float64, granularity, spec)
    eager = problem.run(reference_head, dtype, granularity, spec)
    ours = problem.run(fused_head, dtype, granularity, dataclasses.replace(spec, impl="triton"))
    assert ours.keys() == eager.keys()
    if dtype == torch.float32:  # narrower, rounded logits tie
        assert torch.equal(ours["is_top1"], exact["is_top1"])
    for name in exact.keys() - {"is_top1"}:
        scale = exact[name].abs().max()
        error, allowed = ((x[name] - exact[name]).abs().max() / scale for x in (ours, eager))
        assert error <= allowed + TOLERANCE[dtype], f"{name}: {float(error):.2e}, eager {float(allowed):.2e}"


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_error_is_that_of_eager_torch(dtype, spec, granularity):
    check(Problem(97, dtype, bias=dtype == torch.float32), dtype, granularity, spec)


@pytest.mark.parametrize("granularity", ["batch", "token"])
@pytest.mark.parametrize("vocab", [2, 1024, 5003, 262_143])
def test_any_vocabulary(monkeypatch, vocab, granularity):
    """More columns than one step takes, none of them a multiple of anything, up to the largest in use."""
    if INTERPRETED and vocab > 10_000:  # the interpreter takes as long for a small step as for a large one
        for name in ("_ROW_BLOCK", "_BLOCK", "_SUM_COLUMNS"):
            monkeypatch.setattr(block_triton, name, 1 << 16)
    check(Problem(vocab, torch.float32, bias=False, scale=0.5), torch.float32, granularity, SPECS["softcap"])


def test_more_rows_than_one_program_sums(monkeypatch):
    monkeypatch.setattr(block_triton, "_SUM_ROWS", 8)
    check(Problem(97, torch.float32, bias=False), torch.float32, "batch", SPECS["plain"])


def test_small_logits_under_a_soft_cap():
    """tanh near 0, where 2·sigmoid(2x) − 1 would lose half its digits."""
    problem = Problem(50, torch.float32, bias=False, scale=1e-3)
    check(problem, torch.float32, "batch", HeadSpec(softcap=30.0, outputs=OPTIONAL_OUTPUTS))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("granularity", ["batch", "token"])
def test_ties_go_to_the_earlier_token(impl, granularity):
    """is_top1 as argmax, also where the columns stand in the order of a line and not of the vocabulary."""
    problem = Problem(7, torch.float32, bias=False)
    problem.leaves[1][0] *= 10  # token 0 stands last on the line
    problem.leaves[0][:] = 0  # all logits are 0
    problem.targets[:] = torch.arange(N) % 7
    found = problem.run(fused_head, torch.float32, granularity, dataclasses.replace(SPECS["plain"], impl=impl))
    assert found["is_top1"].tolist() == [k % 7 == 0 for k in range(N)]


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_same_bits_twice_and_the_same_but_for_rounding_from_any_block(impl):
    """Deterministic for blocks of one size: no atomics."""
    problem = Problem(997, torch.float32, bias=True)
    spec = dataclasses.replace(SPECS["softcap"], impl=impl)
    first, again = (problem.run(fused_head, torch.float32, "batch", spec) for _ in range(2))
    small = problem.run(fused_head, torch.float32, "batch", dataclasses.replace(spec, block_bytes=3 * 997 * 4))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
        torch.testing.assert_close(small[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_bad_row_is_told_by_its_log_probability(impl):
    problem = Problem(97, torch.float32, bias=False)
    for bad in (torch.nan, torch.inf):
        problem.leaves[0][4, 0] = bad
        found = problem.run(fused_head, torch.float32, "batch", dataclasses.replace(SPECS["plain"], impl=impl))
        assert torch.isfinite(found["log_probs"]).tolist() == [row != 4 for row in range(N)]


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_graph_is_freed(impl):
    """Outputs that the node keeps for its backward must not keep the node."""
    gc.collect()
    gc.disable()
    try:
        hidden = torch.randn(N, H, device=DEVICE, requires_grad=True)
        watched = hidden * 1
        targets = torch.zeros(N, dtype=torch.long, device=DEVICE)
        weight = torch.randn(9, H, device=DEVICE)
        out = fused_head(watched, weight, None, targets, HeadSpec(outputs=("entropy",), impl=impl))
        alive = weakref.ref(watched)
        del out, watched
        assert alive() is None
    finally:
        gc.enable()


def test_where_it_cannot_run_it_says_so(monkeypatch):
    monkeypatch.setattr(block_triton, "INTERPRETED", False)
    arguments = (torch.randn(2, H), torch.randn(9, H), None, torch.zeros(2, dtype=torch.long))
    with pytest.raises(InputError, match="impl is 'triton' with tensors on cpu; expected a GPU"):
        fused_head(*arguments, HeadSpec(impl="triton"))
    fused_head(*arguments, HeadSpec(impl="auto"))
    doubles = (torch.randn(2, H).double(), torch.randn(9, H).double(), *arguments[2:])
    with pytest.raises(InputError, match="impl is 'triton' with float64 inputs; expected float32 or narrower"):
        fused_head(*doubles, HeadSpec(impl="triton"))
    with pytest.raises(InputError, match="impl is 'cuda'; expected auto, torch, triton"):
        HeadSpec(impl="cuda")
    with pytest.raises(InputError, match="block_bytes is 0; expected 1 or more"):
        HeadSpec(block_bytes=0)


@pytest.mark.parametrize(("capability", "dtype", "flags"), [(90, "bf16", "all"), (80, "fp32", "none")])
def test_compiles_without_a_gpu(tmp_path, capability, dtype, flags):
    """The interpreter takes what the compiler refuses (a variable that changes its type in a loop), so both are asked:
    code for an H100 and an A100, without local memory."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("triton_compile.py")
    command = [sys.executable, str(script), str(capability), dtype, flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if "libcuda" in done.stderr:
        pytest.skip("this Triton compiles only where a driver is")
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = json.loads(done.stdout)
    assert len(sizes) == 6
    for name, size in sizes.items():
        assert size["cubin"] > 1000, name
        assert not size["local"], name
