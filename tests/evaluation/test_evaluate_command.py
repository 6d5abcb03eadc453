"""``plot-align evaluate`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from plot_align.cli import main as cli
from plot_align.evaluation import fluency, safety
from plot_align.evaluation.subject import Found, Subject
from plot_align.records import read_record

SUITE = """\
helpfulness:
  refusals: {kind: over_refusal, limit: 4, max_new_tokens: 4}
guards:
  diversity: {kind: diversity, limit: 4, max_new_tokens: 4}
  drift: {kind: drift, pairs: %s, limit: 4}
"""


@pytest.fixture
def suite(tmp_path: Path, chat_pairs_file: Path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(SUITE % chat_pairs_file, encoding="utf-8")
    return str(path)


@pytest.fixture
def tuned(tiny_base: Path, tmp_path: Path) -> str:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    folder = tmp_path / "tuned"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    return str(folder)


def _run(*arguments: str) -> int:
    return cli.main(["evaluate", *map(str, arguments)])


def test_every_measure_of_every_model_is_a_record(
    suite: str, tuned: str, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert _run(f"base={tiny_base}", tuned, "--suite", suite, "--reference", str(tiny_base), "--output", output) == 0
    for name, source in (("base", str(tiny_base)), ("tuned", tuned)):
        for measure, section in (("refusals", "helpfulness"), ("diversity", "guards"), ("drift", "guards")):
            record = read_record(output / name / f"{measure}.json", "evaluation")
            config = record["config"]
            assert config["model"]["name"] == name
            assert config["model"]["source"] == source
            assert config["section"] == section
            assert config["measure"]["name"] == measure
            assert (config["reference"] or {}).get("name") == ("base" if measure == "drift" else None)
            for quantity in record["results"]["quantities"].values():
                assert {"title", "better", "value", "n", "interval", "bounds", "items", "weights"} <= quantity.keys()
    drift = read_record(output / "base" / "drift.json")["results"]["quantities"]["tv"]["value"]
    assert drift == 0
    assert read_record(output / "tuned" / "drift.json")["results"]["quantities"]["tv"]["value"] > 0.001
    shown = capsys.readouterr().out
    assert "suite mine" in shown
    assert "plot-align report" in shown


def test_an_interrupted_run_goes_on_where_it_stopped(
    suite: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    measured: list[str] = []
    real_refusals, real_diversity = safety.OverRefusal.run, fluency.Diversity.run

    def stopped(self: fluency.Diversity, subject: Subject) -> None:
        raise KeyboardInterrupt

    def counted(self: safety.OverRefusal, subject: Subject) -> object:
        measured.append("refusals")
        return real_refusals(self, subject)

    monkeypatch.setattr(safety.OverRefusal, "run", counted)
    monkeypatch.setattr(fluency.Diversity, "run", stopped)
    arguments = (f"base={tiny_base}", "--suite", suite, "--output", output)
    assert _run(*arguments) == 130
    first = (output / "base" / "refusals.json").read_bytes()
    assert not (output / "base" / "diversity.json").exists()
    monkeypatch.setattr(fluency.Diversity, "run", real_diversity)
    assert _run(*arguments) == 0
    assert (output / "base" / "refusals.json").read_bytes() == first
    assert (output / "base" / "diversity.json").exists()
    assert measured == ["refusals"]


def test_another_seed_other_options_or_a_damaged_record_is_measured_again(
    suite: str, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = (f"base={tiny_base}", "--suite", suite, "--only", "refusals", "--output", output)
    record = output / "base" / "refusals.json"
    assert _run(*arguments) == 0
    _run(*arguments, "--limit", "2")  # the seed is the same
    assert "measured again" in capsys.readouterr().out
    assert json.loads(record.read_text())["results"]["quantities"]["refused"]["n"] == 2
    _run(*arguments, "--limit", "2", "--seed", "1")
    assert "measured again" in capsys.readouterr().out
    assert json.loads(record.read_text())["seed"] == 1
    record.write_text(record.read_text()[:200])
    capsys.readouterr()
    assert _run(*arguments) == 0
    shown = capsys.readouterr().out
    assert "measured again, as the record was damaged (the old records end in .old): base, refusals" in shown
    assert "were others" not in shown
    read_record(record)
    assert _run(*arguments) == 0
    assert "measured again" not in capsys.readouterr().out


def test_a_record_of_older_rules_is_measured_again(
    suite: str, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the judges that decided it alone."""
    arguments = (f"base={tiny_base}", "--suite", suite, "--only", "refusals", "--judge", "refusal")
    record = tmp_path / "out" / "base" / "refusals.json"
    rules = safety.judge_rules()
    for changed, again in (("refusal", True), ("prefixes", False)):
        with monkeypatch.context() as patch:
            patch.setattr(safety, "judge_rules", lambda changed=changed: {**rules, changed: "older"})
            assert _run(*arguments, "--output", tmp_path / "out") == 0
        capsys.readouterr()
        assert _run(*arguments, "--output", tmp_path / "out") == 0
        assert ("a judge's rules" in " ".join(capsys.readouterr().out.split())) == again
        assert read_record(record)["config"]["measure"]["rules"] == {"refusal": rules["refusal"]}


