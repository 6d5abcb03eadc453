"""When the monitor warns and stops, what it asks, and where the texts go."""

from __future__ import annotations

import json
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from plot_align import PreferenceMonitor
from plot_align.errors import InputError
from plot_align.monitor.answers import default_requests, read_requests
from plot_align.monitor.forwards import Sums
from plot_align.monitor.lines import Fall, Lines

NOTHING = Sums(*[0.0] * len(Sums._fields))
COLLAPSE = {"loss_type": "apo_down", "beta": 0.01, "learning_rate": 1e-2, "max_steps": 12, "save_steps": 4}


@pytest.fixture
def run(chat_template):
    """``run(trainer, stop_on=…)`` → the monitor of a training, and the sentences that it said."""

    def train(trainer: Any, resume: str | None = None, **options: Any) -> tuple[PreferenceMonitor, list[str]]:
        trainer.processing_class.chat_template = chat_template
        monitor = PreferenceMonitor(trainer, **options)
        trainer.add_callback(monitor)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train(resume_from_checkpoint=resume)
        return monitor, [str(w.message) for w in caught if w.filename.endswith("monitor/callback.py")]

    return train


def test_a_planted_collapse_warns_once_and_stops(make_trainer, tmp_path, run):
    """A loss that lowers the chosen answers by design; a run that goes on from a checkpoint after it says nothing."""
    trainer = make_trainer("dpo", save_strategy="steps", **COLLAPSE)
    monitor, said = run(trainer, max_new_tokens=0)
    assert len(said) == len(monitor.crossed) == 2
    for sentence, (side, lost) in zip(said, [("chosen", 0.2), ("rejected", 0.5)], strict=True):
        start, _, rest = sentence.partition(" nats a token against the reference")
        assert start.startswith(f"step {monitor.crossed[f'{side}_fall']}: the {side} answers have lost ")
        assert float(start.rpartition(" ")[2]) > lost
        assert "lower the learning rate" in rest
    step = monitor.crossed["chosen_fall"]
    assert trainer.state.global_step == 12
    checkpoint = next(n for n in (4, 8) if n >= step)
    again, said = run(
        make_trainer("dpo", save_strategy="steps", **COLLAPSE), str(tmp_path / "dpo" / f"checkpoint-{checkpoint}"),
        max_new_tokens=0,
    )  # fmt: skip
    assert (again.crossed, said) == (monitor.crossed, [])

    trainer = make_trainer("dpo", **COLLAPSE)
    monitor, said = run(trainer, max_new_tokens=0, stop_on=["chosen_fall"])
    assert trainer.state.global_step == step
    assert "so training stops" in said[0]
    trainer = make_trainer("dpo", **COLLAPSE)
    monitor, said = run(trainer, max_new_tokens=0, stop_on=["rejected_fall"], chosen_fall=None)
    assert list(monitor.crossed) == ["rejected_fall"]
    assert trainer.state.global_step == monitor.crossed["rejected_fall"]


def test_a_resumed_run_stops_at_a_line_that_it_crossed_before(make_trainer, tmp_path, run):
    """Four logs after step 8 there are enough of them again. It says why it stops, and nothing else again."""
    options = {**COLLAPSE, "max_steps": 16}
    monitor, _ = run(make_trainer("dpo", save_strategy="steps", **options), max_new_tokens=0)
    assert max(monitor.crossed.values()) < 8
    resumed = make_trainer("dpo", **options)
    checkpoint = str(tmp_path / "dpo" / "checkpoint-8")
    again, said = run(resumed, checkpoint, max_new_tokens=0, stop_on=["chosen_fall"])
    assert resumed.state.global_step == 12
    assert again.crossed == monitor.crossed
    assert len(said) == 1
    assert said[0].startswith("step 12: the chosen answers have lost ")


def test_the_summary_is_the_last_log(make_trainer, run):
    trainer = make_trainer("dpo", max_steps=3, logging_steps=2)
    monitor, _ = run(trainer, max_new_tokens=2)
    assert {answer.step for answer in monitor.answers} == {0, 3}
    assert "train_loss" in trainer.state.log_history[-1]


def test_a_healthy_run_is_silent(make_trainer, run):
    trainer = make_trainer("dpo", max_steps=12, learning_rate=1e-4)
    monitor, said = run(trainer, max_new_tokens=4)
    assert (monitor.crossed, said) == ({}, [])


