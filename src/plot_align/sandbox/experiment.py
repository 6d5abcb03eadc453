"""One tuning run in the sandbox: train an arm, judge it on held-out prompts, and keep the record.

The same trainers, losses and files as for a real model. A run is identified by everything that decides its result;
its record is the memory of it, so that an interrupted experiment goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import signal
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import InputError
from ..records import read_record, write_record
from ..training import PlotConfig

KIND = "sandbox-run"


@dataclass(frozen=True)
class Setting:
    """What all arms of an experiment share.

    Args:
        steps: optimiser steps.
        learning_rate, beta, batch_size: as in TRL's ``DPOConfig``; pairs a step.
        per_category: training pairs of each sub-preference.
        flipped: share of the training pairs whose chosen and rejected are swapped (label noise).
        heldout: held-out prompts of each sub-preference.
        probe: the term by which the distance to the target is measured, in every arm alike.
    """

    steps: int = 60
    learning_rate: float = 3e-4
    beta: float = 0.1
    batch_size: int = 16
    per_category: int = 200
    flipped: float = 0.0
    heldout: int = 60
    probe: PlotConfig = field(default_factory=PlotConfig)


@dataclass(frozen=True)
class Arm:
    """A loss, with PLOT or without it. ``loss_type`` as in TRL's ``DPOConfig``; no loss type at all is the base."""

    name: str
    loss_type: tuple[str, ...] = ()
    plot: PlotConfig | None = None


def record_path(folder: Path, arm: Arm, setting: Setting, seed: int, base: Path) -> Path:
    """Where the record of a run lies; the name carries a hash of everything that decides the result.

    Among it the base, whose folder's name is a hash of the language and the libraries it was built with, and the
    judges' and evaluation's source.
    """
    key = json.dumps(_describe(arm, setting, base), sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:10]
    name = "".join(c if c.isalnum() else "-" for c in arm.name.lower()).strip("-")
    return folder / f"{name}-seed{seed}-{digest}.json"