TEXTS = """\
guards:
  news: {kind: perplexity, texts: %s, max_length: 16}
  code: {kind: perplexity, texts: %s, max_length: 16}
"""


def test_a_measure_keeps_its_name_and_changed_data_are_measured_again(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    news, code, suite = tmp_path / "news.txt", tmp_path / "code.txt", tmp_path / "two.yaml"
    news.write_text("the cat sat on the mat", encoding="utf-8")
    code.write_text("return x plus two", encoding="utf-8")
    suite.write_text(TEXTS % (news, code), encoding="utf-8")
    output = tmp_path / "out"
    arguments = (f"base={tiny_base}", "--suite", str(suite), "--output", output, "--quiet")
    assert _run(*arguments) == 0
    records = {name: read_record(output / "base" / f"{name}.json") for name in ("news", "code")}
    assert {name: record["config"]["measure"]["name"] for name, record in records.items()} == {
        "news": "news", "code": "code",
    }  # fmt: skip
    news.write_text("what is two plus three", encoding="utf-8")
    capsys.readouterr()
    assert _run(*arguments) == 0
    assert "measured again" in capsys.readouterr().out
    again = read_record(output / "base" / "news.json")
    assert again["config"]["data"] != records["news"]["config"]["data"]
    assert again["results"]["quantities"]["nll"]["value"] != records["news"]["results"]["quantities"]["nll"]["value"]
    assert read_record(output / "base" / "code.json") == records["code"]
    assert (output / "base" / "news.json.old").exists()


def test_another_configuration_is_another_model(
    suite: str, tiny_base: Path, tuned: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights are the same; the norm's epsilon is not."""
    output = tmp_path / "out"
    arguments = (f"m={tuned}", "--suite", suite, "--only", "refusals", "--output", output, "--quiet")
    assert _run(*arguments) == 0
    config = Path(tuned) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 0.5}))
    capsys.readouterr()
    assert _run(*arguments) == 0
    assert "measured again" in capsys.readouterr().out


