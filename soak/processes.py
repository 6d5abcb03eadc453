"""Commands in processes of their own that need no seconds to start: forks of one that has imported everything."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

_PR_SET_CHILD_SUBREAPER = 36
_LIBRARIES = {
    *("plot_align", "torch", "transformers", "trl", "datasets", "accelerate", "tokenizers", "safetensors", "peft"),
    *("matplotlib", "PIL", "fontTools", "rich", "jinja2", "yaml", "pyarrow", "pandas", "numpy", "scipy", "fsspec"),
    *("huggingface_hub", "gguf", "filelock", "multiprocess", "dill"),
}


def adopt_orphans() -> None:
    """Children of a killed child become ours, so that they can be found."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def import_like(modules: Sequence[str]) -> None:
    """Import what a command had imported at its end."""
    for name in modules:
        if name.partition(".")[0] in _LIBRARIES and name not in sys.modules:
            with contextlib.suppress(Exception):
                __import__(name)


class Running:
    """A command under way, or a few ranks of one."""

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        *,
        environment: dict[str, str] | None = None,
        ranks: int = 1,
        before: Callable[[int], None] = lambda rank: None,
        modules: Path | None = None,
    ) -> None:
        """Starts it in ``folder``.

        Args:
            before: called with the rank in each of its processes, before the command.
            modules: where to write how many bytes of address space it took more than at its start, and the names of
                the modules that it imported.
        """
        number = len(list(folder.glob("stderr-*-0")))
        self.started = time.monotonic()
        self._errors = [folder / f"stderr-{number}-{rank}" for rank in range(ranks)]
        (folder / "tmp").mkdir(exist_ok=True)
        self.pids = []
        self.codes: dict[int, int] = {}
        self.worked = 0.0  # seconds of the processor, of those that have ended
        port = _free_port()
        for rank, error in enumerate(self._errors):
            variables = dict(environment or {})
            if ranks > 1:
                variables |= {
                    **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)},
                    **{"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
                    "ACCELERATE_USE_CPU": "true",
                }
            error.touch()
            pid = os.fork()
            if pid == 0:
                _run(arguments, folder, variables, error, lambda rank=rank: before(rank), modules)  # type: ignore[misc]
            self.pids.append(pid)

    def poll(self) -> bool:
        """Whether all processes have ended."""
        for pid in self.pids:
            if pid not in self.codes:
                found, status, usage = os.wait4(pid, os.WNOHANG)
                if found:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
                    self.worked += usage.ru_utime + usage.ru_stime
        return len(self.codes) == len(self.pids)

    def wait(self, timeout: float) -> bool:
        """Wait for the end; False if it has not come in time."""
        end = time.monotonic() + timeout
        while not self.poll():
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True

    def send(self, number: signal.Signals, rank: int = 0) -> bool:
        """Send a signal to one process; False if it has ended."""
        if self.poll() or self.pids[rank] in self.codes:
            return False
        os.kill(self.pids[rank], number)
        return True

    def working(self) -> float:
        """Seconds of the processor until now, with those of all descendants: a busy machine does not change them."""
        total = 0.0
        with contextlib.suppress(psutil.Error):
            for pid in self.pids:
                process = psutil.Process(pid)
                total += sum(process.cpu_times()[:4])
                total += sum(sum(child.cpu_times()[:4]) for child in process.children(recursive=True))
        return total

    def code(self, rank: int = 0) -> int | None:
        """The exit code, negative for a signal; None before the end."""
        return self.codes.get(self.pids[rank])

    def said(self, rank: int = 0) -> str:
        """What it wrote to standard error."""
        return self._errors[rank].read_text(encoding="utf-8", errors="replace")

    def printed(self, rank: int = 0) -> str:
        """What it wrote to standard output."""
        path = self._errors[rank]
        return path.with_name(f"{path.name}-out").read_text(encoding="utf-8", errors="replace")


def end_children() -> None:
    """Kill whatever is left below this process."""
    while children := psutil.Process().children(recursive=True):  # a killed one leaves us its own
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.001)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _run(
    arguments: Sequence[str],
    folder: Path,
    variables: dict[str, str],
    error: Path,
    before: Callable[[], None],
    modules: Path | None,
) -> None:
    """Run the command and end this process."""
    code = 70
    try:
        os.setsid()
        os.chdir(folder)
        os.environ.update(variables, TMPDIR=str(folder / "tmp"), COLUMNS="200")
        _speak(error.with_name(f"{error.name}-out"), error)
        _forget()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        subprocess.Popen = _Forked  # type: ignore[assignment,misc]
        before()
        size = address_space("VmSize")
        code = _main(arguments)
        if modules is not None:
            modules.write_text("\n".join([str(address_space("VmPeak") - size), *sys.modules]), encoding="utf-8")
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def address_space(name: str) -> int:
    """Bytes, as the kernel counts them for this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def _main(arguments: Sequence[str]) -> int:
    from plot_align.cli.main import main

    return main(list(arguments))


def _speak(out: Path, error: Path) -> None:
    """Standard input from nowhere, output into files."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for number, path in ((1, out), (2, error)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(file, number)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 (for the rest of this process)
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115


def _forget() -> None:
    """What a fork knows and a new process would not."""
    import tempfile

    import datasets

    tempfile.tempdir = None
    atexit._clear()
    cache = Path("cache").absolute()
    datasets.config.HF_DATASETS_CACHE = cache
    datasets.config.DOWNLOADED_DATASETS_PATH = cache / "downloads"
    datasets.config.EXTRACTED_DATASETS_PATH = cache / "extracted"


_Popen = subprocess.Popen


class _Forked(_Popen):  # type: ignore[type-arg]
    """``subprocess.Popen`` that forks where another Python would be started to run a command of ours."""

    def __init__(self, args: Sequence[str], *rest: object, **options: object) -> None:  # type: ignore[no-untyped-def]
        if isinstance(args, str) or list(args[1:3]) != ["-m", "plot_align.cli"]:
            super().__init__(args, *rest, **options)  # type: ignore[call-overload]
            return
        self.returncode = None
        self.args = args
        self.stdin = self.stdout = self.stderr = None
        self._waitpid_lock = __import__("threading").Lock()
        self._child_created, self._sigint_wait_secs = True, 0.25
        self._communication_started, self._input = False, None
        file = options["stdout"].fileno()  # type: ignore[attr-defined]
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.setsid()
                for number in (1, 2):
                    os.dup2(file, number)
                sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
                sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
                os.environ.update(options.get("env") or {})  # type: ignore[call-overload]
                atexit._clear()
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                code = _main(args[3:])
                sys.stdout.flush()
            except SystemExit as leave:
                code = leave.code if isinstance(leave.code, int) else 1
            finally:
                os._exit(code)
