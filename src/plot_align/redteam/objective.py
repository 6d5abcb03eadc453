"""The objective that PEZ, GBDA, UAT and GCG share: how unlikely a target is after a suffix.

    loss(suffix) = mean_j  −log p(target_j | before, suffix, after, target_<j)

``before`` is the chat template and the behaviour, ``after`` what the template puts between the user's turn and the
answer. Three things make it fast without changing a loss by more than rounding: the keys and values of ``before`` are
computed once; those of the suffix's first tokens are shared by the candidates that keep them; and the head sees the
target's positions only.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import cached_property

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from plot_align.errors import InputError
from plot_align.inference.chat import not_finite
from plot_align.redteam.attack import Attacked, OnStep, Request
from plot_align.redteam.behaviors import Behavior
from plot_align.redteam.spent import Meter, Spent
from plot_align.redteam.victim import Victim
from plot_align.redteam.vocabulary import Vocabulary, encode, texts_in_context

_FILLERS = ("x", "!", "a", "the", "I", "and", "of")
_CPU_BATCH = 64  # candidates a pass: more do not run faster on a CPU, and their activations leave its caches

KeysValues = list[tuple[Tensor, Tensor]]  # a layer: (1, heads, T, head width) each


class TargetObjective:
    """The loss of a target after ``behavior + " " + suffix``, for many suffixes at once.

    Args:
        victim: the model under attack.
        behavior: what the attack wants the model to do.
        target: how a complying answer begins.
        length: tokens of the suffix.
        vocabulary: the tokens it may consist of.
        batch_size: candidates a pass; None: all at once on an accelerator, halved where memory runs out.
        prefix_cache: keep the keys and values of what does not change; False computes every token every time.

    Raises:
        InputError: the target has no tokens, or no filler makes a suffix of exactly ``length`` tokens.
    """

    def __init__(
        self,
        victim: Victim,
        behavior: Behavior,
        target: str,
        length: int,
        vocabulary: Vocabulary,
        *,
        batch_size: int | None = None,
        prefix_cache: bool = True,
    ) -> None:
        self.meter = Meter(victim)
        self.victim = victim
        self.model = victim.model
        self.length = length
        self.vocabulary = vocabulary
        self.prompt = behavior.prompt.strip()  # many templates strip a turn
        self.batch_size = batch_size or (_CPU_BATCH if victim.device.type == "cpu" else 2**31)
        self._target_length = len(victim.target_ids(target))
        self._layout(target)
        self._crop_head = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self.prefix_cache = prefix_cache
        self._before_kv = self._keys_values(self.before[None]) if prefix_cache else None
        self._focus: tuple[Tensor, KeysValues] | None = None  # a suffix and the keys and values up to its end

    # ------------------------------------------------------------------------------------------ text and tokens

    def _layout(self, target: str) -> None:
        """Splits the rendered conversation into ``before``, ``after`` and the initial suffix."""
        tokenizer, device = self.victim.tokenizer, self.victim.device
        found = None
        for filler in (*_FILLERS, *self._vocabulary_fillers()):
            if (found := self._split(" ".join([filler] * self.length))) is not None:
                break
        if found is None:
            raise InputError(
                f"no text makes a suffix of exactly {self.length} tokens with the tokenizer of "
                f"{tokenizer.name_or_path!r}; choose another number of suffix tokens"
            )
        before, suffix, after, self._head_text, self._tail_text = found
        self.before = torch.tensor(before, device=device)  # (T_before,)
        self.initial = torch.tensor(suffix, device=device)  # (L,)
        self.after = torch.tensor(after, device=device)  # (T_after,)
        self.target = torch.tensor(self.victim.target_ids(target), device=device)  # (T_target,)
        # The target's last token is predicted and never read.
        self._tail = torch.cat([self.after, self.target[:-1]])  # (T_after + T_target - 1,)
        # If the tokenizer makes a token of the separating space, that token is in ``before``.
        joined = texts_in_context(tokenizer, self.initial[None, :1])[0].startswith(" ")
        self.first = self.vocabulary.first if joined else self.vocabulary.anywhere  # (V,)

    def _vocabulary_fillers(self) -> list[str]:
        tokens = self.vocabulary.first.nonzero()[:200]  # (≤ 200, 1)
        return [text.strip() for text in texts_in_context(self.victim.tokenizer, tokens.cpu())]

    def _split(self, suffix: str) -> tuple[list[int], list[int], list[int], str, str] | None:
        """(before, suffix, after) as token ids, and the text around the suffix; None where tokens cross a border."""
        tokenizer = self.victim.tokenizer
        content = f"{self.prompt} {suffix}"
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        at = text.rfind(content)
        if at < 0:
            raise InputError(
                f"the chat template of {tokenizer.name_or_path!r} rewrites the user's turn, so no suffix fits "
                "into it; give the model a template that keeps it as it is"
            )
        start, end = at + len(self.prompt) + 1, at + len(content)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        inside = [a < end and b > start for a, b in encoded.offset_mapping]
        if sum(inside) != self.length:
            return None
        first = inside.index(True)
        last = first + self.length
        if not all(inside[first:last]) or any(b > end for _, b in encoded.offset_mapping[first:last]):
            return None
        ids = encoded.input_ids
        return ids[:first], ids[first:last], ids[last:], text[: start - 1], text[end:]

    def suffix_texts(self, suffixes: Tensor) -> list[str]:
        """The text between the behaviour and the end of the user's turn. suffixes: (B, L)."""
        texts = texts_in_context(self.victim.tokenizer, suffixes)
        return texts if self.first is self.vocabulary.first else [f" {text}" for text in texts]

    def test_cases(self, suffixes: Tensor) -> list[str]:
        """The whole user turn of each suffix. suffixes: (B, L)."""
        return [self.prompt + text for text in self.suffix_texts(suffixes)]

    def survive(self, suffixes: Tensor) -> Tensor:
        """Which suffixes are tokenised back to themselves within the whole conversation.

        Args:
            suffixes: (B, L).

        Returns:
            (B,) bool, on the CPU.
        """
        texts = self.suffix_texts(suffixes)
        whole = [self._head_text + text + self._tail_text for text in texts]
        rows = encode(self.victim.tokenizer, whole)
        head, tail = self.before.tolist(), self.after.tolist()
        wanted = [head + row + tail for row in suffixes.tolist()]
        # A template that strips the turn would remove a trailing space.
        return torch.tensor(
            [got == want and text == text.rstrip() for got, want, text in zip(rows, wanted, texts, strict=True)]
        )

    def allowed_by_place(self) -> Tensor:
        """(L, V) bool: the tokens allowed at each place."""
        allowed = self.vocabulary.anywhere.repeat(self.length, 1)
        allowed[0] = self.first
        return allowed

    def random_suffixes(self, count: int, generator: torch.Generator) -> Tensor:
        """``count`` suffixes of allowed tokens, drawn evenly (count, L); ``generator`` is on the CPU."""
        weights = self.allowed_by_place().float().cpu()  # (L, V)
        return weights.multinomial(count, replacement=True, generator=generator).T.contiguous().to(self.initial)

    def nearest(self, embeds: Tensor) -> Tensor:
        """The allowed token of each place with the largest cosine similarity. embeds: (C, L, H) → (C, L)."""
        # The length of an embedding scales all its similarities, so it does not change their order.
        similarity = embeds.float() @ self.embedding_table.float().T / self._table_norms  # (C, L, V)
        return similarity.masked_fill(~self.allowed_by_place(), -torch.inf).argmax(-1)

    # ------------------------------------------------------------------------------------------ losses

    @torch.no_grad()
    def losses(self, suffixes: Tensor) -> Tensor:
        """Loss of each suffix. suffixes: (B, L) → (B,) float32, nats a token.

        Raises:
            RunError: a loss is NaN.
        """
        shared = self._shared(suffixes)  # (B,) leading tokens that equal the focused suffix's
        order = shared.argsort()
        found = torch.empty(len(suffixes), device=suffixes.device)  # (B,)
        start = 0
        while start < len(order):
            rows = order[start : start + self.batch_size]
            try:
                found[rows] = self._batch_losses(suffixes[rows], int(shared[rows[0]]))
            except RuntimeError as error:
                if self.batch_size == 1 or not should_reduce_batch_size(error):
                    raise
                self.batch_size = max(1, min(self.batch_size, len(rows)) // 2)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            start += len(rows)
        if bool(found.isnan().any()):
            raise not_finite(self.model)
        return found

    def _shared(self, suffixes: Tensor) -> Tensor:
        """How many leading tokens each suffix shares with the focused one, whose keys and values are known; (B,)."""
        if self._focus is None:
            return torch.zeros(len(suffixes), dtype=torch.long, device=suffixes.device)
        return (suffixes == self._focus[0]).long().cumprod(-1).sum(-1)

    def _batch_losses(self, suffixes: Tensor, shared: int) -> Tensor:
        shared = min(shared, self.length - 1)
        known = None
        if self._focus is not None:
            end = len(self.before) + shared
            known = [(k[:, :, :end], v[:, :, :end]) for k, v in self._focus[1]]
        else:
            known, shared = self._before_kv, 0
        ids = torch.cat([suffixes[:, shared:], self._tail.expand(len(suffixes), -1)], 1)  # (B, T)
        embeds = self.model.get_input_embeddings()(ids)  # (B, T, H)
        return self._forward(embeds, known)[0]

    def soft_losses(self, embeds: Tensor) -> Tensor:
        """Loss of suffixes given as embeddings, differentiable. embeds: (B, L, H) → (B,)."""
        tail = self.model.get_input_embeddings()(self._tail)  # (T_tail, H)
        row = torch.cat([embeds.to(tail.dtype), tail.expand(len(embeds), -1, -1)], 1)  # (B, T, H)
        return self._forward(row, self._before_kv)[0]

    def gradient(self, suffix: Tensor) -> tuple[float, Tensor]:
        """The loss of one suffix and its gradient with respect to the one-hot rows of its tokens.

        Also keeps the suffix's keys and values for the candidates of :meth:`losses`.

        Args:
            suffix: (L,).

        Returns:
            (loss, gradient (L, V) float32).

        Raises:
            RunError: the loss is NaN.
        """
        table = self.embedding_table
        rows = self.model.get_input_embeddings()(suffix)[None].detach().requires_grad_()  # (1, L, H)
        tail = self.model.get_input_embeddings()(self._tail)[None]  # (1, T_tail, H)
        losses, cache = self._forward(torch.cat([rows, tail], 1), self._before_kv)
        if math.isnan(loss := float(losses.detach())):
            raise not_finite(self.model)
        (slope,) = torch.autograd.grad(losses.sum(), rows)  # (1, L, H)
        if cache is not None:
            end = len(self.before) + self.length
            known = [(k[:, :, :end].detach(), v[:, :, :end].detach()) for k, v in cache]
            self._focus = (suffix.clone(), known)
        return loss, (slope[0] @ table.T).float()

    @cached_property
    def embedding_table(self) -> Tensor:
        """(V, H): each token's embedding as the model uses it; some models scale the rows."""
        embedding = self.model.get_input_embeddings()
        weight = embedding.weight.detach()
        with torch.no_grad():
            plain = torch.equal(embedding(torch.zeros(1, dtype=torch.long, device=weight.device))[0], weight[0])
            return weight if plain else embedding(torch.arange(len(weight), device=weight.device))

    @cached_property
    def _table_norms(self) -> Tensor:
        """(V,); never zero, though a padding row may be."""
        return self.embedding_table.float().norm(dim=-1).clamp_min(1e-12)

    def _forward(self, embeds: Tensor, known: KeysValues | None) -> tuple[Tensor, KeysValues | None]:
        """Losses (B,) after ``known`` tokens, and the keys and values of all; without ``known``, after ``before``."""
        wanted = self._target_length
        options: dict[str, object] = {"logits_to_keep": wanted} if self._crop_head else {}
        cache = None
        if known is not None:
            batch = len(embeds)
            cache = DynamicCache([(k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)) for k, v in known])
        elif not self.prefix_cache:
            before = self.model.get_input_embeddings()(self.before)  # (T_before, H)
            embeds = torch.cat([before.expand(len(embeds), -1, -1), embeds], 1)  # (B, T, H)
        out = self.model(inputs_embeds=embeds, past_key_values=cache, use_cache=cache is not None, **options)
        passed = embeds.size(0) * embeds.size(1)
        self.victim.forward_tokens += passed
        self.victim.backward_tokens += passed if torch.is_grad_enabled() else 0
        logits = out.logits[:, -wanted:].float()  # (B, T_target, V)
        target = self.target.repeat(len(embeds))  # (B * T_target,)
        # Flat: with the vocabulary in the middle, as torch takes (B, V, T), the softmax strides through memory.
        losses = cross_entropy(logits.flatten(0, 1), target, reduction="none").view(-1, wanted).mean(-1)  # (B,)
        return losses, None if cache is None else [(layer.keys, layer.values) for layer in cache.layers]

    @torch.no_grad()
    def _keys_values(self, ids: Tensor) -> KeysValues:
        """Keys and values of every layer, for one row of ids (1, T)."""
        cache = self.model(input_ids=ids, use_cache=True, past_key_values=DynamicCache()).past_key_values
        self.victim.forward_tokens += ids.numel()
        return [(layer.keys, layer.values) for layer in cache.layers]


