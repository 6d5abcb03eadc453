"""What the commands under test read: tiny checkpoints, pairs, requests, a wheel. Made once, with no network."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for _folder in ("tests", "tests/demo"):  # which build tiny models and a wheel already
    sys.path.append(str(ROOT / _folder))

PAIRS = 48
SUITE = """\
helpfulness:
  accuracy: {kind: preference_accuracy, pairs: inputs/chat.jsonl, limit: 6}
harmlessness:
  prefill: {kind: attack_success, behaviors: inputs/behaviors.csv, targets: inputs/targets.json, attack: prefill,
            attack_options: {tokens: 2}, max_new_tokens: 4}
guards:
  refusals: {kind: over_refusal, benign: inputs/benign.csv, max_new_tokens: 4}
  drift: {kind: drift, pairs: inputs/chat.jsonl, limit: 4}
  kl: {kind: kl, prompts: inputs/prompts.jsonl, limit: 3, max_new_tokens: 4}
"""
TRAINING = {
    "model_name_or_path": "inputs/llama",
    "dataset_name": "inputs/pairs.jsonl",
    "max_steps": 6,
    "save_steps": 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "alpha": 0.1,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "use_cpu": True,
    "dtype": "float32",
}


def make(folder: Path) -> None:
    """Fill ``folder``, unless it is filled."""
    if (folder / "made").exists():
        return
    import yaml

    from plot_align.io import write_json
    from plot_align.redteam.behaviors import Behavior, write_behaviors

    tiny = _tiny()
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "prompt": f"what is {i} plus {i % 7} ?",
            "chosen": f" the sum is {i + i % 7} , gladly . " + "Take care . " * (i % 5),
            "rejected": f" no idea , leave me alone {i} . " + "Go away ! " * (i % 3),
        }
        for i in range(PAIRS)
    ]
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    chat = [{side: [{"role": roles[side], "content": row[side]}] for side in roles} for row in rows]
    _lines(folder / "pairs.jsonl", rows)
    _lines(folder / "chat.jsonl", chat)
    _lines(folder / "prompts.jsonl", [{"prompt": text} for text in tiny.BENIGN.values()])
    texts = [text for row in rows for text in row.values()]
    both = (*tiny.HARMFUL.values(), *tiny.BENIGN.values())
    texts += [f"{text} {answer}" for text in both for answer in tiny.ANSWERS]
    special = {"pad_token": "<|pad|>", "eos_token": "<|end|>"}
    more = ["<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer = tiny._train_tokenizer(texts, 400, **special, extra_special_tokens=more)
    tiny._save_llama(tokenizer, folder / "llama")
    tokenizer.chat_template = tiny.CHAT_TEMPLATE
    tiny._save_llama(tokenizer, folder / "base")
    _tuned(folder / "base", folder / "tuned")
    for name, requests in (("behaviors", tiny.HARMFUL), ("benign", tiny.BENIGN)):
        rows_of = [Behavior(key, text, "standard", name) for key, text in requests.items()]
        write_behaviors(folder / f"{name}.csv", rows_of[:3])
    targets = {name: f"Sure, here is how to {name.replace('_', ' ')}." for name in tiny.HARMFUL}
    write_json(folder / "targets.json", targets)
    gcg = {"steps": 2, "search_width": 4, "top_k": 4, "suffix_tokens": 3}
    attacks = {"prefill": {"tokens": 2}, "best_of_n": {"n": 2}, "gcg": gcg}
    (folder / "attacks.yaml").write_text(yaml.safe_dump(attacks), encoding="utf-8")
    (folder / "suite.yaml").write_text(SUITE, encoding="utf-8")
    training = {**TRAINING, "output_dir": "out"}
    for name, content in {
        "dpo.yaml": training,
        "resume.yaml": {**training, "resume_from_checkpoint": True},
        "sweep.yaml": {**TRAINING, "max_steps": 2, "save_strategy": "no"},
    }.items():
        (folder / name).write_text(yaml.safe_dump(content), encoding="utf-8")
    _wheel(folder)
    (folder / "made").touch()


def _tiny() -> Any:
    """tests/conftest.py, which is not the only module of that name."""
    spec = importlib.util.spec_from_file_location("tiny_models", ROOT / "tests" / "conftest.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError("tests/conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _tuned(base: Path, folder: Path) -> None:
    """The same model, moved a little."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def _wheel(folder: Path) -> None:
    """A tiny model in a wheel, as ``fetch`` finds SmolLM2's, and what it should hold."""
    import test_fetch as parts

    tokenizer = parts._tokenizer()
    model = parts._llama(len(tokenizer))
    gguf = folder / "model.gguf"
    parts._write_gguf(gguf, model, tokenizer)
    content = gguf.read_bytes()
    gguf.unlink()
    wheel = folder / "wheels" / parts.WHEEL
    wheel.parent.mkdir()
    parts._write_wheel(wheel, {parts.ENTRY: content})
    packed = {
        "hub_id": "soak/Tiny-Llama",
        "license": "Apache-2.0",
        "requirement": "tiny-llm==0.1",
        "wheel_size": wheel.stat().st_size,
        "entry": parts.ENTRY,
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "converted_size": 4 * sum(parameter.numel() for parameter in model.parameters()),
    }
    (folder / "packed.json").write_text(json.dumps(packed), encoding="utf-8")


def take_tiny_wheel() -> None:
    """In a process under test: ``fetch`` takes the tiny model in the place of SmolLM2."""
    from plot_align.demo import fetch

    packed = fetch.PackedModel(**json.loads(Path("inputs/packed.json").read_text(encoding="utf-8")))
    fetch.SMOLLM2 = packed


def make_demo_small() -> None:
    """In a process under test: few steps and requests, in float32, and short answers."""
    from plot_align.demo import run as demo

    demo.QUICK = dataclasses.replace(
        demo.QUICK, steps=4, harmful=3, benign=4, pairs=6, attacked=2, prefill=1, samples=2, rounds=0
    )
    demo.NEW_TOKENS, demo.FLOAT32_STEPS = 6, 1
    demo.fast_bf16 = lambda: False
