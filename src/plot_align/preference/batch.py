"""The completion tokens of a micro-batch: preferred or rejected, and how their positions are pooled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plot_align.errors import InputError


@dataclass(frozen=True)
class Pooling:
    """How N positions are pooled into S output distributions.

    Attributes:
        weights: ``(N,)`` the weight of each position; the weights of a distribution sum to one if it has any position.
        segments: ``(N,)`` int64, the distribution of each position; ``None``: one for all.
        counts: ``(S,)`` selected positions of each distribution.
    """

    weights: Tensor
    segments: Tensor | None
    counts: Tensor

    def arguments(self, device: torch.device) -> dict[str, Any]:
        """Keyword arguments of a head pass on ``device``."""
        segments = None if self.segments is None else self.segments.to(device)
        return {"weights": self.weights.to(device), "segments": segments, "num_segments": self.counts.numel()}

    def rows(self, some: slice) -> Pooling:
        """Some of the positions: the distributions of all parts add up to those of the whole."""
        return Pooling(self.weights[some], None if self.segments is None else self.segments[some], self.counts)


@dataclass(frozen=True)
class Batch:
    """The labels of one micro-batch, as the policy's forward sees it.

    Args:
        labels: ``(B, T)`` as a causal model takes them: not shifted, −100 outside the completions.
        roles: ``(B,)`` +1 chosen, −1 rejected, 0 neither.
        keep: ``(B, T)`` bool, False for completion tokens that the model did not write (tool results); or ``None``.
        segments: ``(B, T)`` the document of each token if several are packed into a row; or ``None``.
    """

    labels: Tensor
    roles: Tensor
    keep: Tensor | None = None
    segments: Tensor | None = None

    def selected(self, positions: str) -> Tensor:
        """``(B, T − 1)`` bool: whether position t predicts a completion token of the role."""
        mask = self.labels[:, 1:] != -100  # (B, T-1)
        if self.keep is not None:
            mask = mask & self.keep[:, 1:]
        match positions:
            case "chosen":
                return mask & (self.roles > 0).unsqueeze(-1)
            case "rejected":
                return mask & (self.roles < 0).unsqueeze(-1)
            case "all":
                return mask
        raise InputError(f"positions is {positions!r}; expected chosen, rejected or all.")

    def token_counts(self, positions: str, size: int) -> Tensor:
        """``(size,)`` int64: how often each token is predicted at the selected positions."""
        return torch.bincount(self.labels[:, 1:][self.selected(positions)], minlength=size)

    def sequence_ids(self) -> Tensor:
        """``(B, T − 1)`` int64, non-decreasing along the flattened batch: the sequence of each predicted token."""
        batch, length = self.labels.shape
        if self.segments is None:
            rows = torch.arange(batch, device=self.labels.device)
            return rows.unsqueeze(-1).expand(batch, length - 1)
        per_row = self.segments[:, 1:]  # (B, T-1)
        offset = self.segments.amax(-1).cumsum(0).roll(1)  # (B,)
        offset[0] = 0
        return per_row + (offset + torch.arange(batch, device=per_row.device)).unsqueeze(-1)

    def pooling(self, positions: str, granularity: str, rows: Tensor | None = None) -> Pooling:
        """The selected positions pooled over the batch (``batch``, ``token``) or within each sequence (``sequence``).

        ``rows (N,)``: indices of the N positions in the flattened ``(B, T − 1)`` batch; ``None``: all of them.
        """
        selected = self.selected(positions).flatten()  # (B*(T-1),)
        selected = selected if rows is None else selected[rows]  # (N,)
        if granularity != "sequence":
            counts = selected.sum().unsqueeze(0)  # (1,)
            return Pooling(_exact(selected) / counts.clamp(min=1), None, counts)
        segments = self.sequence_ids().flatten()  # (B*(T-1),)
        count = int(segments.max()) + 1 if segments.numel() else 0
        segments = segments if rows is None else segments[rows]  # (N,)
        counts = torch.bincount(segments[selected], minlength=count)  # (S,)
        return Pooling(_exact(selected) / counts.clamp(min=1)[segments], segments, counts)


def _exact(selected: Tensor) -> Tensor:
    """Ones and zeros in float64, except on Apple's GPUs, which have none."""
    return selected.to(torch.float32 if selected.device.type == "mps" else torch.float64)


def check_shapes(
    logits: Tensor, labels: Tensor, roles: Tensor | None, reference_logits: Tensor | None, *, rows: int
) -> None:
    """Refuses tensors that are not one batch of a model whose head has ``rows`` rows.

    Raises:
        InputError: naming the tensor.
    """
    if logits.ndim != 3 or not logits.is_floating_point() or logits.size(-1) != rows:
        raise InputError(
            f"logits is {logits.dtype} of shape {tuple(logits.shape)}, expected (B, T, {rows}), one entry per row of "
            "the head: pass the model's logits, and rows= to PlotLoss if the head is larger than the embeddings."
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError(
            f"labels is {labels.dtype}, expected token ids and -100 as integers: pass the model's labels."
        )
    outside = (labels != -100) & ((labels < 0) | (labels >= rows))
    if bool(outside.any()):
        raise InputError(
            f"labels has {int(labels[outside][0])}, expected token ids below {rows}, the rows of the head, and -100: "
            "pass the labels of this model's tokenizer."
        )
    if roles is not None and (not isinstance(roles, Tensor) or roles.shape != logits.shape[:1]):
        found = tuple(roles.shape) if isinstance(roles, Tensor) else type(roles).__name__
        raise InputError(
            f"roles is {found}, expected a tensor of shape ({logits.size(0)},), one of +1, -1 and 0 for each row."
        )
    shapes = {"labels": (labels, logits.shape[:2]), "reference_logits": (reference_logits, logits.shape)}
    for name, (given, expected) in shapes.items():
        if given is not None and given.shape != expected:
            raise InputError(
                f"{name} has shape {tuple(given.shape)}, expected {tuple(expected)} for these logits: pass labels "
                "that are not shifted, and the reference model's logits of the same batch."
            )
