"""Embeddings held by reference, and refused if they change after the divergence was built."""

from __future__ import annotations

import torch
from torch import Tensor

from plot_align.errors import InputError
from plot_align.transport.geometry import check_embeddings


class Table:
    """(V, H) in its own dtype; a cost on the embeddings must stay the same while the model trains.

    A tensor that requires a gradient will be trained, so it is copied. Any other is held by reference, and
    :attr:`weight` raises an error once the tensor was changed in place.

    Args:
        embeddings: (V, H), any floating dtype and device, finite.
        vocab_size: V of the target.

    Raises:
        InputError: wrong shape or dtype, NaN or infinite entries, or another number of rows than the target.
    """

    def __init__(self, embeddings: Tensor, vocab_size: int) -> None:
        weight = check_embeddings(embeddings)  # (V, H)
        if weight.shape[0] != vocab_size:
            raise InputError(
                f"embeddings has {weight.shape[0]} rows and target {vocab_size} tokens, but both must have one entry "
                "per row of the head: build the target with size = the number of rows."
            )
        self._weight = weight.clone() if embeddings.requires_grad else weight
        self._version = _version(self._weight)

    @property
    def weight(self) -> Tensor:
        """(V, H), detached.

        Raises:
            InputError: the tensor was changed in place since it was given.
        """
        if _version(self._weight) != self._version:
            raise InputError(
                "embeddings were changed in place after the divergence was built, but its cost must stay the same: "
                "pass a copy (embeddings.clone()), or the reference model's own."
            )
        return self._weight

    def to(self, device: torch.device) -> None:
        """Moves the table to the divergence's device."""
        if device != self._weight.device:
            self._weight = self.weight.to(device)
            self._version = _version(self._weight)

    def __getstate__(self) -> Tensor:
        return self.weight  # a copy has its own version counter

    def __setstate__(self, weight: Tensor) -> None:
        self._weight, self._version = weight, _version(weight)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # inference tensors do not count their changes
