"""Run the user's own training for each job of a sweep."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import plot_align
from plot_align.errors import InputError, RunError
from plot_align.records import read_record, write_record
from plot_align.sweep.grid import Cell, Job, coerce, keys, value_text
from plot_align.sweep.summary import Metric
from plot_align.sweep.workers import CommandWorker, assign_devices, raise_failures, run_jobs, visible_gpus

KIND = "sweep-run"
_SECRETS = ("env", "token", "hub_token", "push_to_hub_token", "use_auth_token")
_FLAGS = {"steps": "max_steps", "batch_size": "per_device_train_batch_size"}  # ours → TRL's


class Training:
    """The user's own training: ``plot-align METHOD --config FILE`` for every job, in its own process.

    Args:
        output: folder of the sweep; each run has a folder under ``runs``, with its log.
        config: the YAML file.
        content: of that file.
    """

    # Evaluation first, else the last training log. TRL's losses include the term, so they are left out.
    MAIN = tuple(
        Metric(prefix + key, f"{label} ({where})", better)
        for prefix, where in (("eval_", "evaluation"), ("", "last training log"))
        for key, label, better in (
            ("loss_without_plot", "loss without the PLOT term", False),
            ("rewards/accuracies", "reward accuracy", True),
            ("rewards/margins", "reward margin", True),
            ("logps/chosen", "log-probability of chosen answers", True),
            ("mean_token_accuracy", "token accuracy", True),
            ("plot/loss", "distance to the preference distribution", False),
        )
    )

    def __init__(self, output: Path, config: Path, content: Mapping[str, Any]) -> None:
        self.output = output
        self.config = config
        self.content = dict(content)

    def record(self, job: Job) -> Path:
        """The path of a finished job's record."""
        return self.output / "records" / f"{self._name(job)}.json"

    def is_finished(self, job: Job) -> bool:
        """Whether a job has its record; a damaged one is as if it were not there."""
        try:
            read_record(self.record(job), KIND)
        except InputError:
            return False
        return True

    def run(self, jobs: Sequence[Job], on_finished: Callable[[], None], workers: int | None) -> None:
        """Run the jobs and call ``on_finished`` after each.

        Args:
            workers: how many at once; None for one per GPU, or one without GPUs.

        Raises:
            InputError: ``workers`` does not divide the GPUs.
            RunError: some jobs failed; the others have their records.
        """
        devices = visible_gpus()
        count = workers if workers is not None else len(devices) or 1
        if devices and len(devices) > count and len(devices) % count:
            raise InputError(
                f"workers is {count} and {len(devices)} GPUs are visible, so some runs would have more GPUs and with "
                f"them a larger batch than others; expected a number that divides {len(devices)}, or more than that"
            )

        def train(worker: CommandWorker, job: Job) -> None:
            self._train(worker, job)
            on_finished()

        failures = run_jobs(jobs, [CommandWorker(device) for device in assign_devices(devices, count)], train)
        raise_failures(failures, [str(job) for job in jobs], self.output)

    def metrics(self, job: Job) -> dict[str, float]:
        """The numbers in the job's record."""
        return training_metrics(read_record(self.record(job), KIND)["results"])

    def main_metrics(self, names: Sequence[str]) -> tuple[list[Metric], list[Metric]]:
        """Of the measured metrics (``names``): those to draw, and further ones for the table."""
        found = [metric for metric in self.MAIN if metric.key in names]
        evaluated = [metric for metric in found if metric.key.startswith("eval_")]
        return (evaluated, [m for m in found if m not in evaluated]) if evaluated else (found, [])

    def command(self, job: Job) -> list[str]:
        """The command that runs a job."""
        flags: list[str] = []
        vanilla = (
            ("alpha", 0.0),
            ("alpha_schedule", "constant"),
            ("alpha_end", 0.0),
        )  # whatever schedule the file has
        for name, value in [*job.cell.setting, *(job.cell.plot or vanilla)]:
            if value is None:  # the option's default, which no flag can express; check() refused a file that sets it
                continue
            values = value.split("+") if name == "loss_type" else [_flag_text(value)]
            flags += [f"--{_FLAGS.get(name, name)}", *values]
        command = [sys.executable, "-m", "plot_align.cli", job.cell.method, "--config", str(self.config), *flags]
        return [*command, "--seed", str(job.seed), "--output_dir", str(self._folder(job))]

    def plot_options(self) -> dict[str, Any]:
        """Options of the term that the file sets.

        Raises:
            InputError: one has another type.
        """
        known = {name: key for name, key in keys().items() if key.group == "plot"}
        return {name: coerce(known[name], value) for name, value in self.content.items() if name in known}

    def check(self, jobs: Sequence[Job]) -> None:
        """Refuse a grid that no command line can express.

        Raises:
            InputError: an option is None in the grid and the file sets it.
        """
        for name, value in (option for job in jobs for option in job.cell.plot or ()):
            if value is None and self.content.get(name) is not None:
                raise InputError(
                    f"{name} is none in the grid, and {self.config} sets it to {self.content[name]!r}, which no flag "
                    "can take back; drop it from one of the two"
                )

    def _train(self, worker: CommandWorker, job: Job) -> None:
        folder = self._folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        written = folder / "plot_align_record.json"
        written.unlink(missing_ok=True)  # a run that was interrupted after this point
        log = folder / "log.txt"
        code = worker.run(self.command(job), log)
        if code != 0:
            lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
            said = lines[-1].removeprefix("plot-align: ").rstrip(".") if lines else f"nothing, and exited with {code}"
            raise RunError(f"{said} (its log is {log}).")
        results = read_record(written, job.cell.method)["results"]
        write_record(self.record(job), KIND, results, config=self._describe(job), seed=job.seed)

    def _folder(self, job: Job) -> Path:
        return self.output / "runs" / self._name(job)

    def _name(self, job: Job) -> str:
        key = json.dumps(self._describe(job), sort_keys=True, default=str)
        return f"{_slug(job.cell)}-seed{job.seed}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"

    def _describe(self, job: Job) -> dict[str, Any]:
        return {
            "train": json.loads(json.dumps(_without_secrets(self.content), default=str)),  # YAML knows dates
            "method": job.cell.method,
            "setting": dict(job.cell.setting),
            "plot": None if job.cell.plot is None else {n: _flag_text(v) for n, v in job.cell.plot},
            "seed": job.seed,
            "files": {name: _content(value) for name, value in sorted(self.content.items()) if _is_local(value)},
            "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
            "source": source_digest(),
        }


