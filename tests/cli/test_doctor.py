"""``plot-align doctor``: it says what is wrong with an environment, whatever is wrong with it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from plot_align import environment
from plot_align.cli import doctor
from plot_align.cli.main import main


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch):
    """Packages of this environment, some of them changed: ``changed(trl={"found": "0.24.0"})``."""

    def change(**packages: dict[str, Any]) -> None:
        found = [replace(package, **packages.get(package.name, {})) for package in environment.packages()]
        monkeypatch.setattr(doctor, "packages", lambda: found)

    return change


def test_this_environment_is_fine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert text.endswith("\n\ntraining can run here\n")
    assert "\ntorch " in text
    assert "does not fit" not in text
    assert "\nDPO, SFT, KTO, GRPO, RLOO, PRO: fused\n" in text
    assert max(map(len, text.splitlines())) <= 80


def test_json_is_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert {"name": "python", "needs": ">=3.10", "required": True, "fits": True}.items() <= found["python"].items()
    assert {entry["name"]: entry["found"] for entry in found["packages"]}["ms-swift"] is None
    assert found["device"].keys() == {"type", "gpus", "cpu", "cores", "fast_bf16"}
    assert len(found["backends"]) == 8
    assert all(entry["reason"] for entry in found["backends"])


def test_another_version_is_a_problem_with_its_remedy(changed, capsys: pytest.CaptureFixture[str]) -> None:
    changed(trl={"found": "0.1.0", "needs": ">=1.16,<1.17"}, scipy={"found": "1.0"}, numpy={"found": None})
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "trl is 0.1.0, plot-align needs >=1.16,<1.17: pip install 'trl>=1.16,<1.17'\n" in text
    assert "numpy is not installed, plot-align needs >=1.26: pip install 'numpy>=1.26'\n" in text
    assert text.count("does not fit") == 3  # scipy is shown, too, since it does not fit
    assert "training can run here" not in text


def test_an_old_python_is_a_problem(changed, capsys: pytest.CaptureFixture[str]) -> None:
    changed(python={"found": "3.9.1"})
    assert main(["doctor"]) == 1
    assert "Python is 3.9.1, plot-align needs >=3.10: " in capsys.readouterr().out


def test_what_is_optional_is_no_problem(changed, capsys: pytest.CaptureFixture[str]) -> None:
    changed(peft={"found": "0.1"}, triton={"found": None})
    assert main(["doctor"]) == 0
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize("absent", ["trl", "torch"])
def test_a_broken_installation_is_a_problem_and_not_a_crash(absent: str) -> None:
    """Installed by its metadata, and not to be imported."""
    code = f"import sys\nsys.modules[{absent!r}] = None\nfrom plot_align.cli.main import main\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "sys.exit(main(['doctor', '--json']))"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["problems"][0].startswith(f"{absent} cannot be used: ModuleNotFoundError: ")
    assert found["backends"] is None
    assert (found["device"] is None) == (absent == "torch")


def test_a_gpu_is_named() -> None:
    device = {"type": "cuda", "gpus": [{"name": "NVIDIA H100", "memory": 80 * 2**30}] * 2, "fast_bf16": True}
    assert doctor._device_lines(device | {"cpu": "x", "cores": 8}) == [
        "device           NVIDIA H100, 80 GiB; NVIDIA H100, 80 GiB",
        "bfloat16         faster than float32",
    ]
