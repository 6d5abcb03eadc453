"""PRO's trainer against materialised logits in float64, TRL's own DPO batches, and every refusal."""

from __future__ import annotations

import functools
import json
import math
import random

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from plot_align import PlotConfig, PlotPROTrainer, PROConfig, PROTrainer, attach
from plot_align.errors import InputError
from plot_align.methods.ranked import DataCollatorForRanking, ranked_row
from plot_align.preference.estimation import estimate
from trl import DPOConfig, DPOTrainer


def logged(trainer, key):
    return [record[key] for record in trainer.state.log_history if key in record]


def first_batch(trainer):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def materialised(trainer, inputs, weight):
    """Loss, scores of each prompt's completions, and logits, all from full logits in float64, loop by loop."""
    logits = trainer.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.double()
    losses, all_scores, row = [], [], 0
    for prompt, n in enumerate(inputs["list_lengths"].tolist()):
        scores: list[torch.Tensor] = []
        logps: list[torch.Tensor] = []
        for _ in range(n):
            terms = [
                logits[row, t].log_softmax(-1)[inputs["input_ids"][row, t + 1]]
                for t in range(inputs["input_ids"].size(1) - 1)
                if inputs["completion_mask"][row, t + 1]
            ]
            logps.append(sum(terms))
            scores.append(logps[-1] / len(terms))
            row += 1
        r = inputs["rewards"][prompt].double()
        loss = -weight * (n - 1) ** 2 * logps[0]
        for k in range(n - 1):
            widest = max(r[k] - r[i] for i in range(k + 1, n))
            rivals = sum(torch.exp(scores[i] * (r[k] - r[i])) for i in range(k + 1, n))
            loss = loss - scores[k] * widest + torch.log(torch.exp(scores[k] * widest) + rivals)
        losses.append(loss)
        all_scores.append([score.item() for score in scores])
    assert row == len(inputs["input_ids"])
    return sum(losses) / len(losses), all_scores, logits


