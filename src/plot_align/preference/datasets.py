"""Open a preference data set from a file, a folder or the Hub, and check its columns."""

from __future__ import annotations

import gzip
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from plot_align.errors import InputError
from plot_align.io import DEEPEST, file_digest, parse_json

_JSON = re.compile(r"\.(jsonl?)(\.gz)?$")
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]')
_NULL = re.compile(rb"(?:\xef\xbb\xbf)?\s*null")
_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_pairs(
    source: str | os.PathLike[str],
    *,
    name: str | None = None,
    split: str = "train",
    streaming: bool = False,
    revision: str | None = None,
    data_dir: str | None = None,
) -> Any:
    """Open a preference data set from a file, a folder or the Hub.

    Args:
        source: a local ``.jsonl``, ``.json`` or ``.csv`` file (each also with ``.gz``), a ``.parquet`` file, a folder
            written by ``datasets.save_to_disk``, a folder of data files, or the id of a data set on the Hub.
        name: configuration of a Hub data set.
        split: split of a Hub data set or of a saved ``DatasetDict``. A single file has no splits.
        streaming: read row by row instead of converting to Arrow first.
        revision: branch, tag or commit of a Hub data set.
        data_dir: folder inside a Hub data set, e.g. ``"harmless-base"`` of ``Anthropic/hh-rlhf``.

    Returns:
        ``datasets.Dataset``, or ``datasets.IterableDataset`` when streaming. Its ``info.download_checksums`` holds its
        origin (file name and SHA-256, or Hub id and commit), which :func:`plot_align.estimate` copies into the
        provenance.

    Raises:
        InputError: no such file or data set, an unknown file type, a file that cannot be parsed (with the row, if
            it can be found), an unknown split.
    """
    import datasets

    path = Path(source)
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and (found := _JSON.search(file.name.lower())):
            _require_harmless(file, by_line=found[1] == "jsonl")
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            data = _load_saved(path, split, streaming)
        else:
            data = _load(str(path), split=split, streaming=streaming)
        return _with_origin(data, path.name, {})
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] == ".gz" else (suffixes or [""])[-1]
    if path.is_file():
        if kind not in _READERS:
            raise InputError(
                f"data file {path} ends in {kind or 'nothing'!r}, expected {', '.join(_READERS)} (or one of them with "
                ".gz); convert it"
            )
        if split != "train":
            raise InputError(f"split is {split!r}, but the single file {path.name} has no splits; leave it out")
        digest = file_digest(path)
        try:
            data = datasets.load_dataset(_READERS[kind], data_files=str(path), split="train", streaming=streaming)
            if not streaming:
                data.data.validate(full=True)  # Arrow's JSON reader takes bytes that are no UTF-8, and nobody after it
        except StopIteration:
            raise InputError(f"data file {path} is empty, expected preference pairs; check the file") from None
        except Exception as error:
            raise InputError(_diagnose(path, kind, error)) from None
        return _with_origin(data, path.name, {"sha256": digest})
    if kind in _READERS or kind == ".gz" or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)):
        raise InputError(f"data file {source} does not exist; check the path (a Hub data set is written owner/name)")
    data = _load(str(source), name=name, split=split, streaming=streaming, revision=revision, data_dir=data_dir)
    return _with_origin(data, str(source), {"revision": _commit(str(source), revision), "data_dir": data_dir})


def _require_harmless(path: Path, *, by_line: bool) -> None:
    """Refuse JSON by which Arrow's reader would end the process: nested so deeply that it overflows the stack, or a
    row ``null``, which it cannot begin a block with (apache/arrow#47409).

    Args:
        by_line: whether each line is a value of its own; of a ``.json`` file the first line tells.

    Raises:
        InputError: it is; the message names the line.
    """
    opener: Any = gzip.open if path.suffix.lower() == ".gz" else open
    depth, rows = 0, None
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if rows is None and line.strip():
                    rows = by_line or bool(_NULL.match(line)) or line.rstrip().endswith(b"}")
                if rows and _NULL.match(line):
                    raise InputError(
                        f"data file {path}, line {number}, is null, expected an object with chosen and rejected; "
                        "correct or remove the row"
                    )
                if by_line and line.count(b"[") + line.count(b"{") <= DEEPEST:
                    continue  # nearly every line, at a hundredth of the cost
                depth = 0 if by_line else depth
                for token in _BRACKETS.findall(line):
                    depth += (token in b"[{") - (token in b"]}") if len(token) == 1 else 0
                    if depth > DEEPEST:
                        raise InputError(
                            f"data file {path}, line {number}, is nested more than {DEEPEST} levels deep; correct or "
                            "remove the row"
                        )
    except (OSError, EOFError):
        return  # whoever reads it says what is wrong


