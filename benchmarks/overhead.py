"""What PLOT costs: the head alone and the whole DPO step, PLOT on against PLOT off on the same kernel.

    python benchmarks/overhead.py                                  # CPU shapes: vocabulary 32k and 128k
    python benchmarks/overhead.py --shapes llama-3.2-3b llama-3.1-8b qwen2.5-7b --dtype bfloat16   # a GPU

Arms are interleaved and compared round by round, so that a machine that slows down slows all of them. Ratios are to
``off``. In a whole step ``on`` is the default (a target from the micro-batch), ``measured`` a step of it that balances
alpha anew, as one in five does, and ``paper`` one target for all. Other arms show what was avoided: ``two-pass``
scores and sweeps in two head passes, ``materialised`` builds the logits. Weights are random. The last line printed is
the record's path.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from plot_align.fused import HeadSpec, fused_head
from plot_align.fused.reference import reference_head
from plot_align.geometry import line
from plot_align.losses import make_divergence
from plot_align.records import measure, write_record
from plot_align.training.overhead import Samples, interleaved, paired_ratio, without_plot


@dataclass(frozen=True)
class Shape:
    """A model's dimensions and a micro-batch of it: ``rows`` sequences (half chosen) of ``length`` tokens."""

    vocab: int
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    rows: int
    length: int


SHAPES = {
    "cpu-32k": Shape(32_000, 512, 4, 1408, 8, 8, 4, 128),
    "cpu-128k": Shape(128_256, 512, 4, 1408, 8, 8, 4, 128),
    "llama-3.2-3b": Shape(128_256, 3072, 28, 8192, 24, 8, 4, 1024),
    "llama-3.1-8b": Shape(128_256, 4096, 32, 14336, 32, 8, 4, 1024),
    "qwen2.5-7b": Shape(152_064, 3584, 28, 18944, 28, 4, 4, 1024),
}
HEAD_ARMS = ("off", "on", "on-all", "sequence", "token", "two-pass", "materialised")
STEP_ARMS = ("off", "on", "measured", "paper", "separate", "trl")
OUTPUTS = ("entropy", "mean_logits", "is_top1")  # what DPO asks of the head


class HeadProblem:
    """One head pass forward and backward: mean log-probability, plus W1 of the chosen half's output distribution."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        rows = shape.rows * shape.length
        torch.manual_seed(0)
        self.hidden = torch.randn(rows, shape.hidden, device=device, dtype=dtype).requires_grad_()
        self.weight = (torch.randn(shape.vocab, shape.hidden, device=device) * 0.02).to(dtype).requires_grad_()
        self.targets = torch.randint(shape.vocab, (rows,), device=device)
        target = torch.rand(shape.vocab, device=device, dtype=torch.float64)
        self.divergence = make_divergence("w1", target / target.sum(), line(self.weight)).to(device)
        chosen = (torch.arange(rows, device=device) < rows // 2).float()
        self.weights = chosen / chosen.sum()
        self.segments = torch.arange(rows, device=device) // shape.length
        self.sequences = shape.rows

    @contextlib.contextmanager
    def arm(self, arm: str) -> Iterator[Callable[[], None]]:
        yield functools.partial(self.step, arm)

    def step(self, arm: str) -> None:
        self.hidden.grad = self.weight.grad = None
        spec, targets = HeadSpec(outputs=OUTPUTS), self.targets
        head = (self.hidden, self.weight, None, targets, spec)
        match arm:
            case "off":
                loss = fused_head(*head).log_probs.mean()
            case "on" | "on-all":
                weights = self.weights if arm == "on" else torch.full_like(self.weights, 1 / len(self.weights))
                out = fused_head(*head, weights=weights)
                loss = out.log_probs.mean() + self._value(out.marginals[0])
            case "sequence":
                weights = self.weights * (self.sequences // 2)
                out = fused_head(*head, weights=weights, segments=self.segments, num_segments=self.sequences)
                loss = out.log_probs.mean() + self._value(out.marginals[: self.sequences // 2]).mean()
            case "token":
                out = fused_head(*head, weights=self.weights, divergence=self.divergence)
                loss = out.log_probs.mean() + (out.values * self.weights).sum()
            case "two-pass":
                loss = fused_head(*head).log_probs.mean()
                selected = self.weights > 0
                again = (self.hidden[selected], self.weight, None, targets[selected])
                out = fused_head(*again, weights=self.weights[selected])
                loss = loss + self._value(out.marginals[0])
            case "materialised":
                out = reference_head(*head, weights=self.weights)
                loss = out.log_probs.mean() + self._value(out.marginals[0])
        loss.backward()

    def _value(self, marginals: torch.Tensor) -> torch.Tensor:
        return self.divergence.value(marginals.double()).float()


class StepProblem:
    """One DPO training step of a random-weight Llama: forward, reference forward, backward; no optimiser."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM
        from trl import DPOConfig, DPOTrainer

        self.folder = tempfile.TemporaryDirectory()
        torch.manual_seed(0)
        tokenizer = _byte_tokenizer()
        config = LlamaConfig(
            vocab_size=shape.vocab, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
            intermediate_size=shape.intermediate, num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )  # fmt: skip
        with torch.device(device):
            model = LlamaForCausalLM(config).to(dtype)
            reference = LlamaForCausalLM(config).to(dtype)
        tokens = torch.randint(2, 256, (shape.rows, shape.length)).tolist()
        half = shape.rows // 2
        data = [
            {"prompt_ids": [], "chosen_ids": c, "rejected_ids": r}
            for c, r in zip(tokens[:half], tokens[half:], strict=True)
        ]
        from datasets import Dataset

        text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * half)
        args = DPOConfig(
            output_dir=self.folder.name, per_device_train_batch_size=half, report_to="none", disable_tqdm=True,
            bf16=False, use_cpu=device == "cpu", max_length=shape.length,
            gradient_checkpointing=device != "cpu",
        )  # fmt: skip
        self.trainer = DPOTrainer(
            model, ref_model=reference, args=args, train_dataset=text, processing_class=tokenizer
        )
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.create_optimizer()
        self.trainer.model_wrapped = self.model = self.trainer.accelerator.prepare(self.trainer.model)
        self.batch = self.trainer._prepare_inputs(self.trainer.data_collator(data))
        self.tokenizer = tokenizer

    @contextlib.contextmanager
    def arm(self, arm: str) -> Iterator[Callable[[], None]]:
        """The trainer with this arm's head for the duration of the block."""
        from plot_align.preference import PreferenceDistribution, vocabulary_fingerprint
        from plot_align.training import PlotConfig, attach

        trainer = self.trainer
        size = len(self.tokenizer)
        counts = torch.arange(1, size + 1)
        preference = PreferenceDistribution(
            counts,
            counts.flip(0),
            {"tokenizer": {"fingerprint": vocabulary_fingerprint(self.tokenizer), "size": size}},
        )
        match arm:
            case "trl":
                yield self.step
            case "off":
                with without_plot(trainer):
                    yield self.step
            case _:
                options: dict[str, Any] = {"grad_ratio_steps": 0}
                if arm == "separate":
                    options["plot_backend"] = "separate"
                config = PlotConfig.paper(**options) if arm == "paper" else PlotConfig(**options)
                handle = attach(trainer, preference, config)
                handle.alpha.observe(0, 1.0, 1.0)  # a step whose alpha is known

                def measured() -> None:
                    handle.alpha.last_step = -1  # as if it were a step that balances alpha anew
                    self.step()

                yield measured if arm == "measured" else self.step
                handle.detach()

    def step(self) -> None:
        self.model.zero_grad()
        self.trainer.training_step(self.model, dict(self.batch), None)


