"""The benchmarks' scripts run on tiny sizes."""

from __future__ import annotations

import sys

import pytest
import torch

import cost
from plot_align.bench.random_weights import random_model
from plot_align.records import read_record, write_record
from shapes import SHAPES, config_of


@pytest.mark.slow
def test_gpu_script_in_the_interpreter(tmp_path, monkeypatch, capsys):
    """All stages on tiny shapes; the same command again runs nothing; a stage that failed is run again."""
    pytest.importorskip("triton")
    import gpu

    path = tmp_path / "gpu.json"
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
    import gpu

    assert gpu.verdict({"value": 1.002, "n": 9, "interval": [1.0, 1.005]}, 1.005) == "pass"
    assert gpu.verdict({"value": 1.007, "n": 9, "interval": [1.006, 1.02]}, 1.005) == "miss"
    assert gpu.verdict({"value": 1.004, "n": 9, "interval": [1.0, 1.006]}, 1.005) == "undecided"
    assert gpu.verdict({"value": 1.002, "n": 4, "interval": [1.0, 1.003]}, 1.005) == "undecided"
    assert gpu.verdict({"value": float("nan"), "n": 0}, 1.005) == "not measured"


@pytest.mark.slow
def test_cost_figure(tmp_path, monkeypatch):
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
    model = random_model(config_of(SHAPES[name]), torch.device("meta"), torch.bfloat16)
    assert sum(weight.numel() for weight in model.parameters()) == expected[name]
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_doctor_script(tmp_path, monkeypatch, capsys):
    import doctor

    path = tmp_path / "doctor.json"
    monkeypatch.setattr(sys, "argv", ["doctor.py", "--rows", "30", "--vocabulary", "300", "--out", str(path)])
    monkeypatch.setattr(doctor, "WARM_UP", 20)
    doctor.main()
    results = read_record(path, "doctor-at-scale")["results"]
    assert (results["rows"], results["pairs"]) == (30, 29)
    assert "no-pair" in results["findings"]
    assert results["peak"]["value"] >= results["before"]["value"] > 10


@pytest.mark.slow
def test_load_script(tmp_path, monkeypatch, capsys):
    """Small sizes of two commands; the same command again runs nothing, a larger size runs alone."""
    import load

    path = tmp_path / "load.json"
    command = ["load.py", "--rows", "report=20", "--rows", "estimate=50", "--vocabulary", "300", "--out", str(path)]
    monkeypatch.setattr(sys, "argv", command)
    load.main()
    results = read_record(path, "load")["results"]
    assert list(results) == ["report, 20", "estimate, 50"]
    assert results["report, 20"]["page_mib"] > 0.01
    estimate = results["estimate, 50"]
    assert estimate["ratio"] == estimate["processor_seconds"] / estimate["map"]["processor_seconds"]
    assert estimate["peak_mib"] >= estimate["peak_anonymous_mib"] > 10
    ran = []
    monkeypatch.setattr(load, "measured", lambda name, size, *_: ran.append((name, size)) or estimate)
    monkeypatch.setattr(sys, "argv", [*command, "--rows", "doctor=30"])
    load.main()
    assert ran == [("doctor", 30)]
    assert "doctor" in capsys.readouterr().out


def test_load_rows_are_those_asked_for(monkeypatch):
    """Each of three to twelve words, over several files, the same at every call."""
    import load

    monkeypatch.setattr(load, "BATCH", 7)
    found = list(load.tables(17))
    assert [len(columns["chosen"]) for columns in found] == [7, 7, 3]
    lengths = {len(text.split()) for columns in found for side in columns.values() for text in side}
    assert min(lengths) >= 3
    assert max(lengths) <= 12
    assert list(load.tables(17)) == found
