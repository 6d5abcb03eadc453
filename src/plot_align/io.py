"""Files: writing whole files or none, one writer at a time, JSON, YAML, dataclasses built from it, digests, the model
cache."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from plot_align.errors import InputError, did_you_mean

DEEPEST = 64  # levels of a JSON or YAML file; ours have fewer than ten
_MOST_VALUES = 20_000  # of a YAML file
_MOST_DIFFERENCES = 3  # named in an error
_LONGEST_VALUES = 100  # characters of two values in an error


def default_cache_dir() -> Path:
    """The folder of downloaded models: ``$PLOT_ALIGN_CACHE``, or ``~/.cache/plot-align``."""
    return Path(os.environ.get("PLOT_ALIGN_CACHE") or Path.home() / ".cache" / "plot-align").expanduser()


PART = ".part."  # how the name of an unfinished file begins
_ENDING = 3.0  # seconds in which the processes of a run that was killed may still be ending
LOCK = ".plot-align.lock"
DIGESTS = "plot_align_digests.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_full(error: BaseException | str) -> bool:
    """Whether a disk is full; not every library says so with an OSError (safetensors, tokenizers, pip's output)."""
    return any(os.strerror(code) in str(error) for code in _FULL)


def unwritable(path: Path, error: OSError) -> InputError:
    """What to say where ``path`` cannot be written."""
    if error.errno in _FULL:
        advice = "free some space, and run the same again"
    elif error.errno == errno.ENOENT:
        advice = "its folder was removed meanwhile, so run the same again"
    else:
        advice = "name a folder you may write to"
    return InputError(f"{path} cannot be written ({error.strerror}); {advice}")


@contextlib.contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """Yields a temporary file beside ``path`` and renames it to ``path`` at the end of the block.

    Raises:
        InputError: the folder does not exist or cannot be written.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=PART, suffix=f".{path.name}")
        temporary = Path(name)
        os.close(handle)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes it private
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None:
            raise  # not the file system: gzip and others raise OSError for damaged input
        raise unwritable(path, error) from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):  # of a folder that may no longer be written
                temporary.unlink()


@contextlib.contextmanager
def claimed(folder: Path, name: str | None = None) -> Iterator[None]:
    """Within this context no other process may write below ``folder``; or only not the file ``name`` in it.

    Unfinished files of runs that were killed are removed. The lock ends with its process, however that ends.

    Raises:
        InputError: another process holds it, or the folder cannot be created or written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / (LOCK if name is None else f".{name}.lock"), timeout=_ENDING)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        for left in _leftovers(folder, name):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    except Timeout:
        raise InputError(
            f"{folder / (name or '')} is in use by another plot-align process; wait until that ends, or name another "
            "output"
        ) from None
    except OSError as error:
        raise unwritable(folder, error) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # no trace of a run that wrote nothing
            Path(lock.lock_file).unlink()
        lock.release()
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def _leftovers(folder: Path, name: str | None) -> list[Path]:
    """Unfinished files below ``folder``, but not where a subfolder has a lock of its own; or those of the file
    ``name``, of its neighbours that differ in their ending, and of the records and scores beside it."""
    if name is not None:
        stem = re.escape(Path(name.removesuffix(".gz")).stem)
        pattern = re.compile(rf"{re.escape(PART)}[^.]+\.{stem}(\.record|\.scores)?(\.[^.]+)?(\.gz)?")
        return [path for path in folder.iterdir() if pattern.fullmatch(path.name)]
    locked = {path.parent for path in folder.rglob(LOCK)} - {folder}
    return [path for path in folder.rglob(f"{PART}*") if locked.isdisjoint(path.parents)]


def no_link(name: str, flags: int) -> int:
    """An ``opener`` of :func:`open` for a file that is written in place: a link would lead into another one."""
    return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def write_json(path: Path, value: Any) -> None:
    """The file is complete or it is not there."""
    content = _json_bytes(value)
    with complete_or_absent(path) as temporary:
        temporary.write_bytes(content)


def _json_bytes(value: Any) -> bytes:
    try:
        return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half an emoji, as an endpoint may send: JSON can hold it escaped only
        return json.dumps(value, indent=2).encode() + b"\n"


def write_sealed_json(path: Path, value: Any) -> None:
    """:func:`write_json`, with a digest of the file in a folder beside it, by which :func:`check_seal` knows it again.

    The digest is written first, beside that of the file to be replaced: a run killed between the two leaves neither
    file in doubt.
    """
    content = _json_bytes(value)
    former = [file_digest(path)] if path.is_file() else []
    write_json(seal_of(path), list(dict.fromkeys([hashlib.sha256(content).hexdigest(), *former])))
    with complete_or_absent(path) as temporary:
        temporary.write_bytes(content)


def check_seal(path: Path) -> None:
    """Checks that a file of :func:`write_sealed_json` is as it was written; one without a seal comes from elsewhere.

    Raises:
        InputError: it was altered, or its seal was.
    """
    if _altered(path):
        raise InputError(
            f"{path} is not as it was written, by its digest in {seal_of(path)}; delete both to make it again, or the "
            "digest alone to take it as it is"
        )


