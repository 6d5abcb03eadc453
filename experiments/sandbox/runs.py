"""One tuning run in the sandbox: train an arm, judge it on held-out prompts, and keep the record.

The same trainers, losses and files as for a real model. A run is identified by everything that decides its result;
its record is the memory of it, so that an interrupted experiment goes on where it stopped.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from plot_align.config import PlotConfig
from plot_align.errors import InputError, RunError
from plot_align.records import measure, read_record, write_record
from plot_align.sweep import training
from sandbox.base import folder_complete_or_absent

KIND = "sandbox-run"
Method = Literal["dpo", "sft", "kto", "pro", "cpo", "simpo", "orpo"]
METHODS: tuple[str, ...] = get_args(Method)


@dataclass(frozen=True)
class Setting:
    """What all arms of an experiment share; an arm may have its own ``learning_rate`` and ``beta``.

    ``probe`` is the term by which the distance to the target is measured, in every arm alike.

    Raises:
        InputError: an option outside its range; the message names it.
    """

    steps: int = field(default=60, metadata={"help": "Optimiser steps."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Of AdamW, falling linearly to 0."})
    beta: float = field(default=0.1, metadata={"help": "As in TRL's DPOConfig and those of the other methods."})
    batch_size: int = field(default=16, metadata={"help": "Pairs a step."})
    per_category: int = field(default=200, metadata={"help": "Training pairs of each of the seven sub-preferences."})
    flipped: float = field(
        default=0.0, metadata={"help": "Share of the pairs whose chosen and rejected are swapped (label noise)."}
    )
    heldout: int = field(default=60, metadata={"help": "Held-out prompts of each sub-preference."})
    probe: PlotConfig = field(default_factory=PlotConfig.paper)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "per_category", "heldout"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "a number of 1 or more")
        for name in ("learning_rate", "beta"):
            _require(name, getattr(self, name), 0 < getattr(self, name) < float("inf"), "a positive number")
        _require("flipped", self.flipped, 0 <= self.flipped < 1, "a share of the pairs, 0 to less than 1")


@dataclass(frozen=True)
class Arm:
    """A loss, with PLOT or without it.

    Args:
        name: as it stands in tables.
        loss_type: of ``method="dpo"``, as in TRL's ``DPOConfig``; no loss type at all is the base as it is. The other
            methods have one loss.
        plot: options of the term; None: without it.
        method: which trainer.
        learning_rate, beta: over the setting's, where methods want different ones; None: the setting's.

    Raises:
        InputError: an unknown method, a loss type with a method other than DPO, a rate or beta that is not positive.
    """

    name: str
    loss_type: tuple[str, ...] = ()
    plot: PlotConfig | None = None
    method: str = "dpo"
    learning_rate: float | None = None
    beta: float | None = None

    def __post_init__(self) -> None:
        _require("method", self.method, self.method in METHODS, f"one of {', '.join(METHODS)}")
        if self.loss_type and self.method != "dpo":
            raise InputError(
                f"loss_type is {'+'.join(self.loss_type)!r} and method is {self.method!r}, which has one loss; "
                "leave loss_type out, or set method to 'dpo'."
            )
        for name in ("learning_rate", "beta"):
            value = getattr(self, name)
            _require(name, value, value is None or 0 < value < float("inf"), "a positive number, or None")

    @property
    def trains(self) -> bool:
        """False of the base as it is."""
        return self.method != "dpo" or bool(self.loss_type)


@dataclass(frozen=True)
class Run:
    """One arm under one setting; ``seed`` is that of the split, the pairs, their order and the training."""

    arm: Arm
    setting: Setting
    seed: int

    def path(self, folder: Path, base: Path) -> Path:
        """See :func:`record_path`."""
        return record_path(folder, self.arm, self.setting, self.seed, base)


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise InputError(f"{name} is {value!r}; expected {expected}.")


def record_path(folder: Path, arm: Arm, setting: Setting, seed: int, base: Path) -> Path:
    """Where the record of a run lies; the name carries a hash of everything that decides the result.

    Among it the base, whose folder's name is a hash of the language and the libraries it was built with, and the code
    (:func:`source_digest`).
    """
    key = json.dumps(_describe(arm, setting, base), sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:10]
    name = "".join(c if c.isalnum() else "-" for c in arm.name.lower()).strip("-")[:120]
    return folder / f"{name}-seed{seed}-{digest}.json"


@functools.cache
def source_digest() -> str:
    """A digest of plot_align's modules and of the sandbox's."""
    here = "".join(file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256((training.source_digest() + here).encode()).hexdigest()[:16]


def run_arm(
    arm: Arm,
    setting: Setting,
    seed: int,
    base: Path,
    folder: Path,
    *,
    keep_model: bool = False,
) -> dict[str, Any]:
    """Trains and judges one arm, or reads the record of an earlier run of exactly the same.

    Args:
        arm: what to train; one that does not train is the base, judged as it is.
        setting: steps, data and so on.
        seed: of the split, the pairs, their order and the training.
        base: checkpoint folder of the base model.
        folder: where records are kept.
        keep_model: also save the tuned checkpoint, in the folder named as the record without its ending.

    Returns:
        The record, see :mod:`plot_align.records`; its ``results`` are those of
        :func:`sandbox.evaluate_model` plus ``distance``, the probe's distance of the held-out chosen
        positions' mean output to the target, ``train_seconds`` and ``train_logs``.
    """
    path = record_path(folder, arm, setting, seed, base)
    checkpoint = path.with_suffix("") if keep_model else None
    if path.exists() and (checkpoint is None or checkpoint.is_dir()):
        return read_record(path, KIND)
    results = _train_and_judge(arm, setting, seed, base, checkpoint)
    write_record(path, KIND, results, config=_describe(arm, setting, base), seed=seed)
    return read_record(path, KIND)


def run_many(
    runs: Sequence[Run],
    base: Path,
    folder: Path,
    on_progress: Callable[[int, int], None] = lambda run, steps: None,
    *,
    workers: int | None = None,
    keep_models: bool = False,
) -> list[dict[str, Any]]:
    """:func:`run_arm` for every run, several at once in processes of their own.

    A model this small gains little from a second core, two runs side by side gain a core each. Each worker keeps to
    one thread, so that a result does not depend on how many runs were left.

    Args:
        runs: what to run; the records come back in this order.
        base, folder: as in :func:`run_arm`.
        on_progress: called with the run's index and its finished optimiser steps.
        workers: how many at once; None: one a core.
        keep_models: as ``keep_model`` of :func:`run_arm`.

    Raises:
        RunError: some runs failed, the first is named; the others are finished and on disk.
    """
    paths = [run.path(folder, base) for run in runs]
    waiting = [i for i, p in enumerate(paths) if not (p.exists() and (not keep_models or p.with_suffix("").is_dir()))]
    for i in set(range(len(runs))) - set(waiting):
        on_progress(i, runs[i].setting.steps)
    jobs = [(runs[i].arm, runs[i].setting, runs[i].seed, base, folder, keep_models) for i in waiting]
    names = [f"{runs[i].arm.name}, seed {runs[i].seed}" for i in waiting]
    in_processes(_run_job, jobs, names, workers, lambda at: on_progress(waiting[at], runs[waiting[at]].setting.steps))
    return [read_record(path, KIND) for path in paths]


def in_processes(
    function: Callable[..., None],
    jobs: Sequence[tuple[Any, ...]],
    names: Sequence[str],
    workers: int | None,
    on_finished: Callable[[int], None],
) -> None:
    """``function(*job)`` for every job, each process with one thread.

    Args:
        names: of the jobs, for the error.
        workers: how many at once; None: one a core.
        on_finished: called with the job's index.

    Raises:
        RunError: some jobs failed; the others are done.
    """
    # A forked process would inherit the parent's OpenMP threads.
    context = multiprocessing.get_context("spawn")
    failed: dict[int, BaseException] = {}
    with ProcessPoolExecutor(workers or os.cpu_count(), context, _prepare_process) as pool:
        futures = {pool.submit(function, *job): i for i, job in enumerate(jobs)}
        for future in as_completed(futures):
            error = future.exception()
            if error is None:
                on_finished(futures[future])
            else:
                failed[futures[future]] = error
    if failed:
        first = min(failed)
        raise RunError(f"{len(failed)} of {len(jobs)} runs failed; {names[first]}: {failed[first]}") from failed[first]


def _prepare_process() -> None:
    import torch

    torch.set_num_threads(1)
    quiet()


def _run_job(arm: Arm, setting: Setting, seed: int, base: Path, folder: Path, keep_model: bool) -> None:
    run_arm(arm, setting, seed, base, folder, keep_model=keep_model)


def run_metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a record: every score, their mean as ``mean_score``, and whatever is a measure."""
    scores = {name: float(entry["value"]) for name, entry in results["scores"].items()}
    others = {n: float(e["value"]) for n, e in results.items() if isinstance(e, dict) and "value" in e}
    return {"mean_score": statistics.fmean(scores.values()), **scores, **others}


