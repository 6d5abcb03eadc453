"""What a command left behind, without what differs from run to run: dates, times, and the machine's load."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_TIMES = re.compile(
    r"^(created|commit|resume_from_checkpoint|seconds|tstamp|digest|.*_runtime|.*_per_second|.*seconds.*|time.*|step_time|elapsed.*)$|/s$"
)
_TEXT_TIMES = re.compile(
    r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d+)?)?( ?UTC|\+00:00)?|[\d.,]+ (s|seconds|min|ms)\b|(?<=runtime': )[^,}]*"
)
_NOT_COMPARED = re.compile(
    r"(^|/)(\.[^/]*\.lock|plot_align_digests\.json|training_args\.bin|log\.txt|optimizer\.pt|README\.md)$|(^|/)\.digests/|-by_seconds-[^/]*$"
)


def snapshot(folder: Path, aside: Sequence[str] = ()) -> dict[str, str]:
    """File → its content, or a digest of it. ``aside``: regular expressions of names to leave out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not _NOT_COMPARED.search(name) and not any(re.search(one, name) for one in aside):
            found[name] = _content(path)
    return found


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """One line a file that is missing, too many or another."""
    lines = [f"{name} is missing" for name in expected.keys() - found.keys()]
    lines += [f"{name} is left over" for name in found.keys() - expected.keys()]
    lines += [
        f"{name} differs: {_where(expected[name], found[name])}"
        for name in expected.keys() & found.keys()
        if expected[name] != found[name]
    ]
    return sorted(lines)


def _content(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        size = 8 + int.from_bytes(data[:8], "little")
        # Of the place of a data set, and of that.
        header = re.sub(rb'fingerprint\\": \\"[0-9a-f]{16}\\"|"digest":"[0-9a-f]+"', b"", data[8:size])
        return f"{header.decode(errors='replace')}\n{hashlib.sha256(data[size:]).hexdigest()}"
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return hashlib.sha256(data).hexdigest()
    if path.suffix == ".json":
        try:
            return json.dumps(_timeless(json.loads(text)), indent=1, sort_keys=True)
        except ValueError:
            return text
    if path.suffix == ".jsonl":
        return "\n".join(json.dumps(_timeless(json.loads(line))) for line in text.splitlines())
    return _TEXT_TIMES.sub("TIME", text)


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        # A data set's fingerprint, unlike a vocabulary's of 64 digits, is of the place of its file.
        kept = {k: v for k, v in value.items() if not (k == "fingerprint" and len(str(v)) == 16)}
        return {key: _timeless(entry) for key, entry in kept.items() if not _TIMES.search(key)}
    if isinstance(value, list):
        return [_timeless(entry) for entry in value]
    return _TEXT_TIMES.sub("TIME", value) if isinstance(value, str) else value


def _where(expected: str, found: str) -> str:
    pairs = zip(expected.splitlines(), found.splitlines(), strict=False)
    line = next(((a, b) for a, b in pairs if a != b), None)
    if line is None:
        return f"{len(found)} characters in place of {len(expected)}"
    a, b = line
    start = max(0, next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0) - 30)
    return f"{b[start : start + 80]!r} in place of {a[start : start + 80]!r}"
