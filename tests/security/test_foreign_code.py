"""No file runs code: no pickle is read, no model's code imported, no program of a folder's git started."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from plot_align.cli.main import main
from plot_align.errors import InputError
from plot_align.evaluation.suite import Given, read_suite
from plot_align.inference.load import load_model, refuse_pickles
from plot_align.records import commit


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What must not come to be."""
    return tmp_path / "code-was-run"


# --- pickles --------------------------------------------------------------------------------------------------------


def _pickled(tiny_base: Path, folder: Path, mark: Path | None) -> Path:
    """The tiny model with its weights as a pickle, a sound one or a bomb."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny_base, folder)
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    if mark is None:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        with (folder / "pytorch_model.bin").open("wb") as file:
            pickle.dump(Bomb(mark), file)
    return folder


@pytest.mark.parametrize("is_bomb", [False, True])
def test_weights_that_are_a_pickle_are_refused(tiny_base: Path, tmp_path: Path, mark: Path, is_bomb: bool) -> None:
    """Also a sound one, and also where the folder check does not look: as a model of the Hub would come."""
    from transformers import AutoModelForCausalLM

    folder = _pickled(tiny_base, tmp_path / "model", mark if is_bomb else None)
    with pytest.raises(InputError, match="a pickle, which can run code"):
        load_model(str(folder))
    with pytest.raises(OSError, match="safetensors"):  # what load_model asks of transformers
        AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    assert not mark.exists()


def test_load_model_asks_for_safetensors(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    asked: dict[str, Any] = {}

    def from_pretrained(name: str, **options: Any) -> None:
        asked.update(options)
        raise OSError("enough")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(InputError, match="enough"):
        load_model(str(tiny_base))
    assert asked["use_safetensors"] is True
    assert asked["trust_remote_code"] is False


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "pytorch_model-00001-of-00002.bin"])
def test_an_adapter_or_a_checkpoint_that_is_a_pickle_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / "optimizer.pt").write_bytes(b"x")  # the Trainer's own
    with pytest.raises(InputError, match=name):
        refuse_pickles(tmp_path)
    (tmp_path / ("adapter_model.safetensors" if "adapter" in name else "model-00001-of-00002.safetensors")).touch()
    refuse_pickles(tmp_path)
    refuse_pickles("owner/name-on-the-hub")


@pytest.mark.parametrize("option", ["--model_name_or_path", "--resume_from_checkpoint"])
def test_training_refuses_a_pickle(
    tiny_llama: Path, pairs_file: Path, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    given = {"--model_name_or_path": str(tiny_llama), "--dataset_name": str(pairs_file), option: str(folder)}
    arguments = [part for pair in given.items() for part in pair]
    assert main(["dpo", *arguments, "--output_dir", str(tmp_path / "out"), "--use_cpu"]) == 2
    assert "a pickle, which can run code" in capsys.readouterr().err


def test_weights_that_lie_are_one_sentence(tiny_base: Path, tmp_path: Path) -> None:
    for number, content in enumerate(
        (b"", b"x" * 100, (2**60).to_bytes(8, "little") + b"{}", b"\x02" + b"\0" * 7 + b"{}")
    ):
        folder = tmp_path / str(number)
        shutil.copytree(tiny_base, folder)
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(InputError, match=r"no model could be loaded|no weights for"):
            load_model(str(folder))


def test_weights_that_are_missing_are_not_made_up(tiny_base: Path, tmp_path: Path) -> None:
    """Transformers would draw them at random, with a warning, and every number would be of that."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_base, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"no weights for model\.layers\.1\.mlp\.up_proj\.weight and 0 others"):
        load_model(str(folder))
    load_model(str(tiny_base))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"), ("tokenizer.json", "[" * 100_000), ("tokenizer.json", '{"version": "1.0"}'),
        ("tokenizer_config.json", "[]"), ("config.json", "{"), ("config.json", '{"model_type": "\\u001b]0;x"}'),
    ],
)  # fmt: skip
def test_a_damaged_model_is_one_sentence(tiny_base: Path, tmp_path: Path, name: str, content: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_base, folder)
    (folder / name).write_text(content)
    with pytest.raises(InputError) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


def test_the_cache_of_lm_eval_is_no_pickle(tmp_path: Path, mark: Path) -> None:
    """What lm-eval would unpickle is not JSON, and what we write is."""
    pytest.importorskip("lm_eval")
    import sqlitedict

    from plot_align.evaluation.harness import _cache_without_pickles

    path = tmp_path / "cache.db"
    with sqlitedict.SqliteDict(str(path), autocommit=True) as planted:
        planted["evil"] = Bomb(mark)
    with _cache_without_pickles():
        from sqlitedict import SqliteDict  # as lm-eval does

        with SqliteDict(str(path), autocommit=True) as cache:
            cache["log-likelihood"] = (-0.1, True)
            cache["answer"] = "half \ud83d"
            assert cache["log-likelihood"] == (-0.1, True)
            assert cache["answer"] == "half \ud83d"
            with pytest.raises(ValueError, match=r"JSON|codec|UTF|utf"):
                cache["evil"]
    assert not mark.exists()
    with sqlite3.connect(path) as connection:
        rows = dict(connection.execute("SELECT key, value FROM unnamed"))
    assert json.loads(rows["log-likelihood"]) == [-0.1, True]
    assert sqlitedict.SqliteDict is not SqliteDict


