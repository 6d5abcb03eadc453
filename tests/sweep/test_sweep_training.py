"""The user's own training as the run of a sweep: real processes, their records read back, their logs kept."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from plot_align.config import PlotConfig
from plot_align.errors import InputError, RunError
from plot_align.records import read_record, write_record
from plot_align.sweep import Cell, Job, expand, training
from plot_align.sweep.run import describe, run
from plot_align.sweep.training import Training, training_metrics

QUIET = Console(quiet=True)


@pytest.fixture
def content(tiny_llama: Path, pairs_file: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(tiny_llama),
        "datasets": [{"path": "json", "data_files": str(pairs_file)}],
        "test_split_size": 0.25,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 1,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "grad_ratio_steps": 0,
    }


@pytest.mark.slow
def test_every_run_is_a_process_and_its_record_is_read_back(content: dict[str, Any], tmp_path: Path) -> None:
    """Vanilla and PLOT; the term is in the losses that TRL reports, and the metrics leave it out."""
    config = tmp_path / "dpo.yaml"
    config.write_text(yaml.safe_dump(content))
    output = tmp_path / "out"
    workload = Training(output, config, content)
    jobs = vanilla, plot = expand({"alpha": [10.0], "seed": [3]}, base=workload.plot_options())
    run(jobs, workload, output, config={}, console=QUIET)
    for job, alpha in ((vanilla, 0.0), (plot, 10.0)):
        folder = next(p for p in (output / "runs").iterdir() if p.name == workload.record(job).stem)
        assert "model saved to" in (folder / "log.txt").read_text()
        own = read_record(folder / "plot_align_record.json", "dpo")
        assert (own["config"]["plot"]["alpha"], own["seed"]) == (alpha, 3)
        assert own["results"]["eval"]["step"] == 1
        metrics = workload.metrics(job)
        assert metrics["eval_loss"] == own["results"]["eval"]["eval_loss"]
        assert metrics["train_loss"] == own["results"]["metrics"]["train_loss"]
    with_plot, without = workload.metrics(plot), workload.metrics(vanilla)
    assert without["eval_loss_without_plot"] == without["eval_loss"]
    assert with_plot["eval_loss"] == pytest.approx(
        with_plot["eval_loss_without_plot"] + 10 * with_plot["eval_plot/loss"], rel=1e-2
    )
    cells = read_record(output / "summary.json", "sweep")["results"]["cells"]
    assert [cell["plot"] for cell in cells] == [None, {"alpha": 10.0}]
    assert cells[1]["minus_vanilla"]["eval_rewards/margins"]["value"] == pytest.approx(
        with_plot["eval_rewards/margins"] - without["eval_rewards/margins"]
    )
    assert (output / "eval_loss_without_plot.png").stat().st_size > 5_000
    assert "reward margin (evaluation) ↑" in (output / "table.md").read_text()


def test_the_baseline_trains_without_plot_whatever_schedule_the_file_has(tmp_path):
    """Its flags, over any schedule of the file, are options that are accepted and switch the term off."""
    workload = Training(tmp_path, Path("dpo.yaml"), {})
    flags = workload.command(expand({"alpha": [0.0]})[0])
    given = dict(zip(flags[6::2], flags[7::2], strict=True))
    for file in ({"alpha_schedule": "linear", "alpha": 1.0, "alpha_end": 0.5}, {"alpha_schedule": "balance"}):
        over = {name: given[f"--{name}"] for name in ("alpha", "alpha_schedule", "alpha_end")}
        over |= {"alpha": float(over["alpha"]), "alpha_end": float(over["alpha_end"])}
        assert PlotConfig.from_options(**{**file, **over}).is_off


def test_a_failed_run_is_reported_with_the_last_line_of_its_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The vanilla arm fails; PLOT's finishes with a record that another one wrote before."""
    workload = Training(tmp_path, Path("a.yaml"), {})
    vanilla, plot = jobs = expand({"alpha": [1.0]})
    template = write_record(tmp_path / "template.json", "dpo", {"eval": {"eval_loss": 0.5}}, config={})
    folder = tmp_path / "runs" / workload.record(plot).stem

    def command(job: Job) -> list[str]:
        if job == vanilla:
            return [
                sys.executable,
                "-c",
                "import sys; print('step 1'); sys.exit('plot-align: out of luck; buy more.')",
            ]
        copy = f"import shutil; shutil.copy({str(template)!r}, {str(folder / 'plot_align_record.json')!r})"
        return [sys.executable, "-c", copy]

    monkeypatch.setattr(workload, "command", command)
    with pytest.raises(RunError) as caught:
        run(jobs, workload, tmp_path, config={}, console=QUIET)
    log = tmp_path / "runs" / workload.record(vanilla).stem / "log.txt"
    assert str(caught.value).startswith(
        f"1 of 2 runs failed (dpo, without PLOT, seed 0); the first said: out of luck; buy more (its log is {log})."
    )
    assert "step 1" in log.read_text()
    assert not workload.record(vanilla).exists()
    (cell,) = read_record(tmp_path / "summary.json")["results"]["cells"]
    assert cell["plot"] == {"alpha": 1.0}
    assert cell["metrics"]["eval_loss"]["value"] == 0.5
    assert cell["minus_vanilla"] == {}


