"""What one run of a sweep is: an arm of the sandbox, or the user's own training."""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from plot_align.config import PlotConfig
from plot_align.errors import InputError, RunError
from plot_align.records import read_record, write_record
from plot_align.sandbox import CATEGORIES
from plot_align.sandbox.experiment import JUDGING, Arm, Run, Setting, run_many, source_digest
from plot_align.sweep.grid import Cell, Job, coerce, keys, value_text
from plot_align.sweep.summary import Metric
from plot_align.workers import CommandWorker, deal, gpus, report_failures, share_out

KIND = "sweep-run"
COMMANDS = ("dpo", "sft", "pro")  # the training commands of plot-align
_FLAGS = {"steps": "max_steps", "batch_size": "per_device_train_batch_size"}  # ours → TRL's
_SANDBOX_ONLY = ("per_category", "flipped", "heldout")
Progress = Callable[[int, float], None]  # index of the job, share of it that is done


class Workload(Protocol):
    """How a job is run, and what it ends with."""

    def record(self, job: Job) -> Path:
        """Where its record lies once it is finished."""

    def run(self, jobs: Sequence[Job], on_progress: Progress, workers: int | None) -> None:
        """Runs those that have no record yet; raises RunError at the end where some failed."""

    def metrics(self, job: Job) -> dict[str, float]:
        """The numbers in its record."""

    def main_metrics(self, names: Sequence[str]) -> tuple[list[Metric], list[Metric]]:
        """Of the ``names`` that were measured: what is drawn, and what stands in the table beside it."""


class Sandbox:
    """The offline world: an arm, judged on held-out prompts.

    Args:
        output: folder of the sweep.
        base: checkpoint folder of the base model; only its name is needed before something is run.
    """

    MAIN = (
        Metric("mean_score", "mean of the seven sub-preferences (share of good answers)", True),
        Metric("over_refusal", "over-refusal (share of benign requests refused)", False),
        Metric("nll_good", "NLL of good answers (nats per token)", False),
        Metric("chosen_logp", "log-probability of chosen answers (nats per answer)", True),
        Metric("distance", "distance to the preference distribution", False),
    )
    BESIDE = (
        *(Metric(category, category, True) for category in CATEGORIES),
        Metric("twin_help", "benign requests helped", True),
        Metric("fluent", "fluent answers", True),
        Metric("distinct_2", "distinct-2", True),
        Metric("preference_accuracy", "preference accuracy", True),
    )

    def __init__(self, output: Path, base: Path) -> None:
        self.folder = output / "records"
        self.base = base

    def record(self, job: Job) -> Path:
        return sandbox_run(job).path(self.folder, self.base)

    def run(self, jobs: Sequence[Job], on_progress: Progress, workers: int | None) -> None:
        runs = [sandbox_run(job) for job in jobs]
        done = [0.0] * len(runs)

        def report(index: int, steps: int) -> None:
            # The last report comes twice: after the last step, and after the judging.
            total = runs[index].setting.steps
            judged = steps >= total and done[index] >= total / (total + JUDGING)
            done[index] = 1.0 if judged else steps / (total + JUDGING)
            on_progress(index, done[index])

        run_many(runs, self.base, self.folder, report, workers=workers)

    def metrics(self, job: Job) -> dict[str, float]:
        return sandbox_metrics(read_record(self.record(job))["results"])

    def main_metrics(self, names: Sequence[str]) -> tuple[list[Metric], list[Metric]]:
        return [m for m in self.MAIN if m.key in names], [m for m in self.BESIDE if m.key in names]


def sandbox_metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a sandbox run's record: every score, their mean as ``mean_score``, and whatever is a measure."""
    scores = {name: float(entry["value"]) for name, entry in results["scores"].items()}
    others = {n: float(e["value"]) for n, e in results.items() if isinstance(e, dict) and "value" in e}
    return {"mean_score": statistics.fmean(scores.values()), **scores, **others}


def sandbox_run(job: Job) -> Run:
    """The sandbox's run of a job.

    The arm's name tells only what differs from the defaults: an option that a later grid spells out must not change
    the name, and with it the record's.

    Raises:
        InputError: a setting outside its range.
    """
    options = dict(job.cell.setting)
    losses = tuple(options.pop("loss_type", "sigmoid").split("+")) if job.cell.method == "dpo" else ()
    setting = Setting(**options)
    plot = None if job.cell.plot is None else PlotConfig.from_options(**dict(job.cell.plot))
    name = "+".join([job.cell.method, *losses])
    if plot is not None:
        plain = PlotConfig().to_dict()
        moved = [f"{n} {value_text(v)}" for n, v in plot.to_dict().items() if n == "alpha" or v != plain[n]]
        name += f"+plot {' '.join(moved)}"
    return Run(Arm(name, losses, plot, job.cell.method), setting, job.seed)