# --- a model's own code ---------------------------------------------------------------------------------------------


@pytest.fixture
def own_code(tiny_base: Path, tmp_path: Path, mark: Path) -> Path:
    """The tiny model, which says that its classes are in files of its own."""
    folder = tmp_path / "own_code"
    shutil.copytree(tiny_base, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.T", "own.T"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "own.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class C(LlamaConfig):\n    model_type = 'own'\nclass M(LlamaForCausalLM):\n    config_class = C\n"
        "class T(PreTrainedTokenizerFast):\n    pass\n"
    )
    return folder


COMMANDS: dict[str, Callable[[str, str, str], list[str]]] = {
    "estimate": lambda model, pairs, out: ["estimate", pairs, "--tokenizer", model, "--output", f"{out}.safetensors"],
    "doctor": lambda model, pairs, out: ["doctor", pairs, "--model", model],
    "evaluate": lambda model, pairs, out: ["evaluate", model, "--output", out],
    "bench": lambda model, pairs, out: ["bench", "--model", model, "--output", f"{out}.json"],
    **{
        method: lambda model, pairs, out, method=method: [
            method, "--model_name_or_path", model, "--dataset_name", pairs, "--output_dir", out, "--use_cpu",
        ]
        for method in ("dpo", "pro")
    },
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_a_models_code_unasked(
    own_code: Path, pairs_file: Path, tmp_path: Path, mark: Path, command: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    code = main(COMMANDS[command](str(own_code), str(pairs_file), str(tmp_path / "out")))
    told = capsys.readouterr().err
    assert not mark.exists()
    assert code in (1, 2), told
    assert len(told.strip().splitlines()[-1]) < 1000


def test_it_runs_where_it_is_asked_for(
    own_code: Path, mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the tests above would show nothing."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    load_model(str(own_code), trust_remote_code=True)
    assert mark.exists()


# --- git, suites ----------------------------------------------------------------------------------------------------


def test_the_records_commit_runs_no_program_of_the_repository(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An archive that was unpacked may hold a .git whose configuration names programs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("HOME", str(tmp_path))

    def git(*arguments: str) -> None:
        name = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", *name, *arguments], check=True, capture_output=True, timeout=60)

    git("init")
    Path("a.txt").write_text("one")
    git("add", "a.txt")
    git("commit", "-m", "one")
    assert commit()["dirty"] is False  # type: ignore[index]
    Path("a.txt").write_text("two")
    assert commit()["dirty"] is True  # type: ignore[index]
    git("checkout", "a.txt")
    program = tmp_path / "program.sh"
    program.write_text(f"#!/bin/sh\ntouch {mark}\ncat\n")
    program.chmod(0o755)
    git("config", "core.fsmonitor", str(program))
    git("config", "filter.a=b.clean", str(program))
    git("config", "filter.a=b.required", "true")
    Path(".gitattributes").write_text("*.txt filter=a=b\n")
    Path("a.txt").touch()
    os.utime("a.txt", (1, 1))  # git must look into it
    found = commit()
    assert not mark.exists()
    assert found is not None
    subprocess.run(["git", "status"], capture_output=True, timeout=60)
    assert mark.exists()  # the trap works


@pytest.mark.parametrize("option", ["judge_url", "judge_key"])
def test_a_suite_cannot_send_a_variable_of_the_environment_anywhere(tmp_path: Path, option: str) -> None:
    suite = tmp_path / "suite.yaml"
    value = {"judge_url": "http://evil.example/v1", "judge_key": "AWS_SECRET_ACCESS_KEY"}[option]
    suite.write_text(f"guards:\n  refusals: {{kind: over_refusal, judge: endpoint, {option}: '{value}'}}\n")
    with pytest.raises(InputError, match=f"refusals in suite .* names its {option}"):
        read_suite(str(suite), Given(judge_url="http://127.0.0.1:9/v1", judge_model="m"))


def test_a_suite_cannot_allow_itself_to_run_code(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    suite = tmp_path / "suite.yaml"
    suite.write_text("coding:\n  humaneval: {kind: lm_eval, task: humaneval, allow_code_execution: true}\n")
    with pytest.raises(InputError, match="--allow_code_execution"):
        read_suite(str(suite), Given())
