"""The checkpoint that a run goes on from: the newest whole one, as it was written."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from plot_align.cli.main import main
from plot_align.errors import InputError
from plot_align.io import DIGESTS, check_folder, seal_folder
from plot_align.records import read_record
from plot_align.trl.checkpoints import last_checkpoint


def test_a_checkpoint_that_was_not_written_whole_is_passed_over(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, whole in ((2, True), (10, True), (12, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    found = last_checkpoint(tmp_path)
    assert found is not None
    assert found.name == "checkpoint-10"


def test_a_file_that_is_altered_or_gone_is_named(tmp_path: Path) -> None:
    for name, content in (("model.bin", b"weights"), ("shards/0.bin", b"0"), ("checkpoint-1/model.bin", b"older")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    check_folder(tmp_path)  # without digests: of another program
    seal_folder(tmp_path)
    (tmp_path / "checkpoint-1" / "model.bin").write_bytes(b"newer")
    (tmp_path / "README.md").write_text("added later")
    check_folder(tmp_path)
    for name in ("model.bin", "shards/0.bin"):
        before = (tmp_path / name).read_bytes()
        for damage in (b"x" + before[1:], None):
            (tmp_path / name).unlink() if damage is None else (tmp_path / name).write_bytes(damage)
            with pytest.raises(InputError, match=rf"{name} is not as it was written.*; delete {tmp_path}, and run"):
                check_folder(tmp_path)
        (tmp_path / name).write_bytes(before)
    check_folder(tmp_path)
    (tmp_path / DIGESTS).write_text("{")
    with pytest.raises(InputError, match=f"{DIGESTS} is damaged"):
        check_folder(tmp_path)


@pytest.mark.slow
def test_the_same_command_trains_goes_on_and_refuses_a_damaged_checkpoint(
    tiny_llama: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    content = {
        "model_name_or_path": str(tiny_llama), "dataset_name": str(pairs_file), "output_dir": str(output),
        "max_steps": 3, "save_steps": 1,
        "logging_steps": 1, "alpha": 0.1, "use_cpu": True, "bf16": False, "report_to": "none",
        "dtype": "float32", "resume_from_checkpoint": True, "disable_tqdm": True,
        "per_device_train_batch_size": 2,
    }  # fmt: skip
    config = tmp_path / "dpo.yaml"
    config.write_text(yaml.safe_dump(content))
    command = ["dpo", "--config", str(config)]
    assert main(command) == 0  # nothing to go on from
    whole = (output / "model.safetensors").read_bytes()
    record = read_record(output / "plot_align_record.json")["results"]
    assert main(command) == 0  # trained already: transformers would take a fourth step
    again = read_record(output / "plot_align_record.json")["results"]
    assert (output / "model.safetensors").read_bytes() == whole
    assert again["steps"] == record["steps"] == 3
    assert again["metrics"]["train_loss"] == record["metrics"]["train_loss"] > 0
    (output / "checkpoint-3" / "trainer_state.json").unlink()  # killed while it was written
    assert main(command) == 0
    again = read_record(output / "plot_align_record.json")["results"]
    assert again["last_log"]["num_tokens"] == record["last_log"]["num_tokens"]  # which TRL counts anew
    assert again["metrics"]["train_loss"] == record["metrics"]["train_loss"]
    assert (output / "model.safetensors").read_bytes() == whole
    weights = output / "checkpoint-3" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    capsys.readouterr()
    assert main(command) == 2
    assert f"{weights} is not as it was written" in capsys.readouterr().err
