"""Four arms on real human preferences: HH-RLHF pairs, a small model first tuned on the chosen side.

    python experiments/hh_rlhf.py path/to/hh_rlhf_harmless_2000.jsonl.gz --output runs/hh

A byte-level BPE tokenizer and a Llama of a million parameters are trained on the chosen side of 1,800 pairs; then
every arm tunes that same model on the 1,800 pairs, and the other 200 tell held-out preference accuracy, the
log-probability of chosen and rejected completions and the distance to the target. A model this small says little
about language models people use; the data, the losses and every line of code are the real ones.

Finished runs under --output are read, not run again. Prints no text of the data set.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from plot_align.config import PlotConfig
from plot_align.preference.estimation import load_pairs
from plot_align.records import mean_of, read_record, write_record
from plot_align.trl import attach
from sandbox.runs import Arm, Probe, quiet

BASE = Arm("base")
ARMS = (
    Arm("DPO", ("sigmoid",)),
    Arm("DPO+SFT", ("sigmoid", "sft")),
    Arm("DPO+PLOT", ("sigmoid",), PlotConfig()),
    Arm("DPO+SFT+PLOT", ("sigmoid", "sft"), PlotConfig()),
)
HELD_OUT = 200
MAX_LENGTH = 128
KEYS = ("accuracy", "reward_accuracy", "chosen_logp", "rejected_logp", "chosen_nll", "distance")


def train_tokenizer(texts: list[str], size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def common(output: str, seed: int, steps: int, batch: int, rate: float) -> dict[str, Any]:
    return {
        "output_dir": output, "seed": seed, "max_steps": steps, "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": 40, "learning_rate": rate, "max_length": MAX_LENGTH, "bf16": False,
        "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no", "logging_steps": 10,
        "disable_tqdm": True,
    }  # fmt: skip


def build_base(train: Dataset, folder: Path, seed: int, steps: int) -> Path:
    """A small Llama tuned on the chosen side; kept under ``folder``."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.trainer_callback import PrinterCallback

    from trl import SFTConfig, SFTTrainer

    if (folder / "config.json").exists():
        return folder
    tokenizer = train_tokenizer(train["chosen"], 2048)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3,
            num_attention_heads=4, max_position_embeddings=1024, tie_word_embeddings=True,
            pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )  # fmt: skip
    chosen = train.select_columns(["chosen"]).rename_column("chosen", "text")
    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model,
            args=SFTConfig(**{**common(output, seed, steps, 16, 2e-3), "lr_scheduler_type": "cosine"}),
            train_dataset=chosen,
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
            trainer.save_model(partial)
            Path(partial).rename(folder)
            Path(partial).mkdir()  # for the context to remove
    return folder


def run(arm: Arm, base: Path, train: Dataset, heldout: Dataset, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.trainer_callback import PrinterCallback

    from trl import DPOConfig, DPOTrainer

    plot = None if arm.plot is None else arm.plot.to_dict()
    config = {"arm": arm.name, "plot": plot, "base": base.name, **options(args)}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:10]
    path = args.output / f"{arm.name.lower().replace('+', '-')}-seed{seed}-{digest}.json"
    if path.exists():
        return read_record(path, "hh-run")["results"]
    with tempfile.TemporaryDirectory() as output:
        settings = common(output, seed, args.steps, 16, args.learning_rate)
        trainer = DPOTrainer(
            AutoModelForCausalLM.from_pretrained(base),
            args=DPOConfig(**settings, loss_type=list(arm.loss_type or ("sigmoid",)), truncation_mode="keep_end"),
            train_dataset=train,
            eval_dataset=heldout,
            processing_class=AutoTokenizer.from_pretrained(base),
        )
        probe = Probe(trainer, PlotConfig.paper())
        if arm.plot is not None:
            attach(trainer, config=arm.plot)
        trainer.remove_callback(PrinterCallback)
        if arm.loss_type:
            trainer.train()
        results = {**judge(trainer), "distance": probe.distance(trainer.model)}
    write_record(path, "hh-run", results, config=config, seed=seed)
    return results


def judge(trainer: Any) -> dict[str, float]:
    """Held-out log-probabilities, and pairs ordered rightly: by themselves, and by DPO's implicit reward."""
    ours, tokens = log_probs(trainer.model, trainer.eval_dataset)
    reference, _ = log_probs(trainer.ref_model, trainer.eval_dataset)
    pairs = len(ours["chosen"])
    margins = [c - r for c, r in zip(ours["chosen"], ours["rejected"], strict=True)]
    reference_margins = [c - r for c, r in zip(reference["chosen"], reference["rejected"], strict=True)]
    return {
        "accuracy": sum(m > 0 for m in margins) / pairs,
        "reward_accuracy": sum(m > b for m, b in zip(margins, reference_margins, strict=True)) / pairs,
        "chosen_logp": math.fsum(ours["chosen"]) / pairs,
        "rejected_logp": math.fsum(ours["rejected"]) / pairs,
        "chosen_nll": -math.fsum(ours["chosen"]) / tokens,
    }


@torch.no_grad()
def log_probs(model: Any, dataset: Dataset) -> tuple[dict[str, list[float]], int]:
    """Log-probability of each completion in nats, from full logits, and the number of chosen tokens."""
    model.eval()
    sums: dict[str, list[float]] = {"chosen": [], "rejected": []}
    tokens = 0
    for row in dataset:
        for side in sums:
            completion = row[f"{side}_ids"]
            ids = torch.tensor([(row["prompt_ids"] + completion)[-MAX_LENGTH:]])
            scored = min(len(completion), ids.size(1) - 1)
            log_p = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            sums[side].append(float(log_p[len(log_p) - scored :].sum()))
            tokens += scored if side == "chosen" else 0
    return sums, tokens


def options(args: argparse.Namespace) -> dict[str, Any]:
    """What decides a result, the data by its content."""
    content = hashlib.sha256(args.data.read_bytes()).hexdigest()[:16]
    return {"data": args.data.name, "content": content, "steps": args.steps, "learning_rate": args.learning_rate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/hh"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=112, help="of 16 pairs; 112 are one epoch")
    parser.add_argument("--base-steps", type=int, default=400)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    quiet()
    console = Console()
    everything = load_pairs(str(args.data)).shuffle(seed=0)
    heldout = everything.select(range(HELD_OUT))
    train = everything.select(range(HELD_OUT, len(everything)))
    results: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in (BASE, *ARMS)}
    with Progress(console=console) as progress:
        task = progress.add_task("base", total=args.seeds * (len(ARMS) + 1) + 1)
        data = hashlib.sha256(args.data.read_bytes()).hexdigest()[:10]
        base = build_base(train, args.output / f"base-{data}-{args.base_steps}-steps", 0, args.base_steps)
        progress.advance(task)
        for seed in range(args.seeds):
            for arm in (BASE, *ARMS):
                progress.update(task, description=f"seed {seed}: {arm.name}")
                results[arm.name].append(run(arm, base, train, heldout, seed, args))
                progress.advance(task)
    table = Table("arm", *KEYS, title=f"200 held-out pairs, mean (smallest–largest) of {args.seeds} seeds")
    for name, found in results.items():
        cells = []
        for key in KEYS:
            entry = mean_of([r[key] for r in found])
            cells.append(f"{entry['value']:.3f} ({entry['spread'][0]:.3f}–{entry['spread'][1]:.3f})")
        table.add_row(name, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
