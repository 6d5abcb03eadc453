"""The model under attack: how it is asked, what it answers, how likely it finds a target."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch

from plot_align.errors import InputError
from plot_align.inference.chat import Start, continue_each, prompt_ids, require_template, tail_logps

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from plot_align.redteam.vocabulary import Vocabulary


class Question(NamedTuple):
    """One answer that is wanted.

    Attributes:
        test_case: the user's turn.
        prefix: token ids that the answer is begun with.
        seed: of its sampling, where answers are sampled.
    """

    test_case: str
    prefix: Sequence[int] = ()
    seed: int | None = None


@dataclass
class Victim:
    """A causal language model with its chat template.

    Args:
        model: on its device, in its dtype; it is put into evaluation mode and asked for no parameter gradients.
        tokenizer: with a chat template.
        name: as it stands in files and tables.

    Raises:
        InputError: the tokenizer has no chat template.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    vocabularies: dict[bool, Vocabulary] = field(default_factory=dict, init=False, repr=False)  # see Vocabulary.of

    def __post_init__(self) -> None:
        require_template(self.tokenizer)
        self.model.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @cached_property
    def identity(self) -> dict[str, str]:
        """See :func:`model_identity`."""
        return model_identity(self.model, self.tokenizer)

    def target_ids(self, target: str) -> list[int]:
        """Token ids of a target, as it stands right after the chat template's generation prompt.

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
        asked = [[Question(case) for case in test_cases]]
        return next(self.answers_to_each(asked, max_new_tokens=max_new_tokens, batch_size=batch_size))

    def answers_to_each(
        self, parts: Sequence[Sequence[Question]], *, max_new_tokens: int, batch_size: int, temperature: float = 0.0
    ) -> Iterator[list[str]]:
        """The answers to each part, none of which shares a batch with another; a prefix is part of its answer.

        Args:
            max_new_tokens: of what follows the prefix.
            temperature: 0 decodes greedily, anything above samples.
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
        """Mean cross-entropy of each target's tokens in nats after its test case, tokenised as it would be sent."""
        prompts = prompt_ids(self.tokenizer, test_cases)
        rows = [prompt + self.target_ids(target) for prompt, target in zip(prompts, targets, strict=True)]
        sums, counts = tail_logps(self.model, rows, [len(prompt) for prompt in prompts], batch_size=batch_size)
        return (-sums / counts).tolist()


def model_identity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What decides an answer besides the question: weights and settings, tokenizer, chat template, dtype.

    The weights as a digest of the shape and a sample of every parameter, of the configuration and of the generation
    configuration: folders may share a name.
    """
    digest = hashlib.sha256()
    for config in (model.config, model.generation_config):
        settings = {} if config is None else config.to_dict()
        # Where it lies, and with which version it was saved, change no answer.
        plain = {k: v for k, v in settings.items() if k not in ("_name_or_path", "transformers_version")}
        digest.update(json.dumps(plain, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 4096)].float().cpu()  # (≤ 8192,)
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return {
        "model": digest.hexdigest()[:16],
        "tokenizer": hashlib.sha256(_tokenization(tokenizer).encode()).hexdigest()[:16],
        "template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16],
        "dtype": str(model.dtype),
    }


def _tokenization(tokenizer: PreTrainedTokenizerBase) -> str:
    """How text becomes tokens; without padding and truncation, which every call sets anew."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = {"vocabulary": tokenizer.get_vocab()} if backend is None else json.loads(backend.to_str())
    return json.dumps({k: v for k, v in whole.items() if k not in ("padding", "truncation")}, sort_keys=True)