def test_a_loss_that_is_no_number_lies_beyond_the_line(make_trainer, run):
    trainer = make_trainer("dpo", max_steps=8, learning_rate=1e30)
    monitor, said = run(trainer, max_new_tokens=0, stop_on=["chosen_fall"])
    assert "chosen_fall" in monitor.crossed
    assert "nan nats a token" in said[0]


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_fall_over_the_latest_answers(side):
    """By hand: 8 answers of 4 tokens a log; four logs make 32."""

    def log(gained: float) -> Sums:
        own = {side: 8 * gained, f"{side}_answers": 8, f"{side}_tokens": 32}
        return NOTHING._replace(**own)

    fall = Fall(side)
    assert [fall.add(log(0)), fall.add(log(0)), fall.add(log(-1))] == [None] * 3
    assert fall.add(log(-3)) == pytest.approx((8 + 24) / 128)
    assert fall.add(log(-4)) == pytest.approx((8 + 24 + 32) / 128)
    many = NOTHING._replace(**{side: -40, f"{side}_answers": 40, f"{side}_tokens": 80})
    assert fall.add(many) == pytest.approx(40 / 80)  # enough by itself
    other = "rejected" if side == "chosen" else "chosen"
    assert fall.add(NOTHING._replace(**{other: -9, f"{other}_answers": 40, f"{other}_tokens": 80})) is None


class Says:
    """Answers instead of a model: by step, what is said to harmless requests, and to harmful ones."""

    def __init__(self, monkeypatch: Any, benign: dict[int, str], harmful: str = "I cannot help with that.") -> None:
        self.benign, self.harmful, self.trainer = benign, harmful, None
        monkeypatch.setattr("plot_align.monitor.answers.generate", self.generate)

    def generate(self, model: Any, tokenizer: Any, prompts: list[str], **options: Any) -> list[str]:
        step = self.trainer.state.global_step
        benign = {x.prompt for x in default_requests() if x.kind == "benign"}
        return [self.benign[step] if prompt in benign else self.harmful for prompt in prompts]


@pytest.fixture
def make_evaluated(make_trainer, rows):
    """A DPO trainer of four steps that evaluates after each other one."""
    return lambda **options: make_trainer(
        "dpo",
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        extra={"eval_dataset": rows.select(range(2))},
        **options,
    )


def test_refusals_of_harmless_requests(make_evaluated, monkeypatch, run):
    says = Says(monkeypatch, {0: "Here is how.", 2: "I'm sorry, but I can't.", 4: "I'm sorry, but I can't."})
    says.trainer = make_evaluated()
    monitor, said = run(says.trainer, stop_on=["repetition"])
    assert monitor.crossed == {"benign_refusals": 2}
    assert said == [
        "step 2: 100% of benign requests are refused, 0% before training (line: 0.25); mix in pairs in which help is "
        "preferred to a refusal, or stop earlier."
    ]
    logged = {x["step"]: x for x in says.trainer.state.log_history if "monitor/repetition" in x}
    assert [logged[step]["monitor/refuses_benign"] for step in (0, 2, 4)] == [0, 1, 1]
    assert logged[0]["monitor/refuses_harmful"] == 1


def test_repetition_stops_and_what_was_so_before_does_not(make_evaluated, monkeypatch, run):
    """Five times the same word is two 4-grams, one of them again: 0.5; half the requests, 0.25. Refusals are many from
    the beginning on."""
    refusal = "I cannot."
    says = Says(monkeypatch, {0: refusal, 2: "no no no no no", 4: refusal})
    says.trainer = make_evaluated()
    monitor, said = run(says.trainer, stop_on=["repetition", "benign_refusals"])
    assert monitor.crossed == {"repetition": 2}
    assert said[0].startswith(
        "step 2: 25% of an answer's 4-grams repeat earlier ones, 0% before training (line: 0.2), so"
    )
    assert says.trainer.state.global_step == 2


