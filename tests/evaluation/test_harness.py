"""lm-eval's tasks through :class:`LMEval`, held against ``lm_eval`` itself on the same checkpoint."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from plot_align.cli.main import main
from plot_align.errors import InputError, RunError
from plot_align.evaluation import harness, harness_tasks
from plot_align.evaluation.harness import LMEval
from plot_align.evaluation.subject import Found, Subject
from plot_align.records import read_record

lm_eval = pytest.importorskip("lm_eval")
ROWS = 12
BATCH = 4

_UTILS = """
import difflib
import os

def code_eval_may_run(doc, results):
    return {"acc": float(os.environ.get("HF_ALLOW_CODE_EVAL") == "1")}

def overlap(doc, results):
    return {"overlap": difflib.SequenceMatcher(None, doc["answer"], results[0]).ratio()}
"""
_TASKS = {
    "local_gsm8k": """
        include: {tasks}/gsm8k/gsm8k.yaml
        task: local_gsm8k
        tag: null
        dataset_path: json
        dataset_name: null
        dataset_kwargs: {{data_files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}}}
        num_fewshot: 1
        generation_kwargs: {{until: ["Question:"], do_sample: false, max_gen_toks: 16}}
    """,
    "overlap": """
        include: local_gsm8k.yaml
        task: overlap
        process_results: !function utils.overlap
        metric_list: [{{metric: overlap, aggregation: mean, higher_is_better: true}}]
        filter_list:
          - {{name: whole, filter: [{{function: take_first}}]}}
          - {{name: start, filter: [{{function: regex, regex_pattern: "^(.{{1,9}})"}}, {{function: take_first}}]}}
    """,
    "sums": """
        task: sums
        tag: [own_tag]
        dataset_path: json
        dataset_kwargs: {{data_files: {{test: {folder}/sums.jsonl}}}}
        output_type: multiple_choice
        test_split: test
        doc_to_text: "{{{{question}}}}"
        doc_to_choice: "{{{{choices}}}}"
        doc_to_target: gold
        metric_list:
          - {{metric: acc, aggregation: mean, higher_is_better: true}}
          - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
    """,
    "long_sums": """
        include: sums.yaml
        task: long_sums
        dataset_kwargs: {{data_files: {{test: {folder}/long_sums.jsonl}}}}
    """,
    "judged": """
        include: long_sums.yaml
        task: judged
        tag: null
        metric_list: [{{metric: brier_score, aggregation: brier_score, higher_is_better: false}}]
    """,
    "normed": """
        include: sums.yaml
        task: normed
        tag: null
        metric_list: [{{metric: acc_norm}}, {{metric: acc}}]
    """,
    "by_size": """
        group: by_size
        task: [sums, long_sums]
        aggregate_metric_list: [{{metric: acc, weight_by_size: true}}, {{metric: acc_norm, weight_by_size: true}}]
    """,
    "by_task": """
        group: by_task
        task: [few, {{group: inner, task: [many]}}]
        aggregate_metric_list: [{{metric: acc, weight_by_size: false}}]
    """,
    "few": "include: sums.yaml\ntask: few\ntag: null\n",
    "many": "include: long_sums.yaml\ntask: many\ntag: null\n",
    "prose": """
        task: prose
        dataset_path: json
        dataset_kwargs: {{data_files: {{test: {folder}/test.jsonl}}}}
        output_type: loglikelihood_rolling
        test_split: test
        doc_to_text: ""
        doc_to_target: "{{{{answer}}}}"
        metric_list:
          - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
          - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
    """,
    "marked": """
        include: sums.yaml
        task: marked
        tag: null
        unsafe_code: true
        process_results: !function utils.code_eval_may_run
    """,
    "unmarked": "include: sums.yaml\ntask: unmarked\ntag: null\nprocess_results: !function runs.run\n",
    "overriding": "group: overriding\ntask: [few, {{group: inner, task: [many], num_fewshot: 2}}]\nnum_fewshot: 1\n",
    "overridden": "group: overridden\ntask: [{{task: few, num_fewshot: 3}}, {{group: overriding, output_type: x}}]\n",
    "marked_group": "group: marked_group\ntask: [sums, {{task: marked, num_fewshot: 0}}]\n",
    "needy": "include: sums.yaml\ntask: needy\ntag: null\nprocess_docs: !function needs.process\n",
    "absent": "include: sums.yaml\ntask: absent\ntag: null\ndataset_kwargs: {{data_files: {folder}/no.jsonl}}\n",
}
_NEEDS = """
try:
    import absent_of_all