def training_pairs(setting: Setting, seed: int) -> Any:
    """The pairs that an arm trains on, label noise included; the noise is the same for every arm of a seed."""
    from sandbox import pairs

    data = pairs("train", seed=seed, per_category=setting.per_category)
    if not setting.flipped:
        return data
    import numpy as np

    flipped = np.random.default_rng(seed).random(len(data)) < setting.flipped

    def swap(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {"chosen": row["rejected"], "rejected": row["chosen"]} if flipped[index] else {}

    return data.map(swap, with_indices=True)


def make_trainer(arm: Arm, setting: Setting, seed: int, base: Path, output: str) -> Any:
    """The TRL trainer of an arm on the sandbox's data, PLOT not attached yet.

    Every method sees the same pairs in batches of as many pairs: SFT their chosen side, KTO both as rows of their own.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sandbox import pairs

    beta = setting.beta if arm.beta is None else arm.beta
    shared: dict[str, Any] = {
        "output_dir": output,
        "max_steps": max(1, setting.steps),
        "learning_rate": setting.learning_rate if arm.learning_rate is None else arm.learning_rate,
        "per_device_train_batch_size": setting.batch_size,
        "per_device_eval_batch_size": 64,
        "seed": seed,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "logging_steps": 10,
        "disable_tqdm": True,
    }
    parts: dict[str, Any] = {
        "model": AutoModelForCausalLM.from_pretrained(base),
        "train_dataset": training_pairs(setting, seed),
        "eval_dataset": pairs("heldout", seed=seed, per_category=setting.heldout),
        "processing_class": AutoTokenizer.from_pretrained(base),
    }
    match arm.method:
        case "dpo":
            from trl import DPOConfig, DPOTrainer

            dpo = DPOConfig(**shared, beta=beta, loss_type=list(arm.loss_type or ("sigmoid",)))
            return DPOTrainer(args=dpo, **parts)
        case "sft":
            from trl import SFTConfig, SFTTrainer

            for name in ("train_dataset", "eval_dataset"):
                parts[name] = parts[name].rename_column("chosen", "completion").remove_columns("rejected")
            return SFTTrainer(args=SFTConfig(**shared), **parts)
        case "kto":
            from trl.data_utils import unpair_preference_dataset

            from trl import KTOConfig, KTOTrainer

            for name in ("train_dataset", "eval_dataset"):
                parts[name] = unpair_preference_dataset(parts[name])
            shared["per_device_train_batch_size"] *= 2
            return KTOTrainer(args=KTOConfig(**shared, beta=beta), **parts)
        case "pro":
            from plot_align.methods.pro import PROConfig, PROTrainer

            return PROTrainer(args=PROConfig(**shared, sft_weight=0.05), **parts)
        case "cpo":
            from trl.experimental.cpo import CPOConfig, CPOTrainer

            return CPOTrainer(args=CPOConfig(**shared, beta=beta), **parts)
        case "simpo":
            from trl.experimental.cpo import CPOConfig, CPOTrainer

            return CPOTrainer(args=CPOConfig(**shared, beta=beta, loss_type="simpo", cpo_alpha=0.0), **parts)
        case "orpo":
            from trl.experimental.orpo import ORPOConfig, ORPOTrainer

            return ORPOTrainer(args=ORPOConfig(**shared, beta=beta), **parts)
    raise InputError(f"method is {arm.method!r}; expected one of {', '.join(METHODS)}.")


def _train_and_judge(arm: Arm, setting: Setting, seed: int, base: Path, checkpoint: Path | None) -> dict[str, Any]:
    from transformers.trainer_callback import PrinterCallback

    from plot_align.preference.estimation import estimate
    from plot_align.trl import attach
    from sandbox import evaluate_model

    quiet()
    with tempfile.TemporaryDirectory() as output:
        # The probe's first: building a trainer seeds the generators that its training draws from.
        paired = None if arm.method == "dpo" else make_trainer(PAIRED, setting, seed, base, output)
        trainer = make_trainer(arm, setting, seed, base, output)
        # From the pairs and not from the trainer's data, which for SFT hold one side only.
        preference = estimate(training_pairs(setting, seed), trainer.processing_class, progress=False)
        probe = Probe(paired or trainer, setting.probe, preference)
        if arm.plot is not None:
            attach(trainer, preference, arm.plot)
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        if arm.trains:
            trainer.train()
        seconds = time.perf_counter() - started
        if checkpoint is not None:
            with folder_complete_or_absent(checkpoint) as temporary:
                trainer.model.save_pretrained(temporary)
                trainer.processing_class.save_pretrained(temporary)
        results = evaluate_model(
            trainer.model, trainer.processing_class, seed=seed, per_category=setting.heldout, twins=setting.heldout
        )
        results["distance"] = {"value": probe.distance(trainer.model), "n": len(probe.trainer.eval_dataset)}
        results["train_seconds"] = measure(seconds, 1, unit="s")
        results["train_logs"] = [
            {name: value for name, value in record.items() if name in ("loss", "step") or "plot/" in name}
            for record in trainer.state.log_history
        ]
    return results


PAIRED = Arm("pairs", ("sigmoid",))  # its trainer tokenises and collates pairs, for the probe of every method


class Probe:
    """Distance of a model to a target that is fixed before training, on the held-out chosen positions.

    Args:
        trainer: a DPO trainer on the pairs, whose collator and held-out rows are used whatever the method is.
        config: the term; its divergence is the distance.
        preference: what the target is made from; None: counted in the trainer's training set.
    """

    def __init__(self, trainer: Any, config: PlotConfig, preference: Any = None) -> None:
        from plot_align.trl import attach

        self.trainer = trainer
        handle = attach(trainer, preference, config)
        self.term = handle.term
        handle.detach()

    def distance(self, model: Any) -> float:
        """D(p̄, P) with p̄ the mean output of ``model`` over the held-out chosen positions."""
        from plot_align.trl.reference import collated, mean_output_distribution

        batches = collated(self.trainer, "DPOTrainer", dataset=self.trainer.eval_dataset)
        output = mean_output_distribution(model, batches, self.term.config.positions)
        return float(self.term.divergence.value(output))


def quiet() -> None:
    """Many short runs: the libraries' bars, notices and warnings would drown the experiment's own progress."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("trl").setLevel(logging.ERROR)


def _describe(arm: Arm, setting: Setting, base: Path) -> dict[str, Any]:
    described = {**asdict(setting), "probe": setting.probe.to_dict()}
    return {
        "base": base.name,
        "source": source_digest(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl")},
        "arm": arm.name,
        "method": arm.method,
        "loss_type": list(arm.loss_type),
        "learning_rate": arm.learning_rate,
        "beta": arm.beta,
        "plot": None if arm.plot is None else arm.plot.to_dict(),
        "setting": described,
    }
