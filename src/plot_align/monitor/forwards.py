"""What a training step's own forwards say about its pairs: no forward is made for it, and no gradient changes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from plot_align.errors import InputError
from plot_align.head import causal_lm, head_spec, target_log_probs
from plot_align.head.block_torch import rows_per_slice
from plot_align.preference.batch import Batch
from plot_align.trl.backends import own_pass
from plot_align.trl.batches import is_earlier_kto, policy_batch, trainer_kind
from plot_align.trl.reference import reference_model

KINDS = ("DPOTrainer", "KTOTrainer", "CPOTrainer", "ORPOTrainer", "PROTrainer")
SAMPLED_EVERY = 10  # steps between two looks at logits, where logging does not go by steps
SAMPLED_PLACES = 128  # of logits, for the entropy and the mass on end-of-sequence


class Sums(NamedTuple):
    """Sums over the answers of some steps. A number that could not be had was never counted."""

    chosen: float  # nats against the reference, of chosen answers
    rejected: float
    chosen_answers: float
    rejected_answers: float
    fell: float  # chosen answers less likely than under the reference
    chosen_tokens: float
    rejected_tokens: float
    entropy: float  # nats, at completion positions
    entropy_tokens: float
    end: float  # probability of end-of-sequence, at completion positions
    end_tokens: float

    def metrics(self) -> dict[str, float]:
        """The numbers that the trainer logs."""
        found = {}
        for name, total, count in (
            ("chosen", self.chosen, self.chosen_answers),
            ("rejected", self.rejected, self.rejected_answers),
            ("chosen_per_token", self.chosen, self.chosen_tokens),
            ("rejected_per_token", self.rejected, self.rejected_tokens),
            ("chosen_fell", self.fell, self.chosen_answers),
            ("entropy", self.entropy, self.entropy_tokens),
            ("end_of_sequence", self.end, self.end_tokens),
        ):
            if count > 0:
                found[f"monitor/{name}"] = total / count
        return found


class Forwards:
    """Reads the policy's and the reference's forward inside ``training_step``, and adds up what they say.

    Where TRL's head builds no logits (1.15 and later), its log-probabilities and entropies are read at every
    micro-batch. Where it builds them, they are read at the last micro-batch before a log, as a pass over them at each
    would be felt; the entropy at 128 places of it. The mass on end-of-sequence is read at that micro-batch in either
    case.

    Args:
        trainer: of TRL, or ours.

    Raises:
        InputError: a trainer that is none of :data:`KINDS`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.kind = trainer_kind(trainer)
        if self.kind not in KINDS:
            raise InputError(
                f"trainer is a {type(trainer).__name__}, which is given no preferred and rejected answers to watch; "
                f"expected one of {', '.join(KINDS)} or a subclass: leave the monitor out."
            )
        self.blind: str | None = None  # why nothing can be read
        self._builds_logits = own_pass(self.kind) == "logits"
        self._sums: Tensor | None = None
        self._hooks: list[Any] = []
        self._forget()

    def install(self) -> None:
        """Hooks the models and ``training_step``; a second call changes nothing."""
        self.remove()
        model = self.trainer.model
        base = causal_lm(model)
        models = {id(x): x for x in (model, reference_model(self.trainer))}
        self._hooks = [x.register_forward_hook(self._after_model, with_kwargs=True) for x in models.values()]
        if not self._builds_logits:
            self._hooks.append(base.base_model.register_forward_hook(self._after_backbone))
        self._shadowed = vars(self.trainer).get("training_step")
        self._original = self.trainer.training_step
        self.trainer.training_step = self._training_step

    def remove(self) -> None:
        """Restores the trainer and its models."""
        for hook in self._hooks:
            hook.remove()
        if vars(self.trainer).get("training_step") == self._training_step:
            del self.trainer.training_step
            if self._shadowed is not None:
                self.trainer.training_step = self._shadowed
        self._hooks = []

    def take(self) -> Sums:
        """The sums since the last call, over all ranks: every rank has to call it."""
        accelerator = self.trainer.accelerator
        own, self._sums = self._sums, None
        if own is None:
            own = torch.zeros(len(Sums._fields), device=accelerator.device)
        return Sums(*accelerator.reduce(own, "sum").tolist())

    def _forget(self) -> None:
        self._inputs: Any = None
        self._ids: Tensor | None = None
        self._batch: Batch | None = None
        self._policy: Tensor | None = None  # (N,) log-probability of each answer
        self._reference: Tensor | None = None
        self._entropy: tuple[Tensor, Tensor] | None = None  # sum over completion positions, and how many
        self._end: tuple[Tensor, Tensor] | None = None  # likewise
        self._end_against_target: Tensor | None = None  # (M,) at completion positions
        self._policy_seen = self._reference_seen = False

    def _training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self._inputs = inputs
        try:
            loss = self._original(model, inputs, *args, **kwargs)
            self._add()
            return loss
        finally:
            self._forget()

    def _after_backbone(self, module: nn.Module, args: Any, output: Any) -> None:
        hidden = getattr(output, "last_hidden_state", None)
        if self._inputs is None or hidden is None or self._policy_seen or not torch.is_grad_enabled():
            return
        batch = self._read_batch() if self._is_due() else None
        if batch is not None:
            model = causal_lm(self.trainer.model)
            self._end_against_target = end_against_target(model, hidden, batch.labels, self._end_id())

    def _after_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self._inputs is None:
            return
        ids = args[0] if args else kwargs.get("input_ids")
        if torch.is_grad_enabled():
            if not self._policy_seen:  # what comes before it has no gradients: KTO's mismatched pairs
                self._policy_seen, self._ids = True, ids
                self._read(output, policy=True)
        elif self._policy_seen and not self._reference_seen and self._same(ids):
            self._reference_seen = True
            self._read(output, policy=False)

    def _same(self, ids: Tensor | None) -> bool:
        """Whether a forward is on the policy's tokens. Prompt-learning PEFT passes embeddings."""
        if ids is None or self._ids is None or ids is self._ids:
            return True
        return ids.shape == self._ids.shape and torch.equal(ids, self._ids)

    @torch.no_grad()
    def _read(self, output: Any, policy: bool) -> None:
        """Keeps what the forward says of the step's answers; nothing where it has neither log-probabilities nor
        logits, as with Liger's losses."""
        log_probs: Any = getattr(output, "log_probs", None)
        logits: Any = getattr(output, "logits", None)
        if log_probs is None and (logits is None or not self._is_due()):
            return
        batch = self._read_batch()
        if batch is None:
            return
        mask = batch.selected("all")  # (N, T-1)
        entropy = end = None
        if log_probs is not None:
            log_probs = _whole_rows(log_probs, mask)
            if policy and output.entropy is not None:
                entropy = _whole_rows(output.entropy, mask).sum(), mask.sum()
            if policy and self._end_against_target is not None:
                end = (self._end_against_target + log_probs[mask]).exp().sum(), mask.sum()
        else:
            places = _places(logits, mask)
            if places is None:
                return
            found = target_log_probs(logits, places, batch.labels[:, 1:][mask].to(logits.device))  # (M,)
            mask = mask.to(found.device)
            log_probs = found.new_zeros(mask.shape).masked_scatter(mask, found)
            if policy:
                some = spread(places, SAMPLED_PLACES)
                summed, mass = entropy_and_mass(logits, some, self._end_id())
                count = summed.new_tensor(len(some))
                entropy, end = (summed, count), None if mass is None else (mass, count)
        if policy:
            self._policy, self._entropy, self._end = log_probs.sum(1), entropy, end
        else:
            self._reference = log_probs.sum(1)

    def _read_batch(self) -> Batch | None:
        """The step's batch, where its rows are known."""
        trainer = self.trainer
        if self._batch is None:
            if self.kind == "KTOTrainer" and is_earlier_kto(type(trainer)):
                self.blind = "the batches of this TRL's KTOTrainer have another form; trl 1.8 or newer has them"
            elif getattr(trainer, "padding_free", False):
                self.blind = "padding_free packs all answers into one row; set it to False"
            else:
                try:
                    self._batch = policy_batch(self.kind, self._inputs, trainer)
                except InputError as error:  # a collator of someone's own must not end the training
                    self.blind = str(error)
        return self._batch

    def _is_due(self) -> bool:
        """Whether a log follows this micro-batch."""
        trainer = self.trainer
        if not trainer.accelerator.sync_gradients:
            return False
        args, step = trainer.args, trainer.state.global_step + 1  # the step that is being made
        every = trainer.state.logging_steps if args.logging_strategy == "steps" else SAMPLED_EVERY
        return step % max(every, 1) == 0 or (step == 1 and args.logging_first_step)

    def _end_id(self) -> int | None:
        processing = self.trainer.processing_class
        return getattr(processing, "tokenizer", processing).eos_token_id

    def _known_reference(self) -> Tensor | None:
        """``(N,)`` what the trainer computed before training, or what the step's forward said."""
        if self._reference is not None:
            return self._reference
        inputs, args = self._inputs, self.trainer.args
        losses = getattr(args, "loss_type", None) or []  # a name or a list of them
        # These are not sums over the whole answer: LD-DPO's are weighted, and those of IPO before TRL 0.29 are means.
        if getattr(args, "ld_alpha", None) is not None or ("ipo" in losses and "prompt_input_ids" in inputs):
            return None
        if "ref_chosen_logps" in inputs:
            return torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        return inputs.get("ref_logps")

    @torch.no_grad()
    def _add(self) -> None:
        if self._policy is None or self._batch is None:
            if self.blind is None and self._is_due():
                self.blind = "its forward yields neither log-probabilities nor logits, as with Liger's losses"
            return
        policy, reference = self._policy, self._known_reference()
        tokens = self._batch.selected("all").sum(1).to(policy.device)  # (N,)
        roles = self._batch.roles.to(policy.device)
        found: dict[str, Tensor] = {}
        if reference is not None:
            gained = policy - reference.to(policy)  # (N,)
            for side, own in (("chosen", (roles > 0) & (tokens > 0)), ("rejected", (roles < 0) & (tokens > 0))):
                found[side] = gained.masked_fill(~own, 0).sum()
                found[f"{side}_answers"] = own.sum()
                found[f"{side}_tokens"] = tokens.masked_fill(~own, 0).sum()
                if side == "chosen":
                    found["fell"] = (own & (gained < 0)).sum()
        if self._entropy is not None:
            found["entropy"], found["entropy_tokens"] = self._entropy
        if self._end is not None:
            found["end"], found["end_tokens"] = self._end
        zero = policy.new_zeros(())
        sums = torch.stack([found.get(name, zero).to(policy) for name in Sums._fields])  # (11,)
        self._sums = sums if self._sums is None else self._sums + sums


