"""Attach the PLOT term to a TRL trainer that is already built, and detach it again."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from plot_align.config import PlotConfig
from plot_align.errors import InputError, RunError
from plot_align.head import causal_lm, head_spec
from plot_align.head.reward import reward_scale
from plot_align.preference.batch import Batch
from plot_align.preference.distribution import PreferenceDistribution
from plot_align.transport import Sinkhorn
from plot_align.trl import artifacts
from plot_align.trl.alpha import AlphaSchedule
from plot_align.trl.backends import HeadBackend, make_backend
from plot_align.trl.batches import LOGITS_TRAINERS, policy_batch, trainer_kind
from plot_align.trl.checks import check, resolve_auto
from plot_align.trl.gradients import gradient_norms
from plot_align.trl.metrics import store
from plot_align.trl.reference import gathered, reference_distribution, reference_model
from plot_align.trl.term import HeadResult, PlotTerm


def attach(
    trainer: Any,
    preference: PreferenceDistribution | str | os.PathLike[str] | None = None,
    config: PlotConfig | None = None,
    *,
    reference: Tensor | None = None,
) -> PlotHandle:
    """Adds ``α·L_PLOT`` to the loss of a TRL trainer; call it after building the trainer and before ``train()``.

        trainer = DPOTrainer(model=…, args=…, train_dataset=…)
        handle = attach(trainer, "preference.safetensors", PlotConfig(alpha=0.1))
        trainer.train()

    Args:
        trainer: a DPO, SFT, KTO, GRPO, RLOO, CPO or ORPO trainer of TRL, a PRO trainer, or a subclass of one.
        preference: token counts of what people prefer and reject, or the file of one. ``None`` counts them in the
            trainer's own training set, which must hold both sides (DPO, KTO, CPO, ORPO, PRO).
        config: the options; ``None`` takes the defaults.
        reference: ``(V,)`` the reference model's mean output distribution, for ``target="anchored"``; ``None``
            estimates it from the first ``reference_rows`` rows of the training set.

    Returns:
        A handle; ``handle.detach()`` restores the trainer.

    Raises:
        InputError: an unsupported trainer or TRL version, a preference of another tokenizer, no target (d = 0).

    Warns:
        UserWarning: a DPO trainer whose ``aot`` loss would sort micro-batches of one pair, which is plain DPO.
    """
    config = config or PlotConfig()
    kind = trainer_kind(trainer)
    if getattr(trainer, "_plot_handle", None) is not None:
        raise InputError("trainer has a PLOT term already; detach() that handle before attaching another.")
    config = resolve_auto(config, trainer, kind, reference)
    check(trainer, kind, config, reference)
    model = causal_lm(trainer.model)
    rows = _head_rows(model)
    if config.target == "anchored" and not (config.needs_reference or config.is_reward) and reference is None:
        reference = reference_distribution(trainer, kind, config.ablations.reference_rows, config.positions)
    embeddings = _embeddings(causal_lm(reference_model(trainer)), trainer.accelerator)
    if embeddings.size(0) != rows:  # the policy was resized, and its reference was not
        embeddings = _embeddings(model, trainer.accelerator)
    if config.ablations.divergence == "deft_log":
        spec = head_spec(model)  # refuses, before training, a model that caps its logits
        reward_scale(logit_scale=spec.logit_scale, temperature=spec.temperature, softcap=spec.softcap)
    term = PlotTerm(
        estimate_from(trainer) if preference is None else preference,
        embeddings,
        config,
        tokenizer=_tokenizer(trainer),
        reference=reference,
        rows=rows,
    )
    return PlotHandle(trainer, kind, term, make_backend(trainer, kind, term))


class PlotHandle:
    """The PLOT term on one trainer: its options, its preference distribution, and ``detach()``.

    While attached, every logging step carries ``plot/vanilla_loss``, ``plot/loss``, ``plot/alpha``,
    ``plot/preferred_mass`` and ``plot/rejected_mass`` (the mass of the mean output distribution on tokens with d > 0
    and d < 0). ``plot/grad_ratio``, ‖∇α·L_PLOT‖ / ‖∇L_vanilla‖ at the head's input, is logged every
    ``grad_ratio_steps`` steps and whenever ``alpha_schedule="balance"`` measures it. With ``alpha=0`` nothing is
    computed or logged, and the trainer behaves as TRL's.
    """

    def __init__(self, trainer: Any, kind: str, term: PlotTerm, backend: HeadBackend) -> None:
        self.trainer = trainer
        self.config = term.config
        self.preference = term.preference
        self.term = term
        self._kind = kind
        self.alpha = AlphaSchedule(self.config)
        self._backend = backend
        trainer.add_callback(self.alpha)
        # Instance attributes shadow the class's methods; deleting them restores the methods.
        self._patched: dict[str, Callable[..., Any]] = {
            "_save": self._save,
            "create_model_card": self._create_model_card,
        }
        if hasattr(trainer, "get_batch_loss_metrics"):  # CPO, ORPO, and DPO before TRL 0.29
            self._patched["get_batch_loss_metrics"] = self._get_batch_loss_metrics
        else:
            self._patched["compute_loss"] = self._compute_loss
        self._originals = {name: getattr(trainer, name) for name in self._patched}
        self._shadowed = {name: vars(trainer)[name] for name in self._patched if name in vars(trainer)}
        for name, replacement in self._patched.items():
            setattr(trainer, name, replacement)
        trainer._plot_handle = self

    def detach(self) -> None:
        """Removes the term: the trainer computes its own loss again, to the bit. Detaching twice does nothing."""
        if getattr(self.trainer, "_plot_handle", None) is not self:
            return
        for name in self._patched:
            delattr(self.trainer, name)
            if name in self._shadowed:
                setattr(self.trainer, name, self._shadowed[name])
        self._backend.remove()
        self.trainer.remove_callback(self.alpha)
        self.trainer._plot_handle = None

    def _compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        original = functools.partial(
            self._originals["compute_loss"],
            model,
            inputs,
            return_outputs=return_outputs,
            num_items_in_batch=num_items_in_batch,
        )
        return self._with_term(original, inputs, num_items_in_batch)

    def _get_batch_loss_metrics(
        self, model: nn.Module, batch: dict[str, Any], train_eval: Literal["train", "eval"] = "train", **kwargs: Any
    ) -> Any:
        """Where a trainer has this method, it computes its loss here, both to train and to evaluate.

        ``kwargs``: what a subclass of TRL's trainer adds, as ms-swift's does.
        """
        method = self._originals["get_batch_loss_metrics"]
        original = functools.partial(method, model, batch, train_eval=train_eval, **kwargs)
        return self._with_term(original, batch)

    def _with_term(self, original: Callable[[], Any], inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """Calls ``original()`` and adds ``α·L_PLOT`` to the loss it returns, alone or first in a tuple."""
        if self.config.is_off:
            return original()
        batch = policy_batch(self._kind, inputs, self.trainer)
        with self._backend.capture(batch):
            returned = original()
        result = self._backend.take()
        if result is None and self._backend.other_shape is not None:
            raise RunError(
                f"the policy's forward saw other tokens, of shape {self._backend.other_shape}, than the batch, whose "
                f"labels have shape {tuple(batch.labels.shape)}; expected TRL's data collator and forward: take out "
                "what cuts or joins rows in between, or detach() the term."
            )
        if result is None:
            raise RunError(
                "the policy's forward never reached the LM head that PLOT watches, so this step would train without "
                "the term; something replaced the model's forward or the loss after attach() (Liger's fused loss, a "
                "custom compute_loss_func, label smoothing): turn it off, or detach() the term."
            )
        if self.config.needs_reference and result.reference is None:
            raise RunError(
                "the reference model's forward never reached the LM head that PLOT watches, so there is no target of "
                "target_scope='batch'; something replaced the reference's forward after attach(): use "
                "target_scope='dataset'."
            )
        vanilla = returned[0] if isinstance(returned, tuple) else returned
        with record_function("plot_align/loss"):
            loss = self.term.loss(result, batch).to(vanilla)
        # If the trainer already divides its loss by the accumulation steps, ours must be divided here.
        training = self.trainer.model.training
        if training:
            artifacts.tag(self.trainer.model)
        steps = self.trainer.current_gradient_accumulation_steps if training else 1
        divisor = steps if training and self._loss_is_scaled(num_items_in_batch) else 1
        with record_function("plot_align/measure"):
            norms = self._measure(vanilla * divisor, loss, result) if training else None
        state = self.trainer.state
        alpha = self.alpha.value(state.global_step, state.max_steps)
        # Evaluations are compared with each other, so their loss leaves out a term whose weight changes in between.
        weighs = training or self.config.schedule == "constant"
        total = vanilla + (alpha / divisor) * loss if weighs else vanilla
        with record_function("plot_align/log"):
            self._log(vanilla * divisor, loss, alpha, norms, result, batch)
        return (total, *returned[1:]) if isinstance(returned, tuple) else total

    def _measure(self, vanilla: Tensor, loss: Tensor, result: HeadResult) -> tuple[float, float] | None:
        """‖∇L_vanilla‖ and ‖∇L_PLOT‖ at the head's input over all ranks; ``None`` at steps that do not need them."""
        step = self.trainer.state.global_step
        balancing = self.alpha.wants_measurement(step)
        every = self.config.grad_ratio_steps
        if not balancing and (every == 0 or step % every != 0):
            return None
        norms = gradient_norms(vanilla, loss, result, offset=step)  # (2,)
        if self.trainer.accelerator.num_processes > 1:
            # Every rank must use the same α. The ranks' rows form one batch, so their squared norms add up. A rank's
            # loss is a mean over its own rows only, so its gradients are too large by the number of ranks.
            ranks = self.trainer.accelerator.num_processes
            norms = self.trainer.accelerator.reduce(norms.square(), "sum").sqrt() / ranks
        of_vanilla, of_plot = norms.tolist()
        if balancing:
            self.alpha.observe(step, of_vanilla, of_plot)
        return of_vanilla, of_plot

    def _loss_is_scaled(self, num_items_in_batch: Any) -> bool:
        """Whether ``compute_loss`` divides by the accumulation steps: the rule of ``Trainer.training_step``, to which
        transformers 5.19 added what a trainer declares."""
        declared = getattr(self.trainer, "loss_is_scaled_for_ga", None)
        if declared is not None:
            return bool(declared)
        by_items = self.trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(by_items or self.trainer.compute_loss_func is not None)

    def _log(
        self,
        vanilla: Tensor,
        loss: Tensor,
        alpha: float,
        norms: tuple[float, float] | None,
        result: HeadResult,
        batch: Batch,
    ) -> None:
        trainer = self.trainer
        masses = self.term.masses(result).to(vanilla)  # (2,)
        values = torch.stack([vanilla.detach(), loss.detach(), *masses])  # (4,)
        logits_are_finite = torch.isfinite(result.head.log_probs.detach()).all()
        *local, finite = torch.cat([values, logits_are_finite.to(values).unsqueeze(0)]).tolist()
        if not finite or not math.isfinite(local[1]):
            self._explain_non_finite(result, batch)
        if trainer.accelerator.num_processes > 1:
            gathered = trainer.accelerator.gather(values.unsqueeze(0))  # (ranks, 4)
            local = gathered.nanmean(0).tolist()  # a rank with nothing selected has no masses
        names = ["vanilla_loss", "loss", "preferred_mass", "rejected_mass"]
        metrics = {"plot/alpha": alpha}
        for name, value in zip(names, local, strict=True):
            if name == "vanilla_loss" or math.isfinite(value):  # masses of an empty selection are NaN
                metrics[f"plot/{name}"] = value
        if isinstance(self.term.divergence, Sinkhorn):
            metrics["plot/sinkhorn_error"] = self.term.divergence.last_error
        if norms is not None and norms[0] > 0:
            metrics["plot/grad_ratio"] = alpha * norms[1] / norms[0]
        store(trainer, metrics, "train" if trainer.model.training else "eval")

    def _explain_non_finite(self, result: HeadResult, batch: Batch) -> None:
        step = self.trainer.state.global_step
        rank = self.trainer.accelerator.process_index
        where = f"step {step}" if self.trainer.accelerator.num_processes == 1 else f"step {step} on rank {rank}"
        bad = ~torch.isfinite(result.head.log_probs.detach())
        if bad.any():
            row = int(result.rows[bad.nonzero()[0, 0]]) // (batch.labels.size(1) - 1)
            raise RunError(
                f"the model's logits are NaN or infinite at {where}, {_name_row(row, self._kind, batch)} of the "
                "micro-batch; nothing of this step was applied: lower the learning rate, check that row of the data, "
                "or use a wider dtype."
            )
        if self.config.ablations.divergence == "kl":
            raise RunError(
                f"the PLOT loss is infinite at {where}: kl from the output distribution to a target that gives some "
                f"tokens no mass (target={self.config.target!r}); nothing of this step was applied: use divergence "
                "'w1', 'js' or 'tv', or a target with full support (softmax)."
            )
        if result.reference is not None and not torch.isfinite(result.reference).all():
            raise RunError(
                f"the reference model's logits are NaN or infinite at {where}, and the target with them; nothing of "
                "this step was applied: check the reference model's weights, or use a wider dtype."
            )
        pooled = self.config.pool and self.trainer.accelerator.num_processes > 1
        raise RunError(
            f"the PLOT loss is NaN or infinite at {where} though this rank's logits are finite; nothing of this step "
            "was applied: "
            + (
                "look at the other ranks' messages, whose output is pooled with this one's."
                if pooled
                else f"check target={self.config.target!r} and divergence={self.config.ablations.divergence!r}."
            )
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self._originals["_save"](output_dir, state_dict=state_dict)
        if not self.trainer.args.should_save:
            return
        folder = Path(output_dir or self.trainer.args.output_dir)
        artifacts.save(folder, self.config, self.preference, step=self.trainer.state.global_step)
        if folder == Path(self.trainer.args.output_dir):
            self.trainer.create_model_card()  # TRL writes one with a checkpoint only, perhaps of an earlier run

    def _create_model_card(self, *args: Any, **kwargs: Any) -> None:
        self._originals["create_model_card"](*args, **kwargs)
        if self.trainer.is_world_process_zero():
            artifacts.extend_model_card(
                Path(self.trainer.args.output_dir) / "README.md", self.config, self.preference, self._kind
            )


def _name_row(row: int, kind: str, batch: Batch) -> str:
    """Names a row by its place in the user's data: a batch of pairs stacks all chosen rows on all rejected ones."""
    if kind == "PROTrainer":
        best = (batch.roles > 0).nonzero().squeeze(-1)  # (P,) rows
        prompt = int((best <= row).sum()) - 1
        return f"completion {row - int(best[prompt])} (0 is the best) of prompt {prompt}"
    if kind not in ("DPOTrainer", *LOGITS_TRAINERS):
        return f"row {row}"
    pairs = batch.labels.size(0) // 2
    return f"the {'chosen' if row < pairs else 'rejected'} side of pair {row % pairs}"


def _tokenizer(trainer: Any) -> Any:
    processing = trainer.processing_class
    return getattr(processing, "tokenizer", processing)


def _head_rows(model: Any) -> int:
    weight = model.get_output_embeddings().weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def _embeddings(model: Any, accelerator: Any) -> Tensor:
    """``(V, H)`` input embeddings of a model before training, gathered if they are sharded."""
    from accelerate.utils import broadcast

    weight = model.get_input_embeddings().weight
    with gathered(weight):
        full = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        full = full.detach().clone()
    if accelerator.num_processes == 1:
        return full
    # With FSDP's RAM-efficient loading only the first rank has weights until training starts.
    full = torch.empty_like(full, device=accelerator.device) if full.is_meta else full.to(accelerator.device)
    return broadcast(full.contiguous(), from_process=0)


def estimate_from(trainer: Any) -> PreferenceDistribution:
    """Counts the tokens of the trainer's training set, tokenised and truncated as the trainer does it.

    Raises:
        InputError: the training set does not hold both sides.
    """
    kind, tokenizer = trainer_kind(trainer), _tokenizer(trainer)
    if kind not in ("DPOTrainer", "KTOTrainer", "PROTrainer", *LOGITS_TRAINERS):
        raise InputError(
            f"preference is missing and the training set of a {kind} holds no preferred and rejected completions to "
            "count; pass one: preference=plot_align.estimate(pairs, tokenizer), or the file it was saved to."
        )
    from plot_align.preference.estimation import estimate_tokenized

    return estimate_tokenized(
        trainer.train_dataset,
        tokenizer,
        max_length=getattr(trainer if hasattr(trainer, "max_length") else trainer.args, "max_length", None),
        # Rows of labels were truncated when they were tokenised, at either end.
        truncation_mode=getattr(trainer.args, "truncation_mode", "keep_start")
        if kind not in LOGITS_TRAINERS
        else "keep_start",
        progress=not trainer.args.disable_tqdm,
        distributed=trainer.accelerator.num_processes > 1,
    )
