"""When the monitor warns on a real model: runs that collapse, and healthy ones.

    python experiments/monitor.py                # five of each on SmolLM2-135M-Instruct, one record a run; resumes
    python experiments/monitor.py --report       # the table, from the records

DPO on our own pairs, 40 steps of 4, evaluated every ten. A run collapses by β = 0.01 and a learning rate that is
too large. Every fourth step the damage is measured on held-out data: KL to the base on the base's own answers (nats a
token), and nats that the chosen answers have lost. The table says at which step the first line was crossed, and what
share of the run's largest KL had been reached by then.
"""

from __future__ import annotations

import argparse
import random
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from plot_align import PreferenceMonitor
from plot_align.demo import data as ours
from plot_align.demo.fetch import fetch
from plot_align.demo.train import quiet
from plot_align.environment import fast_bf16, on_cpu
from plot_align.inference.scoring import divergences, score
from plot_align.records import read_record, write_record
from study.data import as_dataset
from study.measures import given_answers, own_answers

RECORDS = Path(__file__).parent / "study" / "records" / "monitor"
KINDS = {"collapses": {"beta": 0.01, "learning_rate": 5e-5}, "healthy": {"beta": 0.1, "learning_rate": 1e-5}}
PAIRS, HELD_OUT, EVERY = 4, 12, 4


class Damage(TrainerCallback):
    """Measures on held-out data what training has done, before it and every fourth step."""

    def __init__(self, base: Any, tokenizer: Any) -> None:
        self.base = base.eval()
        held_out = [row for row in ours.pairs("heldout") if row["kind"] != "harmful"][:HELD_OUT]
        rows = [(row["prompt"][0]["content"], row["chosen"][0]["content"]) for row in held_out]
        self.chosen = given_answers(tokenizer, rows)
        self.answers = own_answers(base, tokenizer, [prompt for prompt, _ in rows])
        self.before = score(base, self.chosen).logps
        self.curve: list[dict[str, float]] = []

    def measure(self, model: Any, step: int) -> None:
        training = model.training
        model.eval()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=fast_bf16()):
            kl = float(divergences(model, self.base, self.answers).mean())
            lost = float((self.before - score(model, self.chosen).logps).mean())
        model.train(training)
        self.curve.append({"step": step, "kl": kl, "chosen nats lost": lost})

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.curve = []
        self.measure(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % EVERY == 0 or state.global_step == state.max_steps:
            self.measure(model, state.global_step)


def run(path: Path, seed: int, steps: int, output: Path, options: dict[str, float]) -> dict[str, Any]:
    """One training, watched: what the record holds."""
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model, base = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for _ in range(2))
    rows = list(ours.pairs("train"))
    draw = random.Random(seed)
    pairs = as_dataset(draw.sample(rows, min(PAIRS * steps, len(rows))))
    held_out = as_dataset(list(ours.pairs("heldout").select(range(4))))
    args = DPOConfig(
        output_dir=str(output), max_steps=steps, per_device_train_batch_size=PAIRS, warmup_steps=steps // 8, **options,
        max_length=160, bf16=fast_bf16(), use_cpu=on_cpu(), seed=seed, gradient_checkpointing=False,
        save_strategy="no", eval_strategy="steps", eval_steps=max(1, steps // 4), logging_steps=1, report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = DPOTrainer(model, args=args, train_dataset=pairs, eval_dataset=held_out, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    monitor, damage = PreferenceMonitor(trainer), Damage(base, tokenizer)
    trainer.add_callback(monitor)
    trainer.add_callback(damage)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        trainer.train()
    said = [str(w.message) for w in caught if w.filename.endswith("monitor/callback.py")]
    logs = [
        {name: x for name, x in log.items() if name.startswith(("step", "monitor/"))}
        for log in trainer.state.log_history
        if any(name.startswith("monitor/") for name in log)
    ]
    return {"crossed": monitor.crossed, "said": said, "curve": damage.curve, "logs": logs}


def share_done(curve: list[dict[str, float]], step: int) -> float:
    """The KL at the last measurement up to ``step``, as a share of the largest one."""
    return [row["kl"] for row in curve if row["step"] <= step][-1] / max(row["kl"] for row in curve)


def table(records: list[dict[str, Any]]) -> str:
    """One row a run."""
    lines = [
        "| run | seed | warned at step | line | KL done by then | KL at the end | chosen nats lost |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        config, found = record["config"], record["results"]
        crossed, curve = found["crossed"], found["curve"]
        line = min(crossed, key=crossed.get, default=None)
        cells = ["never", "", ""]
        if line is not None:
            cells = [f"{crossed[line]} of {config['steps']}", line, f"{share_done(curve, crossed[line]):.0%}"]
        end = [f"{curve[-1]['kl']:.2f}", f"{curve[-1]['chosen nats lost']:.1f}"]
        lines.append(f"| {' | '.join([config['kind'], str(record['seed']), *cells, *end])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint folder of a small chat model; default: SmolLM2's")
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path("runs/monitor"))
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--report", action="store_true", help="print the table of the records, and train nothing")
    options = parser.parse_args()
    quiet()
    paths = {
        (kind, seed): options.records / kind / f"seed-{seed}.json" for kind in options.only for seed in options.seeds
    }
    if options.report:
        print(table([read_record(path, "monitor") for path in paths.values() if path.exists()]))
        return
    for (kind, seed), path in paths.items():
        if path.exists():
            continue
        output = options.output / kind / str(seed)
        found = run(options.model or fetch(), seed, options.steps, output, KINDS[kind])
        config = {"kind": kind, "steps": options.steps, "pairs": PAIRS, **KINDS[kind], "bf16": fast_bf16()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_record(path, "monitor", found, config=config, seed=seed)
        says = "; ".join(found["said"]) or "silent"
        Console(width=400).print(f"{kind} seed {seed}: {says}", highlight=False, markup=False)


if __name__ == "__main__":
    main()