def _byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": 1, **{chr(c): c for c in range(2, 256)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")),
        pad_token="<pad>", eos_token="<eos>", unk_token="<pad>",
    )  # fmt: skip


def build(what: str, shape: Shape, device: str, dtype: torch.dtype) -> Any:
    return (HeadProblem if what == "head" else StepProblem)(shape, device, dtype)


def ratios(samples: dict[str, Samples]) -> dict[str, Any]:
    """Each arm against ``off``: medians of the rounds' ratios with the middle half."""
    result, base = {}, samples["off"]
    for arm, sample in samples.items():
        time, *half = paired_ratio(sample.seconds, base.seconds)
        memory, *_ = paired_ratio(sample.peak, base.peak)
        rounds = len(sample.seconds)
        result[arm] = {
            "time": measure(time, rounds, spread=(half[0], half[1])),
            "memory": measure(memory, rounds),
            "peak": measure(statistics.median(sample.peak), rounds, unit="B"),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["cpu-32k", "cpu-128k"])
    parser.add_argument("--what", nargs="+", choices=["head", "step"], default=["head", "step"])
    parser.add_argument("--arms", nargs="+", help="some of the arms, beside off; all without it")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--output", type=Path, default=Path("runs/overhead.json"))
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)

    from rich.console import Console
    from rich.table import Table

    console = Console()
    results: dict[str, Any] = {}
    for name in args.shapes:
        for what in args.what:
            arms = HEAD_ARMS if what == "head" else STEP_ARMS
            arms = tuple(arm for arm in arms if args.arms is None or arm in ("off", *args.arms))
            with console.status(f"{name}, {what}: {args.repeats + 1} rounds of {len(arms)} arms"):
                problem = build(what, SHAPES[name], args.device, dtype)
                device = torch.device(args.device)
                steps = {arm: functools.partial(problem.arm, arm) for arm in arms}
                samples = interleaved(steps, repeats=args.repeats, device=device)
                del problem
            results[f"{name}/{what}"] = ratios(samples)
            table = Table("arm", "time / off", "middle half", "memory / off", title=f"{name}, {what}")
            for arm, row in results[f"{name}/{what}"].items():
                low, high = row["time"]["spread"]
                table.add_row(
                    arm, f"{row['time']['value']:.3f}", f"{low:.3f} to {high:.3f}", f"{row['memory']['value']:.3f}"
                )
            console.print(table)
    config = {
        "shapes": {name: asdict(SHAPES[name]) for name in args.shapes},
        "dtype": args.dtype,
        "repeats": args.repeats,
    }
    print(json.dumps({"record": str(write_record(args.output, "overhead", results, config=config, seed=0))}))


if __name__ == "__main__":
    main()