class Training:
    """The user's own training: ``plot-align METHOD --config FILE`` for every job, in a process of its own.

    Args:
        output: folder of the sweep; each run has a folder under ``runs``, with its log.
        config: the YAML file.
        content: what is in it.
    """

    # Evaluation first; without one, the last training log. The term is part of TRL's losses, so these leave it out.
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
        return self.output / "records" / f"{self._name(job)}.json"

    def run(self, jobs: Sequence[Job], on_progress: Progress, workers: int | None) -> None:
        waiting = [index for index, job in enumerate(jobs) if not self.record(job).exists()]
        for index in set(range(len(jobs))) - set(waiting):
            on_progress(index, 1.0)
        devices = gpus()
        count = workers if workers is not None else len(devices) or 1
        if devices and len(devices) > count and len(devices) % count:
            raise InputError(
                f"workers is {count} and {len(devices)} GPUs are visible, so some runs would have more GPUs and with "
                f"them a larger batch than others; expected a number that divides {len(devices)}, or more than that"
            )
        pool = [CommandWorker(device) for device in deal(devices, count)]

        def work(worker: CommandWorker, index: int) -> None:
            self._train(worker, jobs[index])
            on_progress(index, 1.0)

        failures = share_out(waiting, pool, work)
        report_failures({waiting[at]: e for at, e in failures.items()}, [str(job) for job in jobs], self.output)

    def metrics(self, job: Job) -> dict[str, float]:
        return training_metrics(read_record(self.record(job), KIND)["results"])

    def main_metrics(self, names: Sequence[str]) -> tuple[list[Metric], list[Metric]]:
        found = [metric for metric in self.MAIN if metric.key in names]
        evaluated = [metric for metric in found if metric.key.startswith("eval_")]
        return (evaluated, [m for m in found if m not in evaluated]) if evaluated else (found, [])

    def command(self, job: Job) -> list[str]:
        """What runs a job."""
        flags: list[str] = []
        vanilla = (("alpha", 0.0), ("alpha_schedule", "constant"))  # whatever schedule the file asks for
        for name, value in [*job.cell.setting, *(job.cell.plot or vanilla)]:
            if value is None:  # the option's default, which no flag can say; check() refused a file that sets it
                continue
            values = value.split("+") if name == "loss_type" else [_flag_text(value)]
            flags += [f"--{_FLAGS.get(name, name)}", *values]
        command = [sys.executable, "-m", "plot_align.cli", job.cell.method, "--config", str(self.config), *flags]
        return [*command, "--seed", str(job.seed), "--output_dir", str(self._folder(job))]

    def plot_options(self) -> dict[str, Any]:
        """The options of the term that the file sets.

        Raises:
            InputError: one of another type.
        """
        known = {name: key for name, key in keys().items() if key.group == "plot"}
        return {name: coerce(known[name], value) for name, value in self.content.items() if name in known}

    def check(self, jobs: Sequence[Job]) -> None:
        """Refuses what only the sandbox has.

        Raises:
            InputError: a method without a command, or a key of the sandbox's data.
        """
        for method in dict.fromkeys(job.cell.method for job in jobs):
            if method not in COMMANDS:
                raise InputError(
                    f"method is {method!r}, and --train runs {', '.join(COMMANDS)}; choose among these, or leave "
                    "--train out for the sandbox"
                )
        for name, value in (option for job in jobs for option in job.cell.plot or ()):
            if value is None and self.content.get(name) is not None:
                raise InputError(
                    f"{name} is none in the grid, and {self.config} sets it to {self.content[name]!r}, which no flag "
                    "can take back; drop it from one of the two"
                )
        for name, _ in (option for job in jobs for option in job.cell.setting):
            if name in _SANDBOX_ONLY:
                raise InputError(f"{name} is the sandbox's, and --train names {self.config}; drop one of the two")

    def _train(self, worker: CommandWorker, job: Job) -> None:
        folder = self._folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        written = folder / "plot_align_record.json"
        written.unlink(missing_ok=True)  # of a run that was interrupted after it
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
            "train": json.loads(json.dumps(self.content, default=str)),  # YAML knows dates
            "method": job.cell.method,
            "setting": dict(job.cell.setting),
            "plot": None if job.cell.plot is None else {n: _flag_text(v) for n, v in job.cell.plot},
            "seed": job.seed,
            "files": {name: _content(value) for name, value in sorted(self.content.items()) if _is_local(value)},
            "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
            "source": source_digest(),
        }


def training_metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in the record of ``plot-align dpo`` and its kin: the last log, the whole run's, the evaluation's."""
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


def _is_local(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and Path(value).exists()


def _content(path: str) -> str:
    """What tells one content of a file or a folder from another: its bytes, or its files' sizes and times."""
    if Path(path).is_file():
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    files = [(str(f.relative_to(path)), f.stat()) for f in sorted(Path(path).rglob("*")) if f.is_file()]
    listed = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]


def _flag_text(value: Any) -> str:
    """A value as the training command's parser reads it, without loss."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _slug(cell: Cell) -> str:
    options = [*cell.setting, *(cell.plot or (("without", "plot"),))]
    text = " ".join([cell.method, *(f"{name} {value_text(value)}" for name, value in options)])
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in text).split())[:120]