def gradients(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("weight", [0.0, 0.05])
def test_loss_and_every_gradient_against_materialised_logits(make_trainer, weight):
    trainer = make_trainer("pro", sft_weight=weight)
    inputs = first_batch(trainer)
    assert len(set(inputs["list_lengths"].tolist())) > 1  # ragged
    want, _, _ = materialised(trainer, inputs, weight)
    got = trainer.compute_loss(trainer.model, dict(inputs))
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    wanted, found = gradients(trainer, want), gradients(trainer, got)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        scale = gradient.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(
            found[name] / scale, gradient / scale, rtol=0, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_metrics_by_counting(make_trainer):
    trainer = make_trainer("pro", max_steps=1, learning_rate=5e-3, sft_weight=0.3)
    trainer.train()  # a little, so that some predictions are right
    trainer._total_train_tokens = 0.0
    inputs = first_batch(trainer)
    start = (inputs["list_lengths"].cumsum(0) - inputs["list_lengths"]).tolist()
    for name in ("input_ids", "attention_mask", "completion_mask"):
        inputs[name][[row + 1 for row in start]] = inputs[name][start]  # the second best says the same: equal scores
    trainer.compute_loss(trainer.model, dict(inputs))
    found = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    loss, scores, logits = materialised(trainer, inputs, 0.3)
    right = ordered = 0
    for prompt, values in enumerate(scores):
        rewards = inputs["rewards"][prompt].tolist()
        for k in range(len(values)):
            for i in range(len(values)):
                if rewards[k] > rewards[i]:
                    ordered += 1
                    right += values[k] > values[i]
    assert 0 < right < ordered, (right, ordered)
    assert found["rank_accuracy"] == pytest.approx(right / ordered)
    assert found["loss/ranking"] + found["loss/sft"] == pytest.approx(loss.item(), rel=1e-6)
    mask = inputs["completion_mask"][:, 1:].bool()
    p = logits[:, :-1].softmax(-1)
    assert found["entropy"] == pytest.approx((-(p * p.log()).sum(-1))[mask].mean().item(), rel=1e-5)
    targets = inputs["input_ids"][:, 1:]
    hits = (logits[:, :-1].argmax(-1) == targets)[start][mask[start]].double()
    assert 0 < hits.sum() < (logits[:, :-1].argmax(-1) == targets)[mask].sum()
    assert found["mean_token_accuracy"] == pytest.approx(hits.mean().item(), rel=1e-6)
    logps = p.log().gather(-1, targets.unsqueeze(-1)).squeeze(-1) * mask
    assert found["logps/best"] == pytest.approx(logps[start].sum(1).mean().item(), rel=1e-6)
    assert found["num_tokens"] == inputs["attention_mask"].sum().item()


def test_permuted_completions_change_nothing(make_trainer, ranked_rows):
    """With distinct rewards; of a tie the one that stands first in the data counts as the better one."""
    distinct = ranked_rows.map(
        lambda row: {"rewards": [len(text) + i / 8 for i, text in enumerate(row["completions"])]}
    )

    def shuffled(row, index):
        order = random.Random(index).sample(range(len(row["rewards"])), len(row["rewards"]))
        return {name: [row[name][i] for i in order] for name in ("completions", "rewards")}

    other = distinct.map(shuffled, with_indices=True)
    assert other["completions"] != distinct["completions"]
    one, two = (make_trainer("pro", extra={"data": data}) for data in (distinct, other))
    a, b = first_batch(one), first_batch(two)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_padding_changes_nothing(make_trainer, ranked_rows):
    """Each prompt on its own, and all in one batch padded to a multiple of 64: the mean of the losses is the same."""
    trainer = make_trainer("pro")
    trainer.model.eval()
    examples = list(trainer.train_dataset)[:6]
    wide = DataCollatorForRanking(trainer.processing_class.pad_token_id, pad_to_multiple_of=64)
    with torch.no_grad():
        alone = [trainer.compute_loss(trainer.model, trainer.data_collator([example])) for example in examples]
        together = trainer.compute_loss(trainer.model, wide(examples))
    assert together.item() == pytest.approx(sum(alone).item() / len(alone), rel=1e-5)
    assert wide(examples)["input_ids"].size(1) % 64 == 0


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("plot", [None, PlotConfig.paper(alpha=2.0, granularity="sequence", positions="chosen")])
def test_accumulation_is_the_large_batch(make_trainer, preference, plot):
    """PRO's loss is a mean over prompts: two micro-batches of 2 give the step of one batch of 4."""
    options = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 1e9}
    found = []
    for batch, steps in ((4, 1), (2, 2)):
        trainer = make_trainer("pro", per_device_train_batch_size=batch, gradient_accumulation_steps=steps, **options)
        start = weights(trainer)
        if plot is not None:
            attach(trainer, preference, plot)
        trainer.train()
        found.append((weights(trainer), logged(trainer, "loss")))
    for name, want in found[0][0].items():
        moved = (want - start[name]).abs().max()
        assert moved > 0
        torch.testing.assert_close(found[1][0][name] / moved, want / moved, rtol=0, atol=1e-3)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-3)


def test_it_learns_the_ranking(make_trainer):
    trainer = make_trainer("pro", max_steps=25, learning_rate=5e-3)
    trainer.train()
    assert logged(trainer, "rank_accuracy")[-1] > 0.9 > logged(trainer, "rank_accuracy")[0]
    assert logged(trainer, "loss/ranking")[-1] < logged(trainer, "loss/ranking")[0]


# --- data -----------------------------------------------------------------------------------------------------------


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def conversational(row):
    def say(role, text):
        return [{"role": role, "content": text}]

    prompt = say("user", row["prompt"])
    return {
        "prompt": prompt, "chosen": say("assistant", row["chosen"]), "rejected": say("assistant", row["rejected"]),
    }  # fmt: skip


def implicit(row):
    return {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]}


