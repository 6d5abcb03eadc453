"""Settings and small fixtures shared by all tests. Nothing here reaches the network."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

# Before any library reads them: no hub, no telemetry, one thread for each of several test processes.
for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[_name] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# Where there is no GPU, Triton's kernels are interpreted: this is read when they are defined.
if not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd"))):
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Data sets that a test processes are cached for this run only, never in the user's cache.
_CACHE = tempfile.TemporaryDirectory(prefix="plot-align-tests-")
os.environ["HF_DATASETS_CACHE"] = _CACHE.name

import pytest  # noqa: E402 (the libraries that plugins import read the variables above)

if TYPE_CHECKING:
    from plot_align.sandbox import BaseConfig

ROOT = Path(__file__).resolve().parent.parent
pytest_plugins = ["trainers"]  # fixtures: a tiny trainer of every method


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real data sets; a test that needs one is skipped where they are not."""
    folder = Path(os.environ.get("PLOT_ALIGN_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set PLOT_ALIGN_DATA to the folder that holds it")
    return folder


@pytest.fixture(scope="session")
def pair_rows() -> list[dict[str, str]]:
    """24 preference pairs in standard format with an explicit prompt."""
    return _PAIRS


_PAIRS = [
    {
        "prompt": f"what is {left} plus {right} ?",
        "chosen": f" the sum is {left + right} , gladly .",
        "rejected": f" no idea , leave me alone {right} .",
    }
    for left in range(6)
    for right in range(4)
]


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level BPE tokenizer of 300 ids, trained on the pairs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for row in _PAIRS for text in row.values()), trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", model_max_length=512
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """A checkpoint folder: a Llama of two layers with random weights, and the tiny tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pairs as .jsonl, alone in a folder."""
    import json

    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in _PAIRS), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_config() -> BaseConfig:
    """The sandbox's base in a few steps."""
    from plot_align.sandbox import BaseConfig

    return BaseConfig(vocab_size=400, hidden_size=32, layers=1, heads=2, intermediate_size=48, steps=6, batch_size=8)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, tiny_config: BaseConfig) -> Path:
    """A checkpoint folder of the sandbox, chat template included; it has learnt next to nothing."""
    from plot_align.sandbox import base

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "_THREADS", 1)  # two threads only slow a tiny model down
        return base.build_base(seed=3, cache_dir=tmp_path_factory.mktemp("bases"), progress=False, config=tiny_config)