def test_a_measure_that_fails_leaves_no_number_of_another_model(
    suite: str, tiny_base: Path, tuned: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = tmp_path / "out"
    arguments = ("--suite", suite, "--only", "refusals", "--output", output)
    assert _run(f"m={tiny_base}", *arguments) == 0

    def broken(self: safety.OverRefusal, subject: Subject) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(safety.OverRefusal, "run", broken)
    capsys.readouterr()
    assert _run(f"m={tuned}", *arguments) == 1
    shown = capsys.readouterr().out
    assert "Over-refusal" not in shown
    assert "measured again" not in shown
    assert not (output / "m" / "refusals.json").exists()
    assert (output / "m" / "refusals.json.old").exists()


def test_a_model_that_cannot_be_asked_is_refused_before_the_first_is_measured(
    suite: str, tiny_base: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--suite", suite, "--output", tmp_path / "out")
    assert _run(f"base={tiny_base}", f"nt={tiny_llama}", *arguments) == 2
    assert "no chat template" in capsys.readouterr().err
    assert _run(f"base={tiny_base}", "missing=/nope", *arguments) == 2
    assert not list(tmp_path.rglob("*.json"))


def test_damaged_weights_cost_no_other_model(
    suite: str, tiny_base: Path, tuned: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(tuned) / "model.safetensors").unlink()
    output = tmp_path / "out"
    assert _run(tuned, f"base={tiny_base}", "--suite", suite, "--only", "refusals", "--output", output) == 1
    assert "tuned: failed: no model could be loaded" in " ".join(capsys.readouterr().out.split())
    assert (output / "base" / "refusals.json").exists()


@pytest.mark.parametrize("change", [{"config": [1]}, {"results": None}, {"results": {}}, {"schema": 99}])
def test_a_record_of_another_shape_is_measured_again(
    suite: str, tiny_base: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    output = tmp_path / "out"
    arguments = (f"base={tiny_base}", "--suite", suite, "--only", "refusals", "--output", output)
    assert _run(*arguments) == 0
    path = output / "base" / "refusals.json"
    content = json.loads(path.read_text())
    del content["digest"]
    path.write_text(json.dumps({**content, **change}))
    assert _run(*arguments) == 0
    assert read_record(path)["results"]["quantities"]["refused"]["n"] == 4


def test_a_measure_that_fails_costs_no_other(
    suite: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: safety.OverRefusal, subject: Subject) -> None:
        raise ZeroDivisionError("in a library")

    monkeypatch.setattr(safety.OverRefusal, "run", broken)
    output = tmp_path / "out"
    assert _run(f"base={tiny_base}", "--suite", suite, "--output", output) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "base, refusals: failed: ZeroDivisionError: in a library" in shown
    assert "ZeroDivisionError" in next((output / "work" / "base").rglob("refusals.error.txt")).read_text()
    assert (output / "base" / "diversity.json").exists()
    assert "left out: drift: it compares with the model before tuning; give --reference" in shown


def test_an_unfinished_measure_is_gone_on_with(
    suite: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = safety.OverRefusal.run

    def partly(self: safety.OverRefusal, subject: Subject) -> Found:
        return Found(real(self, subject).quantities, unfinished="2 judgements failed, the first: status 503")

    output = tmp_path / "out"
    arguments = (f"base={tiny_base}", "--suite", suite, "--only", "refusals", "--output", output)
    monkeypatch.setattr(safety.OverRefusal, "run", partly)
    assert _run(*arguments) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "base, refusals: unfinished, run the same again to go on: 2 judgements failed" in shown
    monkeypatch.setattr(safety.OverRefusal, "run", real)
    assert _run(*arguments) == 0
    assert "measured again" not in capsys.readouterr().out
    assert read_record(output / "base" / "refusals.json")["results"]["unfinished"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: MODEL"),
        (["m", "--suit", "x"], "unknown option '--suit'; did you mean '--suite'"),
        (["a/m", "b/m", "--suite", "quick"], "two models are called 'm'; name them apart, as NAME=MODEL"),
        (["=m"], "model is '=m', expected a hub id, a folder or NAME=MODEL"),
        (["m", "--suite", "quick", "--limit", "0"], "--limit is 0, expected 1 or more"),
        (["m", "--suite", "quick", "--dtype", "int8"], "--dtype is 'int8'"),
        (["m", "--suite", "quick", "--judge_prices", "3"], "--judge_prices is '3', expected two numbers"),
        (["/no/such/model", "--suite", "quick", "--only", "diversity"], "no tokenizer could be loaded"),
        (
            ["m", "--suite", "quick", "--only", "drift", "--reference", "x", "--preference", "none.st"],
            "none.st does not exist",
        ),
    ],
)
def test_wrong_input_is_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(*arguments, "--output", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not list(tmp_path.rglob("*.json"))


def test_a_model_without_a_chat_template_is_refused(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(str(tiny_llama), "--suite", "quick", "--only", "diversity", "--output", str(tmp_path / "out")) == 2
    assert "no chat template" in capsys.readouterr().err
