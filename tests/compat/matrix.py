"""What differs between TRLs: where the term works, what is refused, a short training. Run by ``run.py``, not with the
suite: in the tested environment other tests show the same."""

from __future__ import annotations

from importlib.metadata import version
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType
from packaging.version import Version

from environments import METHODS, expected
from plot_align.cli.main import main
from plot_align.config import PlotConfig
from plot_align.errors import InputError
from plot_align.trl import attach
from plot_align.trl.backends import FusedBackend, LogitsBackend, own_pass
from plot_align.trl.batches import SUPPORTED, trainer_kind
from plot_align.trl.checks import check
from plot_align.trl.choice import backend_for

TRL = Version(version("trl"))
PACKAGES = ("trl", "transformers", "datasets", "accelerate", "peft", "huggingface_hub", "tokenizers", "torch")


def test_versions(record_property):
    for name in PACKAGES:
        record_property(name, version(name))


@pytest.mark.parametrize("method", METHODS)
def test_where_the_term_works(make_trainer, preference, method, record_property):
    try:
        trainer = make_trainer(method)
        backend = attach(trainer, preference)._backend
    except InputError as error:
        record_property("refused", str(error))
        found = "refused"
    else:
        found = own_pass(trainer_kind(trainer), getattr(trainer.args, "loss_type", None))
        assert type(backend) is (LogitsBackend if found == "logits" else FusedBackend)
    record_property("found", found)
    assert found == expected(method, TRL)
    kind = next(kind for kind in SUPPORTED if kind.lower() == f"{method}trainer")
    assert backend_for(kind)[0] == ("none" if found == "refused" else found)  # what `plot-align doctor` says


def refusal(trainer, preference, record_property, config=None):
    with pytest.raises(InputError) as caught:
        attach(trainer, preference, config)
    record_property("refused", str(caught.value))
    return str(caught.value)


@pytest.mark.skipif(Version("1.15") <= TRL, reason="the fused head stands in its place")
@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_liger_is_refused(make_trainer, preference, method, record_property):
    """The switches that its losses are turned on by, since the package is not needed to refuse it."""
    trainer = make_trainer(method)
    if method == "sft" and trainer.args.loss_type == "chunked_nll":
        pytest.skip("TRL itself refuses the two together")
    if method == "sft":
        trainer.args.use_liger_kernel = True
    elif hasattr(trainer, "get_batch_loss_metrics"):
        trainer.dpo_loss_fn = object()  # TRL before 0.29: what use_liger_loss, later use_liger_kernel, makes
    else:
        trainer.use_liger_kernel = True
    assert "Liger's fused loss is on" in refusal(trainer, preference, record_property)


@pytest.mark.skipif(Version("0.29") <= TRL, reason="TRL turns it off by itself")
def test_pairs_without_padding_are_refused(make_trainer, preference, record_property):
    trainer = make_trainer("dpo", padding_free=True)
    assert "padding_free" in refusal(trainer, preference, record_property)


def test_packing_that_forgets_where_a_row_ends_is_refused(make_trainer, preference, record_property):
    trainer = make_trainer("sft")
    trainer.args.packing, trainer.args.packing_strategy = True, "wrapped"
    assert "packing" in refusal(trainer, preference, record_property, PlotConfig(granularity="sequence"))


def test_megatron_is_refused(make_trainer, record_property):
    accelerator = SimpleNamespace(num_processes=1, distributed_type=DistributedType.MEGATRON_LM)
    trainer = SimpleNamespace(args=make_trainer("dpo").args, accelerator=accelerator)
    with pytest.raises(InputError, match="Megatron-LM") as caught:
        check(trainer, "DPOTrainer", PlotConfig())
    record_property("refused", str(caught.value))


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_a_short_training(make_trainer, preference, tmp_path, method, record_property):
    """Twelve steps, an evaluation, and what is saved."""
    trainer = make_trainer(method, max_steps=12, learning_rate=3e-3)
    attach(trainer, preference)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "plot/loss" in entry]
    assert len(logged) == 12
    assert logged[-1]["plot/vanilla_loss"] < 0.95 * logged[0]["plot/vanilla_loss"]
    assert all(entry["plot/alpha"] > 0 for entry in logged)
    record_property("vanilla", logged[-1]["plot/vanilla_loss"])
    record_property("term", logged[-1]["plot/loss"])
    trainer.evaluate(trainer.train_dataset.select(range(4)))
    assert trainer.state.log_history[-1]["eval_plot/loss"] > 0
    trainer.save_model()
    assert "## PLOT" in (tmp_path / method / "README.md").read_text()
    assert (tmp_path / method / "plot_align.json").exists()


def test_the_commands(tiny_llama, pairs_file, tmp_path):
    """``estimate``, and ``sft`` on what it wrote; ``dpo`` is compared with ``attach`` elsewhere."""
    counted = str(tmp_path / "preference.safetensors")
    assert main(["estimate", str(pairs_file), "--tokenizer", str(tiny_llama), "--output", counted]) == 0
    good = tmp_path / "good.jsonl"
    good.write_text(pairs_file.read_text().replace('"chosen"', '"completion"').replace('"rejected"', '"other"'))
    options = {
        "model_name_or_path": tiny_llama, "dataset_name": good, "output_dir": tmp_path / "sft", "preference": counted,
        "bf16": False, "use_cpu": True, "max_steps": 2, "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    assert main(["sft", *(text for name, value in options.items() for text in (f"--{name}", str(value)))]) == 0
    assert (tmp_path / "sft" / "plot_align_record.json").exists()