def training_metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in the record of ``plot-align dpo``, ``sft`` or ``pro``: from the last log, the whole run, and
    evaluation."""
    found = {
        name: float(value)
        for part in ("last_log", "metrics", "eval")
        for name, value in (results.get(part) or {}).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    for prefix in ("", "eval_"):
        vanilla = found.get(f"{prefix}plot/vanilla_loss", found.get(f"{prefix}loss"))
        if vanilla is not None:
            found[f"{prefix}loss_without_plot"] = vanilla
    return found


@functools.cache
def source_digest() -> str:
    """A digest of every module of this package.

    Finished runs are reused only while it is unchanged. A list of the modules that training needs would go stale, and
    version and commit do not change with an uncommitted edit.
    """
    package = Path(plot_align.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _without_secrets(content: Any, secret: bool = False) -> Any:
    """The content of the file with a digest in place of each secret, by which another one is told from it."""
    if isinstance(content, Mapping):
        return {name: _without_secrets(value, secret or name in _SECRETS) for name, value in content.items()}
    return hashlib.sha256(str(content).encode()).hexdigest()[:16] if secret else content


def _is_local(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and Path(value).exists()


def _content(path: str) -> str:
    """Identifies the content of a file by its bytes, and of a folder by its files' sizes and times."""
    if Path(path).is_file():
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    files = [(str(f.relative_to(path)), f.stat()) for f in sorted(Path(path).rglob("*")) if f.is_file()]
    listed = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]


def _flag_text(value: Any) -> str:
    """A value as a flag's text, from which the training command's parser recovers it exactly."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _slug(cell: Cell) -> str:
    options = [*cell.setting, *(cell.plot or (("without", "plot"),))]
    text = " ".join([cell.method, *(f"{name} {value_text(value)}" for name, value in options)])
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in text).split())[:120]
