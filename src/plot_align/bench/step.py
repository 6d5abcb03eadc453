"""Training steps of a TRL trainer to measure: with the term, without it, and with TRL unchanged."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from plot_align.bench.baseline import without_plot
from plot_align.config import PlotConfig
from plot_align.errors import InputError
from plot_align.preference.distribution import PreferenceDistribution, vocabulary_fingerprint
from plot_align.trl import attach
from plot_align.trl.alpha import AlphaSchedule


class StepProblem:
    """A trainer's step on one micro-batch of random tokens: forward, the reference's forward, backward; no optimiser.

    Without the optimiser the step is shorter than in training, so ratios are, if anything, too large. All tokens are
    completions, and half of the sequences are chosen. The reference model of DPO shares the policy's weights
    (:func:`sharing_weights`); with PEFT it is the policy without its adapters.

    Args:
        model, tokenizer: the policy, on its device.
        rows, length: number of sequences (even for DPO, half of them chosen), and tokens of each.
        method: ``"dpo"`` or ``"sft"``.
        checkpointing: gradient checkpointing.
        use_peft: LoRA on all linear layers but the head.
        bf16: bfloat16 autocast, as with the Trainer's ``--bf16``.

    Raises:
        InputError: an odd number of rows for DPO, or PEFT is not installed.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        rows: int,
        length: int,
        *,
        method: str = "dpo",
        checkpointing: bool = False,
        use_peft: bool = False,
        bf16: bool = False,
    ) -> None:
        if method == "dpo" and (rows < 2 or rows % 2):
            raise InputError(f"--rows is {rows}, expected an even number of sequences for dpo, half of them chosen")
        self.tokenizer = tokenizer
        self.folder = tempfile.TemporaryDirectory(prefix="plot-align-bench-")
        device = next(model.parameters()).device
        vocab = min(len(tokenizer), model.get_output_embeddings().weight.size(0))
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(2, vocab, (rows, length), generator=generator).tolist()
        peft = _lora() if use_peft else None
        options: dict[str, Any] = {
            "output_dir": self.folder.name,
            "report_to": "none",
            "disable_tqdm": True,
            "bf16": bf16,
            "use_cpu": device.type == "cpu",
            "max_length": length,
            "gradient_checkpointing": checkpointing,
        }
        with _quietly():
            self.trainer, examples = _trainer(method, model, tokenizer, tokens, options, peft)
        trainer = self.trainer
        if trainer.args.gradient_checkpointing:  # done in Trainer.train(), which is not called here
            name = "activation" if hasattr(trainer.model, "activation_checkpointing_enable") else "gradient"
            options = dict(getattr(trainer.args, f"{name}_checkpointing_kwargs") or {})
            enable = getattr(trainer.model, f"{name}_checkpointing_enable")
            enable(**{f"{name}_checkpointing_kwargs": options or None})
        trainer.current_gradient_accumulation_steps = 1
        trainer.create_optimizer()
        trainer.model.train()
        self.batch = trainer._prepare_inputs(trainer.data_collator(examples))
        self.device = device

    @contextlib.contextmanager
    def arm(self, name: str, config: PlotConfig | None = None) -> Iterator[Callable[[], None]]:
        """Yields the step of this arm; the trainer has the arm's head for the duration of the block.

        ``trl``: TRL unchanged. ``off``: without the term, on our kernel. ``on``: with the term of ``config``, a step
        that measures no gradient norms. ``measured``: a step that measures them, one in five by default.
        """
        head: contextlib.AbstractContextManager[None]
        match name:
            case "trl":
                head = contextlib.nullcontext()
            case "off":
                head = without_plot(self.trainer, config)
            case "on" | "measured":
                every = 1 if name == "measured" else 0
                head = self._attached((config or PlotConfig()).replace(grad_ratio_steps=every))
            case _:
                raise ValueError(name)
        with head, self._prepared():
            yield self.step

    @contextlib.contextmanager
    def _prepared(self) -> Iterator[None]:
        """Prepares the model with accelerate (autocast's wrapper), as training does after :func:`attach`."""
        trainer, model = self.trainer, self.trainer.model
        before = dict(vars(model))
        trainer.model_wrapped = trainer.accelerator.prepare(model)
        try:
            yield
        finally:
            trainer.accelerator._models.clear()
            for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
                vars(model).pop(name, None)
                if name in before:
                    setattr(model, name, before[name])

    @contextlib.contextmanager
    def _attached(self, config: PlotConfig) -> Iterator[None]:
        size = len(self.tokenizer)
        described = {"fingerprint": vocabulary_fingerprint(self.tokenizer), "size": size}
        handle = attach(self.trainer, random_preference(size, described), config)
        try:
            handle.alpha.observe(0, 1.0, 1.0)  # so that α is known
            yield
        finally:
            handle.detach()

    def step(self) -> None:
        """Forward and backward of the micro-batch."""
        self.trainer.model.zero_grad()
        self.trainer.training_step(self.trainer.model_wrapped, dict(self.batch), None)


