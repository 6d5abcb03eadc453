"""A trainer for Preference Ranking Optimization (PRO): ranked lists of completions, one forward per batch.

It follows :class:`trl.DPOTrainer`: the same tokens, EOS, chat template and truncation, the fused LM head instead of
logits, and the same metrics where they make sense. PRO needs no reference model.
"""

from __future__ import annotations

import math
import textwrap
from collections import defaultdict
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback, set_seed

from plot_align.errors import InputError

try:
    from trl.trainer.base_config import _BaseConfig
    from trl.trainer.base_trainer import _BaseTrainer
    from trl.trainer.utils import (
        add_fused_lm_head,
        create_model_from_path,
        disable_dropout_in_model,
        get_config_model_id,
    )
except ImportError as error:
    if error.name == "trl":  # it is not installed at all
        raise
    raise InputError(
        f"trl {version('trl')} is installed, and PRO trains through the fused head of trl 1.15 or newer; expected "
        "that: upgrade TRL, or train with DPO."
    ) from error

from plot_align.methods.pro_loss import pro_loss
from plot_align.methods.ranked import OUTPUT_COLUMNS, DataCollatorForRanking, prepare
from plot_align.preference.estimation import TRUNCATION_MODES
from plot_align.trl.batches import best_of_each_list
from plot_align.trl.trainers import Attached


