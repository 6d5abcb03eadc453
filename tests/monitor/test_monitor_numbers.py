"""The monitor's numbers against plain float64 forwards of the weights before each step, and what it leaves alone."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import AutoModelForCausalLM, TrainerCallback

from plot_align import PlotConfig, PreferenceMonitor, attach
from plot_align.errors import InputError
from plot_align.monitor.forwards import end_against_target, spread
from plot_align.trl.batches import policy_batch

TRL = Version(version("trl"))
FUSED = Version("1.15") <= TRL
CASES = [("dpo", False), ("dpo", True), ("cpo", False), ("orpo", True)]
if Version("1.8") <= TRL:
    CASES.append(("kto", True))
if FUSED:
    CASES.append(("pro", False))


class Kept(TrainerCallback):
    """The weights before each step, and the batches in order."""

    def __init__(self, trainer: Any) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.batches: list[dict[str, Any]] = []
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: self.batches.append(collate(rows)) or self.batches[-1]
        trainer.add_callback(self)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.weights.append({name: value.detach().clone() for name, value in model.state_dict().items()})


def answers_of(method: str, batch: dict[str, Any]) -> list[tuple[list[int], list[bool], bool]]:
    """Of each row of a batch the tokens without padding, which of them are the answer's, and whether it is chosen."""
    if "prompt_input_ids" in batch and method == "dpo":  # TRL before 0.29
        found = []
        for side in ("chosen", "rejected"):
            for prompt, answer in zip(batch["prompt_input_ids"], batch[f"{side}_input_ids"], strict=True):
                pad = 0  # <pad> of the tiny tokenizer
                ids, own = ([x for x in part.tolist() if x != pad] for part in (prompt, answer))
                found.append((ids + own, [False] * len(ids) + [True] * len(own), side == "chosen"))
        return found
    if method in ("cpo", "orpo"):
        sides = [(batch[f"{s}_input_ids"], batch[f"{s}_attention_mask"], batch[f"{s}_labels"] != -100, s == "chosen")
                 for s in ("chosen", "rejected")]  # fmt: skip
        rows = [(i, a, m, chosen) for *tensors, chosen in sides for i, a, m in zip(*tensors, strict=True)]
    else:
        ids, seen, answer = batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
        match method:
            case "dpo":
                chosen = [row < len(ids) // 2 for row in range(len(ids))]
            case "kto":
                chosen = [bool(x) for x in batch["label"]]
            case "pro":
                chosen = [first for n in batch["list_lengths"].tolist() for first in [True] + [False] * (n - 1)]
        rows = list(zip(ids, seen, answer.bool(), chosen, strict=True))
    return [(i[a == 1].tolist(), m[a == 1].tolist(), bool(chosen)) for i, a, m, chosen in rows]


def plain(model: Any, ids: list[int], answer: list[bool], end: int) -> tuple[float, float, float]:
    """Log-probability of the answer; the entropies and probabilities of ``end`` where it is predicted, summed."""
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    places = [t for t in range(1, len(ids)) if answer[t]]
    return (
        float(sum(log_p[t - 1, ids[t]] for t in places)),
        float(sum(-(log_p[t - 1].exp() * log_p[t - 1]).sum() for t in places)),
        float(sum(log_p[t - 1, end].exp() for t in places)),
    )


def expected(method: str, models: list[Any], batches: list[list[dict[str, Any]]], base: Any, end: int) -> dict:
    """Of the steps before one log: ``models`` at their beginning, ``batches`` in each."""
    gained: dict[bool, list[float]] = {True: [], False: []}
    entropy = mass = tokens = last_tokens = 0.0
    of_side = {True: 0, False: 0}  # tokens
    read = [(model, batch) for model, some in zip(models, batches, strict=True) for batch in some]
    if not FUSED or method in ("cpo", "orpo"):
        read = read[-1:]  # logits are read at the last micro-batch alone
    for model, batch in read:
        for ids, answer, chosen in answers_of(method, batch):
            log_p, h, p = plain(model, ids, answer, end)
            gained[chosen].append(log_p - plain(base, ids, answer, end)[0])
            entropy, tokens = entropy + h, tokens + sum(answer)
            of_side[chosen] += sum(answer)
            if batch is batches[-1][-1]:
                mass, last_tokens = mass + p, last_tokens + sum(answer)
    found = {"entropy": entropy / tokens, "end_of_sequence": mass / last_tokens}
    if method in ("dpo", "kto"):
        found["chosen"] = sum(gained[True]) / len(gained[True])
        found["rejected"] = sum(gained[False]) / len(gained[False])
        found["chosen_per_token"] = sum(gained[True]) / of_side[True]
        found["rejected_per_token"] = sum(gained[False]) / of_side[False]
        found["chosen_fell"] = sum(x < 0 for x in gained[True]) / len(gained[True])
    return {f"monitor/{name}": value for name, value in found.items()}


@pytest.mark.parametrize(("method", "plot"), CASES)
def test_numbers_are_those_of_plain_forwards(make_trainer, preference, tiny_llama, method, plot):
    """Two logs of two steps of two micro-batches. The first step is made with the reference itself, so the second log
    says more."""
    trainer = make_trainer(
        method, max_steps=4, logging_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=2,
        learning_rate=1e-2,
    )  # fmt: skip
    kept = Kept(trainer)
    if plot:
        attach(trainer, preference, PlotConfig.paper(alpha=1.0))
    trainer.add_callback(PreferenceMonitor(trainer, max_new_tokens=0))
    trainer.train()

    def at(step: int) -> Any:
        model = AutoModelForCausalLM.from_pretrained(tiny_llama).double().eval()
        model.load_state_dict(kept.weights[step])
        return model

    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for number, log in enumerate(logs):
        steps = [2 * number, 2 * number + 1]
        batches = [kept.batches[2 * step : 2 * step + 2] for step in steps]
        want = expected(method, [at(step) for step in steps], batches, at(0), trainer.processing_class.eos_token_id)
        found = {name: value for name, value in log.items() if name.startswith("monitor/")}
        if number == 0:  # of the reference itself nothing has fallen but by rounding
            want.pop("monitor/chosen_fell", None)
            found.pop("monitor/chosen_fell", None)
        assert found == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert len(logs) == 2


@pytest.mark.parametrize(("method", "plot"), [("dpo", False), ("dpo", True), ("orpo", True)])
def test_training_is_the_same_to_the_bit(make_trainer, preference, rows, chat_template, method, plot):
    """Losses, gradient norms and weights, with answers and evaluations between the steps."""

    def trained(*, watched: bool) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        trainer = make_trainer(
            method, max_steps=4, eval_strategy="steps", eval_steps=2, extra={"eval_dataset": rows.select(range(4))}
        )
        trainer.processing_class.chat_template = chat_template
        if plot:
            attach(trainer, preference)
        if watched:
            trainer.add_callback(PreferenceMonitor(trainer, max_new_tokens=2))
        trainer.train()
        history = [
            {name: x for name, x in entry.items() if not name.startswith("monitor/") and "_per_second" not in name
             and "runtime" not in name}
            for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry
        ]  # fmt: skip
        assert any("monitor/refuses_benign" in entry for entry in trainer.state.log_history) is watched
        assert "training_step" not in vars(trainer)
        assert not trainer.model._forward_hooks or plot
        return history, {name: value.clone() for name, value in trainer.model.state_dict().items()}

    (history, weights), (want, base) = trained(watched=True), trained(watched=False)
    assert history == want
    assert len(history) == 6
    for name, value in base.items():
        assert torch.equal(weights[name], value), name


def test_what_a_trainer_lacks_is_absent(make_trainer):
    """Log-probabilities before training that are no sums (LD-DPO)."""
    trainer = make_trainer("dpo", ld_alpha=0.5, precompute_ref_log_probs=True, max_steps=1)
    trainer.add_callback(PreferenceMonitor(trainer, max_new_tokens=0))
    trainer.train()
    found = {name for name in trainer.state.log_history[0] if name.startswith("monitor/")}
    assert found == {"monitor/entropy", "monitor/end_of_sequence"}


def test_with_adapters_the_reference_is_the_policy_without_them(make_trainer):
    """TRL logs β times the gain over the reference, a mean over the same answers."""
    from peft import LoraConfig

    peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_alpha=32)
    trainer = make_trainer("dpo", extra={"peft_config": peft}, learning_rate=0.1, beta=0.5)
    trainer.add_callback(PreferenceMonitor(trainer, max_new_tokens=0))
    trainer.train()
    last = trainer.state.log_history[2]
    for side in ("chosen", "rejected"):
        assert abs(last[f"monitor/{side}"]) > 1e-3
        assert last[f"monitor/{side}"] == pytest.approx(last[f"rewards/{side}"] / 0.5, rel=1e-3)