def best_of_each(
    objective: TargetObjective,
    start: Tensor,
    update: Callable[[int], Tensor],
    steps: int,
    request: Request,
    on_step: OnStep,
) -> Attacked:
    """Runs ``steps`` updates of several suffixes at once and keeps the best tokens each has had.

    Args:
        start: (C, L).
        update: given the step, 1 to ``steps``, changes the suffixes and returns their tokens (C, L).

    No further step is begun once ``request.limit`` is reached.
    """
    best, least = start.clone(), objective.losses(start)  # (C, L), (C,)
    trace = [float(least.mean())]
    snapshots: dict[int, list[str]] = {}
    spent: dict[int, list[Spent]] = {}
    for step in range(1, steps + 1):
        tokens = update(step)
        losses = objective.losses(tokens)  # (C,)
        better = losses < least
        best[better], least[better] = tokens[better], losses[better]
        trace.append(float(least.mean()))
        cost = objective.meter.read().shares(len(start))
        if step in request.snapshots:
            snapshots[step], spent[step] = objective.test_cases(best), cost
        on_step(step)
        if request.limit.reached(cost[0]):
            break
    cases, cost = objective.test_cases(best), objective.meter.read().shares(len(start))
    return Attacked(
        cases,
        least.tolist(),
        trace,
        snapshots,
        spent=cost,
        spent_by_step=spent,
    )
