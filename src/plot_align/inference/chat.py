"""What a chat model answers, and how likely it finds an answer: everything goes through its chat template."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from plot_align.errors import InputError
from plot_align.parallel import each

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """A chat model needs a chat template.

    Raises:
        InputError: the tokenizer has none.
    """
    if not tokenizer.chat_template:
        raise InputError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template, so nobody knows how to ask it; "
            "name a chat model, or save one with tokenizer.chat_template set"
        )


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and no gradients; the model is left in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Each prompt as the one user turn of a conversation, up to where the answer begins."""
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return tokenizer.apply_chat_template(conversations, add_generation_prompt=True, tokenize=True, return_dict=False)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 56,
    batch_size: int = 256,
) -> list[str]:
    """The model's greedy answer to each prompt, asked through the chat template, without special tokens.

    Prompts of similar length share a batch (left-padded); the answers come in the order of ``prompts``. The model is
    left in the mode it was in.

    Raises:
        InputError: ``max_new_tokens`` or ``batch_size`` is below one, or the tokenizer has no chat template.
    """
    require_template(tokenizer)
    rows = prompt_ids(tokenizer, prompts) if prompts else []
    return continue_rows(model, tokenizer, rows, max_new_tokens=max_new_tokens, batch_size=batch_size)


def continue_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """What the model writes after each row of token ids, without special tokens.

    Args:
        rows: token ids, one list a prompt.
        temperature: 0 decodes greedily, anything above samples. top_p: of the sampling.
        seed: of the sampling; the caller's random state is left as it was.
        advance: called with how many more rows are answered.

    Raises:
        InputError: ``max_new_tokens`` or ``batch_size`` is below one.
    """
    parts = continue_each(
        model,
        tokenizer,
        [[Start(row) for row in rows]],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        advance=advance,
    )
    return next(parts)


class Start(NamedTuple):
    """What a model goes on from.

    Attributes:
        ids: token ids of the prompt, and of the answer as far as it is begun.
        begun: how many of them, the last ones, belong to the answer; the text that comes back starts with theirs.
        seed: of this row's own sampling; None where its batch has one.
    """

    ids: Sequence[int]
    begun: int = 0
    seed: int | None = None


def continue_each(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    parts: Iterable[Sequence[Start]],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> Iterator[list[str]]:
    """:func:`continue_rows` of each part, none of which shares a batch with another.

    Several processes share the batches (:func:`~parallel.each`). Where they sample, each has its own seed, or
    each row has (:attr:`Start.seed`): its draws are then the same in any batch, as far as rounding is.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name} is {value}, but must be at least 1: pass a positive number.")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    plans = []  # a part: its rows, and their indices batch by batch
    for rows in parts:
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
        plans.append((rows, [order[start : start + batch_size] for start in range(0, len(order), batch_size)]))
    jobs = (
        ([rows[i] for i in batch], _batch_seed(seed, number))
        for rows, batches in plans
        for number, batch in enumerate(batches)
    )
    done = each(partial(_continued, model, tokenizer, max_new_tokens, pad, sampling), jobs)
    for rows, batches in plans:
        answers = [""] * len(rows)
        for batch in batches:
            for i, text in zip(batch, next(done), strict=True):
                answers[i] = text
            advance(len(batch))
        yield answers


def _continued(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    pad: int,
    sampling: dict[str, float],
    job: tuple[list[Start], int],
) -> list[str]:
    """What comes after the rows of one batch: the rows, seed of the sampling."""
    rows, seed = job
    ids, mask = _padded_left([row.ids for row in rows], pad)  # (B, T) each
    seeds = [row.seed for row in rows if row.seed is not None] if sampling else []
    how: dict[str, Any] = {"do_sample": True, **sampling} if sampling and not seeds else {"do_sample": False}
    if seeds:
        how["logits_processor"] = [_OwnDraws(seeds, sampling["temperature"], sampling["top_p"])]
    # A chat model may end its turn with a token of its own, which its generation config lists beside EOS.
    ends = model.generation_config.eos_token_id or tokenizer.eos_token_id
    devices = [model.device] if model.device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            use_cache=True,
            eos_token_id=ends,
            pad_token_id=pad,
            **how,
        )  # (B, T + new)
    texts = tokenizer.batch_decode(out[:, ids.size(1) :], skip_special_tokens=True)
    for r, row in enumerate(rows):
        if row.begun:
            begun = tokenizer.decode(row.ids[len(row.ids) - row.begun :], skip_special_tokens=True)
            whole = tokenizer.decode(out[r, ids.size(1) - row.begun :], skip_special_tokens=True)
            # Decoded together they keep the space between them; apart only where a character is cut in two.
            texts[r] = whole if whole.startswith(begun) else begun + texts[r]
    return texts


class _OwnDraws:
    """Makes of a greedy choice a sample: every token but the drawn one is ruled out.

    A row's draws come from its own generator, one number in [0, 1) a token, the same on every device; the token is the
    first one whose cumulative probability exceeds it.

    Args:
        seeds: one a row.
        temperature, top_p: of the sampling.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float) -> None:
        from transformers import TopPLogitsWarper

        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperature = temperature
        self._nucleus = TopPLogitsWarper(top_p) if top_p < 1 else None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """``scores``: logits (B, V) of the next token, after the processors of the model's generation config."""
        draws = [torch.rand(1, generator=generator, dtype=torch.float64) for generator in self._generators]
        device = "cpu" if scores.device.type == "mps" else scores.device  # MPS has no float64
        logits = scores.to(device, torch.float64)  # (B, V)
        logits = (logits - logits.amax(-1, keepdim=True)) / self._temperature  # no overflow, however cold
        if self._nucleus is not None:
            logits = self._nucleus(input_ids, logits)
        upto = logits.softmax(-1).cumsum(-1)  # (B, V)
        drawn = torch.searchsorted(upto, torch.stack(draws).to(device) * upto[:, -1:], right=True)  # (B, 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn.to(scores.device), 0.0)