except ImportError as error:
    raise type(error)("install it") from error
try:
    import merely_faster
except ImportError:
    merely_faster = None
import langdetect_of_nobody.inner
"""


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory: pytest.TempPathFactory, real_data: Path) -> Path:
    """A folder with tasks: GSM8K's own YAML on local data, and small ones of every kind."""
    folder = tmp_path_factory.mktemp("tasks")
    with gzip.open(real_data / "gsm8k_test_200.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    _write(folder / "test.jsonl", rows[:ROWS])
    _write(folder / "train.jsonl", rows[100:120])
    _write(folder / "sums.jsonl", [_sum(i, i + 1) for i in range(11)])
    _write(folder / "long_sums.jsonl", [_sum(10 + i, 20 + 3 * i) for i in range(5)])
    tasks = Path(lm_eval.__file__).parent / "tasks"
    for name, text in _TASKS.items():
        lines = [line.removeprefix(" " * 8) for line in text.format(folder=folder, tasks=tasks).splitlines()]
        (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "utils.py").write_text(_UTILS, encoding="utf-8")
    (folder / "runs.py").write_text("def run(doc, results):\n    exec(doc['code'])\n", encoding="utf-8")
    (folder / "needs.py").write_text(_NEEDS, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights large enough that each prompt gets an answer of its own."""
    folder = tmp_path_factory.mktemp("checkpoint")
    shutil.copytree(tiny_base, folder, dirs_exist_ok=True)
    config = AutoConfig.from_pretrained(tiny_base, initializer_range=0.4, max_position_embeddings=1024)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def _sum(a: int, b: int) -> dict[str, Any]:
    return {"question": f"what is {a} plus {b} ?", "choices": [f"{a + b}", f"{a} and {b}", "no idea"], "gold": a % 3}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(autouse=True)
def _no_survey(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval asks pip, the compiler and the driver for their versions on every run: half a second."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture
def subject(checkpoint: Path, tmp_path: Path) -> Subject:
    return _subject(checkpoint, tmp_path)


def _subject(checkpoint: Path, folder: Path) -> Subject:
    return Subject(
        AutoModelForCausalLM.from_pretrained(checkpoint),
        AutoTokenizer.from_pretrained(checkpoint),
        name="tiny",
        source=str(checkpoint),
        folder=folder,
        batch_size=BATCH,
    )


@pytest.fixture(scope="module")
def reference(checkpoint: Path, own_tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``lm_eval`` itself finds, run as a user runs it."""
    folder = tmp_path_factory.mktemp("reference")
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={checkpoint}"]
    command += ["--tasks", "local_gsm8k,overlap,by_size,by_task,prose,judged", "--include_path", str(own_tasks)]
    command += ["--apply_chat_template", "--batch_size", str(BATCH), "--device", "cpu"]
    command += ["--output_path", str(folder), "--log_samples"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(next(folder.rglob("results_*.json")).read_text())
    found["samples"] = {
        name: [json.loads(line) for line in next(folder.rglob(f"samples_{name}_*.jsonl")).read_text().splitlines()]
        for name in found["configs"]
    }
    return found


def _sampled(reference: dict[str, Any], task: str, key: str) -> dict[str, Any]:
    """Document → value, from the files that ``lm_eval --log_samples`` writes."""
    metric, end = key.split(",")
    return {str(s["doc_id"]): s[metric] for s in reference["samples"][task] if s["filter"] == end}


def _run(task: str, own_tasks: Path, subject: Subject, **options: Any) -> Found:
    return LMEval(task, include_path=str(own_tasks), **options).run(subject)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["local_gsm8k", "overlap", "by_size", "by_task", "judged"])
def test_numbers_are_those_of_lm_eval_to_the_last_digit(
    task: str, reference: dict[str, Any], own_tasks: Path, subject: Subject
) -> None:
    theirs = {k: v for k, v in reference["results"][task].items() if "," in k and "_stderr" not in k}
    found = _run(task, own_tasks, subject)
    assert {key: quantity["value"] for key, quantity in found.quantities.items()} == theirs
    leaves = {"by_size": {"sums", "long_sums"}, "by_task": {"few", "many"}}
    assert found.details["tasks"].keys() == leaves.get(task, {task})
    for name, about in found.details["tasks"].items():
        assert about["version"] == reference["versions"][name]
        assert about["num_fewshot"] == reference["n-shot"][name]
        assert about["documents"] == about["of"] == len({sample["doc_id"] for sample in reference["samples"][name]})


@pytest.mark.slow
def test_the_command_gives_the_same_numbers(
    reference: dict[str, Any], own_tasks: Path, checkpoint: Path, tmp_path: Path
) -> None:
    asked = {
        task: {"kind": "lm_eval", "task": task, "include_path": str(own_tasks)} for task in ("local_gsm8k", "overlap")
    }
    (tmp_path / "suite.yaml").write_text(json.dumps({"mathematics": asked}), encoding="utf-8")
    arguments = ["evaluate", f"tiny={checkpoint}", "--suite", str(tmp_path / "suite.yaml"), "--device", "cpu"]
    assert main([*arguments, "--batch_size", str(BATCH), "--output", str(tmp_path / "out"), "--quiet"]) == 0
    for task in asked:
        record = read_record(tmp_path / "out" / "tiny" / f"{task}.json", "evaluation")
        for key, quantity in record["results"]["quantities"].items():
            assert quantity["value"] == reference["results"][task][key]


@pytest.mark.slow
def test_every_document_has_the_value_that_lm_eval_logs(
    reference: dict[str, Any], own_tasks: Path, subject: Subject
) -> None:
    quantities = _run("overlap", own_tasks, subject).quantities
    for key in ("overlap,start", "overlap,whole"):
        overlap = quantities[key]
        assert overlap["items"] == _sampled(reference, "overlap", key)
    assert quantities["overlap,start"]["items"] != overlap["items"]
    assert len(set(overlap["items"].values())) > ROWS / 2  # the answers differ, so equal numbers prove something
    assert overlap["bounds"] is None
    assert overlap["better"] == "higher"

    both = _run("by_size", own_tasks, subject).quantities["acc_norm,none"]
    assert both["items"] == {
        f"{task}/{doc}": value
        for task in ("sums", "long_sums")
        for doc, value in _sampled(reference, task, "acc_norm,none").items()
    }
    assert (both["n"], both["weights"], both["bounds"]) == (16, None, [0.0, 1.0])

    alike = _run("by_task", own_tasks, subject).quantities["acc,none"]
    assert alike["weights"] == {doc: 1 / 11 if doc.startswith("few/") else 1 / 5 for doc in alike["items"]}
    mean = np.average([*alike["items"].values()], weights=[*alike["weights"].values()])
    assert mean == pytest.approx(alike["value"], rel=1e-12)


@pytest.mark.slow
def test_perplexity_is_that_of_lm_eval_and_its_interval_that_of_scipy(
    reference: dict[str, Any], own_tasks: Path, subject: Subject
) -> None:
    found = _run("prose", own_tasks, subject).quantities
    assert list(found) == ["word_perplexity,none", "bits_per_byte,none"]
    for key, quantity in found.items():
        # Texts are read in other batches than lm-eval's, so that they can be kept: the padding rounds differently.
        assert quantity["value"] == pytest.approx(reference["results"]["prose"][key], rel=1e-4)
        assert (quantity["n"], quantity["items"], quantity["better"]) == (ROWS, None, "lower")
    sums, sizes = zip(*_sampled(reference, "prose", "bits_per_byte,none").values(), strict=True)
    expected = scipy.stats.bootstrap(
        (np.array(sums), np.array(sizes)), lambda a, b: -a.sum() / b.sum() / np.log(2), paired=True,
        vectorized=False, method="percentile", rng=np.random.default_rng(1), n_resamples=2000,
    ).confidence_interval  # fmt: skip
    width = expected.high - expected.low
    assert found["bits_per_byte,none"]["interval"] == pytest.approx(list(expected), abs=0.15 * width)


@pytest.mark.slow
def test_a_tag_counts_every_document_alike(reference: dict[str, Any], own_tasks: Path, subject: Subject) -> None:
    found = _run("own_tag", own_tasks, subject)
    values = [v for task in ("sums", "long_sums") for v in _sampled(reference, task, "acc,none").values()]
    assert found.quantities["acc,none"]["value"] == pytest.approx(sum(values) / 16)
    assert found.quantities["acc,none"]["n"] == 16


def test_the_score_is_the_metric_asked_for(own_tasks: Path, subject: Subject) -> None:
    first = _run("local_gsm8k", own_tasks, subject, limit=4, title="GSM8K").quantities
    assert list(first) == ["exact_match,strict-match", "exact_match,flexible-extract"]
    assert [entry["title"] for entry in first.values()] == ["GSM8K", "GSM8K, exact_match (flexible-extract)"]
    other = _run("local_gsm8k", own_tasks, subject, limit=4, metric="exact_match,flexible-extract").quantities
    assert list(other) == ["exact_match,flexible-extract", "exact_match,strict-match"]
    assert other["exact_match,flexible-extract"]["title"] == "local_gsm8k, exact_match (flexible-extract)"
    assert list(_run("by_size", own_tasks, subject, metric="acc_norm").quantities) == ["acc_norm,none", "acc,none"]
    assert list(_run("normed", own_tasks, subject).quantities) == [
        "acc_norm,none",
        "acc,none",
    ]  # lm-eval has acc first


def test_limit_is_a_number_or_a_share(own_tasks: Path, subject: Subject) -> None:
    for limit, n in ((3, 3), (0.25, 3)):
        found = _run("overlap", own_tasks, subject, limit=limit)
        assert found.quantities["overlap,whole"]["n"] == n
        assert found.details["tasks"]["overlap"]["of"] == ROWS


class Interrupted:
    """Counts the rows that a model is given, and interrupts it after so many calls."""

    def __init__(self, model: Any, method: str, after: int | None = None) -> None:
        self.rows, self.calls, self.after = 0, 0, after
        self.answer = getattr(model, method)
        setattr(model, method, self)

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self.calls == self.after:
            raise KeyboardInterrupt
        self.calls += 1
        self.rows += len(options["input_ids"] if "input_ids" in options else args[0])
        return self.answer(*args, **options)


@pytest.mark.parametrize(("task", "method"), [("overlap", "generate"), ("sums", "forward"), ("prose", "forward")])
def test_an_interrupted_task_goes_on_where_it_stopped(
    task: str, method: str, checkpoint: Path, own_tasks: Path, tmp_path: Path
) -> None:
    whole = _subject(checkpoint, tmp_path / "whole")
    once = Interrupted(whole.model, method)
    expected = _run(task, own_tasks, whole)

    first = _subject(checkpoint, tmp_path / "resumed")
    broken = Interrupted(first.model, method, after=2)
    with pytest.raises(KeyboardInterrupt):
        _run(task, own_tasks, first)
    second = _subject(checkpoint, tmp_path / "resumed")
    rest = Interrupted(second.model, method)
    assert _run(task, own_tasks, second) == expected
    assert 0 < broken.rows < once.rows
    assert broken.rows + rest.rows == once.rows

    again = _subject(checkpoint, tmp_path / "resumed")
    none = Interrupted(again.model, method)
    assert _run(task, own_tasks, again) == expected
    assert none.rows == 0


def test_answers_of_another_model_or_another_question_are_not_reused(
    checkpoint: Path, own_tasks: Path, tmp_path: Path
) -> None:
    def rows(change: Any = None, **options: Any) -> int:
        subject = _subject(checkpoint, tmp_path)
        if change:
            change(subject)
        counted = Interrupted(subject.model, "generate")
        _run("overlap", own_tasks, subject, **options)
        return counted.rows

    assert [rows(), rows()] == [ROWS, 0]
    assert rows(lambda s: s.model.model.norm.weight.data.mul_(1.1)) == ROWS
    assert rows(lambda s: setattr(s.model.generation_config, "repetition_penalty", 1.3)) == ROWS
    assert rows(apply_chat_template=False) == ROWS
    assert rows(gen_kwargs={"max_gen_toks": 5}) == ROWS
    assert rows(num_fewshot=2) == ROWS
    sampled = {"do_sample": True, "temperature": 1.0}
    assert [rows(gen_kwargs=sampled), rows(gen_kwargs=sampled)] == [ROWS, ROWS]


def test_sampling_follows_the_seed(checkpoint: Path, own_tasks: Path, tmp_path: Path) -> None:
    def items(seed: int) -> dict[str, float]:
        subject = _subject(checkpoint, tmp_path)
        subject.seed = seed
        options = {"do_sample": True, "temperature": 1.0}
        return _run("overlap", own_tasks, subject, gen_kwargs=options).quantities["overlap,whole"]["items"]

    assert items(1) == items(1) != items(2)


@pytest.mark.parametrize("after", [None, 1])
def test_the_subject_is_left_as_it_was(after: int | None, own_tasks: Path, subject: Subject) -> None:
    model, tokenizer = subject.model, subject.tokenizer
    model.train()
    tokenizer.padding_side, tokenizer.pad_token = "right", None
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    logger = logging.getLogger("lm_eval")
    handlers = list(logger.handlers), logger.propagate
    Interrupted(model, "generate", after)
    with contextlib.nullcontext() if after is None else pytest.raises(KeyboardInterrupt):
        _run("overlap", own_tasks, subject)
    assert model.training
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", None)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert (logger.handlers, logger.propagate) == handlers


def test_one_bar_counts_the_questions_and_nothing_is_printed(
    own_tasks: Path, subject: Subject, capfd: pytest.CaptureFixture[str]
) -> None:
    bars: list[list[Any]] = []

    def bar(description: str, total: int) -> Any:
        bars.append([description, total, 0])
        mine = bars[-1]
        return lambda done: mine.__setitem__(2, mine[2] + done)

    subject.bar = bar
    for task in ("overlap", "sums", "prose"):
        _run(task, own_tasks, subject)
    assert bars == [["overlap", ROWS, ROWS], ["sums", 33, 33], ["prose", ROWS, ROWS]]
    assert "it/s" not in capfd.readouterr().err


def test_what_lm_eval_warns_of_is_kept(own_tasks: Path, subject: Subject) -> None:
    subject.model.config.max_position_embeddings = 64
    found = _run("overlap", own_tasks, subject)
    assert any("Left truncation applied" in line and "(3 times)" in line for line in found.details["warnings"])


@pytest.mark.parametrize(
    "task", ["marked", "marked_group", "unmarked", "humaneval_instruct", "mbpp_plus", "cruxeval_input"]
)
def test_a_task_that_runs_programs_is_refused_without_the_flag(
    task: str, own_tasks: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")  # no substitute for the flag
    measure = LMEval(task, include_path=str(own_tasks))
    for refused in (measure.check, lambda: measure.run(subject)):
        with pytest.raises(InputError, match="--allow_code_execution"):
            refused()
    monkeypatch.setattr(harness, "missing_packages", lambda modules: [])
    LMEval(task, include_path=str(own_tasks), allow_code_execution=True).check()


def test_the_flag_opens_code_eval_for_the_run_only(
    own_tasks: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    found = _run("marked", own_tasks, subject, allow_code_execution=True)
    assert found.quantities["acc,none"]["value"] == 1.0
    assert "HF_ALLOW_CODE_EVAL" not in os.environ
    harmless = _run("few", own_tasks, subject)  # without the flag lm-eval and code_eval refuse, too
    assert harmless.quantities["acc,none"]["n"] == 11


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "local_gsm8"}, "task is 'local_gsm8', which lm-eval .* did you mean 'local_gsm8k'"),
        ({"task": "humaneval_instrct"}, "did you mean 'humaneval_instruct'"),
        (
            {"task": "sums", "metric": "acc_nrm"},
            "metric is 'acc_nrm', which sums does not have; did you mean 'acc_n",
        ),
        ({"task": "local_gsm8k", "metric": "exact_match,none"}, "does not have; did you mean 'exact_match,"),
        ({"task": "sums", "metric": "zzzz"}, "known are acc,none, acc_norm,none"),
        ({"task": "sums", "limit": 0}, "limit is 0, expected"),
        ({"task": "sums", "limit": 1.5}, "limit is 1.5, expected"),
        ({"task": "sums", "num_fewshot": -1}, "num_fewshot is -1, expected 0 or more"),
        ({"task": "ifeval", "num_fewshot": 2}, "num_fewshot is 2, but ifeval takes no examples"),
        ({"task": "sums", "gen_kwargs": {"max_gen_toks": 3}}, "sums, which generates nothing"),
        ({"task": "sums", "include_path": "nowhere"}, "include_path is nowhere, which is no folder"),
        ({"task": "needy"}, 'pip install "absent_of_all" "langdetect_of_nobody"$'),
    ],
)
def test_wrong_options_are_told_before_anything_is_loaded(
    options: dict[str, Any], message: str, own_tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if options["task"] == "ifeval":
        monkeypatch.setattr(harness, "missing_packages", lambda modules: [])
    with pytest.raises(InputError, match=message):
        LMEval(**{"include_path": str(own_tasks), **options}).check()


def test_lm_eval_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=re.escape('pip install "plot-align[eval]"')):
        LMEval("gsm8k").check()