def run_arm(
    arm: Arm,
    setting: Setting,
    seed: int,
    base: Path,
    folder: Path,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Trains and judges one arm, or reads the record of an earlier run of exactly the same.

    Args:
        arm: what to train; ``loss_type=()`` judges the base as it is.
        setting: steps, data and so on.
        seed: of the split, the pairs, their order and the training.
        base: checkpoint folder of the base model.
        folder: where records are kept.
        on_step: called with the number of finished optimiser steps.

    Returns:
        The record, see :mod:`plot_align.records`; its ``results`` are those of
        :func:`plot_align.sandbox.evaluate_model` plus ``distance``, the probe's distance of the held-out chosen
        positions' mean output to the target, and ``train_logs``.
    """
    path = record_path(folder, arm, setting, seed, base)
    if path.exists():
        return read_record(path, KIND)
    results = _train_and_judge(arm, setting, seed, base, on_step)
    write_record(path, KIND, results, config=_describe(arm, setting, base), seed=seed)
    return read_record(path, KIND)


def run_all(
    jobs: Sequence[tuple[Arm, int]],
    setting: Setting,
    base: Path,
    folder: Path,
    on_progress: Callable[[int, int], None] = lambda job, steps: None,
) -> list[dict[str, Any]]:
    """:func:`run_arm` for every ``(arm, seed)``, several at once in processes of their own.

    A model this small gains little from a second core, two runs side by side gain a core each. With a GPU the runs
    take turns. An interrupt stops the workers; what was finished is on disk.

    Args:
        jobs: what to run; the records come back in this order.
        setting, base, folder: as in :func:`run_arm`.
        on_progress: called with the job's index and its finished optimiser steps, and once more when it is done.
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, wait
    from queue import Empty

    import torch

    waiting = [i for i, (arm, seed) in enumerate(jobs) if not record_path(folder, arm, setting, seed, base).exists()]
    for i in set(range(len(jobs))) - set(waiting):
        on_progress(i, setting.steps)
    cores = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    workers = max(1, min(cores, len(waiting)))
    context = multiprocessing.get_context("spawn")  # forked workers would inherit the parent's OpenMP threads
    if waiting:
        with context.Manager() as manager:
            steps = manager.Queue()
            pool = ProcessPoolExecutor(workers, context, _prepare_worker, (max(1, cores // workers),))
            try:
                futures = [pool.submit(_run_job, i, *jobs[i], setting, base, folder, steps) for i in waiting]
                running = set(futures)
                while running:
                    _, running = wait(running, timeout=0.2)
                    with contextlib.suppress(Empty):
                        while True:
                            on_progress(*steps.get_nowait())
                for future in futures:
                    future.result()
            except BaseException:
                for process in list((pool._processes or {}).values()):
                    process.terminate()  # a worker in the middle of a run would finish it first
                raise
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    return [read_record(record_path(folder, arm, setting, seed, base), KIND) for arm, seed in jobs]


def _prepare_worker(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    # Ctrl-C reaches the whole process group; the parent answers for it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run_job(index: int, arm: Arm, seed: int, setting: Setting, base: Path, folder: Path, steps: Any) -> None:
    run_arm(arm, setting, seed, base, folder, on_step=lambda step: steps.put((index, step)))
    steps.put((index, setting.steps))


def training_pairs(setting: Setting, seed: int) -> Any:
    """The pairs that an arm trains on, label noise included; the noise is the same for every arm of a seed."""
    from . import pairs

    data = pairs("train", seed=seed, per_category=setting.per_category)
    if not setting.flipped:
        return data
    import numpy as np

    flipped = np.random.default_rng(seed).random(len(data)) < setting.flipped

    def swap(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {"chosen": row["rejected"], "rejected": row["chosen"]} if flipped[index] else {}

    return data.map(swap, with_indices=True)


def make_trainer(arm: Arm, setting: Setting, seed: int, base: Path, output: str) -> Any:
    """The TRL trainer of an arm on the sandbox's data, PLOT not attached yet."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from . import pairs

    return DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=DPOConfig(
            output_dir=output,
            loss_type=list(arm.loss_type or ("sigmoid",)),
            beta=setting.beta,
            max_steps=max(1, setting.steps),
            learning_rate=setting.learning_rate,
            per_device_train_batch_size=setting.batch_size,
            per_device_eval_batch_size=64,
            seed=seed,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            dataloader_pin_memory=False,
            logging_steps=10,
            disable_tqdm=True,
        ),
        train_dataset=training_pairs(setting, seed),
        eval_dataset=pairs("heldout", seed=seed, per_category=setting.heldout),
        processing_class=AutoTokenizer.from_pretrained(base),
    )


def _train_and_judge(
    arm: Arm, setting: Setting, seed: int, base: Path, on_step: Callable[[int], None] | None
) -> dict[str, Any]:
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    from ..training import attach
    from . import evaluate_model

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if on_step is not None:
                on_step(state.global_step)

    quiet()
    with tempfile.TemporaryDirectory() as output:
        trainer = make_trainer(arm, setting, seed, base, output)
        probe = Probe(trainer, setting.probe)
        if arm.plot is not None:
            attach(trainer, config=arm.plot)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Steps())
        if arm.loss_type:
            trainer.train()
        results = evaluate_model(
            trainer.model, trainer.processing_class, seed=seed, per_category=setting.heldout, twins=setting.heldout
        )
        results["distance"] = {"value": probe.distance(), "n": len(trainer.eval_dataset)}
        results["train_logs"] = [
            {name: value for name, value in record.items() if name in ("loss", "step") or "plot/" in name}
            for record in trainer.state.log_history
        ]
    return results


class Probe:
    """Distance of a trainer's model to a target that is fixed before training, on the held-out chosen positions."""

    def __init__(self, trainer: Any, config: PlotConfig) -> None:
        from ..training import attach

        self.trainer = trainer
        handle = attach(trainer, config=config)
        self.term = handle.term
        handle.detach()

    def distance(self) -> float:
        """D(p̄, P) with p̄ the mean output over the held-out chosen positions."""
        from ..training.marginal import collated, mean_output_distribution

        batches = collated(self.trainer, "DPOTrainer", dataset=self.trainer.eval_dataset)
        output = mean_output_distribution(self.trainer.model, batches, self.term.config.positions)
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
    if not 0 <= setting.flipped < 1:
        raise InputError(f"flipped is {setting.flipped}; expected a share of the pairs, 0 to less than 1.")
    described = {**asdict(setting), "probe": setting.probe.to_dict()}
    sources = [Path(__file__).with_name(name).read_bytes() for name in ("evaluate.py", "judges.py")]
    return {
        "base": base.name,
        "judges": hashlib.sha256(b"".join(sources)).hexdigest()[:16],
        "versions": {"plot_align": __version__, "trl": importlib.metadata.version("trl")},
        "arm": arm.name,
        "loss_type": list(arm.loss_type),
        "plot": None if arm.plot is None else arm.plot.to_dict(),
        "setting": described,
    }
