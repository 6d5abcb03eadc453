"""Where the term pays on a real model: losses and weights side by side, one seed, on the demo's requests and pairs.

    python experiments/real.py                      # SmolLM2-135M-Instruct, about two minutes an arm on two cores
    python experiments/real.py --only "DPO β 0.5"   # some of the arms

Trains and judges one arm after another under runs/real, and prints the table. Finished arms are not run again; their
weights are deleted once they are judged. A first look (n 40 to 100, one seed): it says what to try with more.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import yaml
from transformers import AutoTokenizer

from plot_align import PlotConfig, estimate
from plot_align.cli.main import main as plot_align
from plot_align.demo import data
from plot_align.demo.fetch import fetch
from plot_align.demo.train import Arm, Setting, quiet, train
from plot_align.environment import fast_bf16
from plot_align.records import read_record
from plot_align.redteam import write_behaviors

DPO, SFT = ("sigmoid",), ("sigmoid", "sft")


class Trial(NamedTuple):
    loss_type: tuple[str, ...]
    plot: PlotConfig | None = None
    beta: float = 0.1


TRIALS = {
    "DPO": Trial(DPO),
    "DPO β 0.05": Trial(DPO, beta=0.05),
    "DPO β 0.5": Trial(DPO, beta=0.5),
    "DPO+SFT": Trial(SFT),
    "APO-zero": Trial(("apo_zero",)),
    "DPO+PLOT": Trial(DPO, PlotConfig()),
    "DPO+PLOT ρ 0.1": Trial(DPO, PlotConfig(balance_ratio=0.1)),
    "DPO+PLOT ρ 0.25": Trial(DPO, PlotConfig(balance_ratio=0.25)),
    "DPO+PLOT, the paper's, α 0.1": Trial(DPO, PlotConfig.paper()),
    "DPO+PLOT, the paper's, α 1": Trial(DPO, PlotConfig.paper(alpha=1.0)),
    "DPO+PLOT, the paper's, α 10": Trial(DPO, PlotConfig.paper(alpha=10.0)),
    "DPO+SFT+PLOT": Trial(SFT, PlotConfig()),
}  # fmt: skip
COLUMNS = [
    ("direct", "asr", "complies, harmful ↓", 2),
    ("over_refusal", "refused", "refuses, harmless ↓", 2),
    ("preference_accuracy", "accuracy", "ranks pairs correctly ↑", 2),
    ("displacement", "chosen", "chosen, nats gained ↑", 1),
    ("kl", "kl", "KL to the base", 3),
]


def suite(folder: Path) -> Path:
    """All held-out requests and pairs, as files for the command."""
    folder.mkdir(parents=True, exist_ok=True)
    write_behaviors(folder / "harmful.csv", data.behaviors())
    write_behaviors(folder / "benign.csv", data.benign())
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": b.prompt}) + "\n" for b in data.benign()))
    data.pairs("heldout").to_json(folder / "heldout.jsonl")
    answers, pairs = {"max_new_tokens": 32}, {"pairs": f"{folder}/heldout.jsonl"}
    guards = {
        "over_refusal": {"kind": "over_refusal", "benign": f"{folder}/benign.csv", **answers},
        "displacement": {"kind": "displacement", **pairs},
        "kl": {"kind": "kl", "prompts": f"{folder}/prompts.jsonl", **answers},
    }
    content = {
        "harmlessness": {"direct": {"kind": "attack_success", "behaviors": f"{folder}/harmful.csv", **answers}},
        "helpfulness": {"preference_accuracy": {"kind": "preference_accuracy", **pairs}},
        "guards": guards,
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "suite.yaml"


def table(evaluation: Path) -> str:
    rows = ["| arm | " + " | ".join(title for *_, title, _ in COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    for name in ("base", *TRIALS):
        cells = []
        for measure, key, _, digits in COLUMNS:
            path = evaluation / name / f"{measure}.json"
            if not path.exists():
                break
            entry = read_record(path, "evaluation")["results"]["quantities"][key]
            cells.append(f"{entry['value']:.{digits}f}")
        if len(cells) == len(COLUMNS):
            rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/real"))
    parser.add_argument("--only", nargs="+", choices=list(TRIALS), default=list(TRIALS), metavar="ARM")
    parser.add_argument("--steps", type=int, default=16)
    options = parser.parse_args()
    quiet()
    model, output = fetch(), options.output
    pairs = data.training_pairs()
    preference = estimate(pairs, AutoTokenizer.from_pretrained(model), max_length=160, progress=False)
    output.mkdir(parents=True, exist_ok=True)
    preference.save(output / "preference.safetensors")
    measures = suite(output / "data")
    for name in ("base", *options.only):
        folder = model
        if name != "base":
            trial, folder = TRIALS[name], output / "models" / name
            setting = Setting(options.steps, beta=trial.beta, bf16=fast_bf16())
            train(Arm(name, trial.loss_type, trial.plot), setting, model, pairs, preference, folder)
        command = ["evaluate", f"{name}={folder}", "--suite", str(measures), "--reference", str(model), "--quiet"]
        command += ["--output", str(output / "evaluation"), "--batch_size", "64"]
        command += ["--dtype", "bfloat16"] if fast_bf16() else []
        if not (output / "evaluation" / name / "kl.json").exists() and plot_align(command) != 0:
            raise SystemExit(f"{name} could not be judged")
        if name != "base":
            for weights in folder.glob("*.safetensors"):
                weights.unlink()
        print(table(output / "evaluation"), flush=True)


if __name__ == "__main__":
    main()
