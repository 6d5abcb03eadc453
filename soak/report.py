from pathlib import Path
from typing import Any


def write(entries: list[dict[str, Any]], docs: Path) -> None: ...