def _padded_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, T) and attention mask (B, T)."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)  # (B, T)
    mask = torch.zeros_like(ids)  # (B, T)
    for r, row in enumerate(rows):
        ids[r, longest - len(row) :] = torch.tensor(row)
        mask[r, longest - len(row) :] = 1
    return ids, mask


def _batch_seed(seed: int, number: int) -> int:
    """The first batch has the seed itself; the others must not depend on which were drawn before, or where."""
    if number == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:8], "big") >> 1


def completion_logps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    batch_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each answer given its prompt, its EOS included.

    Returns:
        (sum of log-probabilities in nats (N,) float64, number of tokens (N,) int64), on the CPU.
    """
    conversations = [
        [{"role": "user", "content": p}, {"role": "assistant", "content": a}]
        for p, a in zip(prompts, answers, strict=True)
    ]
    rows = tokenizer.apply_chat_template(conversations, tokenize=True, return_dict=False)
    return tail_logps(model, rows, [len(row) for row in prompt_ids(tokenizer, prompts)], batch_size=batch_size)


def tail_logps(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], starts: Sequence[int], *, batch_size: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of what stands in each row from ``starts`` on, given what stands before.

    Args:
        rows: token ids, one list a text. starts: index of the first token that is scored, 1 or more.

    Returns:
        (sum of log-probabilities in nats (N,) float64, number of tokens (N,) int64), on the CPU.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    sums = torch.zeros(len(rows), dtype=torch.float64)  # (N,)
    counts = torch.tensor([len(row) - start for row, start in zip(rows, starts, strict=True)])  # (N,)
    batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    jobs = (_padded_right([rows[i] for i in batch], [starts[i] for i in batch]) for batch in batches)
    for batch, found in zip(batches, each(partial(_scored, model), jobs), strict=True):
        sums[batch] = found
    return sums, counts


def _scored(model: PreTrainedModel, job: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Sums (B,) float64 over one batch: ids, attention mask and what is scored, (B, T) each."""
    ids, mask, scored = job
    with evaluating(model):
        ids, mask = ids.to(model.device), mask.to(model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]  # (B, T-1, V)
        logps = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].cpu()  # (B, T-1)
        return (logps.double() * scored[:, 1:]).sum(-1)


def _padded_right(
    rows: Sequence[Sequence[int]], starts: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, attention mask, and whether a token is scored: (B, T) each."""
    longest = max(map(len, rows))
    ids = torch.zeros((len(rows), longest), dtype=torch.long)  # (B, T); the mask hides the padding
    mask = torch.zeros_like(ids)  # (B, T)
    scored = torch.zeros_like(ids, dtype=torch.bool)  # (B, T)
    for r, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[r, : len(row)] = torch.tensor(row)
        mask[r, : len(row)] = 1
        scored[r, start : len(row)] = True
    return ids, mask, scored
