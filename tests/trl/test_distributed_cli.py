"""``plot-align dpo --num_processes``: a rank that is killed, and going on with another number of ranks."""

from __future__ import annotations

import re
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from plot_align import parallel
from plot_align.cli import launch
from plot_align.cli.main import main
from plot_align.errors import InputError
from plot_align.preference.distribution import PreferenceDistribution
from plot_align.records import read_record

CONFIGS = Path(launch.__file__).parents[1] / "accelerate_configs"


def test_an_error_of_a_rank_is_one_sentence(capfd):
    with pytest.raises(InputError, match=r"^rank [01]: unknown option '--tokeniser'; did you mean '--tokenizer'\?$"):
        launch.with_processes("inspect", 2, ["--tokeniser", "nowhere"])
    assert "Traceback" not in (said := capfd.readouterr().err)
    assert "plot-align" not in said
    assert parallel.tell_launcher("nobody listens") is False


@pytest.mark.parametrize(("given", "expected"), [(None, None), (1, None)])
def test_one_process_is_not_launched(given, expected):
    assert launch.with_processes("estimate", given, []) is expected


def test_no_processes():
    with pytest.raises(InputError, match="--num_processes is 0, expected 1 or more"):
        launch.with_processes("estimate", 0, [])


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("ddp", "MULTI_GPU", {}),
        ("fsdp2", "FSDP", {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}),
        ("zero2", "DEEPSPEED", {"zero_stage": 2, "zero3_init_flag": False}),
        ("zero3", "DEEPSPEED", {"zero_stage": 3, "zero3_init_flag": True, "zero3_save_16bit_model": True}),
    ],
)
def test_shipped_configurations(name, kind, expected):
    """accelerate's own loader and validation read them, and the launcher's options become what they say."""
    from accelerate.commands.config import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    path = str(CONFIGS / f"{name}.yaml")
    assert load_config_from_file(path).distributed_type == kind
    arguments = launch.Launch({}, ["--accelerate_config", name, "--num_processes", "2"]).arguments()
    assert arguments[:2] == ["--config_file", path]
    options, *_ = _validate_launch_command(launch_command_parser().parse_args([*arguments, "script.py"]))
    assert (options.multi_gpu, options.use_fsdp, options.use_deepspeed) == (
        kind == "MULTI_GPU", kind == "FSDP", kind == "DEEPSPEED",
    )  # fmt: skip
    assert options.num_processes == 2
    assert {key: getattr(options, key) for key in expected} == expected


def kill_a_rank(after: Path) -> None:
    """SIGKILL for the second process that this one started, once the file is there."""
    deadline = time.monotonic() + 200
    while not after.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    for child in psutil.Process().children(recursive=True):
        if child.environ().get("RANK") == "1":
            child.send_signal(signal.SIGKILL)
            return


@pytest.mark.slow
def test_killed_and_resumed_on_another_number_of_ranks(tmp_path, tiny_llama, pairs_file, monkeypatch, capfd):
    """Two ranks, killed, go on as one; one goes on as two: the weights and α of one process that was never stopped.
    The norms that balance α are exact at this size, and the state of their averages is in the checkpoint."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(launch, "launches_by_default", lambda: False)

    def train(name: str, ranks: int, *options: object) -> tuple[int, list[str]]:
        shared = {
            "model_name_or_path": tiny_llama, "dataset_name": pairs_file, "output_dir": tmp_path / name, "pool": True,
            "per_device_train_batch_size": 2 // ranks, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 1e9,
            "lr_scheduler_type": "constant", "save_steps": 2, "logging_steps": 1, "bf16": False, "use_cpu": True,
            "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True, "seed": 3,
        }  # fmt: skip
        flags = [text for key, value in shared.items() for text in (f"--{key}", str(value))]
        if ranks > 1:
            flags += ["--num_processes", str(ranks)]
        capfd.readouterr()
        code = main(["dpo", *flags, *map(str, options)])
        return code, capfd.readouterr().err.splitlines()

    killer = threading.Thread(target=kill_a_rank, args=(tmp_path / "two" / "checkpoint-4" / "trainer_state.json",))
    killer.start()
    begun = time.monotonic()
    code, said = train("two", 2, "--max_steps", 5000)
    killer.join()
    assert code == 1
    assert time.monotonic() - begun < 200
    found = re.fullmatch(
        r"plot-align: rank 1 was killed by SIGKILL, perhaps because memory ran out, and the other ranks were stopped; "
        rf"go on with --resume_from_checkpoint {re.escape(str(tmp_path))}/two/checkpoint-(\d+), .*",
        said[-1],
    )
    assert found, said[-5:]
    assert int(found[1]) >= 4
    assert not any("Traceback" in line for line in said)

    def checkpoint(name: str) -> str:
        return str(tmp_path / name / "checkpoint-4")

    assert train("one", 1, "--max_steps", 8)[0] == 0
    whole = load_file(tmp_path / "one" / "model.safetensors")
    alphas = logged(tmp_path / "one", "plot/alpha")
    assert len(set(alphas)) == 8
    for name, ranks, source in (("as_one", 1, "two"), ("as_two", 2, "one")):
        assert train(name, ranks, "--max_steps", 8, "--resume_from_checkpoint", checkpoint(source))[0] == 0
        for parameter, tensor in load_file(tmp_path / name / "model.safetensors").items():
            torch.testing.assert_close(tensor, whole[parameter], rtol=0, atol=2e-6)
        assert logged(tmp_path / name, "plot/alpha") == pytest.approx(alphas, rel=1e-4)
    counts = [
        PreferenceDistribution.load(folder / "preference.safetensors")
        for folder in (tmp_path / "one", tmp_path / "as_two", Path(checkpoint("two")))
    ]
    for other in counts[1:]:
        assert torch.equal(other.chosen_counts, counts[0].chosen_counts)
        assert torch.equal(other.rejected_counts, counts[0].rejected_counts)


def logged(folder: Path, key: str) -> list[float]:
    record = read_record(folder / "plot_align_record.json")
    return [entry[key] for entry in record["results"]["history"] if key in entry]