@pytest.mark.parametrize(
    ("task", "packages"),
    [
        ("ifeval", ["immutabledict", "langdetect"]),
        ("longbench_dureader", ["fuzzywuzzy", "jieba", "rouge"]),
        ("minerva_math500", ["antlr4-python3-runtime", "math_verify"]),
        ("minerva_math", ["antlr4-python3-runtime", "math_verify"]),
    ],
)
def test_packages_of_a_task_are_named_as_pip_wants_them(
    task: str, packages: list[str], own_tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = {"langdetect", "immutabledict", "antlr4", "math_verify", "fuzzywuzzy", "jieba", "rouge"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else object())
    modules = harness_tasks.modules_of(harness_tasks.configs_of(task, str(own_tasks)))
    found = harness_tasks.missing_packages(modules)
    assert [re.split(r"[\[=>]", package)[0] for package in found] == packages


def test_a_metric_that_only_the_tasks_code_knows_is_missed_after_the_run(own_tasks: Path, subject: Subject) -> None:
    LMEval("overlap", metric="overlapp", include_path=str(own_tasks)).check()
    with pytest.raises(InputError, match="'overlapp', which overlap does not have; did you mean 'overlap,"):
        _run("overlap", own_tasks, subject, metric="overlapp", limit=2)


def test_data_that_cannot_be_loaded(own_tasks: Path, subject: Subject) -> None:
    with pytest.raises(RunError, match=r"absent cannot be loaded \(FileNotFoundError: .*check that its data"):
        _run("absent", own_tasks, subject)


def test_an_unreadable_file_of_ones_own_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness_tasks, "manager", lambda path: SimpleNamespace(task_index={}))
    (tmp_path / "mine.yaml").write_text("task: [mine\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"mine.yaml in include_path cannot be read"):
        LMEval("mine", include_path=str(tmp_path)).check()


@pytest.mark.parametrize(
    "name",
    [
        "mmlu_stem",
        "mmlu",
        "bbh_cot_fewshot",
        "by_task",
        "marked_group",
        "own_tag",
        "overriding",
        "overridden",
        "gsm8k",
    ],
)
def test_configurations_are_merged_as_lm_eval_merges_them(
    name: str, own_tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[dict[str, Any]] = []

    class Recorder:
        def __init__(self, config: dict[str, Any]) -> None:
            built.append(config)
            self.task_name = config["task"]

    monkeypatch.setattr("lm_eval.tasks._factory.ConfigurableTask", Recorder)
    manager = harness_tasks.manager(str(own_tasks))
    manager._factory.build(manager.task_index[name], registry=dict(manager.task_index))
    plain = ("task", "num_fewshot", "output_type", "unsafe_code", "dataset_path", "dataset_name")
    ours = harness_tasks.configs_of(name, str(own_tasks))
    assert [[c.get(key) for key in plain] for c in ours] == [[c.get(key) for key in plain] for c in built]


@given(st.text() | st.text().map("/".__add__))
def test_any_text_may_stand_in_a_configuration(text: str) -> None:
    assert harness_tasks.modules_of([{"task": "x", "doc_to_text": text, "filter_list": [{"name": text}]}]) == []


def test_a_damaged_file_of_answers_is_named(own_tasks: Path, subject: Subject) -> None:
    _run("few", own_tasks, subject, limit=1)
    (cache,) = (subject.folder / "lm_eval").glob("*.db")
    cache.write_bytes(b"no database at all" * 500)
    with pytest.raises(InputError, match=rf"{cache} cannot be read .*; delete it"):
        _run("few", own_tasks, subject, limit=1)
