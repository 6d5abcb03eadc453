"""ms-swift: its own command with ``--external_plugins``, with the options of its example ``rlhf/dpo/full.sh``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from frameworks import PLOT, chat_model, check_same, check_sum, history, needs, run, write_lines

from plot_align.errors import InputError

pytestmark = needs("swift", "ms-swift")
SHARED = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "max_steps": 3,
    "logging_steps": 1,
    "warmup_steps": 1,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "max_grad_norm": 1.0,
    "beta": 0.1,
    "seed": 3,
    "report_to": "none",
}


@pytest.fixture(scope="module")
def model(tiny_llama, tmp_path_factory):
    return chat_model(tiny_llama, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def trained(model, pair_rows, tmp_path_factory):
    """The checkpoint that the command left, with a plug-in of two lines and the option that names it."""
    folder = tmp_path_factory.mktemp("run")
    rows = [
        {
            "messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}],
            "rejected_response": row["rejected"],
        }
        for row in pair_rows
    ]
    write_lines(folder / "pairs.jsonl", rows)
    (folder / "plot.py").write_text(f"from plot_align.plugins.swift import use\n\nuse(**{PLOT})\n", encoding="utf-8")
    example = {
        "rlhf_type": "dpo",
        "model": model,
        "model_type": "llama",
        "template": "dummy",
        "tuner_type": "full",
        "dataset": "pairs.jsonl",
        "split_dataset_ratio": 0,
        "torch_dtype": "float32",
        "num_train_epochs": 1,
        "save_steps": 3,
        "save_total_limit": 2,
        "max_length": 128,
        "output_dir": "out",
        "save_only_model": "true",
        "dataset_shuffle": "false",
        "train_dataloader_shuffle": "false",
        **SHARED,
        "external_plugins": "plot.py",
    }
    flags = [text for name, value in example.items() for text in (f"--{name}", str(value))]
    printed = run("swift.cli.main", "rlhf", *flags, folder=folder)
    assert "use_logits_to_keep: True" in printed  # its default: no logits of the prompts
    (checkpoint,) = folder.glob("out/*/checkpoint-3")
    return checkpoint


def template_of(model, **options):
    """swift's own template for the tiny model, set to encode pairs."""
    from swift import get_processor, get_template

    processor = get_processor(str(model), model_type="llama")
    template = get_template(processor, template_type="dummy", max_length=128, **options)
    template.set_mode("rlhf")
    return template


@pytest.mark.slow
def test_its_command_trains_with_the_term(trained):
    check_sum(history(trained))
    written = {path.name for path in trained.iterdir()}
    assert {"model.safetensors", "plot_align.json", "preference.safetensors"} <= written


@pytest.mark.slow
def test_it_logs_what_attach_logs_on_plain_trl(trained, model, pair_rows, tmp_path):
    """The tokens of swift's template, in TRL's own trainer and collator."""
    template = template_of(model)
    rows = []
    for row in pair_rows:
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}]
        found = template.encode({"messages": messages, "rejected_response": row["rejected"]})
        start = sum(label == -100 for label in found["chosen_labels"])
        ids = {side: found[f"{side}_input_ids"] for side in ("chosen", "rejected")}
        completions = {f"{side}_ids": tokens[start:] for side, tokens in ids.items()}
        rows.append({"prompt_ids": ids["chosen"][:start], **completions})
    args = {**SHARED, "output_dir": str(tmp_path / "out"), "bf16": False, "use_cpu": True, "save_strategy": "no"}
    spec = {"model": str(model), "rows": str(write_lines(tmp_path / "rows.jsonl", rows)), "args": args, "plot": PLOT}
    (tmp_path / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    run(str(Path(__file__).parent / "plain_trl.py"), str(tmp_path / "spec.json"), folder=tmp_path)
    check_same(history(trained), history(tmp_path / "out"))


@pytest.mark.parametrize("name", ["packing", "padding_free"])
def test_joined_rows_are_refused(model, name):
    from plot_align.plugins.swift import PlotDPOTrainer, use

    use(**PLOT)
    template = template_of(model)
    setattr(template, name, True)
    with pytest.raises(InputError, match=f"^{name} is on, with which swift joins all pairs in one row; PLOT expects"):
        PlotDPOTrainer(template=template)


def test_sequence_parallelism_is_refused(model):
    from plot_align.plugins.swift import PlotDPOTrainer, use

    use(**PLOT)
    template = template_of(model)
    template.sequence_parallel_size = 2
    with pytest.raises(InputError, match=r"^sequence_parallel_size is 2, where no rank sees whole sequences"):
        PlotDPOTrainer(template=template)


def test_only_its_dpo_trainer_is_another(monkeypatch):
    from swift.trainers import TrainerFactory

    from plot_align.plugins.swift import PlotDPOTrainer, use

    before = dict(TrainerFactory.TRAINER_MAPPING)
    monkeypatch.setattr(TrainerFactory, "TRAINER_MAPPING", dict(before))
    use(**PLOT)
    changed = {name for name, where in TrainerFactory.TRAINER_MAPPING.items() if before.get(name) != where}
    assert changed <= {"dpo"}
    args = type("Args", (), {"rlhf_type": "dpo"})
    assert TrainerFactory.get_trainer_cls(args) is PlotDPOTrainer


def test_a_wrong_option_is_refused_when_the_file_is_read():
    from plot_align.plugins.swift import use

    with pytest.raises(InputError, match=r"^unknown option 'alfa' in use\(\); did you mean 'alpha'\?$"):
        use(alfa=0.1)


def test_megatron_is_refused(monkeypatch):
    """Its program imports ``swift.megatron``, which needs Megatron-LM and is stood in for here."""
    import sys

    from plot_align.plugins.swift import use

    monkeypatch.setitem(sys.modules, "swift.megatron", sys)
    with pytest.raises(InputError, match=r"^the plug-in was read by swift's Megatron trainers, which split the head"):
        use(**PLOT)
