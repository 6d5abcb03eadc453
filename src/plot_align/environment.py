"""What is installed beside plot-align, whether plot-align works with it, and what the machine computes fast."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from plot_align.errors import InputError

# What decides how a training runs; plot-align has bounds on some of them.
NAMED = (
    "torch", "transformers", "trl", "datasets", "accelerate", "peft", "triton", "deepspeed", "unsloth", "axolotl",
    "llamafactory", "ms-swift",
)  # fmt: skip


@dataclass(frozen=True)
class Package:
    """A package as it is installed, and as plot-align asks for it.

    Args:
        found: its version; None if it is not installed. needs: the versions that plot-align works with; "" for any.
        required: whether plot-align needs it at all.
    """

    name: str
    found: str | None
    needs: str
    required: bool

    @property
    def fits(self) -> bool:
        """Whether its version is one of those; an optional package may be absent."""
        if self.found is None:
            return not self.required
        return SpecifierSet(self.needs).contains(self.found, prereleases=True)


def packages() -> list[Package]:
    """Python, the packages :data:`NAMED`, then all others that plot-align requires.

    Raises:
        InputError: plot-align is not installed, only its source is on the path, so its requirements are not known.
    """
    try:
        own = metadata.metadata("plot-align")
    except metadata.PackageNotFoundError:
        raise InputError(
            "plot-align is on the path but not installed, so what it requires is not known; pip install it"
        ) from None
    asked = _asked(own.get_all("Requires-Dist") or (), own.get_all("Provides-Extra") or ())
    python = Package("python", platform.python_version(), own["Requires-Python"] or "", True)
    others = sorted(name for name, (_, required) in asked.items() if required and name not in NAMED)
    return [python, *(Package(name, _version(name), *asked.get(name, ("", False))) for name in (*NAMED, *others))]


def _asked(requirements: Iterable[str], extras: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Versions by name, and whether they are required or come with an extra; on this platform and Python."""
    found: dict[str, tuple[str, bool]] = {}
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        required = marker is None or marker.evaluate({"extra": ""})
        if required or (marker is not None and any(marker.evaluate({"extra": extra}) for extra in extras)):
            versions = ",".join(sorted(map(str, requirement.specifier), reverse=True))  # >= before <
            found.setdefault(canonicalize_name(requirement.name), (versions, required))
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def on_cpu() -> bool:
    """Whether there is no GPU; TRL must be told so before it accepts bfloat16."""
    import torch

    return not torch.cuda.is_available()


def fast_bf16() -> bool:
    """Whether this machine multiplies faster in bfloat16 than in float32: a capable GPU, AVX512-BF16 or AMX."""
    import torch

    if not on_cpu():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not hasattr(torch.cpu, "get_capabilities"):  # before torch 2.13
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
