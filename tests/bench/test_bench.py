"""`plot-align bench`: what it measures, its formulas, its errors."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import time

import pytest
import torch
from transformers import LlamaConfig

pytest.importorskip("trl")

from plot_align.bench import Samples, StepProblem, compare, interleaved, measured_share, mixed, paired
from plot_align.bench.profile import profile
from plot_align.bench.random_weights import random_model, word_tokenizer
from plot_align.bench.run import out_of_memory
from plot_align.bench.show import line
from plot_align.bench.step import sharing_weights
from plot_align.cli import bench as cli
from plot_align.cli.main import main
from plot_align.config import PlotConfig
from plot_align.errors import RunError
from plot_align.records import read_record

CPU = torch.device("cpu")
VOCAB = 203


def tiny_config():
    return LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip


def tiny_model():
    return random_model(tiny_config(), CPU, torch.float32)


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
    for arm in results["step"]["arms"].values():
        assert arm["time"]["n"] == 3
        assert arm["time"]["spread"][0] <= arm["time"]["value"] <= arm["time"]["spread"][1]
        assert arm["seconds"]["value"] > 0
    assert results["step"]["measured_share"] == 0.2
    assert line(record) in out.replace("\n", " ") or line(record) in out

    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    ranges = results["profile"]["ranges"]
    assert {"plot_align/output_distribution", "plot_align/potential", "plot_align/loss"} <= set(ranges) <= names
    assert 0 < results["profile"]["plot_share"] < 1
    assert 0 < results["profile"]["head_share"] < 1


@pytest.mark.slow
def test_bench_of_random_weights(bench, tmp_path):
    """A folder with a config.json and nothing else; SFT, LoRA, one position at a time; without a profile."""
    tiny_config().save_pretrained(tmp_path / "model")
    code, record, _, err = bench(
        str(tmp_path / "model"), "--random_weights", "--method", "sft", "--rows", "3", "--length", "12",
        "--repeats", "1", "--use_peft", "--granularity", "token", "--gradient_checkpointing",
    )  # fmt: skip
    assert code == 0, err
    assert record["config"]["rows"] == 3
    assert record["config"]["gradient_checkpointing"]
    assert "profile" not in record["results"]
    assert "model (random weights)" in line(record)
    assert "sft peft checkpointing" in line(record)
    # one round says nothing of the spread
    time_ratio = record["results"]["step"]["arms"]["on"]["time"]
    assert time_ratio["interval"] == [time_ratio["value"]] * 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), ["MODEL", "a hub id or a folder"]),
        (("no/such/model", "--rows", "3"), ["--rows is 3", "even", "add one"]),
        (("no/such/model", "--length", "1"), ["--length is 1", "2 or more"]),
        (("no/such/model", "--repeats", "0"), ["--repeats is 0", "1 or more"]),
        (("no/such/model", "--dtype", "int8"), ["--dtype is 'int8'", "bfloat16"]),
        (("no/such/model", "--device", "cuda:1"), ["--device is 'cuda:1'", "CUDA_VISIBLE_DEVICES"]),
        (("no/such/model", "--granularity", "tokens"), ["--granularity", "'tokens'", "sequence"]),
        (("no/such/model", "--slices", "many"), ["--slices", "'many'", "int"]),
        (("no/such/model", "--alpha", "0"), ["--alpha is 0", "positive weight"]),
        (("no/such/model",), ["'no/such/model'", "a hub id or a folder"]),
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
    found = cli._plot(cli.make_parser().parse(["gpt2", *flags]))
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


def test_step_has_the_losses_its_arms_name(monkeypatch):
    """``off`` and ``trl`` have the same gradient; ``on`` and ``measured`` another one, and leave nothing behind.

    Only ``measured`` takes gradient norms.
    """
    norms: list[int] = []
    attach = sys.modules["plot_align.trl.attach"]  # the function of that name hides it
    taken = attach.gradient_norms
    monkeypatch.setattr(attach, "gradient_norms", lambda *args, **options: norms.append(1) or taken(*args, **options))
    model = tiny_model()
    problem = StepProblem(model, word_tokenizer(VOCAB), 4, 8)
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

    dtypes, init = [], chunked._HeadPass.__init__

    def watched(self, *args, **kwargs):
        init(self, *args, **kwargs)
        dtypes.append(self.tile.dtype)

    monkeypatch.setattr(chunked._HeadPass, "__init__", watched)
    model = tiny_model()
    problem = StepProblem(model, word_tokenizer(VOCAB), 4, 8, bf16=True)
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


def test_reference_shares_weights_and_is_frozen():
    model = tiny_model()
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
            with torch.profiler.record_function("plot_align/output_distribution"):
                time.sleep(0.02)
        with torch.profiler.record_function("plot_align/loss"):
            time.sleep(0.01)
        time.sleep(0.03)

    found = profile(step, CPU, tmp_path / "trace.json")
    assert found["seconds"] == pytest.approx(0.1, rel=0.2)
    assert found["head_share"] == pytest.approx(0.6, abs=0.06)
    assert found["plot_share"] == pytest.approx(0.3, abs=0.06)
    assert found["ranges"]["plot_align/output_distribution"]["calls"] == 1
    assert "plot_align/output_distribution" in (tmp_path / "trace.json").read_text()


def test_profile_without_a_range_says_so(tmp_path):
    with pytest.raises(RunError, match="named ranges"):
        profile(lambda: torch.zeros(3).add(1), CPU, tmp_path / "trace.json")


def test_out_of_memory_is_one_sentence(bench, monkeypatch, tmp_path):
    """A real failure of the allocator, where the bench makes its model."""
    tiny_config().save_pretrained(tmp_path / "model")
    monkeypatch.setattr("plot_align.bench.random_weights.random_model", lambda *_: torch.empty(1 << 55))
    code, record, _, err = bench(str(tmp_path / "model"), "--random_weights", "--rows", "8", "--repeats", "1")
    assert (code, record) == (1, None)
    assert "8 x 1024 tokens did not fit into the memory of cpu" in err
    assert "take a smaller --rows or --length or --gradient_checkpointing or --use_peft" in err
    with pytest.raises(RuntimeError) as other, out_of_memory("it", CPU, "less"):
        raise RuntimeError("something else")
    assert type(other.value) is RuntimeError


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_recomputes_each_layer(checkpointing):
    """What the option says is what the step does: a checkpointed layer runs once more in the backward."""
    problem = StepProblem(tiny_model(), word_tokenizer(VOCAB), 2, 8, checkpointing=checkpointing)
    calls = []
    problem.trainer.model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    with problem.arm("on", PlotConfig()) as step:
        step()
    assert len(calls) == 1 + checkpointing


def test_interleaved_stops_when_its_time_is_over():
    done: list[int] = []

    def arm():
        return contextlib.nullcontext(functools.partial(time.sleep, 0.02))

    samples = interleaved({"a": arm, "b": arm}, repeats=50, device=CPU, budget=0.1, on_round=done.append)
    rounds = len(samples["a"].seconds)
    assert 1 <= rounds <= 4
    assert len(samples["b"].seconds) == rounds
    assert done == list(range(1, rounds + 2))  # the first round warms up