@torch.no_grad()
def end_against_target(model: Any, hidden: Tensor, labels: Tensor, end: int | None) -> Tensor | None:
    """``z_end − z_target`` at the M completion positions, from the head's rows of these tokens only: with the target's
    log-probability it gives that of ``end``, without another pass over the vocabulary.

    Args:
        model: the causal language model.
        hidden: ``(N, T', H)`` what its head reads; T' is T, and prompt-learning's virtual tokens before them.
        labels: ``(N, T)``, −100 outside the completions.
        end: token id.

    Returns:
        ``(M,)`` float32, or None where the head's weight is not at hand: sharded, quantised, with an adapter.
    """
    head = model.get_output_embeddings()
    if end is None or not isinstance(head, nn.Linear) or hasattr(head, "base_layer"):
        return None
    weight = head.weight
    if isinstance(weight, DTensor) or not weight.is_floating_point() or weight.numel() == 0:
        return None
    spec = head_spec(model)
    places = (labels[:, 1:] != -100).nonzero()  # (M, 2)
    hidden = hidden.detach()[:, -labels.size(1) :][:, :-1]  # (N, T-1, H)
    found = torch.empty(len(places), device=hidden.device)
    for start in range(0, len(places), 1024):
        row, column = places[start : start + 1024].unbind(1)
        states = hidden[row, column].float()  # (m, H)
        ids = torch.stack([torch.full_like(row, end), labels[row, column + 1]], 1)  # (m, 2)
        z = (weight[ids].float() @ states.unsqueeze(-1)).squeeze(-1)  # (m, 2)
        if head.bias is not None:
            z = z + head.bias[ids]
        z = z * spec.logit_scale
        if spec.softcap is not None:
            z = spec.softcap * torch.tanh(z / spec.softcap)
        found[start : start + 1024] = z[:, 0] - z[:, 1]
    return found


