"""What is fuzzed: one module for each kind of input."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from hypothesis.strategies import SearchStrategy


class Target(Protocol):
    """One kind of input.

    The first byte of a case chooses the variant, the rest is the file.

    Attributes:
        name: in tables.
        names: one of these is in every clear error.
        seeds: valid cases, each of which gives a right result.
        cases: spoilt ones.
        seconds: of the processor for one case, where a target needs more than :data:`fuzz.guard.SECONDS`.
    """

    name: str
    names: tuple[str, ...]
    seeds: list[bytes]
    cases: SearchStrategy[bytes]

    def run(self, data: bytes, folder: Path) -> None:
        """Read ``data`` as the package does and check the result.

        Raises:
            PlotAlignError: the input is refused.
            Wrong: the result is wrong.
        """


NAMES = ("rows", "yaml", "artefacts", "records", "behaviors", "completions", "replies")


def make(name: str) -> Any:
    """The target called ``name``; heavy libraries are imported only for those that need them."""
    match name:
        case "rows":
            from fuzz.targets.rows import Rows as Kind
        case "yaml":
            from fuzz.targets.yaml_files import Yaml as Kind  # type: ignore[assignment]
        case "artefacts":
            from fuzz.targets.artefacts import Artefacts as Kind  # type: ignore[assignment]
        case "records":
            from fuzz.targets.records import Records as Kind  # type: ignore[assignment]
        case "behaviors":
            from fuzz.targets.behaviors import Behaviors as Kind  # type: ignore[assignment]
        case "completions":
            from fuzz.targets.completions import Completions as Kind  # type: ignore[assignment]
        case "replies":
            from fuzz.targets.replies import Replies as Kind  # type: ignore[assignment]
        case _:
            raise SystemExit(f"no target {name!r}; expected {', '.join(NAMES)}")
    return Kind()


def joined(variant: int, content: bytes) -> bytes:
    return bytes([variant]) + content


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path
