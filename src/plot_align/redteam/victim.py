"""The model under attack: what it answers, and how likely it finds a target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch

from plot_align.errors import InputError
from plot_align.inference.chat import Continuation, Start, continue_each, prompt_ids, require_template, tail_logps
from plot_align.inference.identity import model_identity
from plot_align.redteam.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Question(NamedTuple):
    """One question to the model.

    Attributes:
        test_case: the user's turn.
        prefix: token ids with which the answer begins.
        seed: of its sampling, if answers are sampled.
    """

    test_case: str
    prefix: Sequence[int] = ()
    seed: int | None = None


@dataclass
class Victim:
    """A causal language model with its chat template.

    Args:
        model: on its device, in its dtype; it is put into evaluation mode, without parameter gradients.
        tokenizer: with a chat template.
        name: for files and tables.

    Attributes:
        forward_tokens, backward_tokens: spent on losses and gradients so far; see
            :class:`plot_align.redteam.spent.Spent`. Answers carry their own costs.

    Raises:
        InputError: the tokenizer has no chat template.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    forward_tokens: int = field(default=0, init=False, repr=False)
    backward_tokens: int = field(default=0, init=False, repr=False)
    _vocabularies: dict[bool, Vocabulary] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        require_template(self.tokenizer)
        self.model.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @cached_property
    def identity(self) -> dict[str, str]:
        """See :func:`plot_align.inference.identity.model_identity`."""
        return model_identity(self.model, self.tokenizer)

    def vocabulary(self, *, non_ascii: bool = False) -> Vocabulary:
        """The tokens that an attack may use; read once per victim. ``non_ascii`` allows any character."""
        if non_ascii not in self._vocabularies:
            self._vocabularies[non_ascii] = Vocabulary.of(self.model, self.tokenizer, non_ascii=non_ascii)
        return self._vocabularies[non_ascii]

    def target_ids(self, target: str) -> list[int]:
        """Token ids of a target, as it follows the chat template's generation prompt.

        Raises:
            InputError: there is no target, or it has no tokens.
        """
        ids = self.tokenizer(target, add_special_tokens=False).input_ids
        if not ids or not target.strip():
            raise InputError(
                f"the target {target!r} has no tokens; write how a complying answer begins, e.g. 'Sure, here is'"
            )
        return ids

    def answers(self, test_cases: Sequence[str], *, max_new_tokens: int, batch_size: int) -> list[str]:
        """Greedy answers, one user turn each, no system message."""
        questions = [[Question(case) for case in test_cases]]
        found = next(self.answers_to_each(questions, max_new_tokens=max_new_tokens, batch_size=batch_size))
        return [answer.text for answer in found]

    def answers_to_each(
        self, parts: Sequence[Sequence[Question]], *, max_new_tokens: int, batch_size: int, temperature: float = 0.0
    ) -> Iterator[list[Continuation]]:
        """Yield the answers to each part, with costs. Parts have separate batches; a prefix is part of its answer.

        Args:
            max_new_tokens: of what follows the prefix.
            temperature: 0 decodes greedily, anything above samples.

        Raises:
            RunError: as :func:`~plot_align.inference.chat.continue_rows`.
        """
        rows = []
        for part in parts:
            prompts = prompt_ids(self.tokenizer, [question.test_case for question in part]) if part else []
            rows.append(
                [
                    Start([*prompt, *question.prefix], len(question.prefix), question.seed)
                    for prompt, question in zip(prompts, part, strict=True)
                ]
            )
        return continue_each(
            self.model,
            self.tokenizer,
            rows,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            temperature=temperature,
        )

    def target_losses(self, test_cases: Sequence[str], targets: Sequence[str], *, batch_size: int = 64) -> list[float]:
        """Mean cross-entropy of each target's tokens in nats after its test case, tokenised as it would be sent.

        Raises:
            RunError: one is NaN.
        """
        prompts = prompt_ids(self.tokenizer, test_cases)
        rows = [prompt + self.target_ids(target) for prompt, target in zip(prompts, targets, strict=True)]
        self.forward_tokens += sum(map(len, rows))
        sums, counts = tail_logps(self.model, rows, [len(prompt) for prompt in prompts], batch_size=batch_size)
        return (-sums / counts).tolist()
