"""What is installed, against what plot-align asks for."""

from __future__ import annotations

from email.message import Message
from importlib import metadata

import pytest
import torch

from plot_align import environment
from plot_align.environment import NAMED, Package, packages
from plot_align.errors import InputError


@pytest.fixture
def declare(monkeypatch: pytest.MonkeyPatch):
    """Makes up the metadata of plot-align, and the versions that are installed."""

    def of(requirements: list[str], installed: dict[str, str]) -> dict[str, Package]:
        own = Message()
        own["Requires-Python"] = ">=3.10"
        for requirement in requirements:
            own["Requires-Dist"] = requirement
        for extra in ("dev", "peft"):
            own["Provides-Extra"] = extra

        def version(name: str) -> str:
            if name not in installed:
                raise metadata.PackageNotFoundError(name)
            return installed[name]

        monkeypatch.setattr(environment.metadata, "metadata", lambda name: own)
        monkeypatch.setattr(environment.metadata, "version", version)
        return {package.name: package for package in packages()}

    return of


def test_versions_are_held_against_the_requirements(declare) -> None:
    found = declare(
        [
            "torch>=2.9",
            "trl<1.17,>=1.16; python_version >= '3.0'",
            "transformers>=5.19",
            "SciPy>=1.15",
            "triton>=3.5; python_version < '3.0' and extra == 'dev'",  # not on this Python
            "peft>=0.17; extra == 'peft'",
        ],
        {"torch": "2.13.0+cpu", "trl": "1.17.0", "scipy": "1.15", "peft": "0.10"},
    )
    assert list(found) == ["python", *NAMED, "scipy"]
    assert found["torch"] == Package("torch", "2.13.0+cpu", ">=2.9", True)
    assert found["trl"] == Package("trl", "1.17.0", ">=1.16,<1.17", True)
    assert found["transformers"] == Package("transformers", None, ">=5.19", True)
    assert found["triton"] == Package("triton", None, "", False)
    assert found["peft"] == Package("peft", "0.10", ">=0.17", False)
    assert {name for name, package in found.items() if not package.fits} == {"trl", "transformers", "peft"}
    assert found["python"].needs == ">=3.10"


def test_a_version_before_a_release_counts(declare) -> None:
    assert declare(["trl>=1.16"], {"trl": "1.17.0.dev0"})["trl"].fits
    assert not declare(["trl>=1.17"], {"trl": "1.17.0.dev0"})["trl"].fits


def test_what_this_package_asks_for_is_here() -> None:
    found = {package.name: package for package in packages()}
    assert all(package.fits for package in found.values())
    assert {name for name in NAMED if found[name].required} >= {
        "torch",
        "transformers",
        "trl",
        "datasets",
        "accelerate",
    }
    assert found["torch"].found == torch.__version__


def test_a_bare_source_tree_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(environment.metadata, "metadata", missing)
    with pytest.raises(InputError, match="on the path but not installed"):
        packages()


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"avx512_f": True, "avx512_bf16": False}, False),
        ({}, False),
    ],
)
def test_bf16_is_for_processors_that_multiply_in_it(
    capabilities: dict[str, bool], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "on_cpu", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert environment.fast_bf16() is fast