def _load(source: str, **options: Any) -> Any:
    """``datasets.load_dataset`` of a Hub data set or a folder; turns its errors into one sentence."""
    import datasets

    try:
        return datasets.load_dataset(source, **options)
    except Exception as error:
        raise InputError(
            f"data set {source!r} cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:300]}); "
            "check its name, configuration and split, and the network"
        ) from None


def _load_saved(path: Path, split: str, streaming: bool) -> Any:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:
        raise InputError(
            f"folder {path} cannot be loaded ({' '.join(str(error).split())[:300]}), expected what save_to_disk "
            "wrote; save it again"
        ) from None
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise InputError(f"split is {split!r}, but folder {path} has {', '.join(data)}; name one of them")
        data = data[split]
    return data.to_iterable_dataset() if streaming else data


def _with_origin(data: Any, identity: str, details: dict[str, Any]) -> Any:
    """Stores the origin of ``data`` in ``info.download_checksums``, which every transformation keeps."""
    data.info.download_checksums = {identity: {key: value for key, value in details.items() if value is not None}}
    return data


def _commit(source: str, revision: str | None) -> str | None:
    """The commit of a Hub revision; offline, the revision itself."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(source, revision=revision, timeout=10).sha
    except Exception:  # offline: the data set came from the cache
        return revision


def _diagnose(path: Path, kind: str, error: Exception) -> str:
    """Why a file cannot be parsed: its first bad row, or else the reader's error."""
    reason = " ".join(str(error.__cause__ or error).split())[:300]
    if _READERS[kind] == "json":
        opener: Any = gzip.open if path.suffix.lower() == ".gz" else open
        try:
            with opener(path, "rt", encoding="utf-8") as file:
                found = _bad_json_row(file)
        except (OSError, EOFError, UnicodeDecodeError) as broken:
            found = f"cannot be read to its end ({broken})"
        if found:
            return f"data file {path} {found}; correct it"
    return f"data file {path} is no valid {kind[1:]} ({reason}); correct or convert it"


def _bad_json_row(file: Iterable[str]) -> str | None:
    """The error in the first bad line of a JSON-lines file; None if there is none, or for a file with one array."""
    for number, text in enumerate(file, start=1):
        if not text.strip():
            continue
        if number == 1 and text.lstrip()[0] == "[":
            return None  # one JSON array, not lines
        fault = json_fault(text)
        if fault:
            return f"line {number} {fault}"
    return None


def json_fault(text: str) -> str | None:
    """Why a line is no row, to follow its number; None of a row."""
    try:
        row = parse_json(text)
    except ValueError as error:
        return f"is no valid JSON ({error})"
    if isinstance(row, dict):
        return None
    return f"is {'null' if row is None else shown(row)}, expected an object with chosen and rejected"


def shown(value: Any) -> str:
    """Describes a value in an error message by its type, without its text, which may be anything."""
    if value is None:
        return "missing"
    if isinstance(value, bool | int | float):
        return repr(value)
    return f"a {type(value).__name__} of length {len(value)}" if hasattr(value, "__len__") else type(value).__name__


def require_pairs(data: Any) -> None:
    """Refuses, before a model is loaded, data that a trainer would fail on.

    Args:
        data: a ``datasets`` object; of a stream only the columns are checked, if they are known.

    Raises:
        InputError: no ``chosen`` or no ``rejected`` column, no rows, or a row where one of them is missing.
    """
    _require_columns(
        data,
        ("chosen", "rejected"),
        "expected chosen and rejected (and prompt, if they do not contain it)",
        "preference pairs",
    )


def require_ranked(data: Any) -> None:
    """As :func:`require_pairs`, for ``plot-align pro``: ``prompt`` and ``completions``, or pairs.

    Raises:
        InputError: neither of the two layouts, no rows, or a row where one of the columns is missing.
    """
    columns = data.column_names or ()
    if "chosen" in columns and "completions" not in columns:
        require_pairs(data)
    else:
        expected = "expected prompt and completions (and rewards, unless they are in order), or chosen and rejected"
        _require_columns(data, ("prompt", "completions"), expected, "ranked completions")


def _require_columns(data: Any, names: tuple[str, ...], expected: str, rows: str) -> None:
    import datasets
    import numpy as np

    columns = data.column_names
    if columns is None:
        return
    for name in names:
        if name not in columns:
            raise InputError(
                f"the training set has no column {name!r} (columns: {', '.join(columns)}), {expected}; rename its "
                "columns"
            )
        if not isinstance(data, datasets.Dataset):
            continue
        if len(data) == 0:
            raise InputError(f"the training set is empty, expected {rows}; name another file or split")
        column = data.data.column(name)
        if column.null_count:
            row = int(np.flatnonzero(column.is_null().to_numpy())[0])
            raise InputError(
                f"training row {row}: {name!r} is missing, expected one in every row; complete or remove the row"
            )
