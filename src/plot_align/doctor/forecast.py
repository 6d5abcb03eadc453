"""What a first training step does to the log-probability of chosen answers, to first order.

    Δ log p(y⁺) ≈ η·⟨∇ log p(y⁺), u⟩                     u = −g                 plain gradient descent
                                                         u = −g / (|g| + ε)     Adam's first step

g = ∇L of a batch of pairs at the model as it is, which is also the reference. At its first step Adam has seen one
gradient, so its averages m̂ = g and v̂ = g² leave the sign of every coordinate: lengths of gradients cancel, and a
learning rate means the same for every loss. TRL trains with AdamW, so that step is forecast unless SGD is asked for.

u is the mean over several batches, each a first step of its own with its own weight α of the PLOT term, and y⁺ are
chosen answers of other pairs: what is asked is what the step does to answers that it was not made from, as in a
training log of an epoch that sees every pair once. The forecast is of one step at the full learning rate. Steps that
follow add to it while the gradients stay alike; over such distances first order is a sign and an order of magnitude.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plot_align.errors import InputError, RunError
from plot_align.head import causal_lm, fused_head, head_spec
from plot_align.inference.ches import Pair, pair_batches, stacked
from plot_align.inference.scoring import collate, last_hidden_states
from plot_align.plot import BalancedAlpha, PlotLoss
from plot_align.preference.batch import Batch
from plot_align.preference.estimation import ScoredSequence

LOSSES = ("DPO", "DPO+SFT", "DPO+PLOT")
OPTIMIZERS = ("adamw", "sgd")
EPSILON = 1e-8  # AdamW's, in torch and transformers


@dataclass(frozen=True)
class Step:
    """The step that is forecast: TRL's defaults.

    Args:
        beta: of DPO. learning_rate: what the step is taken with, after any warm-up.
        optimizer: ``"adamw"`` or ``"sgd"``.
        pairs: of a batch. batches: over how many the step is averaged.
        answers: chosen answers of other pairs whose change is forecast.

    Raises:
        InputError: another optimizer, or a number below one.
    """

    beta: float = 0.1
    learning_rate: float = 1e-6
    optimizer: str = "adamw"
    pairs: int = 8
    batches: int = 4
    answers: int = 16

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise InputError(f"optimizer is {self.optimizer!r}, expected {' or '.join(OPTIMIZERS)}")
        for name in ("pairs", "batches", "answers"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected 1 or more")

    def split(self, pairs: Sequence[Pair], seed: int) -> tuple[list[list[Pair]], list[ScoredSequence]]:
        """A random sample: the batches of pairs that step, and the chosen answers of others.

        Of fewer pairs than that, at most half are stepped on; a single pair is both.
        """
        scored = [i for batch in pair_batches(pairs, 1) for i in batch]
        order = random.Random(seed).sample(sorted(scored), len(scored))
        used = min(self.pairs * self.batches, max(1, len(order) // 2))
        others = order[used:] or order
        batches = [[pairs[i] for i in order[at : min(at + self.pairs, used)]] for at in range(0, used, self.pairs)]
        return batches if scored else [], [pairs[i][0] for i in others[: self.answers]]


def forecast(
    model: Any, pairs: Sequence[Pair], plot: PlotLoss | None, step: Step | None = None, *, seed: int = 0
) -> dict[str, list[float]]:
    """Forecast change of the log-probability, in nats of a whole answer, by loss and answer.

    The losses are DPO, DPO with TRL's SFT term (``loss_type: [sigmoid, sft]``) and DPO with the PLOT term. Memory does
    not grow with the number of pairs: beside the model one batch, one gradient, and three vectors in float32 of the
    size of the parameters that train.

    Args:
        model: a causal language model, or a PEFT wrapper of one; the parameters that require a gradient train. It is
            put into evaluation mode (no dropout), and restored.
        pairs: those without a scored token on both sides are left out.
        plot: the term, made of the model's own embeddings; ``None``: not forecast.
        step: ``None``: TRL's defaults.
        seed: of the sample.

    Returns:
        One value per answer of the sample for each loss; no value if no pair is scored.

    Raises:
        InputError: no parameter requires a gradient.
        RunError: the device is out of memory, or a forecast is not finite.
    """
    step = step or Step()
    batches, answers = step.split(pairs, seed)
    training = model.training
    model.eval()
    try:
        return effects(model, answers, directions(model, batches, plot, step), step.learning_rate)
    except torch.OutOfMemoryError:
        raise RunError(
            f"the device is out of memory at the gradients of {step.pairs} pairs; use fewer pairs a step, a smaller "
            "max_length, a narrower dtype or a PEFT adapter"
        ) from None
    finally:
        model.train(training)


def directions(
    model: Any, batches: Sequence[Sequence[Pair]], plot: PlotLoss | None, step: Step
) -> dict[str, list[Tensor]]:
    """u by loss: the mean step over the batches, one float32 tensor for each parameter that trains."""
    trained = _trained(model)
    names = LOSSES if plot is not None else LOSSES[:2]
    found = {name: [torch.zeros_like(p, dtype=torch.float32) for p in trained] for name in names}
    for batch in batches:
        with torch.enable_grad():
            losses = first_losses(model, batch, plot, step.beta)
            for name in names:
                gradients = torch.autograd.grad(
                    losses[name], trained, retain_graph=name != names[-1], allow_unused=True
                )
                for total, gradient in zip(found[name], gradients, strict=True):
                    if gradient is not None:
                        total.sub_(_moved(gradient.float(), step.optimizer), alpha=1 / len(batches))
                del gradients
    return found


def _moved(gradient: Tensor, optimizer: str) -> Tensor:
    return gradient / (gradient.abs() + EPSILON) if optimizer == "adamw" else gradient


def effects(
    model: Any, answers: Sequence[ScoredSequence], steps: dict[str, list[Tensor]], learning_rate: float
) -> dict[str, list[float]]:
    """``η·⟨∇ log p(y), u⟩`` of every answer, one backward pass each, by loss."""
    trained = _trained(model)
    found: dict[str, list[float]] = {name: [] for name in steps}
    for answer in answers:
        with torch.enable_grad():
            gradients = torch.autograd.grad(_log_p(model, answer), trained, allow_unused=True)
        for name, step in steps.items():
            products = [
                (gradient.float() * u).sum(dtype=torch.float64 if u.device.type != "mps" else None)
                for gradient, u in zip(gradients, step, strict=True)
                if gradient is not None
            ]
            found[name].append(learning_rate * sum(map(float, products)))
    for name, values in found.items():
        if not bool(torch.isfinite(torch.tensor(values)).all()):
            raise RunError(
                f"the forecast for {name} is not finite, expected numbers; the model overflows in its dtype: use "
                "bfloat16 or float32, or check its weights"
            )
    return found


def first_losses(model: Any, batch: Sequence[Pair], plot: PlotLoss | None, beta: float) -> dict[str, Tensor]:
    """The losses of the first step on a batch, with their graph: the reference is the model itself.

    DPO       −mean log σ(β·[(log p⁺ − log p⁺_ref) − (log p⁻ − log p⁻_ref)])
    DPO+SFT   DPO − the mean log-probability of all chosen tokens of the batch
    DPO+PLOT  DPO + α·W1(p̄, P),  P ∝ max(p̄_ref + λ·d, 0),  α balanced on this batch
    """
    base, sequences = causal_lm(model), stacked(batch)
    head = base.get_output_embeddings()
    hidden, targets, rows = last_hidden_states(base, sequences)  # (n, H), (n,), (n,)
    rows = rows.to(hidden.device)
    labels, places = _labelled(sequences)
    pooling = None if plot is None else plot.pooling(labels, places)
    how = {} if pooling is None else pooling.arguments(hidden.device)
    result = fused_head(hidden, head.weight, getattr(head, "bias", None), targets, head_spec(base), **how)
    logps = result.log_probs.new_zeros(len(sequences)).index_add(0, rows, result.log_probs)  # (2B,)
    chosen, rejected = (logps - logps.detach()).chunk(2)  # (B,) each, against the reference
    dpo = -F.logsigmoid(beta * (chosen - rejected)).mean()
    losses = {"DPO": dpo, "DPO+SFT": dpo - result.log_probs[rows < len(batch)].mean()}
    if plot is not None and pooling is not None and result.distributions is not None:
        output = result.distributions  # (1, V)
        target = plot.targets(labels, output, output.detach())
        term = plot.mean_divergence(output, pooling.counts, *target).to(dpo)
        losses["DPO+PLOT"] = dpo + BalancedAlpha(plot.config.ratio)(dpo, term, hidden) * term
    return losses


def _labelled(sequences: Sequence[ScoredSequence]) -> tuple[Batch, Tensor]:
    """The batch as a trainer has it, chosen sides first; and where its scored positions are in it, ``(n,)``."""
    (ids, _), rows, columns, _ = collate(sequences)
    labels = torch.full_like(ids, -100)  # (2B, T)
    labels[rows, columns + 1] = ids[rows, columns + 1]
    roles = torch.ones(len(sequences), dtype=torch.int8)  # (2B,)
    roles[len(sequences) // 2 :] = -1
    return Batch(labels, roles), rows * (ids.size(1) - 1) + columns


def _log_p(model: Any, answer: ScoredSequence) -> Tensor:
    """Log-probability of one answer, with its graph."""
    base = causal_lm(model)
    head = base.get_output_embeddings()
    hidden, targets, _ = last_hidden_states(base, [answer])
    return fused_head(hidden, head.weight, getattr(head, "bias", None), targets, head_spec(base)).log_probs.sum()


def _trained(model: Any) -> list[Tensor]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise InputError("no parameter of the model requires a gradient, expected those that training changes; set it")
    return trained