@torch.no_grad()
def entropy_and_mass(logits: Tensor, places: Tensor, token: int | None) -> tuple[Tensor, Tensor | None]:
    """The sums of the entropies in nats and of the probabilities of ``token`` over M positions, a slice at a time.

    Args:
        logits: ``(..., V)``.
        places: ``(M,)`` int64, indices into the flattened leading dimensions.
        token: its id; without it the entropies alone.
    """
    flat = logits.reshape(-1, logits.size(-1))
    entropy, mass = torch.zeros(2, device=logits.device)
    step = rows_per_slice(logits.device, logits.size(-1))
    for start in range(0, len(places), step):
        log_p = flat[places[start : start + step]].float().log_softmax(-1)  # (m, V)
        p = log_p.exp()
        entropy -= (p * log_p).sum()
        if token is not None:
            mass += p[:, token].sum()
    return entropy, None if token is None else mass


def spread(places: Tensor, most: int) -> Tensor:
    """At most ``most`` of them, evenly spaced."""
    return places[:: max(1, -(-len(places) // most))]


def _whole_rows(values: Tensor, mask: Tensor) -> Tensor:
    """``(N, T − 1)`` float32, 0 outside the mask: without the virtual tokens that prompt-learning PEFT puts before."""
    return values.detach()[:, -mask.size(1) :].float().masked_fill(~mask, 0)


def _places(logits: Tensor, mask: Tensor) -> Tensor | None:
    """``(M,)`` where the flattened ``(N, T', V)`` logits predict the tokens of ``mask (N, T − 1)``: both end at the
    same token. None where they are not the batch's rows, or begin too late."""
    row, column = mask.nonzero().unbind(1)
    column = column + logits.size(1) - mask.size(1) - 1
    if logits.size(0) != mask.size(0) or bool((column < 0).any()):
        return None
    return (row * logits.size(1) + column).to(logits.device)
