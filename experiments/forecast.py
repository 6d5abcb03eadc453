"""Whether the doctor's forecast comes true, and what filters of pairs do, on a real model.

    python experiments/forecast.py --data path/to/data                          # eight sets × three losses; resumes
    python experiments/forecast.py --data path/to/data --filters --seeds 0 1 2  # by CHES, by length, at random
    python experiments/forecast.py --report                                     # docs/forecast.md from the records

What the filters did is on docs/results.md (`real.py --report`).

SmolLM2-135M-Instruct, 20 steps of four pairs at the learning rate of real.py. The forecast is made of 32 of the
training pairs before any training, for chosen answers that are held out; measured is what happens to these very
answers. Each forecast and each run leaves one record under experiments/study/records-forecast, and is not made again
while it is there.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_callback import PrinterCallback

from plot_align.demo.fetch import fetch
from plot_align.demo.train import quiet
from plot_align.doctor.forecast import LOSSES, OPTIMIZERS, Step, directions, effects
from plot_align.environment import fast_bf16
from plot_align.inference.ches import ches
from plot_align.inference.scoring import score
from plot_align.methods.filter import ches_scores, completion_lengths, keep_pairs, length_ratio
from plot_align.plot import PlotLoss
from plot_align.preference.estimation import estimate, scored_pairs
from plot_align.records import write_record
from plot_align.trl import attach
from real import RATE, STEPS, Study, _trainer
from study import data
from study.arms import ARMS
from study.measures import autocast_once
from study.sets import SETS, training_pairs

RECORDS = Path(__file__).parent / "study" / "records-forecast"
FORECAST, FILTERS = "forecast", "filters"  # folders of the records; runs lie in that of their loss
PAIRS = 4  # of a step: half of those of real.py, for eight times as many runs
BATCHES = 8  # of training pairs, of which the forecast is made
BY, SHARE = ("ches", "length", "random"), 0.6


class Set:
    """One preference set: training pairs, held-out pairs, and the token counts of all that may be trained on."""

    def __init__(self, name: str, folder: Path, tokenizer: Any) -> None:
        self.name, self.tokenizer = name, tokenizer
        halves = [data.split(pairs) for pairs in SETS[name](folder, tokenizer)]
        self.kinds = [training for training, _ in halves]
        self.held_out = [row for _, held_out in halves for row in held_out]
        pool = data.as_dataset([row for pairs in self.kinds for row in pairs])
        self.preference = estimate(pool, tokenizer, max_length=None, progress=False)

    def rows(self, seed: int) -> list[data.Pair]:
        return training_pairs(self.kinds, PAIRS * STEPS, PAIRS, seed, self.tokenizer)

    def scored(self, rows: list[data.Pair]) -> list[Any]:
        return list(scored_pairs(data.as_dataset(rows), self.tokenizer, max_length=None))


def path_of(records: Path, folder: str, name: str, seed: int) -> Path:
    return records / folder / name.replace(" ", "_").replace(",", "").replace("'", "") / f"seed-{seed}.json"


def make_forecast(model: Any, pairs: Set, seed: int, path: Path) -> None:
    """Record of the forecasts for the held-out chosen answers, by optimizer and loss, and of CHES."""
    stepped = pairs.scored(pairs.rows(seed))
    batches = [stepped[at : at + PAIRS] for at in range(0, len(stepped), PAIRS)][:BATCHES]
    answers = [chosen for chosen, _ in pairs.scored(pairs.held_out)]
    model.eval()
    plot = PlotLoss(pairs.preference, model.get_input_embeddings().weight.detach())
    found: dict[str, Any] = {}
    with _as_trained():
        steps = directions(model, batches, plot, Step(learning_rate=RATE), OPTIMIZERS)
        for (optimizer, loss), values in effects(model, answers, steps, RATE).items():
            found.setdefault(optimizer, {})[loss] = values
        similarity = torch.cat([ches(model, batch) for batch in batches])  # (pairs, 2)
    found["ches"], found["ches_normalised"] = similarity.T.tolist()
    found["tokens"] = [answer.stop - answer.start for answer in answers]
    _write(path, found, pairs.name, seed)


def make_run(model: Any, pairs: Set, loss: str, seed: int, path: Path, output: Path) -> None:
    """Record of what training did to the log-probability of the chosen answers, held out and trained on."""
    rows = pairs.rows(seed)
    sides = {"held_out": pairs.scored(pairs.held_out), "trained": pairs.scored(rows)}
    answers = {name: [chosen for chosen, _ in found] for name, found in sides.items()}
    before = log_p(model, answers)
    arm = ARMS[loss]
    trainer = _trainer(arm, model, pairs.tokenizer, rows, seed, output / "trainer")
    trainer.remove_callback(PrinterCallback)
    if arm.plot is not None:
        attach(trainer, pairs.preference, arm.plot)
    trainer.train()
    gained = {name: (found - before[name]).tolist() for name, found in log_p(trainer.model, answers).items()}
    _write(path, gained, pairs.name, seed, loss=loss)


def log_p(model: Any, answers: dict[str, list[Any]]) -> dict[str, torch.Tensor]:
    with _as_trained():
        return {name: score(model, found).logps for name, found in answers.items()}


def _as_trained() -> torch.autocast:
    """The precision of the training runs."""
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16, enabled=fast_bf16())


def kept(kinds: list[list[data.Pair]], by: str, seed: int, model: Any, tokenizer: Any) -> list[list[data.Pair]]:
    """The share of each kind of pairs that a filter keeps."""
    found = []
    for pairs in kinds:
        rows = data.as_dataset(pairs)
        if by == "ches":
            values = ches_scores(model, tokenizer, rows, max_length=None, progress=False)[:, 1]
        elif by == "length":
            values = length_ratio(completion_lengths(tokenizer, rows, max_length=None, progress=False))
        else:
            values = torch.rand(len(pairs), generator=torch.Generator().manual_seed(seed))
        keep = keep_pairs(values, SHARE, "lowest").tolist()
        found.append([row for row, keeps in zip(pairs, keep, strict=True) if keeps])
    return found


def make_filter(study: Study, whole: list[list[data.Pair]], by: str, seed: int, path: Path) -> None:
    """Record of all measures of DPO on the pairs that a filter keeps."""
    study.kinds = kept(whole, by, seed, study.load(), study.tokenizer)
    model, _ = study.train(ARMS["DPO"], seed)
    with _as_trained(), autocast_once(model):
        scores, _ = study.bench.run(model, probabilities=False)
    _write(path, scores, study.kind, seed, by=by, share=SHARE)


def _write(path: Path, found: dict[str, Any], name: str, seed: int, **more: Any) -> None:
    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rounded(inner) for key, inner in value.items()}
        return [float(f"{x:.5g}") for x in value]

    config = {"data": name, "steps": STEPS, "pairs": PAIRS, "learning_rate": RATE, "bf16": fast_bf16(), **more}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_record(path, "forecast study", {"scores": rounded(found)}, config=config, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="folder with HH-RLHF's pairs and GSM8K; for --filters, as for real.py"
    )
    parser.add_argument("--model", type=Path, help="checkpoint folder of a small chat model; default: SmolLM2's")
    parser.add_argument("--only", nargs="+", choices=list(SETS), default=list(SETS), metavar="SET")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--filters", action="store_true", help="train on filtered pairs, instead of forecasting")
    parser.add_argument("--requests", type=int, default=40, help="for --filters: at most this many of each kind")
    parser.add_argument("--output", type=Path, default=Path("runs/forecast"))
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--report", type=Path, nargs="?", const=Path(__file__).parents[1] / "docs" / "forecast.md",
                        metavar="FILE", help="write the page from the records, and train nothing")  # fmt: skip
    options = parser.parse_args()
    quiet()
    if options.report is not None:
        from study.forecasts import write

        return write(options.records, options.report)
    if options.data is None or not options.data.is_dir():
        parser.error(f"--data is {options.data}, expected the folder with the pairs and requests: name it")
    options.output.mkdir(parents=True, exist_ok=True)
    (filters if options.filters else forecasts)(options, options.model or fetch())
    return None


def forecasts(options: Any, source: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)

    for seed in options.seeds:
        for name in options.only:
            places = {folder: path_of(options.records, folder, name, seed) for folder in (FORECAST, *LOSSES)}
            missing = [folder for folder, path in places.items() if not path.exists()]
            pairs = Set(name, options.data, tokenizer) if missing else None
            for folder in missing:
                begun = time.monotonic()
                if folder == FORECAST:
                    make_forecast(load(), pairs, seed, places[folder])
                else:
                    make_run(load(), pairs, folder, seed, places[folder], options.output)
                _say(f"{name}, {folder}, seed {seed}: {time.monotonic() - begun:.0f} s")


def filters(options: Any, source: Path) -> None:
    jobs = [(by, seed, path_of(options.records, FILTERS, by, seed)) for seed in options.seeds for by in BY]
    jobs = [job for job in jobs if not job[2].exists()]
    if not jobs:
        return
    study = Study(source, "human", options.data, options.output, options.requests)
    whole = study.kinds
    for by, seed, path in jobs:
        begun = time.monotonic()
        make_filter(study, whole, by, seed, path)
        _say(f"kept by {by}, seed {seed}: {time.monotonic() - begun:.0f} s")


def _say(line: str) -> None:
    Console(width=400).print(line, highlight=False, markup=False)


if __name__ == "__main__":
    main()
