"""Files that are complete or absent, never half-written, and the folder that models are kept in."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from plot_align.errors import InputError


def default_cache_dir() -> Path:
    """Where models are kept: ``$PLOT_ALIGN_CACHE``, or ``~/.cache/plot-align``."""
    return Path(os.environ.get("PLOT_ALIGN_CACHE") or Path.home() / ".cache" / "plot-align").expanduser()


@contextlib.contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """Yields a temporary file beside ``path``, and renames it there once the block has written all of it.

    Raises:
        InputError: the folder does not exist or cannot be written.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
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
        raise InputError(f"{path} cannot be written ({error.strerror}); name a folder you may write to") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_complete_or_absent(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``path``, and renames it there once the block has filled it.

    A folder that stands there already is left as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        part = Path(temporary) / path.name
        part.mkdir()
        yield part
        if not path.is_dir():
            part.rename(path)


def require_writable(folder: Path) -> None:
    """Writes to ``folder`` and leaves no trace, so that a long run does not find out at its end that it cannot.

    Raises:
        InputError: the folder cannot be made or written to.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable."):
            pass
        for path in missing:
            path.rmdir()
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}); name a folder you may write to") from None