@dataclass
class PROConfig(_BaseConfig):
    """Options of :class:`PROTrainer`: those below, and all of :class:`transformers.TrainingArguments`.

    Defaults that differ from ``TrainingArguments``: those of every TRL trainer (``logging_steps`` 10, ``bf16`` and
    ``gradient_checkpointing`` on), and ``learning_rate`` 5e-6 and ``num_train_epochs`` 2, as in the paper's runs on
    HH-RLHF.

    Raises:
        InputError: an option outside its range; the message names it.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*_BaseConfig._VALID_DICT_FIELDS, "model_init_kwargs"]

    learning_rate: float = field(default=5e-6, metadata={"help": "The initial learning rate for AdamW."})
    num_train_epochs: float = field(default=2.0, metadata={"help": "Total number of training epochs to perform."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of `from_pretrained`, if the model is given by its name."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether to run Python code that comes with a model or tokenizer."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Whether to disable dropout in the model."})
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Number of processes that tokenise the data set."}
    )
    max_length: int | None = field(
        default=1024,
        metadata={"help": "Longest sequence of prompt and completion in tokens; longer ones are truncated."},
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata={
            "help": "Which end of a sequence longer than `max_length` is kept. With `keep_start`, rows whose prompt "
            "alone is that long are dropped.",
            "choices": list(TRUNCATION_MODES),
        },
    )
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Pad the sequences of a batch to a multiple of this many tokens."}
    )
    sft_weight: float = field(
        default=0.05,
        metadata={
            "help": "Weight w of the best completion's negative log-likelihood: the loss adds w·(n−1)²·NLL for a list "
            "of n completions."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.sft_weight) and self.sft_weight >= 0):
            raise InputError(f"sft_weight is {self.sft_weight!r}; expected a finite number, 0 or more.")
        if self.truncation_mode not in TRUNCATION_MODES:
            raise InputError(
                f"truncation_mode is {self.truncation_mode!r}; expected one of {', '.join(TRUNCATION_MODES)}."
            )
        if self.max_length is not None and self.max_length < 1:
            raise InputError(f"max_length is {self.max_length!r}; expected a number of tokens, or None for no limit.")


class PROTrainer(_BaseTrainer):
    """Trainer for Preference Ranking Optimization (Song et al., AAAI 2024, arXiv 2306.17492); see
    :func:`plot_align.pro_loss` for the loss.

    Rows of the data sets are text or messages, with optional ``tools`` and ``chat_template_kwargs`` for the chat
    template, in one of these formats:

    - ``prompt``, ``completions`` (a list of two or more, the number may differ between rows) and ``rewards`` (as many
      numbers, in any order);
    - ``prompt`` and ``completions`` without rewards, from best to worst: the rewards are then n − 1, …, 0;
    - pairs: ``chosen`` and ``rejected``, with ``prompt`` or with the prompt implicit in both, with the rewards
      ``score_chosen`` and ``score_rejected`` if these columns exist, and 1 and 0 otherwise.

    Logged metrics, besides the loss: ``loss/ranking`` and ``loss/sft`` (their sum is the loss), ``rank_accuracy`` (the
    fraction of pairs with different rewards whose better completion has the larger log-probability per token),
    ``logps/best`` (mean log-probability of the best completion), ``entropy``, ``mean_token_accuracy`` (of the best
    completions), ``num_tokens``.

    Args:
        model: name or folder of a causal language model, or the model itself, or a PEFT model.
        args: options; ``None`` takes the defaults and names the output folder after the model.
        data_collator: ``None`` takes :class:`DataCollatorForRanking`.
        train_dataset: ``datasets.Dataset``, or an ``IterableDataset`` with ``max_steps`` in ``args``.
        eval_dataset: one data set, or several by name.
        processing_class: the tokenizer; ``None`` loads the model's own. Without a pad token it pads with EOS.
        callbacks: more callbacks for the training loop.
        optimizers: optimizer and scheduler, instead of those that ``args`` describe.
        quantization_config: quantisation of a model given by its name.
        peft_config: adapters to train instead of the model's own weights.

    Raises:
        InputError: an argument that does not fit, or a row that cannot be ranked, named by its index: fewer than two
            completions, another number of rewards, a reward that is NaN, rewards that are all equal.
    """

    loss_is_scaled_for_ga = False  # a mean over prompts: the Trainer divides by the accumulation steps

    _tag_names: ClassVar[list[str]] = ["trl", "pro"]
    _name = "PRO"
    _paper: ClassVar[dict[str, str]] = {
        "title": "Preference Ranking Optimization for Human Alignment",
        "id": "2306.17492",
        "citation": textwrap.dedent("""\
            @inproceedings{song2024preference,
                title     = {{Preference Ranking Optimization for Human Alignment}},
                author    = {Feifan Song and Bowen Yu and Minghao Li and Haiyang Yu and Fei Huang and Yongbin Li and Houfeng Wang},
                year      = 2024,
                booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
                volume    = 38,
                number    = 17,
                pages     = {18990--18998},
                doi       = {10.1609/aaai.v38i17.29865},
            }"""),  # noqa: E501
    }

    def __init__(
        self,
        model: Any,
        args: PROConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        if args is None:
            args = PROConfig(f"{name.split('/')[-1]}-PRO")
        _check_arguments(model, args, train_dataset, quantization_config, peft_config)
        if isinstance(train_dataset, datasets.IterableDataset):
            # Accelerate's dispatch would cut a batch along its first dimension, which lists of different length lack.
            args.accelerator_config.dispatch_batches = False

        # Before the model, so that a bad row is found before the model is loaded.
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(
                name, revision=_model_options(args).get("revision"), trust_remote_code=args.trust_remote_code
            )
        if not isinstance(processing_class, PreTrainedTokenizerBase):
            raise InputError(
                f"processing_class is a {type(processing_class).__name__}, expected a transformers tokenizer; of a "
                "processor, pass processor.tokenizer."
            )
        if processing_class.pad_token is None:
            processing_class.pad_token = processing_class.eos_token
        train_dataset = prepare(train_dataset, processing_class, args, "train")
        if isinstance(eval_dataset, dict):
            eval_dataset = {key: prepare(data, processing_class, args, key) for key, data in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = prepare(eval_dataset, processing_class, args, "eval")

        model = _build_model(model, args, quantization_config, peft_config)
        model.config.get_text_config().pad_token_id = processing_class.pad_token_id
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.pad_token_id = processing_class.pad_token_id
        if args.use_liger_kernel:
            # Liger's fused loss would replace the forward that the fused head patches.
            args.liger_kernel_config = {**(args.liger_kernel_config or {}), "fused_linear_cross_entropy": False}
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator
            or DataCollatorForRanking(
                pad_token_id=processing_class.pad_token_id,
                max_length=args.max_length,
                truncation_mode=args.truncation_mode,
                pad_to_multiple_of=args.pad_to_multiple_of,
            ),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.n_gpu > 1:
            raise InputError(
                f"{args.n_gpu} GPUs are visible to one process, which the Trainer would use through nn.DataParallel, "
                "and the fused head cannot; start with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one."
            )
        base = self.model.get_base_model() if is_peft_model(self.model) else self.model
        add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
        # Mixtures of experts: the load-balancing loss, with the architecture's own coefficient, as in TRL's trainers.
        text_config = self.model.config.get_text_config()
        routes = hasattr(text_config, "output_router_logits")
        self._router_coefficient = float(getattr(text_config, "router_aux_loss_coef", 0.0)) if routes else 0.0
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._total_train_tokens = 0.0
        self.model.add_model_tags(self._tag_names)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(OUTPUT_COLUMNS)

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids, completion = inputs["input_ids"], inputs["completion_mask"]  # (S, T)
        outputs = model(
            input_ids=ids,
            attention_mask=inputs["attention_mask"],
            use_cache=False,
            labels=ids.masked_fill(completion == 0, -100),
            fused_lm_head=True,
            **({"output_router_logits": True} if self._router_coefficient else {}),
        )
        scored = completion[:, 1:].bool()  # (S, T-1)
        # Prompt-learning PEFT prepends virtual tokens to the outputs; the last positions are the real ones.
        log_probs = outputs.log_probs[:, -scored.size(1) :].masked_fill(~scored, 0)  # (S, T-1)
        rewards, list_lengths = inputs["rewards"], inputs["list_lengths"]  # (P, n), (P,)
        ranks = torch.arange(rewards.size(1), device=rewards.device)  # (n,)
        present = ranks < list_lengths.unsqueeze(1)  # (P, n)

        def by_prompt(values: Tensor) -> Tensor:
            return values.new_zeros(present.shape).masked_scatter(present, values)  # (S,) → (P, n)

        logps, lengths = by_prompt(log_probs.sum(1)), by_prompt(scored.sum(1))  # (P, n)
        result = pro_loss(logps, lengths, rewards, present, sft_weight=self.args.sft_weight)

        with torch.no_grad():
            is_best = best_of_each_list(list_lengths, ids.size(0)).unsqueeze(1) & scored  # (S, T-1)
            scores = logps / lengths.clamp(min=1)  # (P, n)
            ordered = rewards.unsqueeze(2) > rewards.unsqueeze(1)  # (P, n, n): the first is the better one
            ordered &= present.unsqueeze(2) & present.unsqueeze(1)
            right = ordered & (scores.unsqueeze(2) > scores.unsqueeze(1))
            entropy = outputs.entropy[:, -scored.size(1) :].masked_fill(~scored, 0)
            correct = outputs.is_top1[:, -scored.size(1) :].bool() & is_best
            self._log_batch(
                prompts=list_lengths.new_tensor(list_lengths.numel()),
                ranking=result.ranking.sum(),
                sft=result.sft.sum(),
                best=logps[:, 0].sum(),
                ordered=ordered.sum(),
                right=right.sum(),
                scored=scored.sum(),
                entropy=entropy.sum(),
                scored_best=is_best.sum(),
                correct=correct.sum(),
                tokens=inputs["attention_mask"].sum(),
            )
        loss = result.loss
        if self._router_coefficient:
            loss = loss + self._router_coefficient * outputs.aux_loss
            mode = "train" if self.model.training else "eval"
            mean = self.accelerator.gather(outputs.aux_loss.detach()).mean()
            self._metrics[mode]["aux_loss"].append(mean.item())
        return (loss, outputs) if return_outputs else loss

    def _log_batch(self, **sums: Tensor) -> None:
        """Adds up sums of the batch over all ranks, in one transfer, and turns them into metrics."""
        local = torch.stack([value.float() for value in sums.values()])  # (11,)
        total = self.accelerator.gather(local.unsqueeze(0)).sum(0).tolist()
        found = dict(zip(sums, total, strict=True))
        training = self.model.training
        metrics = self._metrics["train" if training else "eval"]
        if training:
            self._total_train_tokens += found["tokens"]
        metrics["num_tokens"] = [self._total_train_tokens]
        for name, amount, number in (
            ("loss/ranking", "ranking", "prompts"),
            ("loss/sft", "sft", "prompts"),
            ("logps/best", "best", "prompts"),
            ("rank_accuracy", "right", "ordered"),
            ("entropy", "entropy", "scored"),
            ("mean_token_accuracy", "correct", "scored_best"),
        ):
            metrics[name].append(found[amount] / found[number] if found[number] else 0.0)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """Returns only the loss: there are no logits."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """``eval_dataset``: as in the constructor, or the name of one of its sets; ``None``: all of them."""
        if isinstance(eval_dataset, dict):
            eval_dataset = {
                key: prepare(data, self.processing_class, self.args, key) for key, data in eval_dataset.items()
            }
        elif eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = prepare(eval_dataset, self.processing_class, self.args, "eval")
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        prefix = "eval_" if mode == "eval" else ""
        for name, values in self._metrics[mode].items():
            logs[prefix + name] = sum(values) / len(values)
        self._metrics[mode].clear()
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        name = self.args.hub_model_id or self.args.output_dir
        self.create_model_card(model_name=Path(name).name)
        super()._save_checkpoint(model, trial)


# --- building -------------------------------------------------------------------------------------------------------


def _check_arguments(
    model: Any, args: PROConfig, train_dataset: Any, quantization_config: Any, peft_config: Any
) -> None:
    if not isinstance(train_dataset, datasets.Dataset | datasets.IterableDataset):
        raise InputError(
            f"train_dataset is a {type(train_dataset).__name__}, expected a datasets.Dataset or IterableDataset; open "
            "files with plot_align.load_pairs, and pass one split."
        )
    if not isinstance(model, str):
        if quantization_config is not None:
            raise InputError(
                "quantization_config came with a model that is loaded already; expected the model's name: pass that, "
                "or load the model quantised."
            )
        if args.model_init_kwargs is not None:
            raise InputError(
                "model_init_kwargs came with a model that is loaded already; expected the model's name: pass that, or "
                "leave them out."
            )
        if peft_config is not None and is_peft_model(model):
            raise InputError(
                "peft_config came with a model that has adapters already; expected one of the two: merge the "
                "adapters, or leave peft_config out."
            )


def _model_options(args: PROConfig) -> dict[str, Any]:
    """``model_init_kwargs`` as a mapping; ``TrainingArguments`` has already parsed JSON."""
    return args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}


def _build_model(model: Any, args: PROConfig, quantization_config: Any, peft_config: Any) -> Any:
    set_seed(args.seed)  # adapters start from random weights
    if isinstance(model, str):
        options = {"trust_remote_code": args.trust_remote_code, **_model_options(args)}
        if quantization_config is not None:
            options["quantization_config"] = quantization_config
        if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            options["device_map"] = None  # each process holds the whole model, or its shard of it
        model = create_model_from_path(model, **options)
    if peft_config is not None:
        from peft import get_peft_model

        model = get_peft_model(model, peft_config)
    if is_peft_model(model):
        from peft.tuners.tuners_utils import BaseTunerLayer

        if isinstance(model.get_output_embeddings(), BaseTunerLayer):
            raise InputError(
                "the adapters include the LM head, whose weight the fused head reads directly, so they would never be "
                "trained; expected other modules: leave lm_head out of target_modules."
            )
        if args.gradient_checkpointing:
            model.enable_input_require_grads()
    if args.disable_dropout:
        disable_dropout_in_model(model)
    return model


class PlotPROTrainer(Attached, PROTrainer):
    """:class:`PROTrainer` with ``α·L_PLOT`` added; the best completion of each list is the preferred one.

    Args:
        *args: those of :class:`PROTrainer`.
        **kwargs: likewise.
        preference: token preferences or the file of them; ``None`` counts them in ``train_dataset``.
        plot: options of the term; ``None`` takes the defaults.

    Raises:
        InputError: see :class:`PROTrainer` and :func:`plot_align.attach`.
    """
