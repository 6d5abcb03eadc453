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

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from plot_align.errors import InputError, RunError
from plot_align.head import HeadOutput, causal_lm, fused_head, head_spec
from plot_align.inference.ches import Pair, pair_batches
from plot_align.inference.scoring import collate, last_hidden_states
from plot_align.plot import BalancedAlpha, PlotLoss
from plot_align.preference.batch import Batch, Pooling
from plot_align.preference.estimation import ScoredSequence
from plot_align.transport.base import widest_dtype

LOSSES = ("DPO", "DPO+SFT", "DPO+PLOT")
OPTIMIZERS = ("adamw", "sgd")
EPSILON = 1e-8  # AdamW's, in torch and transformers
_TOGETHER = 2  # answers of like length in one forward pass
_PART = 1 << 18

Name = TypeVar("Name")


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
    model: Any,
    pairs: Sequence[Pair],
    plot: PlotLoss | None,
    step: Step | None = None,
    *,
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> dict[str, list[float]]:
    """Forecast change of the log-probability, in nats of a whole answer, by loss and answer.

    The losses are DPO, DPO with TRL's SFT term (``loss_type: [sigmoid, sft]``) and DPO with the PLOT term. Memory does
    not grow with the number of pairs: beside the model one batch, three gradients, and three vectors in float32
    of the size of the parameters that train.

    Args:
        model: a causal language model, or a PEFT wrapper of one; the parameters that require a gradient train. It is
            put into evaluation mode (no dropout), and restored.
        pairs: those without a scored token on both sides are left out.
        plot: the term, made of the model's own embeddings; ``None``: not forecast.
        step: ``None``: TRL's defaults.
        seed: of the sample.
        advance: called with each number of newly done pairs and answers.

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
        steps = directions(model, batches, plot, step, advance=advance)
        found = effects(model, answers, steps, step.learning_rate, advance=advance)
        return {loss: values for (_, loss), values in found.items()}
    except torch.OutOfMemoryError:
        raise RunError(
            f"the device is out of memory at the gradients of {step.pairs} pairs; use fewer pairs a step, a smaller "
            "max_length, a narrower dtype or a PEFT adapter"
        ) from None
    finally:
        model.train(training)


def directions(
    model: Any,
    batches: Sequence[Sequence[Pair]],
    plot: PlotLoss | None,
    step: Step,
    optimizers: Sequence[str] | None = None,
    *,
    advance: Callable[[int], None] = lambda done: None,
) -> dict[tuple[str, str], list[Tensor]]:
    """u by optimizer and loss: the mean step over the batches, one float32 tensor for each parameter that trains.

    ``optimizers``: of steps that differ in nothing else and share the gradients; ``None``: the step's own.
    ``advance``: called with the number of pairs of each batch that is done.
    """
    trained = _trained(model)
    optimizers = [step.optimizer] if optimizers is None else optimizers
    keys = [(optimizer, loss) for optimizer in optimizers for loss in (LOSSES if plot is not None else LOSSES[:2])]
    found = {key: [torch.zeros(p.shape, dtype=torch.float32, device=p.device) for p in trained] for key in keys}
    for batch in batches:
        for loss, gradients in first_gradients(model, batch, plot, step.beta):
            for optimizer in optimizers:
                for total, gradient in zip(found[optimizer, loss], gradients, strict=True):
                    for part, of_part in _parts(total, gradient):
                        part.sub_(_moved(of_part.float(), optimizer), alpha=1 / len(batches))
        advance(len(batch))
    return found


def _moved(gradient: Tensor, optimizer: str) -> Tensor:
    return gradient / (gradient.abs() + EPSILON) if optimizer == "adamw" else gradient


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same elements of each, few enough to stay in a processor's cache."""
    return zip(*(tensor.flatten().split(_PART) for tensor in tensors), strict=True)


def effects(
    model: Any,
    answers: Sequence[ScoredSequence],
    steps: Mapping[Name, list[Tensor]],
    learning_rate: float,
    *,
    advance: Callable[[int], None] = lambda done: None,
) -> dict[Name, list[float]]:
    """``η·⟨∇ log p(y), u⟩`` of every answer, by the name of u: one backward pass an answer for all of them.

    ``advance``: called after each answer, with 1.
    """
    trained = _trained(model)
    found: dict[Name, list[float]] = {name: [] for name in steps}
    for answer in answers:
        with torch.enable_grad():
            _, head = _forward(model, [answer])
        gradients = torch.autograd.grad(head.log_probs.sum(), trained, materialize_grads=True)
        for name, step in steps.items():
            products = [_inner(gradient, u) for gradient, u in zip(gradients, step, strict=True)]
            found[name].append(learning_rate * sum(products))
        advance(1)
    if not all(math.isfinite(value) for values in found.values() for value in values):
        raise RunError(
            "the forecast is not finite, expected numbers; the model overflows in its dtype: use bfloat16 or float32, "
            "or check its weights"
        )
    return found


def _inner(gradient: Tensor, u: Tensor) -> float:
    parts = [torch.dot(of_part.float(), part) for of_part, part in _parts(gradient, u)]
    return float(torch.stack(parts).sum(dtype=widest_dtype(u.device)))