def _altered(path: Path) -> bool:
    """Whether a file is not as :func:`write_sealed_json` wrote it."""
    seal = seal_of(path)
    if not seal.exists() or not path.exists():
        return False
    digests = json_or_none(seal)
    return not isinstance(digests, list) or file_digest(path) not in digests


def seal_folder(folder: Path) -> None:
    """Write the digests of all files below ``folder`` into it, without those of checkpoints in it."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and path.name != DIGESTS and not name.parts[0].startswith("checkpoint-"):
            digests[name.as_posix()] = file_digest(path)
    write_json(folder / DIGESTS, digests)


def check_folder(folder: Path) -> None:
    """Checks a folder by the digests in it; one without them was written by another program, or an earlier version.

    Raises:
        InputError: a file is missing or altered.
    """
    path = folder / DIGESTS
    if not path.exists():
        return
    digests = json_or_none(path)
    if not isinstance(digests, dict):
        raise InputError(f"{path} is damaged, and {folder} with it, perhaps; delete {folder}, and run the same again")
    for name, expected in digests.items():
        file = folder / name
        if not file.is_file() or file_digest(file) != expected:
            raise InputError(
                f"{file} is not as it was written, by its digest in {path.name}; delete {folder}, and run the same "
                "again"
            )


def seal_of(path: Path) -> Path:
    """Where the digest of a sealed file is."""
    return path.parent / ".digests" / f"{path.name}.json"


def parse_json(text: str | bytes, **hooks: Any) -> Any:
    """``json.loads`` of a text that anyone may have written.

    Raises:
        ValueError: it is no JSON, or nested more than :data:`DEEPEST` levels deep.
    """
    try:
        content = json.loads(text, **hooks)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [content]
    for _ in range(DEEPEST):
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return content
    raise ValueError(f"it is nested more than {DEEPEST} levels deep")


def json_or_none(path: Path) -> Any:
    """What a JSON file holds; None where it is missing or damaged."""
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def plain_json(content: Mapping[str, Any]) -> Any:
    """``content`` as it reads back from JSON."""
    return json.loads(json.dumps(content))


def match_or_write(record: Path, content: Mapping[str, Any], made: Path) -> None:
    """Write into ``record`` what ``made`` is made with, or check that it says the same already.

    Raises:
        InputError: it says something else, or is not as it was written.
    """
    plain = plain_json(content)
    if not record.exists():
        write_sealed_json(record, plain)
        return
    found = json_or_none(record)
    if not isinstance(found, dict) or _altered(record):
        raise InputError(
            f"{record} is damaged and no longer says what made {made}; delete {record}, if nothing else has changed "
            f"since, or {made} to make it again"
        )
    differing = [said for key in plain for said in _differences(key, found.get(key), plain[key])]
    if differing:
        more = [f"{len(differing) - _MOST_DIFFERENCES} more"] if len(differing) > _MOST_DIFFERENCES else []
        raise InputError(
            f"{made} was made with another {' and '.join(differing[:_MOST_DIFFERENCES] + more)}; choose another "
            f"output, or delete {made} to make it again"
        )


def _differences(name: str, there: Any, now: Any) -> list[str]:
    """The values that differ, in words: ``"attack.steps (4001 there, 4000 now)"``; without long ones."""
    if there == now:
        return []
    if isinstance(there, dict) and isinstance(now, dict):
        return [
            said
            for key in dict.fromkeys((*now, *there))
            for said in _differences(f"{name}.{key}", there.get(key), now.get(key))
        ]
    values = ["none" if value is None else json.dumps(value, ensure_ascii=False) for value in (there, now)]
    return [name if len("".join(values)) > _LONGEST_VALUES else f"{name} ({values[0]} there, {values[1]} now)"]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest(path: Path) -> str:
    """16 hex digits of a file's content, or of a folder's names and contents."""
    found = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            found.update(f"{file.relative_to(path).as_posix()}\0{file_digest(file)}\0".encode())
    return found.hexdigest()[:16]


def json_digest(content: Any) -> str:
    """16 hex digits of what JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def file_name(text: str) -> str:
    """The name of a file or folder for a text that anyone may have chosen: an id, or the name of a model.

    The text itself where every file system takes it, else its letters and its digest: it climbs nowhere, names no
    device, and is never too long, also with an ending. Two texts have two names, unless they differ in case alone,
    which :func:`require_distinct` refuses.
    """
    portable = (
        re.fullmatch(r'[^<>:"/\\|?*~]+', text) is not None
        and text.isprintable()
        and len(text.encode()) <= 200
        and unicodedata.is_normalized("NFC", text)
        and not text.startswith((".", " "))
        and not text.endswith((".", " "))
        and not re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", text, re.IGNORECASE)
    )
    if portable:
        return text
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
    return f"{re.sub(r'[^A-Za-z0-9-]+', '_', text)[:60]}~{digest}"