def test_the_command_of_a_job(tmp_path: Path) -> None:
    workload = Training(tmp_path, Path("dpo.yaml"), {})
    setting = (("loss_type", "sigmoid+sft"), ("steps", 5), ("batch_size", 2), ("learning_rate", 1e-05))
    job = Job(Cell("dpo", setting, (("alpha", 0.1), ("pool", True), ("norm_order", float("inf")))), 4)
    command = workload.command(job)
    assert command[1:6] == ["-m", "plot_align.cli", "dpo", "--config", "dpo.yaml"]
    assert command[6:-2] == [
        "--loss_type", "sigmoid", "sft", "--max_steps", "5", "--per_device_train_batch_size", "2",
        "--learning_rate", "1e-05", "--alpha", "0.1", "--pool", "true", "--norm_order", "inf", "--seed", "4",
    ]  # fmt: skip
    assert command[-2] == "--output_dir"
    assert workload.command(Job(Cell("sft"), 0))[6:8] == ["--alpha", "0.0"]


def test_the_commands_flags_are_understood_by_the_training_command(tmp_path: Path) -> None:
    """The oracle is the parser of ``plot-align dpo``."""
    from plot_align.cli import options

    setting = (("loss_type", "sigmoid+sft"), ("steps", 5), ("learning_rate", 1e-05), ("beta", 0.3), ("batch_size", 2))
    plot = (("alpha", 0.1), ("norm_order", float("inf")), ("scaled", False), ("granularity", "token"))
    flags = Training(tmp_path, Path("a.yaml"), {}).command(Job(Cell("dpo", setting, plot), 4))[6:]
    (_, training, *_, found, _), _ = options.parse(options.make_parser("dpo"), {"use_cpu": True}, flags, None)
    assert (training.loss_type, training.max_steps, training.seed) == (["sigmoid", "sft"], 5, 4)
    assert (training.learning_rate, training.beta, training.per_device_train_batch_size) == (1e-05, 0.3, 2)
    assert (found.alpha, found.granularity) == (0.1, "token")
    assert (found.ablations.norm_order, found.ablations.scaled) == (float("inf"), False)


def test_a_record_depends_on_the_training_file(tmp_path: Path) -> None:
    job = Job(Cell("dpo"), 0)
    names = {Training(tmp_path, Path("a.yaml"), {"learning_rate": rate}).record(job) for rate in (1e-5, 1e-6)}
    assert len(names) == 2


