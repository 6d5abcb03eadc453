"""The callback: numbers at each log, answers at each evaluation, one sentence for each line that is crossed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from plot_align.errors import InputError, RunError
from plot_align.inference.chat import require_template
from plot_align.io import json_or_none, write_json
from plot_align.monitor.answers import Answer, answered, default_requests, metrics_of, read_requests, to_loggers
from plot_align.monitor.forwards import Forwards
from plot_align.monitor.lines import REMEDIES, Fall, Lines, require_names
from plot_align.trl.metrics import store

_KEY = "plot_align.monitor"  # key in the trainer's state; no callback has this name, so the Trainer ignores it
FILE = "monitor_answers.json"


class PreferenceMonitor(TrainerCallback):
    """Watches a DPO, KTO, CPO, ORPO or PRO training, with or without the PLOT term, and says when it goes wrong.

        trainer = DPOTrainer(model=…, args=…, train_dataset=…)
        trainer.add_callback(PreferenceMonitor(trainer, stop_on=["chosen_fall"]))

    Each log carries ``monitor/chosen`` and ``monitor/rejected`` (nats that the answers have gained against the
    reference), the same per token (``monitor/chosen_per_token``, ``monitor/rejected_per_token``),
    ``monitor/chosen_fell`` (share of the chosen answers that are less likely than under the reference),
    ``monitor/entropy`` (nats) and ``monitor/end_of_sequence`` (mean probability) at completion positions. Before
    training, at every evaluation and after the last step, greedy answers to a few requests yield
    ``monitor/refuses_benign``, ``monitor/refuses_harmful``, ``monitor/answer_tokens`` and ``monitor/repetition``; the
    texts go into the logger's table and into ``monitor_answers.json`` in the output folder.
    What a trainer does not have (CPO, ORPO and PRO no reference, Liger's losses no log-probabilities) is absent.

    Loss, gradients and weights are the same to the bit without the monitor.

    Args:
        trainer: the trainer that it is added to.
        chosen_fall: line of the chosen answers' fall (:class:`plot_align.monitor.lines.Lines`), judged over the latest
            32 of them or four logs. Each line warns once; a resumed run repeats only
            what stops it.
        rejected_fall: line of the rejected answers' fall, likewise.
        benign_refusals: line of refused benign requests; they also have to exceed what they were before training.
        repetition: line of repetition; as for refusals.
        stop_on: names of lines that end the training.
        requests: a file of requests (``{"prompt": "…", "kind": "benign"}`` or ``"harmful"``, one a line), or XSTest's
            CSV; ``None`` takes 12 of our own of either kind.
        max_new_tokens: of an answer; 0 asks nothing.

    Raises:
        InputError: a trainer without preferred and rejected answers, a line or a name that is none, or a request that
            cannot be read.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        chosen_fall: float | None = Lines.chosen_fall,
        rejected_fall: float | None = Lines.rejected_fall,
        benign_refusals: float | None = Lines.benign_refusals,
        repetition: float | None = Lines.repetition,
        stop_on: Sequence[str] = (),
        requests: str | os.PathLike[str] | None = None,
        max_new_tokens: int = 48,
    ) -> None:
        self.trainer = trainer
        self.lines = Lines(chosen_fall, rejected_fall, benign_refusals, repetition)
        self.stop_on = require_names(stop_on)
        if max_new_tokens < 0:
            raise InputError(f"max_new_tokens is {max_new_tokens}, expected 0 or more; 0 asks the model nothing")
        self.max_new_tokens = max_new_tokens
        self.requests = default_requests() if requests is None else read_requests(Path(requests))
        self.crossed: dict[str, int] = {}  # line → step at which it was
        self.answers: list[Answer] = []
        self._before: dict[str, float] = {}  # the answers' metrics before training
        self._forwards = Forwards(trainer)
        self._falls = _falls()
        self._runs = self._asks = self._is_blind = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins to watch; asks the model what it answers before training."""
        resumes = state.global_step > 0
        saved = (state.stateful_callbacks or {}).get(_KEY) if resumes else None
        self.crossed, self._before = saved or ({}, {})
        self.answers = self._earlier_answers(state.global_step) if resumes else []
        self._falls = _falls()
        self._forwards.install()
        self._runs = True
        reason = self._why_no_answers() if self.max_new_tokens else None
        self._asks = self.max_new_tokens > 0 and reason is None
        if reason is not None:
            self._say(f"the monitor asks the model nothing: {reason}.")
        if not resumes:
            self._ask(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds the numbers to the log that follows."""
        if control.should_log:
            self._measure(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The same where logging goes by epochs. At the end of the last one asks the model, so that the trainer's
        summary stays the last log; a log that is due comes first, then :meth:`on_train_end` asks."""
        if control.should_log:
            self._measure(state, control)
        elif self._runs and (control.should_training_stop or state.global_step >= state.max_steps):
            self._ask(state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks the model again."""
        if self._runs:
            self._ask(state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks the model for the last time, if that was not done."""
        self._forwards.remove()
        self._ask(state)
        self._runs = False

    def _measure(self, state: Any, control: Any) -> None:
        sums = self._forwards.take()
        metrics = sums.metrics()
        if metrics:
            store(self.trainer, metrics, "train")
        if self._forwards.blind is not None and not self._is_blind:
            self._is_blind = True
            self._say(f"the monitor sees no log-probabilities: {self._forwards.blind}.")
        for fall in self._falls:
            lost = fall.add(sums)
            if lost is not None:
                what = f"the {fall.side} answers have lost {lost:.2f} nats a token against the reference"
                self._judge(f"{fall.side}_fall", lost, state, control, what)

    def _judge(self, line: str, value: float, state: Any, control: Any, what: str) -> None:
        limit = getattr(self.lines, line)
        stops = line in self.stop_on and control is not None  # also in a resumed run that has warned before
        if limit is None or value <= limit or (line in self.crossed and not stops):  # NaN lies beyond any line
            return
        self.crossed.setdefault(line, state.global_step)
        self._keep(state)
        end = ", so training stops" if stops else ""
        self._say(f"step {state.global_step}: {what} (line: {limit:g}){end}; {REMEDIES[line]}.")
        if stops:
            control.should_training_stop = True

    def _say(self, sentence: str) -> None:
        if self.trainer.is_world_process_zero():
            warnings.warn(sentence, UserWarning, stacklevel=2)

    def _why_no_answers(self) -> str | None:
        accelerator = self.trainer.accelerator
        kind = str(accelerator.distributed_type.value)
        plugin = getattr(accelerator.state, "deepspeed_plugin", None)
        if kind == "DEEPSPEED" and plugin is not None and plugin.zero_stage == 3:
            return "ZeRO-3 has split its weights; use ZeRO-2, DDP or FSDP 2 to see answers"
        if kind == "FSDP" and not accelerator.is_fsdp2:
            return "FSDP version 1 has split its weights; use fsdp_version: 2 to see answers"
        try:
            require_template(self._tokenizer())
        except InputError as error:
            return str(error)
        return None

    def _tokenizer(self) -> Any:
        processing = self.trainer.processing_class
        return getattr(processing, "tokenizer", processing)

    def _ask(self, state: Any, control: Any = None) -> None:
        step = state.global_step
        if not self._asks or (self.answers and self.answers[-1].step == step):
            return
        # Every rank answers all of them: so few cost no more than a share, and FSDP's ranks have to go together.
        try:
            found = answered(self.trainer.model, self._tokenizer(), self.requests, step, self.max_new_tokens)
        except RunError as error:  # NaN on every rank; whether training goes on is not for a monitor to say
            self._asks = False
            self._say(f"the monitor asks the model nothing more: {error}.")
            return
        self.answers += found
        metrics = self._of_main(metrics_of(found))
        if step == 0:
            self._before = metrics
        self._keep(state)
        self.trainer.log(dict(metrics))
        if self.trainer.is_world_process_zero():
            to_loggers(self.trainer, self.answers)
            write_json(self._file(), [asdict(answer) for answer in self.answers])
        for line, name, what in (
            ("benign_refusals", "monitor/refuses_benign", "of benign requests are refused"),
            ("repetition", "monitor/repetition", "of an answer's 4-grams repeat earlier ones"),
        ):
            value, before = metrics.get(name, 0.0), self._before.get(name)  # None: that part of the run had no monitor
            if before is None or value > before:
                then = "" if before is None else f", {before:.0%} before training"
                self._judge(line, value, state, control, f"{value:.0%} {what}{then}")

    def _of_main(self, metrics: dict[str, float]) -> dict[str, float]:
        """The main process's, so that all ranks decide alike."""
        if self.trainer.accelerator.num_processes == 1:
            return metrics
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([metrics])[0]

    def _file(self) -> Path:
        return Path(self.trainer.args.output_dir) / FILE

    def _earlier_answers(self, step: int) -> list[Answer]:
        rows = json_or_none(self._file())
        try:
            found = [Answer(**row) for row in rows or []]
        except TypeError:  # not what we wrote
            return []
        return [answer for answer in found if answer.step <= step]

    def _keep(self, state: Any) -> None:
        """Puts into the state, which every checkpoint saves, what a resumed run has to know."""
        state.stateful_callbacks = {**(state.stateful_callbacks or {}), _KEY: [self.crossed, self._before]}


def _falls() -> tuple[Fall, Fall]:
    return Fall("chosen"), Fall("rejected")