def test_blind_it_says_so_once(make_trainer, monkeypatch):
    """A batch of unknown keys; and a loss that goes round the model's forward, as Liger's do. Training goes on."""
    trainer = make_trainer("dpo")
    monkeypatch.setattr("plot_align.monitor.forwards.policy_batch", lambda kind, *_: policy_batch(kind, {}))
    trainer.add_callback(PreferenceMonitor(trainer, max_new_tokens=0))
    with pytest.warns(UserWarning, match="sees no log-probabilities: the DPO batch has the keys") as caught:
        trainer.train()
    assert len([w for w in caught if "sees no" in str(w.message)]) == 1
    assert trainer.state.global_step == 3

    trainer = make_trainer("dpo")
    trainer.add_callback(PreferenceMonitor(trainer, max_new_tokens=0))
    trainer.compute_loss = lambda model, inputs, **options: 0 * next(trainer.model.parameters()).sum()
    with pytest.warns(UserWarning, match="neither log-probabilities nor logits"):
        trainer.train()


def test_reference_from_before_training(make_trainer):
    """Of the first step, where policy and reference are one: 0."""
    trainer = make_trainer("dpo", precompute_ref_log_probs=True, max_steps=1)
    trainer.add_callback(PreferenceMonitor(trainer, max_new_tokens=0))
    trainer.train()
    assert trainer.state.log_history[0]["monitor/chosen"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("head", ["bias", "softcap", "scale"])
def test_mass_on_the_end_by_two_rows_of_the_head(head):
    """Against the softmax over the whole vocabulary, in float64."""
    from types import SimpleNamespace

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 6, 8, generator=generator)
    layer = torch.nn.Linear(8, 11, bias=head == "bias")
    config = SimpleNamespace(model_type="llama", logit_scale=None)
    if head == "softcap":
        config.final_logit_softcapping = 1.5
    if head == "scale":
        config.logit_scale = 0.3
    config.get_text_config = lambda: config
    model = SimpleNamespace(config=config, get_output_embeddings=lambda: layer)
    labels = torch.randint(0, 11, (2, 5), generator=generator)  # behind one virtual token
    labels[0, :3] = labels[1, 4:] = -100
    found = end_against_target(model, hidden, labels, end=4)

    z = layer.double()(hidden[:, 1:-1].double()).detach() * (config.logit_scale or 1.0)
    if head == "softcap":
        z = 1.5 * (z / 1.5).tanh()
    log_p = z.log_softmax(-1)
    places = [(n, t) for n in range(2) for t in range(1, 5) if labels[n, t] != -100]
    want = [float(log_p[n, t - 1, 4] - log_p[n, t - 1, labels[n, t]]) for n, t in places]
    assert found.tolist() == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize(("number", "kept"), [(0, 0), (5, 5), (6, 3), (7, 4), (11, 4), (1000, 5)])
def test_places_spread_evenly(number, kept):
    """Every second of six or seven, every third of eleven."""
    found = spread(torch.arange(number), 5)
    assert len(found) == kept
    assert len(set(found.diff().tolist())) <= 1


def test_only_trainers_with_both_sides(make_trainer):
    with pytest.raises(InputError, match="no preferred and rejected answers"):
        PreferenceMonitor(make_trainer("sft"))
