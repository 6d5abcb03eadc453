"""What a chat model answers, and how likely it finds an answer. Everything goes through its chat template."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.distributed.fsdp import FSDPModule

from plot_align.errors import InputError, RunError
from plot_align.parallel import each

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that there is a chat template.

    Raises:
        InputError: the tokenizer has none.
    """
    if not tokenizer.chat_template:
        raise InputError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; "
            "name a chat model, or save one with tokenizer.chat_template set"
        )


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and no gradients; restores the model's mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def not_finite(model: Any) -> RunError:
    """What is raised where ``model`` gives NaN, or overflows."""
    name = getattr(model, "name_or_path", "")
    return RunError(
        f"the model {f'{name!r} ' if name else ''}gives a log-probability that is not finite, expected numbers; it "
        "overflows in its dtype: use bfloat16 or float32, or check its weights"
    )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt as the only user turn of a conversation, up to where the answer begins."""
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
    """The model's greedy answer to each prompt, through the chat template, without special tokens.

    Prompts of similar length form a batch (left-padded); the answers come in the order of ``prompts``.

    Raises:
        InputError: ``max_new_tokens`` or ``batch_size`` is below one, or the tokenizer has no chat template.
        RunError: as :func:`continue_rows`.
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
        rows: token ids, one list per prompt.
        temperature: 0 decodes greedily, anything above samples. top_p: of the sampling.
        seed: of the sampling; the global random state is not changed.
        advance: called with the number of newly answered rows.

    Raises:
        InputError: ``max_new_tokens`` or ``batch_size`` is below one.
        RunError: logits that decide a token are not finite.
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
    return [continuation.text for continuation in next(parts)]


class Start(NamedTuple):
    """What a model continues.

    Attributes:
        ids: token ids of the prompt and of a begun answer.
        begun: how many of the last ids belong to the answer; the returned text starts with theirs.
        seed: of this row's sampling; None to use the batch's.
    """

    ids: Sequence[int]
    begun: int = 0
    seed: int | None = None


class Continuation(NamedTuple):
    """What a model made of a start.

    Attributes:
        text: without special tokens; it begins with the begun answer.
        tokens: that went through the model: those of the start and all new ones but the last, which nothing reads.
        seconds: this row's equal share of its batch's.
    """

    text: str
    tokens: int
    seconds: float


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
) -> Iterator[list[Continuation]]:
    """:func:`continue_rows` for each part, and what each row cost; parts have separate batches.

    The batches are divided among processes (:func:`~parallel.each`). When sampling, each batch has its own seed, or
    each row (:attr:`Start.seed`), whose draws are then the same in any batch, up to rounding.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name} is {value}, but must be at least 1: pass a positive number.")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    plans = []  # per part: its rows, and their indices batch by batch
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
        answers: dict[int, Continuation] = {}
        for batch in batches:
            answers.update(zip(batch, next(done), strict=True))
            advance(len(batch))
        yield [answers[i] for i in range(len(rows))]


def _continued(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    pad: int,
    sampling: dict[str, float],
    job: tuple[list[Start], int],
) -> list[Continuation]:
    """Continue one batch. job: its rows, and the seed of the sampling."""
    began = time.perf_counter()
    rows, seed = job
    ids, mask = _padded_left([row.ids for row in rows], pad)  # (B, T) each
    seeds = [row.seed for row in rows if row.seed is not None] if sampling else []
    how: dict[str, Any] = {"do_sample": True, **sampling} if sampling and not seeds else {"do_sample": False}
    if isinstance(model, FSDPModule):  # its forwards are made together: a rank that is done goes on until all are
        how["synced_gpus"] = True
    # A chat model may end its turn with a special token, which its generation config lists beside EOS.
    ends = model.generation_config.eos_token_id or tokenizer.eos_token_id
    how["logits_processor"] = [_Finite(model, ids.size(1), ends)]
    if seeds:
        how["logits_processor"].append(_OwnDraws(seeds, sampling["temperature"], sampling["top_p"]))
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
    new = out[:, ids.size(1) :]  # (B, new)
    read = (_are_ends(new, ends)[:, :-1].cumsum(-1) == 0).sum(-1).tolist()  # (B,) before the end, and not the last
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    for r, row in enumerate(rows):
        if row.begun:
            begun = tokenizer.decode(row.ids[len(row.ids) - row.begun :], skip_special_tokens=True)
            whole = tokenizer.decode(out[r, ids.size(1) - row.begun :], skip_special_tokens=True)
            # Decode both together to keep the space between them, unless a character is split between them.
            texts[r] = whole if whole.startswith(begun) else begun + texts[r]
    seconds = (time.perf_counter() - began) / len(rows)
    return [
        Continuation(text, len(row.ids) + count, seconds) for text, row, count in zip(texts, rows, read, strict=True)
    ]


def _are_ends(ids: torch.Tensor, ends: int | list[int] | None) -> torch.Tensor:
    """Which of ``ids`` end a turn; of their shape."""
    return torch.zeros_like(ids).bool() if ends is None else torch.isin(ids, torch.tensor(ends, device=ids.device))


class _Finite:
    """Raises :func:`not_finite` where the logits that decide a token are not finite.

    Args:
        start: tokens of the padded prompts.
        ends: tokens that end an answer.
    """

    def __init__(self, model: PreTrainedModel, start: int, ends: int | list[int] | None) -> None:
        self._model, self._start, self._ends = model, start, ends

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """``scores``: logits (B, V); −∞ rules a token out, and is not an error."""
        broken = ~scores.amax(-1).isfinite()  # (B,)
        if not bool(broken.any()):  # generate, too, waits for the device once a token
            return scores
        ended = _are_ends(input_ids[:, self._start :], self._ends).any(-1)  # (B,)
        if bool((broken & ~ended).any()):
            raise not_finite(self._model)
        return scores.masked_fill(broken[:, None], 0.0)  # nothing reads these tokens, but NaN cannot be sampled


class _OwnDraws:
    """Turns a greedy choice into a sample by ruling out every token but the drawn one.

    Each row has its own generator, which gives one number in [0, 1) per token, the same on every device. The token is
    the first one whose cumulative probability exceeds that number.

    Args:
        seeds: one per row.
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
        logits = (logits - logits.amax(-1, keepdim=True)) / self._temperature  # no overflow at low temperatures
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
    """The first batch uses the seed itself. The others must not depend on which were drawn before, or where."""
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
    """Log-probability of each answer, including EOS, given its prompt.

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
    """Log-probability of each row's tokens from ``starts`` on, given those before.

    Args:
        rows: token ids, one list per text. starts: index of the first scored token, 1 or more.

    Returns:
        (sum of log-probabilities in nats (N,) float64, number of tokens (N,) int64), on the CPU.

    Raises:
        RunError: a log-probability is NaN.
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
    """Sums (B,) float64 for one batch. job: ids, attention mask and which tokens are scored, (B, T) each."""
    ids, mask, scored = job
    with evaluating(model):
        ids, mask = ids.to(model.device), mask.to(model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]  # (B, T-1, V)
        logps = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].cpu()  # (B, T-1)
    sums = logps.double().masked_fill(~scored[:, 1:], 0.0).sum(-1)
    if bool(sums.isnan().any()):
        raise not_finite(model)
    return sums


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
