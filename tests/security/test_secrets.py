"""Keys, tokens and passwords are in no file, no output and no process list that a command leaves."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hostile_server import chat, hostile_server, reply

from plot_align.cli.main import main
from plot_align.cli.train import _without_tokens
from plot_align.sweep.grid import Cell, Job
from plot_align.sweep.training import Training

KEY, PASSWORD = "sk-sentinel-0123456789abcdef", "hunter22-sentinel"


def everything(folder: Path) -> bytes:
    """Names and contents of all files, also of hidden ones."""
    found = b""
    for path in sorted(folder.rglob("*")):
        found += os.fsencode(path) + (path.read_bytes() if path.is_file() else b"")
    return found


def test_a_run_whose_judge_repeats_the_key(
    tiny_base: Path, requests_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The judge's answers, refusals and rubbish hold it; no byte that two commands and a failed one write does."""
    pytest.importorskip("openai")
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("openai._base_client.time.sleep", lambda seconds: None)
    said = json.dumps({"error": {"message": f"{KEY} {PASSWORD} is no key"}})
    files = [f"--{name}={requests_folder / file}" for name, file in
             {"behaviors": "behaviors.csv", "targets": "targets.json", "benign": "benign.csv"}.items()]  # fmt: skip
    out = tmp_path / "out"

    def attacked(*script: Any, debug: bool = False) -> int:
        with hostile_server(*script) as server:
            url = server.url.replace("://", f"://me:{PASSWORD}@") + "/v1"
            judge = ["--judge", "endpoint", "--judge_url", url, "--judge_model", "m", "--judge_key", "MY_KEY"]
            size = ["--attacks", "direct", "--max_new_tokens", "4", "--output", str(out)]
            return main([*(["--debug"] if debug else []), "redteam", f"m={tiny_base}", *files, *judge, *size])

    assert attacked(reply(401, said), debug=True) == 1  # it decided nothing
    verdicts = "[[refused: no]] [[helped: yes]]"
    answers = (
        *(chat(f"[[yes]] {KEY}"), reply(401, said), chat(f"{KEY} says nothing"), reply(400, said)),
        *(chat(f"[[no]] {KEY}"), chat(f"{verdicts} {KEY}")),
    )
    assert attacked(*answers) == 0
    assert main(["report", str(out), "-o", str(tmp_path / "page.html")]) == 0
    shown = capfd.readouterr()
    for secret in (KEY, PASSWORD):
        assert secret[:10] not in shown.out + shown.err
        assert secret[:10].encode() not in everything(tmp_path)
    assert "MY_KEY" in shown.err  # where to put another one
    assert (tmp_path / "page.html").exists()


@pytest.mark.parametrize("typed", [KEY, KEY.replace("-", "_"), ""])
@pytest.mark.parametrize("command", ["asked", "unasked", "attacker", "over_refusal", "mt_bench"])
def test_a_key_typed_in_place_of_its_variable(
    typed: str, command: str, requests_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Refused before a model is loaded, and nowhere repeated: also one that could be the name of a variable."""
    monkeypatch.chdir(tmp_path)
    suite = tmp_path / "own.yaml"
    suite.write_text("guards:\n  a: {kind: over_refusal, judge: endpoint}\n  b: {kind: mt_bench, folder: x}\n")
    endpoint = ["--judge_url", "http://127.0.0.1:9/v1", "--judge_model", "m"]
    attacks = ["redteam", "no/model", "--behaviors", str(requests_folder / "behaviors.csv"), "--attacks", "direct"]
    measures = ["evaluate", "no/model", "--suite", str(suite), *endpoint, "--only"]
    arguments = {
        "asked": [*attacks, *endpoint, "--judge", "endpoint", "--judge_key"],
        "unasked": [*attacks, "--judge_key"],
        "attacker": [*attacks, "--attacker_key"],
        "over_refusal": [*measures, "a", "--judge_key"],
        "mt_bench": [*measures, "b", "--judge_key"],
    }[command]
    before = everything(tmp_path)
    assert main(["--debug", *arguments, typed]) == 2
    shown = capfd.readouterr()
    assert "pass the name of that" in shown.err
    if typed:
        assert "sentinel" not in shown.out + shown.err
    assert everything(tmp_path) == before


def test_help_does_not_read_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for command in ("redteam", "evaluate"):
        assert main([command, "--help"]) == 0
    assert KEY not in capsys.readouterr().out


def test_a_sweep_keeps_no_secret_of_its_file(tmp_path: Path) -> None:
    """But another secret is another run, as it may be another value of a variable that decides the result."""

    def described(key: str) -> dict[str, Any]:
        content = {
            "env": {"WANDB_API_KEY": key, "CUDA_VISIBLE_DEVICES": 0},
            "hub_token": key,
            "model_init_kwargs": {"token": key, "revision": "main"},
            "eos_token": "<|end|>",
        }
        return Training(tmp_path, tmp_path / "x.yaml", content)._describe(Job(Cell("dpo", (), None), 0))

    found = described(KEY)
    assert KEY not in json.dumps(found)
    assert found["train"]["model_init_kwargs"]["revision"] == "main"
    assert found["train"]["eos_token"] == "<|end|>"
    assert found == described(KEY)
    assert found != described(KEY + "0")


def test_a_trainings_record_keeps_no_token() -> None:
    found = _without_tokens({"seed": 1, "model_init_kwargs": {"token": KEY, "dtype": "auto"}})
    assert found == {"seed": 1, "model_init_kwargs": {"token": "<TOKEN>", "dtype": "auto"}}