def test_a_record_depends_on_every_module_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit, a move and a new module each give another digest; what Python compiles does not."""
    package = tmp_path / "package"
    (package / "room").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "room" / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(training.plot_align, "__file__", str(package / "__init__.py"))

    def digest() -> str:
        training.source_digest.cache_clear()
        return training.source_digest()

    try:
        found = [digest()]
        (package / "a.pyc").write_bytes(b"compiled")
        assert digest() == found[0]
        (package / "room" / "a.py").write_text("x = 2\n")
        found.append(digest())
        (package / "room" / "a.py").rename(package / "a.py")
        found.append(digest())
        (package / "b.py").write_text("")
        found.append(digest())
        job = Job(Cell("dpo"), 0)
        record = Training(tmp_path, Path("a.yaml"), {}).record(job)
        (package / "b.py").unlink()
        digest()
        assert Training(tmp_path, Path("a.yaml"), {}).record(job) != record
    finally:
        training.source_digest.cache_clear()
    assert len(set(found)) == 4


def test_none_cannot_take_back_what_the_file_sets(tmp_path: Path) -> None:
    job = Job(Cell("dpo", (), (("alpha", None),)), 0)
    Training(tmp_path, Path("a.yaml"), {}).check([job])
    with pytest.raises(InputError, match=r"alpha is none in the grid, and a\.yaml sets it to 2"):
        Training(tmp_path, Path("a.yaml"), {"alpha": 2}).check([job])


def test_finished_runs_are_read_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each run copies a record that says how many there were before it."""
    workload = Training(tmp_path, Path("a.yaml"), {})
    jobs = expand({"alpha": [1.0, 2.0], "seed": [0, 1]})
    ran: list[Job] = []

    def train(worker: Any, job: Job) -> None:
        ran.append(job)
        write_record(workload.record(job), "sweep-run", {"eval": {"eval_loss": float(len(ran))}}, config={})

    monkeypatch.setattr(workload, "_train", train)
    run(jobs[:4], workload, tmp_path, config={}, console=QUIET)
    describe(jobs, workload, Console(width=200))
    out = capsys.readouterr().out
    assert "without PLOT: seeds 0* 1*\n" in out
    assert "6 runs, 4 finished (*), 2 to run" in out
    cells = run(jobs, workload, tmp_path, config={}, console=QUIET)
    assert ran == jobs
    assert [cell["metrics"]["eval_loss"]["value"] for cell in cells] == [2.5, 3.5, 4.5]  # (1 + 4) / 2 and so on
    assert [cell["minus_vanilla"].get("eval_loss", {}).get("value") for cell in cells] == [None, 1.0, 2.0]


def test_a_damaged_record_is_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    workload = Training(tmp_path, Path("a.yaml"), {})
    jobs = expand({"alpha": [1.0], "seed": [0]})
    ran: list[Job] = []

    def train(worker: Any, job: Job) -> None:
        ran.append(job)
        write_record(workload.record(job), "sweep-run", {"eval": {"eval_loss": 2.5}}, config={})

    monkeypatch.setattr(workload, "_train", train)
    run(jobs, workload, tmp_path, config={}, console=QUIET)
    for damage in (lambda text: text[:80], lambda text: text.replace("2.5", "7.5")):
        path = workload.record(jobs[1])
        path.write_text(damage(path.read_text()))
        ran.clear()
        cells = run(jobs, workload, tmp_path, config={}, console=QUIET)
        assert ran == [jobs[1]]
        assert [cell["metrics"]["eval_loss"]["value"] for cell in cells] == [2.5, 2.5]


def test_options_of_the_term_in_the_training_file(tmp_path: Path) -> None:
    workload = Training(tmp_path, Path("a.yaml"), {"alpha": "1e-1", "pool": True, "max_steps": 3})
    assert workload.plot_options() == {"alpha": 0.1, "pool": True}
    with pytest.raises(InputError, match="pool is on with granularity='token'"):
        expand({"granularity": ["token"]}, base=workload.plot_options())


def test_metrics_of_a_training_record() -> None:
    found = training_metrics(
        {
            "steps": 2,
            "last_log": {"loss": 0.9, "plot/vanilla_loss": 0.7, "step": 2},
            "metrics": {"train_loss": 1.0, "note": "text"},
            "eval": {"eval_loss": 0.8},
        }
    )
    assert found == {
        "loss": 0.9, "plot/vanilla_loss": 0.7, "step": 2.0, "train_loss": 1.0, "eval_loss": 0.8,
        "loss_without_plot": 0.7, "eval_loss_without_plot": 0.8,
    }  # fmt: skip
    assert "eval_loss_without_plot" not in training_metrics({"last_log": {"loss": 1.0}})