def first_gradients(
    model: Any, batch: Sequence[Pair], plot: PlotLoss | None, beta: float
) -> Iterator[tuple[str, list[Tensor]]]:
    """Gradients of the losses of a first step on a batch of B pairs, by loss: the reference is the model itself.

    DPO       −mean log σ(β·[(log p⁺ − log p⁺_ref) − (log p⁻ − log p⁻_ref)])
    DPO+SFT   DPO − the mean log-probability of all chosen tokens of the batch
    DPO+PLOT  DPO + α·W1(p̄, P),  P ∝ max(p̄_ref + λ·d, 0),  α balanced on this batch

    Every margin is 0, where log σ has the slope ½. So with G⁺ and G⁻ the gradients of Σ log p⁺ and Σ log p⁻, DPO's is
    β/2B·(G⁻ − G⁺), and SFT's −G⁺/n of n chosen tokens. One forward pass and one backward pass of each side give both;
    PLOT's term takes a second backward pass.
    """
    trained = _trained(model)
    # The sides meet in sums alone, so each is in the order of its lengths: little of it is padding.
    sides = [sorted((pair[side] for pair in batch), key=lambda answer: len(answer.ids)) for side in (0, 1)]
    labels, places = _labelled([*sides[0], *sides[1]])
    pooling = None if plot is None else plot.pooling(labels, places)
    of_sides: list[Pooling | None] = [None, None]
    if pooling is not None:
        first = sum(answer.stop - answer.start for answer in sides[0])
        of_sides = [pooling.rows(slice(first)), pooling.rows(slice(first, None))]
    with torch.enable_grad():
        hidden, heads = zip(*map(_forward, [model] * 2, sides, of_sides), strict=True)  # (n⁺, H) and (n⁻, H)

    def gradients(value: Tensor, inputs: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """Of a value: the norm of its gradient at the head's inputs, and the gradients in the parameters."""
        found = torch.autograd.grad(value, [*inputs, *trained], retain_graph=plot is not None, materialize_grads=True)
        norms = [float(gradient.float().norm()) for gradient in found[: len(inputs)]]
        return math.hypot(*norms), list(found[len(inputs) :])

    weight = beta / 2 / len(batch)
    norm_rejected, rejected = gradients(weight * heads[1].log_probs.sum(), hidden[1:])
    norm_chosen, chosen = gradients(weight * heads[0].log_probs.sum(), hidden[:1])
    dpo = _combined(rejected, chosen, lambda down, up: down - up)
    yield "DPO", dpo
    per_token = 1 / (weight * len(heads[0].log_probs))
    yield "DPO+SFT", _combined(chosen, dpo, lambda up, of_dpo: of_dpo - up * per_token)
    del chosen, rejected
    if plot is not None and pooling is not None:
        with torch.enable_grad():
            outputs = torch.stack([head.distributions for head in heads if head.distributions is not None]).sum(0)
            target = plot.targets(labels, outputs, outputs.detach())  # of (S, V)
            term = plot.mean_divergence(outputs, pooling.counts, *target)
        norm, of_term = gradients(term, hidden)
        alpha = BalancedAlpha(plot.config.ratio)
        alpha.observe(math.hypot(norm_chosen, norm_rejected), norm)
        yield "DPO+PLOT", _combined(of_term, dpo, lambda of_plot, of_dpo: of_dpo + of_plot * alpha.value)


def _combined(
    gradients: list[Tensor], others: list[Tensor], combine: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """``gradients``, each replaced by its combination with the other one: no second list of their size."""
    for i, other in enumerate(others):
        gradients[i] = combine(gradients[i], other)
    return gradients


def _labelled(sequences: Sequence[ScoredSequence]) -> tuple[Batch, Tensor]:
    """The batch as a trainer has it, chosen sides first; and where its scored positions are in it, ``(n,)``."""
    (ids, _), rows, columns, _ = collate(sequences)
    labels = torch.full_like(ids, -100)  # (2B, T)
    labels[rows, columns + 1] = ids[rows, columns + 1]
    roles = torch.ones(len(sequences), dtype=torch.int8)  # (2B,)
    roles[len(sequences) // 2 :] = -1
    return Batch(labels, roles), rows * (ids.size(1) - 1) + columns


def _forward(
    model: Any, answers: Sequence[ScoredSequence], pooling: Pooling | None = None
) -> tuple[Tensor, HeadOutput]:
    """The head's input at the positions that are scored (n, H), and what the head makes of it; with their graph."""
    base = causal_lm(model)
    head = base.get_output_embeddings()
    found = [last_hidden_states(base, answers[at : at + _TOGETHER])[:2] for at in range(0, len(answers), _TOGETHER)]
    states, tokens = zip(*found, strict=True)
    hidden, targets = torch.cat(states).requires_grad_(), torch.cat(tokens)  # even where the head alone trains
    how = {} if pooling is None else pooling.arguments(hidden.device)
    return hidden, fused_head(hidden, head.weight, getattr(head, "bias", None), targets, head_spec(base), **how)


def _trained(model: Any) -> list[Tensor]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise InputError("no parameter of the model requires a gradient, expected those that training changes; set it")
    return trained
