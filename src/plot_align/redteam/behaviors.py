"""HarmBench's behaviours and targets."""

from __future__ import annotations

from dataclasses import dataclass

CONTEXT_SEPARATOR = "\n\n---\n\n"


@dataclass(frozen=True)
class Behavior:
    """One row of a behaviours file."""

    id: str
    text: str
    functional_category: str = "standard"
    semantic_category: str = ""
    tags: tuple[str, ...] = ()
    context: str = ""

    @property
    def prompt(self) -> str:
        """The behaviour as it is asked for: the context first, then the separator."""
        return f"{self.context}{CONTEXT_SEPARATOR}{self.text}" if self.context else self.text