def _trainer(
    method: str, model: Any, tokenizer: Any, tokens: list[list[int]], options: dict[str, Any], peft: Any
) -> tuple[Any, list[dict[str, Any]]]:
    """The trainer, and ``tokens`` as rows for its collator."""
    from datasets import Dataset

    rows = len(tokens)
    match method:
        case "dpo":
            from trl import DPOConfig, DPOTrainer

            half = rows // 2
            trainer = DPOTrainer(
                model,
                ref_model=None if peft is not None else sharing_weights(model),
                args=DPOConfig(per_device_train_batch_size=half, **options),
                train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * half),
                processing_class=tokenizer,
                peft_config=peft,
            )
            pairs = zip(tokens[:half], tokens[half:], strict=True)
            suffix = "input_ids" if "prompt_input_ids" in trainer.train_dataset.column_names else "ids"  # TRL < 0.29
            return trainer, [
                # A prompt of one token, as an empty list would be a float tensor in TRL before 0.29.
                {f"prompt_{suffix}": chosen[:1], f"chosen_{suffix}": chosen[1:], f"rejected_{suffix}": rejected[1:]}
                for chosen, rejected in pairs
            ]
        case "sft":
            from trl import SFTConfig, SFTTrainer

            trainer = SFTTrainer(
                model,
                args=SFTConfig(per_device_train_batch_size=rows, **options),
                train_dataset=Dataset.from_list([{"text": "a b"}] * rows),
                processing_class=tokenizer,
                peft_config=peft,
            )
            return trainer, [{"input_ids": ids} for ids in tokens]
    raise ValueError(method)


def sharing_weights(model: nn.Module) -> nn.Module:
    """A second, frozen model on the same weights: a reference that needs no further memory.

    A reference with its own weights would add the same memory to every arm and bring the memory ratios closer to 1.
    """
    memo: dict[int, Any] = {
        id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in model.parameters()
    }
    return copy.deepcopy(model, memo)


def random_preference(size: int, tokenizer: dict[str, Any] | None = None) -> PreferenceDistribution:
    """Made-up token counts in which every token occurs, and half of them are preferred."""
    counts = torch.arange(1, size + 1)
    return PreferenceDistribution(
        counts, counts.flip(0), {"tokenizer": tokenizer or {"fingerprint": "", "size": size}}
    )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Hides the progress bars of ``datasets``."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()


def measured_share(config: PlotConfig, steps: int = 1000) -> float:
    """The fraction of steps that measure gradient norms, to balance α or to log them, after the first ``steps``."""
    schedule = AlphaSchedule(config)
    schedule.observe(0, 1.0, 1.0)
    every = config.grad_ratio_steps
    later = range(steps, 2 * steps)
    return sum(schedule.wants_measurement(step) or (every > 0 and step % every == 0) for step in later) / steps


def _lora() -> Any:
    try:
        from peft import LoraConfig
    except ModuleNotFoundError:
        raise InputError("--use_peft needs PEFT, which is not installed; pip install 'plot-align[peft]'") from None
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