def test_texts_in_the_loggers_tables(make_evaluated, tmp_path, monkeypatch, run):
    """A fake wandb, a fake TensorBoard writer, and the file."""
    from transformers import TrainerCallback

    tables: list[Any] = []
    wandb = SimpleNamespace(run="a run", log=tables.append, Table=lambda dataframe: dataframe)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    written: list[tuple[str, str, int]] = []
    board = TrainerCallback()
    board.tb_writer = SimpleNamespace(add_text=lambda *text: written.append(text), flush=lambda: None)
    says = Says(monkeypatch, {0: "Here | is\nhow.", 2: "<b>Yes", 4: "Yes."})
    says.trainer = make_evaluated()
    says.trainer.args.report_to = ["wandb"]
    says.trainer.add_callback(board)
    monitor, _ = run(says.trainer)

    assert [len(table["monitor/answers"]) for table in tables] == [24, 48, 72]
    frame = tables[-1]["monitor/answers"]
    assert list(frame.columns) == ["step", "kind", "prompt", "answer", "refused", "tokens", "repetition"]
    assert set(frame[frame.kind == "harmful"].refused) == {True}
    assert [(name, step) for name, _, step in written] == [("monitor/answers", step) for step in (0, 2, 4)]
    assert r"Here \| is\\nhow. |" in written[0][1]
    assert r"&lt;b\>Yes" in written[1][1]
    rows = json.loads((tmp_path / "dpo" / "monitor_answers.json").read_text())
    assert [row["answer"] for row in rows if row["kind"] == "benign"] == [x.answer for x in monitor.answers
                                                                         if x.kind == "benign"]  # fmt: skip


def test_answers_are_the_model_s(make_trainer, run):
    """Greedy, by a plain loop of argmax over the trained model."""
    import torch

    trainer = make_trainer("dpo", max_steps=2, learning_rate=1e-2)
    monitor, _ = run(trainer, max_new_tokens=5)
    assert {x.step for x in monitor.answers} == {0, 2}
    last, tokenizer = monitor.answers[-1], trainer.processing_class
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": last.prompt}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + 5 and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
            ids = [*ids, int(trainer.model(torch.tensor([ids])).logits[0, -1].argmax())]
    assert last.answer == tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_without_a_template_it_asks_nothing_and_says_so(make_trainer):
    trainer = make_trainer("dpo", max_steps=1)
    trainer.add_callback(PreferenceMonitor(trainer))
    with pytest.warns(UserWarning, match="asks the model nothing: the tokenizer of .* has no chat template"):
        trainer.train()
    assert "monitor/chosen" in trainer.state.log_history[0]


def test_a_model_of_nans_is_not_asked_again_and_trains_on(make_evaluated, run):
    trainer = make_evaluated(learning_rate=1e30)
    monitor, said = run(trainer, max_new_tokens=2)
    assert [x for x in said if "asks the model nothing more: the model" in x and "not finite" in x] == said[:1]
    assert {x.step for x in monitor.answers} == {0}
    assert trainer.state.global_step == 4


def test_a_file_of_requests(tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text('{"prompt": "How?", "kind": "benign"}\n\n{"prompt": "Why?", "kind": "harmful"}\n')
    assert [(x.prompt, x.kind) for x in read_requests(path)] == [("How?", "benign"), ("Why?", "harmful")]
    table = tmp_path / "xstest.csv"
    table.write_text("id,prompt,type,label\n1,How?,homonyms,safe\n2,Why?,contrast_homonyms,unsafe\n", encoding="utf-8")
    assert [(x.prompt, x.kind) for x in read_requests(table)] == [("How?", "benign"), ("Why?", "harmful")]
    for bad in (
        '{"prompt": "How?"}',
        '{"prompt": "", "kind": "benign"}',
        "[1]",
        "How?",
        '{"prompt": "a", "kind": "x"}',
    ):
        path.write_text(f'{{"prompt": "How?", "kind": "benign"}}\n{bad}\n')
        with pytest.raises(
            InputError, match=r"requests\.jsonl, line 2: .* came, expected .*; correct or remove the line"
        ):
            read_requests(path)
    path.write_text("\n")
    with pytest.raises(InputError, match="holds no request"):
        read_requests(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_requests(tmp_path / "none.jsonl")


def test_own_requests():
    found = default_requests()
    assert [sum(x.kind == kind for x in found) for kind in ("benign", "harmful")] == [12, 12]
    assert len({x.prompt for x in found}) == 24


def test_wrong_options(make_trainer):
    trainer = make_trainer("dpo")
    with pytest.raises(InputError, match="stop_on has 'repetitions'; did you mean 'repetition'"):
        PreferenceMonitor(trainer, stop_on=["repetitions"])
    with pytest.raises(InputError, match="chosen_fall is -1, expected a positive number"):
        Lines(chosen_fall=-1)
    with pytest.raises(InputError, match="max_new_tokens is -1"):
        PreferenceMonitor(trainer, max_new_tokens=-1)