@pytest.mark.parametrize("truncation_mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize(
    ("layout", "max_length"),
    [("explicit", None), ("explicit", 13), ("implicit", 13), ("conversational", None), ("conversational", 36)],
)
def test_pairs_give_the_tokens_of_trls_dpo(tiny_llama, pair_rows, tmp_path, layout, max_length, truncation_mode):
    """Same ids, masks and completion masks, row by row; as pairs and as lists of two."""
    change = {"explicit": dict, "implicit": implicit, "conversational": conversational}[layout]
    pairs = Dataset.from_list([change(row) for row in pair_rows[:6]])
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = TEMPLATE
    common = {
        "max_length": max_length, "truncation_mode": truncation_mode, "output_dir": str(tmp_path), "use_cpu": True,
        "bf16": False, "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip

    def batch(cls, args, data):
        trainer = cls(str(tiny_llama), args=args, train_dataset=data, processing_class=tokenizer)
        trainer._set_signature_columns_if_needed()
        rows = [{k: row[k] for k in trainer._signature_columns if k in row} for row in trainer.train_dataset]
        return trainer.data_collator(rows)

    want = batch(DPOTrainer, DPOConfig(**common), pairs)
    found = [batch(PROTrainer, PROConfig(**common), pairs)]
    if "prompt" in pairs.column_names:
        lists = [{"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]]} for row in pairs]
        found.append(batch(PROTrainer, PROConfig(**common), Dataset.from_list(lists)))
    count = len(want["input_ids"]) // 2
    assert max_length is None or want["attention_mask"].sum(1).max() == max_length  # some row is cut
    interleaved = torch.arange(2 * count).view(2, count).T.flatten()
    for ours in found:
        assert ours["rewards"].tolist() == [[1.0, 0.0]] * count
        for name in ("input_ids", "attention_mask", "completion_mask"):
            assert torch.equal(ours[name], want[name][interleaved]), name


def test_a_ranked_list_of_conversations(tiny_llama, tmp_path):
    """The template's own text, cut by hand: the prompt with its generation prompt, then answer and EOS."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = "{% if tools %}[{{ tools[0]['name'] }}]{% endif %}" + TEMPLATE
    answers = [[{"role": "assistant", "content": text}] for text in ("poor", "good", "fair")]
    row = {"prompt": [{"role": "user", "content": "hello"}], "completions": answers, "rewards": [0.1, 0.9, 0.4]}
    rows = Dataset.from_list([row, {**row, "rewards": [3.0, 1.0, 2.0]}]).add_column("tools", [None, '[{"name": "t"}]'])
    args = PROConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    found = PROTrainer(str(tiny_llama), args, train_dataset=rows, processing_class=tokenizer).train_dataset
    for index, (head, order) in enumerate([("", "good fair poor"), ("[t]", "poor fair good")]):
        assert tokenizer.decode(found[index]["prompt_ids"]) == head + "<user>hello<eos><assistant>"
        texts = [tokenizer.decode(ids) for ids in found[index]["ranked_ids"]]
        assert texts == [f"{text}<eos>" for text in order.split()]
    assert found["rewards"][:] == [[0.9, 0.4, 0.1], [3.0, 2.0, 1.0]]


def test_a_prompt_that_merges_into_its_answer(tiny_llama, tmp_path):
    """The completion starts where the tokens diverge, for any of the answers, and a warning says so once."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    prompt, answers = "what is 1 plus 2 ? the su", ["m is 3", "x", "m"]
    ids = [tokenizer.encode(prompt), *(tokenizer.encode(prompt + text + "<eos>") for text in answers)]
    shared = min(next(i for i, (a, b) in enumerate(zip(ids[0], row, strict=False)) if a != b) for row in ids[1:2])
    assert shared < len(ids[0])  # "sum" is one token
    args = PROConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    rows = Dataset.from_list([{"prompt": prompt, "completions": answers}])
    with pytest.warns(UserWarning, match="the completion starts where they diverge"):
        row = PROTrainer(str(tiny_llama), args, train_dataset=rows).train_dataset[0]
    assert row["prompt_ids"] == ids[0][:shared]
    assert row["ranked_ids"] == [other[shared:] for other in ids[1:]]


def test_collated_batch_by_hand():
    collate = DataCollatorForRanking(pad_token_id=0, max_length=4)
    batch = collate([
        {"prompt_ids": [1, 2], "ranked_ids": [[3], [4, 5, 6], [7]], "rewards": [3.0, 2.5, 1.0]},
        {"prompt_ids": [8], "ranked_ids": [[9, 9], [5]], "rewards": [1e9 + 1, 1e9]},
    ])  # fmt: skip
    assert next(iter(batch)) == "rewards"
    assert batch["rewards"].tolist() == [[2.0, 1.5, 0.0], [1.0, 0.0, 0.0]]
    assert batch["list_lengths"].tolist() == [3, 2]
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0], [1, 2, 4, 5], [1, 2, 7, 0], [8, 9, 9, 0], [8, 5, 0, 0]]
    assert batch["completion_mask"].tolist() == [
        [0, 0, 1, 0], [0, 0, 1, 1], [0, 0, 1, 0], [0, 1, 1, 0], [0, 1, 0, 0],
    ]  # fmt: skip
    assert batch["attention_mask"].sum(1).tolist() == [3, 4, 3, 3, 2]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "completions": ["a", "b", "c"], "rewards": [0, 2.5, 1]}, (["b", "c", "a"], [2.5, 1, 0])),
        ({"prompt": "p", "completions": ["a", "b", "c"], "rewards": [1, 2, 1]}, (["b", "a", "c"], [2, 1, 1])),
        ({"prompt": "p", "completions": ["a", "b", "c"]}, (["a", "b", "c"], [2, 1, 0])),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, (["a", "b"], [1, 0])),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 7, "score_rejected": 4},
            (["a", "b"], [7, 4]),
        ),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 7}, (["a", "b"], [1, 0])),
        ({"chosen": "p a", "rejected": "p b"}, ([" a", " b"], [1, 0])),
    ],
)
def test_every_format_becomes_a_ranked_list(row, expected):
    assert ranked_row(row, "row") == ("p", *expected)