def require_distinct(names: Iterable[str], what: str) -> None:
    """Refuse names of which two would be one file where letters have no case, as on macOS and Windows.

    Raises:
        InputError: there are such names.
    """
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise InputError(f"{what} {other!r} and {name!r} differ in case only, and name files; rename one of them")


def require_writable(folder: Path) -> None:
    """Checks that ``folder`` can be written and leaves no trace, so that a long run does not fail at its end.

    Raises:
        InputError: the folder cannot be created or written.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable."):
            pass
        for path in missing:
            path.rmdir()
    except OSError as error:
        raise unwritable(folder, error) from None


def read_yaml(path: str, option: str = "--config") -> dict[str, Any]:
    """The options in a YAML file. ``option``: the flag that named it.

    Raises:
        InputError: the file cannot be read or is no mapping; a key stands there twice; it is nested deeply, or its
            aliases expand to a multiple of what is written.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def __init__(self, text: str) -> None:
            super().__init__(text)
            self.depth = self.values = 0
            self.sizes: dict[Any, int] = {}  # finished node → values in it, aliases expanded

        def compose_node(self, parent: Any, index: Any) -> Any:
            before, is_alias = self.values, self.check_event(yaml.AliasEvent)
            self.depth += 1
            if self.depth > DEEPEST:
                raise InputError(f"{option} {path} is nested more than {DEEPEST} levels deep; write it flatter")
            node = super().compose_node(parent, index)
            self.depth -= 1
            # An alias inside of what it names is never finished.
            self.values += self.sizes.get(node, _MOST_VALUES) if is_alias else 1
            if self.values > _MOST_VALUES:
                raise InputError(
                    f"{option} {path} holds more than {_MOST_VALUES:,} values, aliases (*name) expanded; write less"
                )
            if not is_alias:
                self.sizes[node] = self.values - before
            return node

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            seen = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    continue  # YAML's own constructor refuses it
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise InputError(f"{option} {path}, line {line}, has {key.value!r} twice; rename or remove one")
                seen.add(key.value)
            return node

        def construct_yaml_int(self, node: Any) -> int:
            value = super().construct_yaml_int(node)
            if value.bit_length() > 64:  # of thousands of hexadecimal digits Python makes a number, but no text
                raise yaml.constructor.ConstructorError(None, None, "a number of over 64 bits", node.start_mark)
            return value

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise InputError(f"{option} {path} cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise InputError(f"{option} {path} is not UTF-8 text; name a YAML file") from None
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:  # the latter of tags such as !!int
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        why = " ".join(str(getattr(error, "problem", error)).split())
        raise InputError(f"{option} {path}{place} is not valid YAML ({why})") from None
    if not isinstance(content, dict):
        raise InputError(f"{option} {path} holds no mapping; write one 'option: value' on each line")
    return content


def build(kind: Any, given: Mapping[str, Any], what: str, **extra: Any) -> Any:
    """``kind(**given, **extra)``; turns lists into tuples where the class declares tuples.

    Args:
        kind: a dataclass whose annotations are strings (``from __future__ import annotations``).
        given: options from the user. what: their name in errors. extra: options from the program; a user cannot set
        these.

    Raises:
        InputError: an option that ``kind`` does not have, a value of another type, or a missing option.
    """
    known = {field.name: str(field.type) for field in fields(kind) if field.init and field.name not in extra}
    types = get_type_hints(kind, localns={"float": int | float})
    options = {}
    for name, value in given.items():
        if name not in known:
            near = did_you_mean(str(name), known, f"expected {', '.join(known) or 'none'}")
            raise InputError(f"{what} has no option {str(name)!r}; {near}")
        options[name] = tuple(value) if isinstance(value, list) and "tuple" in known[name] else value
        if not fits(options[name], types[name]):
            hint = known[name].replace("None", "null").replace("tuple", "list").replace(", ...", "")
            raise InputError(f"{what}: {name} is {value!r}, expected {hint}; correct it")
    for field in fields(kind):
        required = field.init and field.default is MISSING and field.default_factory is MISSING
        if required and field.name not in {*options, *extra}:
            raise InputError(f"{what} lacks {field.name}, expected {known[field.name]}; add it")
    return kind(**extra, **options)


def fits(value: Any, kind: Any) -> bool:
    """Whether ``value`` has a type such as ``int | None``, ``tuple[str, ...]`` or ``Literal["a", "b"]``."""
    origin, parameters = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, option) for option in parameters)
    if origin is Literal:
        return value in parameters
    if not isinstance(value, origin or kind) or (isinstance(value, bool) and kind is not bool):
        return False
    if origin is dict:
        return all(fits(key, parameters[0]) and fits(item, parameters[1]) for key, item in value.items())
    if origin is tuple and ... not in parameters:
        return len(value) == len(parameters) and all(map(fits, value, parameters))
    return origin is None or all(fits(item, parameters[0]) for item in value)
