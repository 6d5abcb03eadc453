"""`plot-align bench`: what it measures, its formulas, its errors."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from plot_align.bench import HeadProblem, HeadWork, Machine, accuracy, compare, mixed, paired
from plot_align.bench.profile import profile
from plot_align.bench.run import out_of_memory
from plot_align.bench.shapes import SHAPES, random_model, sharing_weights, word_tokenizer
from plot_align.bench.show import line
from plot_align.bench.step import StepProblem, measured_share
from plot_align.cli import bench as cli
from plot_align.cli.main import main
from plot_align.config import PlotConfig
from plot_align.errors import RunError
from plot_align.records import read_record, write_record
from plot_align.trl.overhead import Samples, interleaved

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def bench(tmp_path, capsys):
    """``bench(*options)`` → exit code, record (None where none was written), standard output, standard error."""

    def run(*options: str):
        path = tmp_path / "bench.json"
        code = main(["bench", *options, "--output", str(path)])
        streams = capsys.readouterr()
        return code, read_record(path, "bench") if path.exists() else None, streams.out, streams.err

    return run


@pytest.mark.slow
def test_bench_measures_a_checkpoint(bench, tiny_llama, tmp_path):
    trace = tmp_path / "trace.json"
    options = ("--rows", "4", "--length", "12", "--repeats", "3", "--granularity", "sequence", "--slices", "4")
    code, record, out, err = bench(str(tiny_llama), *options, "--profile", str(trace))
    assert code == 0, err
    results, plot = record["results"], record["config"]["plot"]
    assert (plot["granularity"], plot["slices"]) == ("sequence", 4)
    assert set(results["step"]["arms"]) == {"trl", "off", "on", "measured", "training"}
    assert results["step"]["arms"]["off"]["time"]["value"] == 1
    for arm in (*results["step"]["arms"].values(), *results["head"]["arms"].values()):
        assert arm["time"]["n"] == 3
        assert arm["time"]["spread"][0] <= arm["time"]["value"] <= arm["time"]["spread"][1]
        assert arm["seconds"]["value"] > 0
    assert results["step"]["measured_share"] == 0.2
    # 4 products of 2·N·V·H over 4 sequences of 11 predicted tokens
    assert results["head"]["flops"] == 4 * 2 * 44 * record["config"]["vocab"] * record["config"]["hidden"]
    assert results["machine"]["bandwidth"]["value"] > 1e8
    assert line(record) in out.replace("\n", " ") or line(record) in out

    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    ranges = results["profile"]["ranges"]
    assert {"plot_align/marginal", "plot_align/potential", "plot_align/loss"} <= set(ranges) <= names
    assert 0 < results["profile"]["plot_share"] < 1
    assert 0 < results["profile"]["head_share"] < 1


@pytest.mark.slow
def test_bench_of_random_weights(bench):
    """SFT, LoRA, one position at a time; without a profile."""
    code, record, _, err = bench(
        "--shape", "tiny", "--method", "sft", "--rows", "3", "--repeats", "1", "--use_peft", "--granularity", "token",
        "--gradient_checkpointing",
    )  # fmt: skip
    assert code == 0, err
    assert record["config"]["rows"] == 3
    assert record["config"]["gradient_checkpointing"]
    assert record["config"]["vocab"] == SHAPES["tiny"].vocab
    assert "profile" not in record["results"]
    assert "sft peft checkpointing" in line(record)
    # one round says nothing of the spread
    time_ratio = record["results"]["step"]["arms"]["on"]["time"]
    assert time_ratio["interval"] == [time_ratio["value"]] * 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), ["neither MODEL nor --shape", "expected one"]),
        (("gpt2", "--shape", "tiny"), ["both MODEL and --shape"]),
        (("--shape", "llama-3.1-8"), ["'llama-3.1-8'", "did you mean 'llama-3.1-8b'"]),
        (("--shape", "tiny", "--rows", "3"), ["--rows is 3", "even", "add one"]),
        (("--shape", "tiny", "--length", "1"), ["--length is 1", "2 or more"]),
        (("--shape", "tiny", "--repeats", "0"), ["--repeats is 0", "1 or more"]),
        (("--shape", "tiny", "--dtype", "int8"), ["--dtype is 'int8'", "bfloat16"]),
        (("--shape", "tiny", "--device", "cuda:1"), ["--device is 'cuda:1'", "CUDA_VISIBLE_DEVICES"]),
        (("--shape", "tiny", "--granularity", "tokens"), ["--granularity", "'tokens'", "sequence"]),
        (("--shape", "tiny", "--slices", "many"), ["--slices", "'many'", "int"]),
        (("--shape", "tiny", "--alpha", "0"), ["--alpha is 0", "positive weight"]),
        (("no/such/model",), ["'no/such/model'", "--shape"]),
    ],
)
def test_bench_refuses(bench, options, words):
    code, record, _, err = bench(*options)
    assert code == 2
    assert record is None
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_bench_takes_every_option_of_plot(capsys):
    flags = ["--granularity", "sequence", "--divergence", "sinkhorn", "--sinkhorn_size", "8", "--no_scaled"]
    found = cli._plot(cli.make_parser().parse(["--shape", "tiny", *flags]))
    assert found == PlotConfig.from_options(
        granularity="sequence", divergence="sinkhorn", sinkhorn_size=8, scaled=False
    )
    assert main(["bench", "--help-all"]) == 0
    assert main(["bench", "--help"]) == 0
    long, short = capsys.readouterr().out.split("usage: ")[1:]
    assert "--sinkhorn_size" in long.partition("ablations:")[2]
    assert "--sinkhorn_size" not in short


def test_paired_is_the_median_of_ratios_with_its_interval():
    """Ratios 1, 1.1, 1.2, 1.3 and 2: median 1.2, middle half 1.1 to 1.3; no resample's median leaves 1 to 2."""
    entry = paired([1.0, 2.2, 3.6, 5.2, 10.0], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert entry["value"] == pytest.approx(1.2)
    assert entry["quartiles"] == pytest.approx([1.1, 1.3])
    assert entry["spread"] == pytest.approx((1.0, 2.0))
    # P(median of 5 draws is the smallest value) = P(3 or more of them are it) = 0.058 > 0.025, so the 95 % interval
    # reaches both ends.
    assert entry["interval"] == pytest.approx((1.0, 2.0))
    assert paired([1, 2], [0, 0])["n"] == 0


def test_compare_and_mixed():
    off, on, other = (Samples([s, s], [p, p]) for s, p in ((1.0, 100), (1.5, 110), (2.0, 90)))
    training = mixed(on, other, 0.2)
    assert training.seconds == pytest.approx([1.6, 1.6])
    assert training.peak == [110, 110]
    table = compare({"off": off, "on": on, "training": training}, "off")
    assert table["training"]["time"]["value"] == pytest.approx(1.6)
    assert table["on"]["memory"]["value"] == pytest.approx(1.1)
    assert table["off"]["seconds"] == {"value": 1.0, "n": 2, "unit": "s", "quartiles": [1.0, 1.0]}


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's counts")
def test_page_faults_are_counted():
    """A step that touches 64 MiB anew takes a fault for each page of it (of 4 KiB, or of 2 MiB at once)."""
    arms = {"touches": 64 << 20, "does not": 1}

    @contextlib.contextmanager
    def arm(size):
        yield lambda: torch.ones(size, dtype=torch.uint8)

    found = interleaved({name: functools.partial(arm, size) for name, size in arms.items()}, repeats=2, device=CPU)
    assert min(found["touches"].faults) >= 32
    assert max(found["does not"].faults) < min(found["touches"].faults)
    table = compare(found, "does not")
    assert table["touches"]["faults"]["value"] >= 32
    assert table["touches"]["kernel"]["unit"] == "s"


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


def test_step_has_the_losses_its_arms_name(monkeypatch):
    """``off`` and ``trl`` have the same gradient; ``on`` and ``measured`` another one, and leave nothing behind.

    Only ``measured`` takes gradient norms.
    """
    norms: list[int] = []
    attach = sys.modules["plot_align.trl.attach"]  # the function of that name hides it
    taken = attach.gradient_norms
    monkeypatch.setattr(attach, "gradient_norms", lambda *args, **options: norms.append(1) or taken(*args, **options))
    shape = SHAPES["tiny"]
    model = random_model(shape, CPU, torch.float32)
    problem = StepProblem(model, word_tokenizer(shape.vocab), 4, 8)
    gradients = {}
    for name in ("trl", "on", "measured", "off", "trl"):
        with problem.arm(name, PlotConfig(alpha=100.0)) as step:
            step()
        assert len(norms) == (name == "measured")
        norms.clear()
        gradient = model.lm_head.weight.grad.clone()
        if name in gradients:
            assert torch.equal(gradient, gradients[name])
        gradients[name] = gradient
    torch.testing.assert_close(gradients["off"], gradients["trl"], rtol=1e-4, atol=1e-7)
    assert torch.equal(gradients["on"], gradients["measured"])
    assert not torch.allclose(gradients["on"], gradients["off"], rtol=1e-2, atol=1e-6)
    reference = problem.trainer.ref_model
    assert reference.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()


def test_bf16_is_autocast_over_the_weights_dtype(monkeypatch):
    """The products of policy, reference and backward in bfloat16, in every arm; nothing of it is left afterwards."""
    from plot_align.head import fused as chunked

    dtypes, sweep = [], chunked._Sweep.__init__

    def watched(self, *args, **kwargs):
        sweep(self, *args, **kwargs)
        dtypes.append(self.tile.dtype)

    monkeypatch.setattr(chunked._Sweep, "__init__", watched)
    shape = SHAPES["tiny"]
    model = random_model(shape, CPU, torch.float32)
    problem = StepProblem(model, word_tokenizer(shape.vocab), 4, 8, bf16=True)
    forward, gradients = model.forward, {}
    for name in ("trl", "off", "on", "trl"):
        with problem.arm(name, PlotConfig(alpha=1.0)) as step:
            assert model.forward != forward
            step()
        assert dtypes == [torch.bfloat16] * (0 if name == "trl" else 3)
        dtypes.clear()
        assert model.forward == forward
        gradient = model.lm_head.weight.grad.clone()
        assert gradient.dtype == torch.float32
        assert name not in gradients or torch.equal(gradient, gradients[name])
        gradients[name] = gradient
    error = (gradients["off"] - gradients["trl"]).norm() / gradients["trl"].norm()
    assert 0 < error < 0.02


@pytest.mark.parametrize(
    ("config", "share"),
    [
        (PlotConfig(), 0.2),  # one in five balances α, and those that log fall on them
        (PlotConfig(alpha=1.0), 0.02),
        (PlotConfig(alpha=1.0, grad_ratio_steps=0), 0.0),
        (PlotConfig(grad_ratio_steps=3), 7 / 15),  # 1/5 + 1/3 − 1/15
    ],
)
def test_measured_share(config, share):
    assert measured_share(config, 1500) == pytest.approx(share)


@pytest.mark.parametrize(
    "name", ["tiny", "qwen2.5-0.5b", "qwen2.5-7b", "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b"]
)
def test_shapes_have_the_models_parameters(name):
    """Number of parameters of the real models; of ``tiny`` by hand.

    Two matrices of 1,003 × 32; two layers of Q, O 32·32, K, V 32·16, three of 32·64, two norms of 32; one norm.
    """
    expected = {
        "tiny": 2 * 1003 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 32,
        "qwen2.5-0.5b": 494_032_768,
        "qwen2.5-7b": 7_615_616_512,
        "llama-3.2-1b": 1_235_814_400,
        "llama-3.2-3b": 3_212_749_824,
        "llama-3.1-8b": 8_030_261_248,
    }
    model = random_model(SHAPES[name], torch.device("meta"), torch.bfloat16)
    assert sum(weight.numel() for weight in model.parameters()) == expected[name]
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_reference_shares_weights_and_is_frozen():
    model = random_model(SHAPES["tiny"], CPU, torch.float32)
    other = sharing_weights(model)
    ids = torch.arange(2, 8).unsqueeze(0)
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
        assert torch.equal(other(ids).logits, model(ids).logits)
    assert not any(weight.requires_grad for weight in other.parameters())
    assert all(weight.requires_grad for weight in model.parameters())


def test_profile_shares_are_those_of_the_ranges(tmp_path):
    """A head of 60 ms, 20 of them PLOT's, in a step of 100 ms with 10 more of PLOT's loss."""

    def step():
        with torch.profiler.record_function("plot_align/head_forward"):
            time.sleep(0.04)
            with torch.profiler.record_function("plot_align/marginal"):
                time.sleep(0.02)
        with torch.profiler.record_function("plot_align/loss"):
            time.sleep(0.01)
        time.sleep(0.03)

    found = profile(step, CPU, tmp_path / "trace.json")
    assert found["seconds"] == pytest.approx(0.1, rel=0.2)
    assert found["head_share"] == pytest.approx(0.6, abs=0.06)
    assert found["plot_share"] == pytest.approx(0.3, abs=0.06)
    assert found["ranges"]["plot_align/marginal"]["calls"] == 1
    assert "plot_align/marginal" in (tmp_path / "trace.json").read_text()


def test_profile_without_a_range_says_so(tmp_path):
    with pytest.raises(RunError, match="named ranges"):
        profile(lambda: torch.zeros(3).add(1), CPU, tmp_path / "trace.json")


def test_out_of_memory_is_one_sentence(bench, monkeypatch):
    """A real failure of the allocator, where the bench makes its model."""
    monkeypatch.setattr("plot_align.bench.run.random_model", lambda *_: torch.empty(1 << 55))
    code, record, _, err = bench("--shape", "tiny", "--rows", "8", "--repeats", "1")
    assert (code, record) == (1, None)
    assert "8 x 24 tokens did not fit into the memory of cpu" in err
    assert "take a smaller --rows or --length or --gradient_checkpointing or --use_peft" in err
    with pytest.raises(RuntimeError) as other, out_of_memory("it", CPU, "less"):
        raise RuntimeError("something else")
    assert type(other.value) is RuntimeError


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


def load(name: str):
    """A script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_gpu_script_in_the_interpreter(tmp_path, monkeypatch, capsys):
    """All stages on tiny shapes; the same command again runs nothing; a stage that failed is run again."""
    pytest.importorskip("triton")
    gpu, path = load("gpu"), tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--output", str(path)])
    if torch.cuda.is_available():
        pytest.skip("the interpreter is chosen before Triton is imported")
    assert gpu.main() == 0, capsys.readouterr().out
    record = read_record(path, "gpu")
    results = record["results"]
    assert list(results) == ["accuracy", "head/tiny/2 x 6", "step/tiny/2 x 6"]
    assert (results["accuracy"]["cases"], results["accuracy"]["wrong"], results["accuracy"]["left_out"]) == (24, {}, 0)
    assert set(results["head/tiny/2 x 6"]["floors"]) == set(gpu.PLOTS)
    step = results["step/tiny/2 x 6"]
    assert step["verdict"]["time"] == "undecided"  # of one round
    out = capsys.readouterr().out
    assert "24 heads, 0 wrong" in out
    assert "time <= 1.005: " in out

    def no_memory(run, seconds):
        raise MemoryError

    monkeypatch.setattr(gpu, "accuracy", no_memory)
    assert gpu.main() == 0  # finished already
    del results["accuracy"]
    write_record(path, "gpu", results, config=record["config"])
    assert gpu.main() == 1
    assert "accuracy did not fit into the memory of cpu" in capsys.readouterr().out.replace("\n", " ")
    again = read_record(path, "gpu")["results"]
    assert "failed" in again["accuracy"]
    assert again["step/tiny/2 x 6"] == step

    write_record(path, "gpu", results, config={**record["config"], "tiny": False})
    assert gpu.main() == 2
    assert "record of another run" in capsys.readouterr().out


def test_verdict_needs_rounds_and_an_interval_on_one_side():
    gpu = load("gpu")
    assert gpu.verdict({"value": 1.002, "n": 9, "interval": [1.0, 1.005]}, 1.005) == "pass"
    assert gpu.verdict({"value": 1.007, "n": 9, "interval": [1.006, 1.02]}, 1.005) == "miss"
    assert gpu.verdict({"value": 1.004, "n": 9, "interval": [1.0, 1.006]}, 1.005) == "undecided"
    assert gpu.verdict({"value": 1.002, "n": 4, "interval": [1.0, 1.003]}, 1.005) == "undecided"
    assert gpu.verdict({"value": float("nan"), "n": 0}, 1.005) == "not measured"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_recomputes_each_layer(checkpointing):
    """What the option says is what the step does: a checkpointed layer runs once more in the backward."""
    shape = SHAPES["tiny"]
    model = random_model(shape, torch.device("cpu"), torch.float32)
    problem = StepProblem(model, word_tokenizer(shape.vocab), 2, 8, checkpointing=checkpointing)
    calls = []
    problem.trainer.model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    with problem.arm("on", PlotConfig()) as step:
        step()
    assert len(calls) == 1 + checkpointing


@pytest.mark.slow
def test_cost_figure(tmp_path, monkeypatch):
    cost = load("cost")
    command = ["cost.py", "--sizes", "tiny", "--device", "cpu", "--repeats", "1", "--output", str(tmp_path / "cost")]
    monkeypatch.setattr(sys, "argv", command)
    assert cost.main() == 0
    results = read_record(tmp_path / "cost.json", "cost")["results"]
    assert list(results["vocabulary"]) == ["64", "128"]
    assert list(results["tokens"]) == ["8", "16"]
    assert set(results["pairs"]) == {"off", *(f"{g}, {x}" for g in cost.GRANULARITIES for x in cost.GEOMETRIES)}
    assert results["vocabulary"]["64"]["token, norm"]["time"]["value"] > 0
    first = (tmp_path / "cost.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    monkeypatch.setattr(
        sys, "argv", ["cost.py", "--draw", str(tmp_path / "cost.json"), "--output", str(tmp_path / "b")]
    )
    monkeypatch.setattr(cost, "measure", None)
    assert cost.main() == 0
    assert (tmp_path / "b.png").read_bytes() == first


def test_interleaved_stops_when_its_time_is_over():
    from plot_align.trl.overhead import interleaved

    done: list[int] = []

    def arm():
        return contextlib.nullcontext(functools.partial(time.sleep, 0.02))

    samples = interleaved({"a": arm, "b": arm}, repeats=50, device=CPU, budget=0.1, on_round=done.append)
    rounds = len(samples["a"].seconds)
    assert 1 <= rounds <= 4
    assert len(samples["b"].seconds) == rounds
    assert done == list(range(1, rounds + 2))  # the first round warms up
