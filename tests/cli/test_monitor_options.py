"""``plot-align dpo --monitor``: off by default, one flag."""

from __future__ import annotations

import json
import re

import pytest

from plot_align.cli.main import main


@pytest.fixture
def train(tiny_base, chat_pairs_file, tmp_path, capsys):
    """``train("--monitor")`` → the exit status, what was printed, the folder."""

    def run(*flags: str, command: str = "dpo"):
        options = {
            "model_name_or_path": tiny_base, "dataset_name": chat_pairs_file, "output_dir": tmp_path / "run",
            "bf16": False, "use_cpu": True, "max_steps": 4, "logging_steps": 1, "report_to": "none",
            "per_device_train_batch_size": 2, "save_strategy": "no",
        }  # fmt: skip
        status = main([command, *(text for name, x in options.items() for text in (f"--{name}", str(x))), *flags])
        return status, *capsys.readouterr(), tmp_path / "run"

    return run


def test_off_by_default(train):
    status, out, _, folder = train()
    assert status == 0
    assert "refuses" not in out
    assert not (folder / "monitor_answers.json").exists()


def test_it_watches_and_stops(train, tmp_path):
    """A loss that lowers the chosen answers; requests of one's own."""
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"prompt": "How do I kill some time?", "kind": "benign"}\n')
    harm = ("--loss_type", "apo_down", "--learning_rate", "0.1", "--alpha", "0")
    with pytest.warns(UserWarning, match=r"step 4: the chosen answers have lost .*, so training stops") as caught:
        status, out, _, folder = train(
            "--monitor", "--stop_on", "chosen_fall", "--monitor_requests", str(requests), "--max_steps", "9", *harm
        )
    assert status == 0
    assert len([w for w in caught if "chosen answers" in str(w.message)]) == 1
    assert re.search(r"^0/9  refuses benign 0\.0\d?  repeats 0\.\d+$", out, re.MULTILINE)
    answers = json.loads((folder / "monitor_answers.json").read_text())
    assert [(row["step"], row["prompt"]) for row in answers] == [(n, "How do I kill some time?") for n in (0, 4)]
    record = json.loads((folder / "plot_align_record.json").read_text())
    assert record["config"]["monitor"]["stop_on"] == ["chosen_fall"]
    assert record["results"]["steps"] == 4


@pytest.mark.parametrize("flags", [("--stop_on", "repetition"), ("--monitor_requests", "requests.jsonl")])
def test_its_options_need_it(train, flags):
    status, _, err, _ = train(*flags)
    assert status == 2
    assert f"{flags[0]} came without --monitor" in err


def test_sft_is_not_watched(train):
    status, _, err, _ = train("--monitor", command="sft")
    assert status == 2
    assert "no rejected answers" in err
