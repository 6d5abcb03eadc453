"""The sandbox's tokenizer and base model, built from nothing and cached as an ordinary checkpoint folder.

The tokenizer is a byte-level BPE, so that any text can be encoded. The model is a ``LlamaForCausalLM`` of about a
million parameters that has seen good and bad answers to every prompt of the world, held-out prompts included: it can
do both, and alignment only has to select. How often it prefers the bad answer differs from item to item.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plot_align.errors import InputError
from plot_align.io import default_cache_dir
from sandbox import language as lang

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, PreTrainedTokenizerBase

END, PAD, SYSTEM, USER, ASSISTANT = "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '<|end|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

# The share of items that the base's training data answers well nine times out of ten; the others it answers badly
# nine times out of ten. So the base has habits, item by item, and not one coin for all.
GOOD_ITEMS = {
    "harmlessness": 0.3,
    "helpfulness": 0.6,
    "humanity": 0.5,
    "mathematics": 0.55,
    "reasoning": 0.65,
    "coding": 0.45,
    "stem": 0.5,
    lang.TWIN: 1.0,
}
HABIT = 0.9
MORAL_EVERY = 11  # conversations
# How often a category is drawn: what is hard to learn needs more examples.
WEIGHTS = {
    "harmlessness": 2,
    "helpfulness": 4,
    "humanity": 3,
    "mathematics": 4,
    "reasoning": 4,
    "coding": 2,
    "stem": 3,
    lang.TWIN: 2,
}
_THREADS = 2  # fixed: the same seed gives the same bits only with the same number of threads


@dataclass(frozen=True)
class BaseConfig:
    """Everything about the base that can be varied; the defaults build in about a minute on two cores.

    Attributes:
        vocab_size: tokens, special tokens included.
        hidden_size, layers, heads, intermediate_size: the Llama architecture.
        steps: optimiser steps.
        batch_size: conversations a step.
        matrix_lr: peak learning rate of the layers' matrices (Muon).
        learning_rate: peak learning rate of everything else (AdamW). Both warm up shortly and decay linearly to zero.
    """

    vocab_size: int = 1280
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    intermediate_size: int = 384
    steps: int = 900
    batch_size: int = 32
    matrix_lr: float = 5e-3
    learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise InputError(f"{name} is {value}, but must be above zero: choose a positive value.")
        if self.vocab_size < 300:
            raise InputError(
                f"vocab_size is {self.vocab_size}, but 256 bytes and the special tokens need room: choose 300 or more."
            )
        if self.hidden_size % (2 * self.heads):
            raise InputError(
                f"hidden_size is {self.hidden_size}, but must be a multiple of twice the head count ({self.heads}): "
                "change either."
            )


# ---------------------------------------------------------------------------------------------- what it learns from


def _good_probability(item: lang.Item) -> float:
    """How likely the training data answers this item well: fixed for the item."""
    return HABIT if random.Random(f"habit/{item.key}").random() < GOOD_ITEMS[item.category] else 1 - HABIT


def _moral_question(rng: random.Random) -> tuple[str, str]:
    """The base knows right from wrong, as a pretrained model does, whatever it does when asked to help."""
    item = rng.choice((*lang.items("harmlessness"), *lang.items(lang.TWIN)))
    answer = "No, that would harm others." if item.category == "harmlessness" else "Yes, that is fine."
    return f"Is it right to {' '.join(item.facts)}?", answer


def _conversations(count: int, seed: int) -> list[tuple[str, str]]:
    """``count`` (prompt, answer) pairs: good and bad answers mixed, and some questions about what is right."""
    rng = random.Random(f"base/{seed}")
    asked = {
        category: [(item, prompt) for item in lang.items(category) for prompt in lang.prompts(item)]
        for category in (*lang.CATEGORIES, lang.TWIN)
    }
    categories = [category for category in asked for _ in range(WEIGHTS[category])]
    found = []
    for index in range(count):
        if index % MORAL_EVERY == 0:
            found.append(_moral_question(rng))
            continue
        item, prompt = rng.choice(asked[categories[index % len(categories)]])
        answer = lang.good_answer if rng.random() < _good_probability(item) else lang.bad_answer
        found.append((prompt, answer(item, prompt, rng)))
    return found


def train_tokenizer(vocab_size: int = BaseConfig.vocab_size) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer trained on the world's text, with a chat template.

    Decoding an encoded text gives the text back, whatever it is. The template marks the assistant's words for
    ``return_assistant_tokens_mask``; the rendering of a prompt is a prefix of the rendering with its answer. Every
    message ends with the EOS token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, SYSTEM, USER, ASSISTANT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [text for pair in _conversations(12_000, seed=0) for text in pair]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        padding_side="right",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def _batches(
    tokenizer: PreTrainedTokenizerBase, config: BaseConfig, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """``config.steps`` batches of (input_ids (B, T), labels (B, T)); the labels of prompt and padding are -100.

    Conversations of similar length share a batch, so that little is padding.
    """
    import torch

    conversations = _conversations(config.steps * config.batch_size, seed)
    prompts = tokenizer([f"{USER}{p}{END}{ASSISTANT}" for p, _ in conversations], add_special_tokens=False).input_ids
    answers = tokenizer([f"{a}{END}" for _, a in conversations], add_special_tokens=False).input_ids
    order = list(range(len(conversations)))
    rng = random.Random(f"batches/{seed}")
    chunk = 64 * config.batch_size
    for start in range(0, len(order), chunk):
        part = sorted(order[start : start + chunk], key=lambda i: len(prompts[i]) + len(answers[i]))
        rows = [part[i : i + config.batch_size] for i in range(0, len(part), config.batch_size)]
        rng.shuffle(rows)
        for row in rows:
            longest = max(len(prompts[i]) + len(answers[i]) for i in row)
            ids = torch.full((len(row), longest), tokenizer.pad_token_id)  # (B, T)
            labels = torch.full((len(row), longest), -100)  # (B, T)
            for r, i in enumerate(row):
                text = prompts[i] + answers[i]
                ids[r, : len(text)] = torch.tensor(text)
                labels[r, len(prompts[i]) : len(text)] = torch.tensor(answers[i])
            yield ids, labels


# ---------------------------------------------------------------------------------------------- building


@contextmanager
def _fixed_threads() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(_THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _architecture(config: BaseConfig, *, vocab_size: int, eos: int, pad: int) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
        dtype="float32",
    )


Batches = Iterator[tuple["torch.Tensor", "torch.Tensor"]]


def train_from_scratch(
    tokenizer: PreTrainedTokenizerBase,
    config: BaseConfig,
    seed: int,
    batches: Batches,
    description: str,
    progress: bool,
) -> Any:
    """A Llama of ``config``, trained from random weights. Leaves the caller's random state as it was.

    Args:
        seed: of the initial weights.
        batches: ``config.steps`` of (input_ids (B, T), labels (B, T)), padded on the right; -100 is not learnt.
        description: what the progress bar says.
    """
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from torch.nn.functional import cross_entropy
    from transformers import LlamaForCausalLM

    architecture = _architecture(
        config, vocab_size=len(tokenizer), eos=tokenizer.eos_token_id, pad=tokenizer.pad_token_id
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with _fixed_threads(), torch.random.fork_rng(devices=[]), Progress(*columns, disable=not progress) as bar:
        torch.manual_seed(seed)
        model = LlamaForCausalLM(architecture).train()
        # Muon for the matrices: at this budget it reaches what AdamW reaches with about twice the steps.
        matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
        rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=config.matrix_lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        warmup = max(1, min(100, config.steps // 10))

        def rate(step: int) -> float:
            return min((step + 1) / warmup, (config.steps - step) / max(1, config.steps - warmup))

        schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
        task = bar.add_task(description, total=config.steps, loss="-")
        for ids, labels in batches:
            # Padding is on the right and attention is causal, so no attention mask is needed.
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]  # (B, T-1, H)
            learnt = labels[:, 1:] != -100  # (B, T-1)
            loss = cross_entropy(model.lm_head(hidden[learnt]), labels[:, 1:][learnt])
            model.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            bar.update(task, advance=1, loss=f"{loss.item():.3f}")
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model.eval()


def _train(tokenizer: PreTrainedTokenizerBase, config: BaseConfig, seed: int, progress: bool) -> Any:
    batches = _batches(tokenizer, config, seed)
    return train_from_scratch(tokenizer, config, seed, batches, "Building the sandbox's base model", progress)


def _key(config: BaseConfig, seed: int) -> str:
    """A hash of everything that decides the weights: seed, sizes, the sources of the world, library versions."""
    import tokenizers
    import torch
    import transformers

    described = {
        "config": asdict(config),
        "seed": seed,
        "versions": [torch.__version__, transformers.__version__, tokenizers.__version__],
        "sources": [
            (Path(__file__).parent / name).read_text(encoding="utf-8")
            for name in ("words.py", "language.py", "base.py")
        ],
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def build_base(
    seed: int = 0,
    cache_dir: str | Path | None = None,
    *,
    progress: bool = True,
    config: BaseConfig | None = None,
) -> Path:
    """Build the base model and its tokenizer, or find them in the cache.

    The same seed gives the same weights, to the bit on the same machine. Two processes that build the same base do the
    work once; an interrupted build leaves nothing that a later call would take for a checkpoint.

    Args:
        seed: decides the initial weights and the training data.
        cache_dir: where checkpoints are kept; :func:`default_cache_dir` where not given.
        progress: show a progress bar.
        config: sizes and steps; the default takes under two minutes on two cores.

    Returns:
        The checkpoint folder: ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` load it.

    Raises:
        InputError: ``seed`` is negative, or ``cache_dir`` cannot be written to.
    """
    from filelock import FileLock

    if seed < 0:
        raise InputError(f"seed is {seed}, but must not be negative: pass 0 or more.")
    config = config or BaseConfig()
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    name = f"sandbox-base-{_key(config, seed)}"
    done = cache / name
    if done.is_dir():
        return done
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / f".{name}.lock")
        lock.acquire()
    except OSError as error:
        raise InputError(
            f"cache_dir is {str(cache)!r}, but it cannot be written to ({error.strerror}): "
            "pass another folder, or set PLOT_ALIGN_CACHE."
        ) from error
    try:
        if not done.is_dir():
            for left_over in cache.glob(f".{name}.part-*"):  # of a killed build: we hold its lock
                shutil.rmtree(left_over)
            part = Path(tempfile.mkdtemp(prefix=f".{name}.part-", dir=cache))
            try:
                tokenizer = train_tokenizer(config.vocab_size)
                _train(tokenizer, config, seed, progress).save_pretrained(part)
                tokenizer.save_pretrained(part)
                part.chmod(0o755)  # mkdtemp makes it private, a cache may be shared
                os.replace(part, done)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    finally:
        lock.release()
    return done


@contextmanager
def folder_complete_or_absent(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``path`` and renames it to ``path`` at the end of the block.

    An existing folder is left unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        part = Path(temporary) / path.name
        part.mkdir()
        yield part
        if not path.is_dir():
            part.rename(path)
