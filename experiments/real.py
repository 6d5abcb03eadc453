"""Where the term pays on a real model: methods and weights side by side, on human pairs and on mixed ones.

    python experiments/real.py --data path/to/data                 # every arm, one seed; resumes
    python experiments/real.py --data path/to/data --only DPO DPO+PLOT --seeds 0 1 2
    python experiments/real.py --report                            # docs/results.md from the records

SmolLM2-135M-Instruct, one run after another. Each leaves one record under experiments/study/records, and is not run
again while it is there; the answers that were judged lie under --output, for reading.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_callback import PrinterCallback

from plot_align.bench import without_plot
from plot_align.demo import data as ours
from plot_align.demo.fetch import fetch
from plot_align.demo.train import quiet
from plot_align.environment import fast_bf16
from plot_align.inference.chat import prompt_ids
from plot_align.preference.estimation import estimate
from plot_align.records import write_record
from plot_align.trl import attach
from study import data
from study.arms import ARMS, Arm
from study.attacks import attacked
from study.measures import OPENERS, Bench, autocast_once, own_answers, sequence
from study.terms import Beside, Contexts, States, TriedTerm, hooked

RECORDS = Path(__file__).parent / "study" / "records"
PAIRS, STEPS, RATE = 8, 20, 4e-5


class Study:
    """What all runs on one kind of data share: the base model, the pairs, the measures."""

    def __init__(self, model: Path, kind: str, folder: Path, output: Path, each: int) -> None:
        self.path, self.kind, self.output = model, kind, output
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        human, held_out = data.split(data.human_pairs(folder, self.tokenizer))
        helpful, held_out_helpful = data.split(data.helpful_pairs(self.tokenizer))
        self.kinds = [human, helpful] if kind == "mixed" else [human]
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16()):
            self.bench = Bench(self.load(), self.tokenizer, folder, [held_out, held_out_helpful], each)
        pool = data.as_dataset([row for pairs in self.kinds for row in pairs])
        self.preference = estimate(pool, self.tokenizer, max_length=data.MAX_LENGTH + 2, progress=False)
        self._states: States | None = None

    def load(self, dtype: torch.dtype = torch.float32) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=dtype)

    @property
    def states(self) -> States:
        if self._states is None:
            pairs = [row for kind in self.kinds for row in kind]
            self._states = States(self.load(), self.tokenizer, pairs, self.output / f"states-{self.kind}.pt")
        return self._states

    def train(self, arm: Arm, seed: int) -> tuple[Any, dict[str, float]]:
        """The tuned model, and what training logged in the mean of its last steps."""
        rows = data.draw(self.kinds, PAIRS * STEPS, PAIRS, seed, self.tokenizer)
        trainer = _trainer(arm, self.load(), self.tokenizer, rows, seed, self.output / "trainer")
        trainer.remove_callback(PrinterCallback)
        handle = None if arm.plot is None else attach(trainer, self.preference, arm.plot)
        before = None
        if arm.contexts is not None or arm.rejected:
            contexts = None
            if arm.contexts is not None:
                name, clusters = arm.contexts
                contexts = Contexts(name, self.states, len(self.tokenizer), clusters)
            term = TriedTerm.of(handle.term, contexts, arm.rejected)
            if contexts is not None:

                def before(inputs: dict[str, Any]) -> None:
                    term.batch_contexts = contexts.batch(inputs["input_ids"], inputs["attention_mask"])

        with without_plot(trainer) if arm.plot is None and arm.method != "pro" else nullcontext():
            if before is not None or arm.beside is not None:
                hooked(trainer, before, None if arm.beside is None else self._beside(arm, seed, handle))
            trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry][-STEPS // 2 :]
        logged = {k: sum(e[k] for e in log if k in e) / len(log) for k in log[-1] if isinstance(log[-1][k], float)}
        return trainer.model, logged

    def _beside(self, arm: Arm, seed: int, handle: Any) -> Beside:
        kind, weight = arm.beside
        if kind == "recovery":
            found = []
            for request, begun, refusal in data.recovery_rows(STEPS * Beside.ROWS, seed):
                start = prompt_ids(self.tokenizer, [request])[0]
                start = start + self.tokenizer(begun, add_special_tokens=False)["input_ids"]
                answer = self.tokenizer(" " + refusal, add_special_tokens=False)["input_ids"]
                found.append(sequence(start, [*answer, self.tokenizer.eos_token_id]))
            return Beside("nll", weight, found, self.load())
        base = self.load()
        asked = random.Random(seed).sample([b.prompt for b in ours.benign("train")], STEPS * Beside.ROWS)
        divergence = None
        if kind == "w1":
            from plot_align.plot import PlotLoss

            divergence = PlotLoss(self.preference, base.get_input_embeddings().weight.detach()).divergence
        return Beside(kind, weight, own_answers(base, self.tokenizer, asked), base, divergence)


def _trainer(arm: Arm, model: Any, tokenizer: Any, rows: list[data.Pair], seed: int, output: Path) -> Any:
    from plot_align.methods.pro import PROConfig, PROTrainer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    shared = {
        "output_dir": str(output), "max_steps": STEPS, "per_device_train_batch_size": len(rows) // STEPS,
        "learning_rate": RATE, "warmup_steps": STEPS // 8,
        "bf16": fast_bf16(), "use_cpu": not torch.cuda.is_available(), "seed": seed, "gradient_checkpointing": False,
        "save_strategy": "no", "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "max_length": None,
        "dataloader_pin_memory": False, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    pairs = data.as_dataset(rows)
    match arm.method:
        case "dpo":
            args = DPOConfig(**{"beta": 0.1, **shared, **arm.options})
            return DPOTrainer(model=model, args=args, train_dataset=pairs, processing_class=tokenizer)
        case "sft":
            chosen = pairs.remove_columns("rejected").rename_column("chosen", "completion")
            args = SFTConfig(**shared, completion_only_loss=True, **arm.options)
            return SFTTrainer(model=model, args=args, train_dataset=chosen, processing_class=tokenizer)
        case "pro":
            args = PROConfig(**shared, **arm.options)
            return PROTrainer(model=model, args=args, train_dataset=pairs, processing_class=tokenizer)
    raise ValueError(arm.method)


def record_path(records: Path, kind: str, arm: str, seed: int) -> Path:
    return records / kind / arm.replace(" ", "_").replace(",", "").replace("'", "") / f"seed-{seed}.json"


def run(study: Study, records: Path, name: str, seed: int, attack: bool) -> str:
    """Trains and measures one arm, writes its record, and says the main figures in a line."""
    path = record_path(records, study.kind, name, seed)
    begun = time.monotonic()
    logged: dict[str, float] = {}
    if name == "base":
        model = study.load()
    else:
        model, logged = study.train(ARMS[name], seed)
    trained = time.monotonic() - begun
    with torch.autocast(model.device.type, torch.bfloat16, enabled=fast_bf16()), autocast_once(model):
        scores, texts = study.bench.run(model)
    if attack:
        folder = study.output / "attacks" / study.kind / path.parent.name / str(seed)
        scores |= attacked(model, study.tokenizer, folder, seed)
    rounded = {key: [float(f"{value:.5g}") for value in values] for key, values in scores.items()}
    folder = study.output / "answers" / study.kind / path.parent.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"seed-{seed}.json").write_text(json.dumps(texts, indent=1))
    plot = None if name == "base" or ARMS[name].plot is None else ARMS[name].plot.to_dict()
    config = {
        "arm": name, "data": study.kind, "steps": STEPS, "pairs": PAIRS, "learning_rate": RATE,
        "bf16": fast_bf16(), "openers": len(OPENERS), "plot": plot,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_record(path, "study", {"scores": rounded, "logged": logged}, config=config, seed=seed)

    def mean(key: str) -> float:
        return sum(scores[key]) / len(scores[key])

    keys = ("refuses/harmful", "refuses/StrongREJECT", "refuses/benign", "refuses/ordinary", "refuses/prefilled",
            "refusal/ours", "refusal/twins", "kl", "gained/chosen", "nll/chosen", "accuracy/implicit")  # fmt: skip
    figures = " ".join(f"{key.replace('refuses', 'R').replace('refusal', 'P')} {mean(key):.3f}" for key in keys)
    return f"{study.kind} {name} seed {seed}: {figures} ({trained:.0f} + {time.monotonic() - begun - trained:.0f} s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with HH-RLHF's pairs, StrongREJECT, XSTest, GSM8K, MT-Bench")
    parser.add_argument("--model", type=Path, help="checkpoint folder of a small chat model; default: SmolLM2's")
    parser.add_argument("--pairs", choices=["mixed", "human"], default="mixed", help="mixed: half of them ours")
    parser.add_argument("--output", type=Path, default=Path("runs/real"))
    parser.add_argument("--only", nargs="+", choices=["base", *ARMS], default=["base", *ARMS], metavar="ARM")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--requests", type=int, default=40, help="at most this many of other people's, of each kind")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--attack", action="store_true", help="attack as well: GCG, PEZ, best of n, prefill")
    parser.add_argument(
        "--report", action="store_true", help="write docs/results.md from the records, and train nothing"
    )
    options = parser.parse_args()
    quiet()
    if options.report:
        from study.report import write

        return write(options.records, Path(__file__).parents[1] / "docs")
    jobs = [(name, seed) for seed in options.seeds for name in options.only]
    jobs = [job for job in jobs if not record_path(options.records, options.pairs, *job).exists()]
    if not jobs:
        return None
    if options.data is None or not options.data.is_dir():
        parser.error(f"--data is {options.data}, expected the folder with the pairs and requests: name it")
    options.output.mkdir(parents=True, exist_ok=True)
    study = Study(options.model or fetch(), options.pairs, options.data, options.output, options.requests)
    for number, (name, seed) in enumerate(jobs, 1):
        Console(width=400).print(
            f"[{number}/{len(jobs)}] " + run(study, options.records, name, seed, options.attack),
            highlight=False,
            markup=False,
        )
    return None


if __name__ == "__main__":
    main()