MESSAGE = {"role": "user", "content": "hello"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"rewards": [1.0, 1.0]},
            "all rewards are 1, so there is nothing to rank; remove the row, or drop the rewards",
        ),
        ({"rewards": [1.0]}, "there are 1 rewards for 2 completions, expected one each"),
        ({"rewards": [1.0, math.nan]}, "a reward is nan, expected a finite number"),
        ({"rewards": [math.inf, 1.0]}, "a reward is inf, expected a finite number"),
        ({"rewards": [None, 1.0]}, "a reward is missing, expected a finite number"),
        ({"rewards": None}, "'rewards' is missing, expected a list of numbers"),
        ({"completions": ["a"]}, "'completions' is 1 of them, expected a list of two or more"),
        ({"completions": None}, "'completions' is missing, expected a list of two or more"),
        ({"completions": ["a", None]}, "completion 1 is missing, expected a string"),
        ({"prompt": None}, "'prompt' is missing, expected a string"),
        ({"prompt": [MESSAGE]}, "completion 0 is a str of length 1, expected a list of messages"),
        ({"prompt": [MESSAGE], "completions": [[MESSAGE], []]}, "completion 1 is a list of length 0"),
    ],
)
def test_a_row_that_cannot_be_ranked_is_named(row, said):
    with pytest.raises(InputError) as caught:
        ranked_row({"prompt": "p", "completions": ["a", "b"], **row}, "train data row 4")
    assert str(caught.value).startswith("train data row 4: " + said)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "p", "chosen": "a"}, "row has the columns prompt, chosen, expected prompt and completions"),
        ({"chosen": "a", "rejected": ""}, "row: 'rejected' is a str of length 0, so it shares no prompt"),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 2},
            "row: score_chosen is 1 and score_rejected 2, expected the first higher",
        ),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 2},
            "row: all rewards are 2, so there is nothing to rank",
        ),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": None},
            "row: a reward is missing, expected a finite number",
        ),
    ],
)
def test_a_pair_that_cannot_be_ranked(row, said):
    with pytest.raises(InputError) as caught:
        ranked_row(row, "row")
    assert str(caught.value).startswith(said)


def test_a_data_set_that_cannot_be_used_is_refused_before_the_model_is_loaded(
    tiny_llama, ranked_rows, tmp_path, monkeypatch
):
    from plot_align.methods import pro

    args = PROConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, max_steps=1, report_to="none", max_length=6)
    rows = ranked_rows.to_list()
    rows[5]["rewards"] = [0.0] * len(rows[5]["rewards"])
    bad, stream = Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset()
    trainer = PROTrainer(str(tiny_llama), args, train_dataset=stream)  # read only while it trains
    with pytest.raises(InputError, match="train data row 5: all rewards are 0"):
        trainer.train()

    monkeypatch.setattr(pro, "create_model_from_path", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    for options, said in (
        ({"train_dataset": bad}, "train data row 5: all rewards are 0"),
        ({"train_dataset": ranked_rows}, "every prompt fills max_length = 6; raise it"),
        ({"train_dataset": ranked_rows.select([])}, "the train data set is empty"),
        ({"train_dataset": ranked_rows.add_column("image", [0] * 24)}, "the train data set has images"),
    ):
        with pytest.raises(InputError, match=said):
            PROTrainer(str(tiny_llama), args, **options)
    args.max_length = None
    with pytest.raises(InputError, match="eval data row 5"):
        PROTrainer(str(tiny_llama), args, train_dataset=ranked_rows, eval_dataset=bad)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sft_weight": -1}, "sft_weight is -1; expected"),
        ({"sft_weight": math.nan}, "sft_weight is nan; expected"),
        ({"truncation_mode": "middle"}, "truncation_mode is 'middle'; expected one of keep_start, keep_end"),
        ({"max_length": 0}, "max_length is 0; expected a number of tokens"),
    ],
)
def test_options_out_of_range(tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        PROConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def test_defaults_are_the_papers(tmp_path):
    args = PROConfig(str(tmp_path), use_cpu=True)
    assert (args.sft_weight, args.learning_rate, args.num_train_epochs) == (0.05, 5e-6, 2)


def test_arguments_that_do_not_fit(make_trainer, ranked_rows):
    from peft import LoraConfig

    with pytest.raises(InputError, match="train_dataset is a NoneType"):
        make_trainer("pro", extra={"data": None})
    with pytest.raises(InputError, match="quantization_config came with a model that is loaded already"):
        make_trainer("pro", extra={"quantization_config": object()})
    with pytest.raises(InputError, match="model_init_kwargs came with a model"):
        make_trainer("pro", model_init_kwargs={"dtype": "float32"})
    with pytest.raises(InputError, match="the adapters include the LM head"):
        make_trainer("pro", extra={"peft_config": LoraConfig(r=2, target_modules=["q_proj", "lm_head"])})


# --- training, evaluating, saving -----------------------------------------------------------------------------------


def test_evaluation_is_the_mean_over_prompts(make_trainer, ranked_rows):
    """10 prompts in batches of 4: the last one of 2 counts for 2."""
    trainer = make_trainer("pro", extra={"eval_dataset": ranked_rows.select(range(10))})
    trainer.model.eval()
    with torch.no_grad():
        losses = [trainer.compute_loss(trainer.model, trainer.data_collator([row])) for row in trainer.eval_dataset]
    trainer._metrics["eval"].clear()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(sum(losses).item() / 10, rel=1e-5)
    assert 0 <= trainer.state.log_history[-1]["eval_rank_accuracy"] <= 1
    raw = trainer.evaluate(ranked_rows.select(range(10)))
    assert raw["eval_loss"] == pytest.approx(metrics["eval_loss"])
    named = trainer.evaluate({"first": ranked_rows.select(range(5)), "last": ranked_rows.select(range(5, 10))})
    assert (named["eval_first_loss"] + named["eval_last_loss"]) / 2 == pytest.approx(metrics["eval_loss"], rel=1e-5)


def test_a_stream_trains_like_the_data_set(make_trainer, ranked_rows):
    found = []
    for data in (ranked_rows, ranked_rows.to_iterable_dataset()):
        trainer = make_trainer("pro", extra={"data": data}, train_sampling_strategy="sequential")
        trainer.train()
        found.append(logged(trainer, "loss"))
    assert len(found[0]) == 3
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("plot", [False, True])
def test_resumed_training_is_the_training_that_was_not_interrupted(make_trainer, ranked_rows, tmp_path, plot):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    if plot:
        options["cls"] = PlotPROTrainer
    whole = make_trainer("pro", output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    resumed = make_trainer("pro", output_dir=str(tmp_path / "resumed"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    for (name, want), got in zip(weights(whole).items(), weights(resumed).values(), strict=True):
        assert torch.equal(got, want), name


def test_model_card_cites_the_paper(make_trainer, tmp_path):
    trainer = make_trainer("pro", cls=PlotPROTrainer, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    card = (tmp_path / "pro" / "README.md").read_text()
    assert "https://huggingface.co/papers/2306.17492" in card
    assert "song2024preference" in card
    assert "PROTrainer" in card.split("## PLOT")[1]
    assert json.loads((tmp_path / "pro" / "checkpoint-1" / "plot_align.json").read_text())["global_step"] == 1


def test_adapters_train_and_the_base_stays(make_trainer, tmp_path):
    from peft import LoraConfig

    peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False)
    trainer = make_trainer("pro", extra={"peft_config": peft}, gradient_checkpointing=True)
    inputs = first_batch(trainer)
    a, b = (trainer.compute_loss(trainer.model, dict(inputs)).item() for _ in range(2))
    assert a == b  # no dropout
    start = weights(trainer)
    trainer.train()
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, start[name])}
    assert moved == {name for name in start if "lora_" in name}
    trainer.save_model()
    assert (tmp_path / "pro" / "adapter_model.safetensors").is_file()


def test_a_model_by_name(tiny_llama, ranked_rows, tmp_path, monkeypatch):
    """Without options the folder is named after the model; here they are those of a machine without accelerator."""
    from plot_align.methods import pro

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pro, "PROConfig", functools.partial(PROConfig, use_cpu=True, bf16=False))
    trainer = PROTrainer(str(tiny_llama), train_dataset=ranked_rows)
    assert trainer.args.output_dir == f"{tiny_llama.name}-PRO"
    assert trainer.model.dtype == torch.float32
    assert trainer.processing_class.get_vocab() == AutoTokenizer.from_pretrained(tiny_llama).get_vocab()


# --- PLOT -----------------------------------------------------------------------------------------------------------


def test_the_best_completions_are_the_preferred_ones(make_trainer, ranked_rows):
    """The oracle counts from the texts by hand, with EOS, cut at 13 tokens."""
    trainer = make_trainer("pro", cls=PlotPROTrainer, max_length=13)
    tokenizer = trainer.processing_class
    chosen, rejected = (torch.zeros(len(tokenizer), dtype=torch.int64) for _ in range(2))
    for row in ranked_rows:
        best = max(range(len(row["rewards"])), key=lambda i: row["rewards"][i])
        prompt = len(tokenizer.encode(row["prompt"]))
        for index, text in enumerate(row["completions"]):
            kept = [*tokenizer.encode(text), tokenizer.eos_token_id][: 13 - prompt]
            for token in kept:
                (chosen if index == best else rejected)[token] += 1
    found = trainer.plot_handle.preference
    assert torch.equal(found.chosen_counts, chosen)
    assert torch.equal(found.rejected_counts, rejected)
    assert found.provenance["sources"][0]["rows"] == len(ranked_rows)
    trainer.train()
    assert len(logged(trainer, "plot/loss")) == 3


@pytest.mark.parametrize("truncation_mode", ["keep_start", "keep_end"])
def test_pairs_are_counted_as_dpo_counts_them(make_trainer, rows, truncation_mode):
    options = {"max_length": 13, "truncation_mode": truncation_mode}
    trainer = make_trainer("pro", extra={"data": rows}, **options)
    found = attach(trainer).preference
    want = estimate(rows, trainer.processing_class, progress=False, **options)
    assert torch.equal(found.chosen_counts, want.chosen_counts)
    assert torch.equal(found.rejected_counts, want.rejected_counts)


def test_anchored_target_reads_the_lists(make_trainer, preference):
    """p_ref over the best completions of the first rows, against the materialised softmax."""
    from plot_align.trl.reference import reference_distribution

    trainer = make_trainer("pro")
    found = reference_distribution(trainer, "PROTrainer", 5, "chosen")
    total = torch.zeros(300, dtype=torch.float64)
    with torch.no_grad():
        for row in list(trainer.train_dataset)[:5]:
            ids = torch.tensor([row["prompt_ids"] + row["ranked_ids"][0]])
            p = trainer.model.eval()(ids).logits[0].double().softmax(-1)
            total[: p.size(1)] += p[len(row["prompt_ids"]) - 1 : -1].sum(0)
    torch.testing.assert_close(found, (total / total.sum())[: len(found)], rtol=1e-5, atol=1e-9)
    attach(trainer, preference, PlotConfig.paper(target="anchored", reference_rows=5))
    trainer.train()
    assert len(logged(trainer, "plot/loss")) == 3


def test_a_bad_logit_is_named_by_its_completion(make_trainer, preference):
    from plot_align.trl.attach import _name_row
    from plot_align.trl.batches import policy_batch

    trainer = make_trainer("pro")
    inputs = trainer.data_collator(list(trainer.train_dataset)[:3])
    batch = policy_batch("PROTrainer", inputs)
    lengths = inputs["list_lengths"].tolist()
    names = [f"completion {i} (0 is the best) of prompt {p}" for p, n in enumerate(lengths) for i in range(n)]
    assert [_name_row(row, "PROTrainer", batch) for row in range(sum(lengths))] == names
